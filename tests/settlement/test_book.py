"""The evidence book refuses what no honest site sends, and stays as it was."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedinfer_flower.errors import (
    BindingError,
    ConfigError,
    EnvelopeError,
    IncompatibleProtection,
    InvalidCiphertextError,
    InvalidScoresError,
    ProtectionRefusedError,
    ProtocolError,
    ReplayError,
    SettlementError,
    ShapeError,
    SizeLimitError,
)
from fedinfer_flower.privacy.base import PROTECTIONS, make_protection
from fedinfer_flower.settlement import (
    EvidenceBook,
    EvidenceForm,
    SettlementKeys,
    agreed_form,
    evidence_form,
    site_evidence,
)
from fedinfer_flower.settlement.ckks_rows import (
    CIPHERTEXT_BYTES,
    add_rows,
    encrypt_rows,
    open_totals,
    payload_bytes,
)
from fedinfer_flower.settlement.ring import ONE, encode_rows
from fedinfer_flower.wire.identity import Identity

SITE = "a" * 64
ROWS = np.array([[0.25, 0.75], [1.0, 0.0]])


def evidence(form, rows=ROWS, *, keys=None):
    return site_evidence(
        form,
        rows,
        querier=Identity.generate().public,
        evidence_key=b"" if keys is None else keys.public_key,
        identity=Identity.generate(),
        query_id="q-0",
    )


def add(book, payload, **changes):
    given = {"n_queries": 2, "n_classes": 2, **changes}
    book.add(given.pop("query_id", "q-0"), given.pop("key_id", SITE), payload, **given)


# -- which form is legal -------------------------------------------------------------------

LEGAL = {
    ("plain", False): EvidenceForm.CLEAR,
    ("plain", True): EvidenceForm.SHARES,
    ("secagg", True): EvidenceForm.SHARES,
    ("he", True): EvidenceForm.SHARES,
}


@pytest.mark.parametrize("sealed", [False, True])
@pytest.mark.parametrize("name", PROTECTIONS.names())
def test_form_is_given_where_it_is_legal_and_refused_elsewhere(name, sealed):
    options = {"epsilon": 1.0, "delta": 1e-6} if "dp" in name else {}
    protection = make_protection(name, options)
    if (name, sealed) in LEGAL:
        assert evidence_form(protection, sealed=sealed) is LEGAL[name, sealed]
        return

    with pytest.raises(IncompatibleProtection) as refused:
        evidence_form(protection, sealed=sealed)

    assert refused.value.code == "FI203"
    assert refused.value.hint
    assert ("noise" in refused.value.message) == ("dp" in name)


@pytest.mark.parametrize("asked", ["clear", "shares", "ckks"])
@pytest.mark.parametrize("name", ["plain", "secagg", "he"])
def test_site_gives_evidence_in_the_legal_form_only(name, asked):
    protection = make_protection(name)
    if LEGAL[name, True].value == asked or (name, asked) == ("he", "ckks"):
        assert agreed_form(asked, protection, sealed=True).value == asked
        return

    with pytest.raises(ProtectionRefusedError):
        agreed_form(asked, protection, sealed=True)


def test_ckks_is_for_sealed_he_that_wants_it():
    he = make_protection("he")
    assert evidence_form(he, sealed=True, wanted="ckks") is EvidenceForm.CKKS
    for name, sealed in (("secagg", True), ("plain", True), ("plain", False), ("he", False)):
        with pytest.raises(IncompatibleProtection):
            evidence_form(make_protection(name), sealed=sealed, wanted="ckks")


def test_unknown_form_is_refused():
    with pytest.raises(EnvelopeError):
        agreed_form("open", make_protection("plain"), sealed=False)
    with pytest.raises(IncompatibleProtection):
        agreed_form("clear", make_protection("secagg"), sealed=False)


# -- what a site may send ------------------------------------------------------------------


@pytest.mark.parametrize(
    "rows",
    [
        np.array([[np.nan, 1.0]]),
        np.array([[np.inf, 0.0]]),
        np.array([[1.5, -0.5]]),
        np.array([[0.5, 0.4]]),
        np.array([[1e308, 1e308]]),
    ],
)
@pytest.mark.parametrize("form", [EvidenceForm.CLEAR, EvidenceForm.SHARES])
def test_site_does_not_send_what_is_no_distribution(form, rows):
    with pytest.raises(InvalidScoresError):
        evidence(form, rows)


@pytest.mark.parametrize("shape", [(0, 2), (2, 0), (2,), (1, 2, 2)])
def test_site_does_not_send_other_shapes(shape):
    with pytest.raises(ShapeError):
        evidence(EvidenceForm.CLEAR, np.zeros(shape))


def test_shares_need_keys():
    with pytest.raises(ConfigError):
        site_evidence(
            EvidenceForm.SHARES, ROWS, querier=None, evidence_key=b"", identity=None, query_id="q"
        )


@given(
    st.lists(
        st.lists(st.floats(0.0, 1.0), min_size=3, max_size=3).filter(lambda row: sum(row) > 0.01),
        min_size=1,
        max_size=5,
    )
)
def test_codec_error_is_at_most_half_a_step(raw):
    rows = np.array(raw)
    rows /= rows.sum(axis=1, keepdims=True)

    assert np.abs(encode_rows(rows) / ONE - rows).max() <= 0.5 / ONE


# -- what the coordinator takes ------------------------------------------------------------


@pytest.mark.parametrize("form", [EvidenceForm.CLEAR, EvidenceForm.SHARES])
@pytest.mark.parametrize("change", ["empty", "short", "long", "other shape"])
def test_evidence_of_another_size_is_refused_and_leaves_no_trace(form, change):
    book, payload = EvidenceBook(form), evidence(form)
    altered = {"empty": b"", "short": payload[:-1], "long": payload + b"x"}.get(change, payload)
    n_queries = 3 if change == "other shape" else 2

    with pytest.raises(ShapeError):
        add(book, altered, n_queries=n_queries)

    assert book.query_ids == ()
    add(book, payload)


def test_clear_evidence_that_is_no_distribution_is_refused():
    book = EvidenceBook(EvidenceForm.CLEAR)
    for rows in ([[ONE + 1, 0], [ONE, 0]], [[0, 0], [ONE, 0]], [[ONE, ONE], [ONE, 0]]):
        with pytest.raises(InvalidScoresError):
            add(book, np.array(rows, dtype="<u8").tobytes())
    with pytest.raises(InvalidScoresError):
        add(book, b"\xff" * 32)


@given(st.binary(max_size=64))
def test_random_bytes_are_refused_typed_or_a_distribution(raw):
    book = EvidenceBook(EvidenceForm.CLEAR)
    try:
        add(book, raw)
    except ProtocolError:
        assert book.query_ids == ()


def test_second_copy_and_second_shape_are_refused():
    book, payload = EvidenceBook(EvidenceForm.CLEAR), evidence(EvidenceForm.CLEAR)
    add(book, payload)

    with pytest.raises(ReplayError):
        add(book, payload)
    with pytest.raises(ShapeError):
        add(book, evidence(EvidenceForm.CLEAR, ROWS[:1]), n_queries=1, key_id="b" * 64)


def test_book_is_bounded():
    payload = evidence(EvidenceForm.CLEAR)
    book = EvidenceBook(EvidenceForm.CLEAR, max_bytes=len(payload))
    add(book, payload)

    with pytest.raises(SizeLimitError):
        add(book, payload, key_id="b" * 64)
    other = EvidenceBook(EvidenceForm.CLEAR)
    add(other, payload, query_id="q-1")
    with pytest.raises(SizeLimitError):
        book.merge(other)


def test_books_of_one_epoch_merge():
    book, other = EvidenceBook(EvidenceForm.CLEAR), EvidenceBook(EvidenceForm.CLEAR)
    add(book, evidence(EvidenceForm.CLEAR))
    add(other, evidence(EvidenceForm.CLEAR), query_id="q-1")

    book.merge(other)

    assert book.query_ids == ("q-0", "q-1")
    with pytest.raises(ReplayError):
        book.merge(other)
    with pytest.raises(SettlementError):
        book.merge(EvidenceBook(EvidenceForm.SHARES))


# -- ckks ----------------------------------------------------------------------------------


def test_encrypted_evidence_adds_up_and_has_the_stated_size(settlement_keys):
    rng = np.random.default_rng(0)
    rows = rng.dirichlet(np.ones(10), size=(3, 120))
    payloads = [encrypt_rows(settlement_keys.public_key, one) for one in rows]
    assert {len(p) for p in payloads} == {payload_bytes(120, 10)}

    total = add_rows(settlement_keys.public_key, payloads)
    opened = open_totals(settlement_keys, total, n_queries=120, n_classes=10)

    # The deviation is 7e-4 a site, with long tails: of 60 keys with 1,200 entries each the
    # largest error was 10 deviations.
    error = opened - rows.sum(axis=0)
    assert error.std() < 1.5 * 7e-4 * np.sqrt(3)
    assert np.abs(error).max() < 25 * 7e-4 * np.sqrt(3)


@pytest.mark.parametrize("change", ["empty", "short", "long", "residue", "transparent"])
def test_malformed_ciphertexts_stop_at_the_gate(change, settlement_keys):
    payload = evidence(EvidenceForm.CKKS, keys=settlement_keys)
    altered = {
        "empty": b"",
        "short": payload[:-1],
        "long": payload + b"x",
        "residue": payload[:32] + b"\xff" * 5 + payload[37:],
        "transparent": payload[:32] + bytes(CIPHERTEXT_BYTES),
    }[change]
    book = EvidenceBook(EvidenceForm.CKKS)

    with pytest.raises((ShapeError, InvalidCiphertextError)):
        add(book, altered)

    assert book.query_ids == ()


def test_evidence_under_another_key_is_refused(settlement_keys):
    other = SettlementKeys.make()
    payload = evidence(EvidenceForm.CKKS, keys=other)

    with pytest.raises(BindingError):
        add_rows(settlement_keys.public_key, [payload])
    with pytest.raises(ProtocolError):
        evidence(EvidenceForm.CKKS)
    with pytest.raises(ProtectionRefusedError):
        encrypt_rows(other.secret_key, ROWS)


def test_secret_key_is_not_shown(settlement_keys):
    assert repr(settlement_keys) == "SettlementKeys()"
