"""Sessions and sealed shares: signed, bound, and refused where consent ends."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from fedinfer_flower.errors import (
    BindingError,
    EnvelopeError,
    ExpiredError,
    InvalidValueError,
    ProtectionRefusedError,
    ProtocolError,
    SealError,
    ShapeError,
    SignatureError,
    UntrustedKeyError,
)
from fedinfer_flower.mpc import Disclosed, tls
from fedinfer_flower.mpc.sealed_shares import (
    link_id,
    open_result,
    open_shares,
    seal_result,
    seal_shares,
    split_bytes,
)
from fedinfer_flower.mpc.session import MpcConsent, MpcSession
from fedinfer_flower.mpc.shares import decode_reals, encode_reals, held_to_bytes, join, split
from fedinfer_flower.mpc.statement import SiteStatement, sign_document
from fedinfer_flower.wire.identity import Identity

from .conftest import CLASSES, SMALL, Trio, make_trio

INPUTS = np.random.default_rng(0).normal(size=(4, 2, 6, 6))


def consent_of(trio: Trio, **changes: object) -> MpcConsent:
    given = {
        "parties": frozenset(site.key_id for site in trio.sites),
        "queriers": frozenset({trio.querier.key_id}),
    }
    return MpcConsent(**(given | changes))


# -- session -----------------------------------------------------------------------------


def test_session_round_trip(trio: Trio) -> None:
    data = trio.session.to_bytes(trio.querier)
    session = MpcSession.from_bytes(data)
    assert session == trio.session
    assert session.digest() == trio.session.digest()
    assert [session.rank_of(site.key_id) for site in trio.sites] == [0, 1, 2]


def test_session_signed_by_another_is_refused(trio: Trio) -> None:
    with pytest.raises(SignatureError):
        MpcSession.from_bytes(trio.session.to_bytes(Identity.generate()))


@pytest.mark.parametrize("place", [0, 63, 80, 200, -1])
def test_altered_session_is_refused(trio: Trio, place: int) -> None:
    data = bytearray(trio.session.to_bytes(trio.querier))
    data[place] ^= 1
    with pytest.raises(ProtocolError):
        MpcSession.from_bytes(bytes(data))


def test_querier_cannot_give_a_party_another_certificate(trio: Trio) -> None:
    forged = replace(trio.statements[2], certificate=trio.statements[1].certificate)
    signed_by_other = forged.to_bytes(trio.querier)
    with pytest.raises(SignatureError):
        replace(trio.session, parties=(*trio.session.parties[:2], signed_by_other))


def test_same_party_twice_is_refused(trio: Trio) -> None:
    first, second, _ = trio.session.parties
    with pytest.raises(InvalidValueError, match="same party twice"):
        replace(trio.session, parties=(first, second, first))


def test_owner_without_network_and_party_without_address_are_refused(trio: Trio) -> None:
    bare = Identity.generate()
    statement = SiteStatement(identity=bare.public, name="bare").to_bytes(bare)
    with pytest.raises(InvalidValueError, match="without a network"):
        replace(trio.session, owners=(statement,))
    with pytest.raises(InvalidValueError, match="without an address"):
        replace(trio.session, parties=(*trio.session.parties[:2], statement))


def test_owners_with_other_classes_are_refused(trio: Trio) -> None:
    one = Identity.generate()
    other = SiteStatement(
        identity=one.public, name="x", network=SMALL, classes=tuple(reversed(CLASSES))
    )
    with pytest.raises(InvalidValueError, match="order of classes"):
        replace(trio.session, owners=(*trio.session.owners[:1], other.to_bytes(one)))


def test_site_outside_the_session_has_no_place(trio: Trio) -> None:
    with pytest.raises(BindingError):
        trio.session.rank_of(Identity.generate().key_id)
    with pytest.raises(BindingError):
        trio.session.owner_number(Identity.generate().key_id)


@pytest.mark.parametrize("address", ["no-port", "a b:1", "host:123456", "host:1\n"])
def test_statement_with_a_bad_address_is_refused(address: str) -> None:
    with pytest.raises(InvalidValueError):
        SiteStatement.of_party(Identity.generate(), name="a", address=address)


def test_statement_of_another_is_refused() -> None:
    me = Identity.generate()
    data = SiteStatement(identity=me.public, name="a").to_bytes(Identity.generate())
    with pytest.raises(SignatureError):
        SiteStatement.from_bytes(data)


# -- consent -----------------------------------------------------------------------------


def test_consent_covers_the_agreed_session(trio: Trio) -> None:
    consent_of(trio).check(trio.session)


def test_unknown_querier_or_party_is_refused(trio: Trio) -> None:
    with pytest.raises(UntrustedKeyError, match="querier"):
        consent_of(trio, queriers=frozenset()).check(trio.session)
    two = frozenset(site.key_id for site in trio.sites[:2])
    with pytest.raises(UntrustedKeyError, match="party"):
        consent_of(trio, parties=two).check(trio.session)


def test_answer_of_too_few_owners_is_refused(trio: Trio) -> None:
    alone = replace(trio.session, owners=trio.session.owners[:1])
    with pytest.raises(ProtectionRefusedError, match="demands 2"):
        consent_of(trio).check(alone)
    consent_of(trio, min_owners=1).check(alone)


def test_disclosure_beyond_consent_is_refused(trio: Trio) -> None:
    only_label = consent_of(trio, disclosed=frozenset({Disclosed.LABEL}))
    with pytest.raises(ProtectionRefusedError, match="disclose"):
        only_label.check(trio.session)
    only_label.check(replace(trio.session, disclosed=Disclosed.LABEL))


def test_session_after_its_time_is_refused(trio: Trio) -> None:
    with pytest.raises(ExpiredError):
        consent_of(trio).check(replace(trio.session, expires_at=1))


# -- sealed shares -----------------------------------------------------------------------


def opened(trio: Trio, rank: int, sealed: bytes, **changes: object) -> bytes:
    given = {
        "maker": trio.querier.public,
        "label": "query-0",
        "shapes": [trio.session.computation.input_shape],
    }
    return open_shares(trio.sites[rank], trio.session, sealed, **(given | changes))[1]


def test_three_parties_hold_what_was_sealed(trio: Trio) -> None:
    shape = trio.session.computation.input_shape
    sealed = seal_shares(trio.querier, trio.session, [INPUTS], label="query-0")
    held = [split_bytes(opened(trio, r, sealed[r]), [shape])[0] for r in range(3)]
    # Half a step of the fixed-point grid.
    np.testing.assert_allclose(decode_reals(join(held)), INPUTS, atol=2.0**-19)


def test_links_are_named_by_all_makers_secrets(trio: Trio) -> None:
    shape = trio.session.computation.input_shape
    sealed = seal_shares(trio.querier, trio.session, [INPUTS], label="query-0")
    secrets = [
        open_shares(
            site,
            trio.session,
            sealed[rank],
            maker=trio.querier.public,
            label="query-0",
            shapes=[shape],
        )[0]
        for rank, site in enumerate(trio.sites)
    ]
    assert len(set(secrets)) == 1
    assert len(secrets[0]) == 32
    assert link_id(trio.session, [secrets[0], b"a"]) != link_id(trio.session, [secrets[0], b"b"])
    other = replace(trio.session, session_id="another")
    assert link_id(trio.session, secrets) != link_id(other, secrets)


def test_share_does_not_open_elsewhere(trio: Trio) -> None:
    sealed = seal_shares(trio.querier, trio.session, [INPUTS], label="query-0")
    with pytest.raises(SealError):
        opened(trio, 1, sealed[0])
    with pytest.raises(SealError):
        opened(trio, 0, sealed[0], label="query-1")
    other = replace(trio, session=replace(trio.session, session_id="another"))
    with pytest.raises(SealError):
        opened(other, 0, sealed[0])


def test_share_of_another_maker_is_refused(trio: Trio) -> None:
    forged = seal_shares(Identity.generate(), trio.session, [INPUTS], label="query-0")
    with pytest.raises(SignatureError):
        opened(trio, 0, forged[0])


def test_share_of_another_length_is_refused(trio: Trio) -> None:
    sealed = seal_shares(trio.querier, trio.session, [INPUTS[:3]], label="query-0")
    with pytest.raises(ShapeError):
        opened(trio, 0, sealed[0])


def test_result_opens_for_the_querier_alone(trio: Trio) -> None:
    result = np.arange(12.0).reshape(4, 3)
    held = split(encode_reals(result))
    sealed = [
        seal_result(site, trio.session, held_to_bytes(h), batch=0)
        for site, h in zip(trio.sites, held, strict=True)
    ]
    back = [
        open_result(trio.querier, trio.session, s, batch=0, rank=r) for r, s in enumerate(sealed)
    ]
    np.testing.assert_array_equal(decode_reals(join(back)), result)
    with pytest.raises(SealError):
        open_result(trio.sites[0], trio.session, sealed[0], batch=0, rank=0)
    with pytest.raises(SealError):
        open_result(trio.querier, trio.session, sealed[0], batch=0, rank=1)
    with pytest.raises(SealError):
        open_result(trio.querier, trio.session, sealed[0], batch=1, rank=0)


def test_coordinator_carries_no_clear_share(trio: Trio) -> None:
    words = encode_reals(INPUTS)
    sealed = seal_shares(trio.querier, trio.session, [INPUTS], label="query-0")
    for data in sealed:
        for clear in (INPUTS.tobytes(), words.tobytes()):
            assert clear[:32] not in data


# -- certificates ------------------------------------------------------------------------


def test_certificate_belongs_to_the_key_that_is_worked_out_again() -> None:
    from cryptography import x509
    from cryptography.hazmat.primitives.serialization import load_pem_private_key

    me, salt = Identity.generate(), bytes(range(32))
    key = load_pem_private_key(tls.secret_pem(me, salt), None)
    made = x509.load_der_x509_certificate(tls.certificate(me, salt))
    assert made.public_key() == key.public_key()
    assert tls.secret_pem(me, bytes(32)) != tls.secret_pem(me, salt)
    assert tls.secret_pem(Identity.generate(), salt) != tls.secret_pem(me, salt)


def test_certificate_that_is_none_or_too_old_is_refused() -> None:
    with pytest.raises(EnvelopeError):
        tls.pem_of(b"nonsense")
    tls.require_valid(tls.certificate(Identity.generate(), bytes(32)))


def test_party_that_signs_again_with_another_purpose_is_refused(trio: Trio) -> None:
    body = trio.session.to_bytes(trio.querier)[64:]
    with pytest.raises(SignatureError):
        MpcSession.from_bytes(sign_document(trio.querier, "mpc-shares", body))


def test_trios_differ() -> None:
    assert make_trio().session.digest() != make_trio().session.digest()
