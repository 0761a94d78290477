"""What one site signs: one byte form, strict reading, and no field that can be changed."""

from __future__ import annotations

import dataclasses
import json
from types import MappingProxyType

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedinfer_flower.errors import (
    EnvelopeError,
    InvalidValueError,
    ProtocolError,
    SignatureError,
    SizeLimitError,
    UnsupportedVersionError,
)
from fedinfer_flower.privacy.charge import Charge
from fedinfer_flower.receipts.statement import (
    MAX_STATEMENT_BYTES,
    SignedStatement,
    SiteStatement,
    cohort_digest,
)
from fedinfer_flower.wire.identity import Identity

from .conftest import make_statement

SITE = Identity.generate()
OTHER = Identity.generate()
STATEMENT = make_statement(SITE, site="north", keys=[SITE.key_id, OTHER.key_id])
SCALARS = st.text(max_size=9) | st.booleans() | st.integers(-(2**53), 2**53)
OPTIONS = st.dictionaries(st.text(max_size=9), SCALARS | st.floats(-1e300, 1e300), max_size=4)
HEX = st.binary(min_size=32, max_size=32).map(bytes.hex)
DELTAS = st.floats(0.0, 0.999)
CLAIMS = st.none() | st.tuples(st.floats(0.0, 1e6), DELTAS)

OTHER_VALUE = {
    "query_id": "job-9",
    "run_id": 8,
    "site": "south",
    "site_key_id": OTHER.key_id,
    "querier_key_id": "",
    "session_key_id": "",
    "query_sealed": False,
    "protection": "plain",
    "protection_options": {"mechanism": "gaussian", "epsilon": 1.5, "delta": 1e-5},
    "rule": "majority-vote",
    "rule_options": {},
    "n_rows": 5,
    "n_fresh_rows": 3,
    "n_sites_asked": 3,
    "cohort_digest": "0" * 64,
    "min_cohort": 1,
    "epsilon": 0.5,
    "delta": 1e-6,
    "charge": Charge.gaussian(0.1, 4),
    "profile_commitment": "0" * 64,
    "model_digest": "",
    "record_epsilon": 1.0,
    "record_delta": 1e-9,
    "payload_digest": "1" * 64,
    "evidence": "shares",
    "issued_at": 1_899_999_999,
}


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    protection_options=OPTIONS,
    rule_options=OPTIONS,
    site=st.text(min_size=1, max_size=128).filter(str.isprintable),
    claim=CLAIMS,
    mu=st.floats(1e-6, 100.0),
    delta=DELTAS,
    epsilon=st.floats(1e-9, 1e9),
    payload_digest=HEX,
    issued_at=st.integers(0, 2**40),
    run_id=st.integers(0, 2**64 - 1),
    sealed=st.booleans(),
)
def test_statement_after_a_round_trip_is_the_same(
    protection_options,
    rule_options,
    site,
    claim,
    mu,
    delta,
    epsilon,
    payload_digest,
    issued_at,
    run_id,
    sealed,
):
    statement = dataclasses.replace(
        STATEMENT,
        protection_options=protection_options,
        rule_options=rule_options,
        site=site,
        record_epsilon=None if claim is None else claim[0],
        record_delta=None if claim is None else claim[1],
        charge=Charge.gaussian(mu, STATEMENT.n_fresh_rows),
        delta=delta,
        epsilon=epsilon,
        payload_digest=payload_digest,
        issued_at=issued_at,
        run_id=run_id,
        query_sealed=sealed,
    )

    signed = SignedStatement.from_bytes(statement.sign(SITE).to_bytes())

    assert signed.statement == statement
    assert SiteStatement.from_bytes(statement.to_bytes()) == statement
    signed.verify()


def test_table_of_other_values_has_every_field():
    assert OTHER_VALUE.keys() == {spec.name for spec in dataclasses.fields(SiteStatement)}


@pytest.mark.parametrize("name", OTHER_VALUE)
def test_statement_with_one_field_changed_has_no_valid_signature(name):
    signed = STATEMENT.sign(SITE)
    changes = {name: OTHER_VALUE[name]}
    if name == "n_fresh_rows":
        changes["charge"] = Charge.gaussian(0.2, 3)

    changed = dataclasses.replace(STATEMENT, **changes)

    assert changed != STATEMENT
    with pytest.raises(SignatureError):
        dataclasses.replace(signed, statement=changed).verify()


def test_signature_by_another_key_does_not_verify():
    forged = dataclasses.replace(STATEMENT, site_key_id=OTHER.key_id).sign(OTHER)
    with pytest.raises(SignatureError):
        dataclasses.replace(forged, statement=STATEMENT).verify()
    with pytest.raises(SignatureError):
        dataclasses.replace(forged, statement=STATEMENT, signer=SITE.public).verify()


def test_signature_made_for_another_purpose_does_not_verify():
    signature = SITE.sign("receipt", STATEMENT.to_bytes())
    with pytest.raises(SignatureError):
        SignedStatement(statement=STATEMENT, signer=SITE.public, signature=signature).verify()


def test_site_signs_only_with_the_key_that_it_names():
    with pytest.raises(InvalidValueError, match="site_key_id"):
        STATEMENT.sign(OTHER)


def test_canonical_bytes_do_not_depend_on_order_or_on_how_a_number_was_given():
    shuffled = dict(reversed(STATEMENT.protection_options.items()))
    charge = STATEMENT.charge
    same = dataclasses.replace(
        STATEMENT,
        protection_options=shuffled,
        record_epsilon=8,
        charge=dataclasses.replace(charge, rho=0, mu_squared=charge.mu_squared),
    )
    assert same.to_bytes() == STATEMENT.to_bytes()
    assert dataclasses.replace(STATEMENT, record_epsilon=-0.0).to_bytes() == (
        dataclasses.replace(STATEMENT, record_epsilon=0.0).to_bytes()
    )


def test_options_of_a_statement_cannot_be_changed_from_outside():
    options = {"epsilon": 1.0}
    statement = dataclasses.replace(STATEMENT, protection_options=options)
    options["epsilon"] = 99.0
    assert statement.protection_options == {"epsilon": 1.0}
    assert isinstance(statement.protection_options, MappingProxyType)


@pytest.mark.parametrize(
    "damage",
    [
        lambda data: data + b" ",
        lambda data: data.replace(b'","', b'", "', 1),
        lambda data: data.replace(b'"run_id":7', b'"run_id":7.0'),
        lambda data: data.replace(b'"rho":0.0', b'"rho":0'),
        lambda data: data.replace(b'"rho":0.0', b'"rho":NaN'),
        lambda data: data.replace(b'"rho":0.0', b'"rho":-0.0'),
        lambda data: data.replace(b'"run_id":7', b'"run_id":7,"run_id":7'),
        lambda data: data.replace(b'"run_id":7,', b""),
        lambda data: data.replace(b'"run_id":7', b'"run_id":7,"unknown":1'),
        lambda data: data.replace(b'"run_id":7', b'"run_id":' + b"7" * 5000),
        lambda data: data.replace(b'"rho":0.0', b'"rho":' + b"7" * 400),
        lambda data: data.replace(b'"north"', b'"north\\ud800"'),
        lambda data: data.replace(b'"north"', b'"north\\u001b"'),
        lambda data: b"[" * 50_000,
        lambda data: b"[]",
        lambda data: b"",
        lambda data: b"\xff" + data,
        lambda data: data.decode().encode("utf-16"),
    ],
)
def test_bytes_that_are_not_the_canonical_ones_are_refused(damage):
    data = STATEMENT.to_bytes()
    assert damage(data) != data
    with pytest.raises(EnvelopeError):
        SiteStatement.from_bytes(damage(data))


def test_random_damage_raises_only_typed_errors_or_changes_the_statement():
    data = STATEMENT.sign(SITE).to_bytes()
    for place in range(0, len(data), 3):
        damaged = data[:place] + bytes([data[place] ^ 1]) + data[place + 1 :]
        with pytest.raises(ProtocolError):
            SignedStatement.from_bytes(damaged).verify()


def test_statement_that_is_too_long_is_neither_written_nor_read():
    options = {f"{i:064d}": "\U0001f600" * 256 for i in range(32)}
    statement = dataclasses.replace(STATEMENT, rule_options=options)
    with pytest.raises(SizeLimitError):
        statement.to_bytes()
    with pytest.raises(SizeLimitError):
        SiteStatement.from_bytes(b" " * (MAX_STATEMENT_BYTES + 1))


def test_statement_of_another_version_is_refused():
    plain = STATEMENT.to_dict()
    for version in (1, 3, True, "2", None, 2.0):
        with pytest.raises(UnsupportedVersionError):
            SiteStatement.from_bytes(json.dumps(plain | {"version": version}).encode())


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("query_id", "no-number-"),
        ("query_id", "spaces here-0"),
        ("run_id", -1),
        ("run_id", True),
        ("site", ""),
        ("site", "bell\x07"),
        ("site_key_id", ""),
        ("querier_key_id", "AB" * 32),
        ("session_key_id", "0"),
        ("query_sealed", 2),
        ("protection", "Plain"),
        ("rule", ""),
        ("protection_options", {"x": [1]}),
        ("rule_options", {"x": float("nan")}),
        ("n_rows", 0),
        ("n_fresh_rows", 5),
        ("n_sites_asked", 0),
        ("cohort_digest", "0"),
        ("min_cohort", 0),
        ("epsilon", -1.0),
        ("epsilon", float("inf")),
        ("epsilon", None),
        ("delta", 1.0),
        ("delta", None),
        ("charge", Charge()),
        ("charge", Charge.gaussian(0.2, 3)),
        ("profile_commitment", "x" * 64),
        ("model_digest", "0"),
        ("record_epsilon", float("nan")),
        ("record_delta", None),
        ("payload_digest", ""),
        ("evidence", "both"),
        ("issued_at", -1),
        ("issued_at", 1.5),
    ],
)
def test_field_that_no_honest_statement_has_is_refused_when_built(name, value):
    with pytest.raises(InvalidValueError):
        dataclasses.replace(STATEMENT, **{name: value})


def test_rows_from_the_cache_cost_nothing():
    free = dataclasses.replace(STATEMENT, n_fresh_rows=0, charge=Charge(), epsilon=0.0)
    assert free.charge.is_free
    with pytest.raises(InvalidValueError, match="epsilon"):
        dataclasses.replace(free, epsilon=1.0)


def test_cohort_digest_is_of_the_set():
    keys = [SITE.key_id, OTHER.key_id]
    assert cohort_digest(keys) == cohort_digest(reversed(keys))
    assert cohort_digest(keys) != cohort_digest(keys[:1])
    with pytest.raises(InvalidValueError):
        cohort_digest([SITE.key_id, SITE.key_id])
    with pytest.raises(InvalidValueError):
        cohort_digest(["short"])


def test_job_is_the_query_without_its_number():
    assert dataclasses.replace(STATEMENT, query_id="a-b-12").job_id == "a-b"
