"""Sites that lie: about what they sent, about their keys, about their statements."""

from __future__ import annotations

import dataclasses
import json

import numpy as np
import pytest
from cryptography.hazmat.primitives.asymmetric.x25519 import (
    X25519PrivateKey,
    X25519PublicKey,
)
from flwr.app import Message

from fedinfer_flower import Querier
from fedinfer_flower.errors import SealError
from fedinfer_flower.privacy.base import ScorePlan
from fedinfer_flower.privacy.cohort import Cohort
from fedinfer_flower.privacy.masked_answer import MaskedAnswer
from fedinfer_flower.privacy.masks import leaf, mask, pair_key
from fedinfer_flower.privacy.secagg import SecAgg
from fedinfer_flower.receipts.statement import SignedStatement
from fedinfer_flower.receipts.verification import verify
from fedinfer_flower.wire.envelope import Kind
from fedinfer_flower.wire.identity import Identity, PublicIdentity
from fedinfer_flower.wire.records import pack, unpack
from fedinfer_flower.wire.relayed import read_relayed
from fedinfer_flower.wire.roster import Roster, Seat
from fedinfer_flower.wire.sealing import open_sealed

from .conftest import ROWS, replaced

P = 2**255 - 19


def identity_of(context) -> Identity:
    return Identity.from_secret(json.loads(str(context.state["fedinfer"]["identity"])))


def lying(change, *, partition: int = 0, action: str = "fi_predict"):
    """Return a wrap in which one site's reply goes through ``change(envelope, identity)``."""

    def wrap(asked, place, message, context, handle):
        reply = handle(message, context)
        envelope = unpack(reply.content)
        if (asked, place) != (action, partition) or envelope.kind is Kind.ERROR:
            return reply
        return Message(pack(change(envelope, identity_of(context))), reply_to=message)

    return wrap


def restated(**changes):
    """Return a change that signs another statement."""

    def change(envelope, identity):
        signed = SignedStatement.from_bytes(bytes(envelope.section("statement")))
        said = dataclasses.replace(signed.statement, **changes)
        return replaced(envelope, sections={"statement": said.sign(identity).to_bytes()})

    return change


def left_out(result) -> list[tuple[str, str]]:
    return [
        (site.name, site.error_code)
        for site in result.reports[0].sites
        if site.status.value != "answered"
    ]


# -- answers -------------------------------------------------------------------------------


def other_payload(envelope, identity):
    payload = bytearray(envelope.section("scores"))
    payload[-1] ^= 1
    return replaced(envelope, sections={"scores": bytes(payload)})


def foreign_signature(envelope, identity):
    signed = SignedStatement.from_bytes(bytes(envelope.section("statement")))
    other = Identity.generate()
    said = dataclasses.replace(signed.statement, site_key_id=other.key_id)
    return replaced(envelope, sections={"statement": said.sign(other).to_bytes()})


def bad_signature(envelope, identity):
    signed = SignedStatement.from_bytes(bytes(envelope.section("statement")))
    forged = dataclasses.replace(signed, signature=bytes(64))
    return replaced(envelope, sections={"statement": forged.to_bytes()})


def no_statement_text(envelope, identity):
    return replaced(envelope, sections={"statement": b"{}"})


LIES = {
    "another payload than it signed": (other_payload, "FI303"),
    "another digest than of its payload": (restated(payload_digest="0" * 64), "FI303"),
    "another batch": (restated(query_id="other-0"), "FI303"),
    "another run": (restated(run_id=1), "FI303"),
    "another number of rows": (restated(n_rows=7, n_fresh_rows=7), "FI303"),
    "another protection": (restated(protection="plain"), "FI303"),
    "signed by another key": (foreign_signature, "FI303"),
    "signed by nobody": (bad_signature, "FI310"),
    "no statement": (no_statement_text, "FI301"),
}


@pytest.mark.parametrize(("lie", "code"), LIES.values(), ids=LIES)
def test_site_whose_statement_is_of_another_answer_is_left_out(make_federation, lie, code):
    federation = make_federation(wrap=lying(lie))
    querier, _, result = federation.ask(federation.strategy("secagg"))
    assert left_out(result) == [("site-0", code)]
    expected = federation.probabilities()[1:].sum(axis=0)
    np.testing.assert_allclose(querier.totals(result.combined), expected, atol=1e-3)
    verify(result.receipt.to_bytes()).require_ok()


SPOILERS = {
    "rule": {"rule": "median"},
    "rule options": {"rule_options": {"x": 1}},
    "protection options": {"protection_options": {"self_mask": "x"}},
    "name": {"site": "site-1"},
    "sealed": {"query_sealed": False},
    "querier": {"querier_key_id": "0" * 64},
    "session": {"session_key_id": "0" * 64},
    "number of sites": {"n_sites_asked": 3},
    "cohort": {"cohort_digest": "0" * 64},
    "smallest cohort": {"min_cohort": 99},
    "profile": {"profile_commitment": "0" * 64},
}


@pytest.mark.parametrize("lie", SPOILERS.values(), ids=SPOILERS)
def test_site_that_lies_in_its_statement_does_not_end_the_run(make_federation, lie):
    federation = make_federation(wrap=lying(restated(**lie)))
    querier, _, result = federation.ask(federation.strategy("secagg"))
    assert len(querier.open(result.combined)) == len(ROWS)


@pytest.mark.parametrize("lie", SPOILERS.values(), ids=SPOILERS)
def test_site_that_lies_in_its_statement_does_not_spoil_the_receipt(make_federation, lie):
    federation = make_federation(wrap=lying(restated(**lie)))
    _, _, result = federation.ask(federation.strategy("secagg"))
    assert left_out(result) == [("site-0", "FI303")]
    verify(result.receipt.to_bytes()).require_ok()


def test_sealed_answer_that_is_too_long_is_left_out(make_federation):
    def longer(envelope, identity):
        payload = bytes(envelope.section("scores")) + b"x"
        import hashlib

        digest = hashlib.sha256(payload).hexdigest()
        changed = replaced(envelope, sections={"scores": payload})
        return restated(payload_digest=digest)(changed, identity)

    federation = make_federation(wrap=lying(longer))
    _, _, result = federation.ask(federation.strategy("plain"))
    assert left_out(result) == [("site-0", "FI305")]


@pytest.mark.parametrize("damage", ["garbage", "cut"])
def test_sealed_answer_that_does_not_open_is_left_out_by_the_querier(
    make_federation, damage, caplog
):
    def spoilt(envelope, identity):
        import hashlib

        good = bytes(envelope.section("scores"))
        payload = bytes(len(good)) if damage == "garbage" else good[:-1]
        digest = hashlib.sha256(payload).hexdigest()
        changed = replaced(envelope, sections={"scores": payload})
        return restated(payload_digest=digest)(changed, identity)

    federation = make_federation(wrap=lying(spoilt))
    querier, _, result = federation.ask(federation.strategy("plain"))
    expected = federation.probabilities()[1:].sum(axis=0)
    np.testing.assert_allclose(querier.totals(result.combined), expected, atol=1e-3)
    assert "FI312" in caplog.text


def test_answer_that_another_site_sealed_does_not_open_as_one_s_own(make_federation):
    federation = make_federation()
    querier, _, result = federation.ask(federation.strategy("plain"))
    (batch,) = result.combined.batches
    (one, sealed), (two, _), *_ = read_relayed(batch.total)
    query_id = batch.query_id
    assert open_sealed(querier.identity, sealed, info=f"answer|{one}|{query_id}".encode())
    with pytest.raises(SealError):
        open_sealed(querier.identity, sealed, info=f"answer|{two}|{query_id}".encode())


# -- keys ----------------------------------------------------------------------------------


def carded(make_identity):
    """Return a change that replaces the keys in a site's card, signed anew."""

    def change(envelope, identity):
        public = make_identity(identity)
        from fedinfer_flower.wire.directory import _profile

        commitment = bytes.fromhex(_profile(envelope.meta).commitment())
        statement = envelope.run_id.to_bytes(8, "big") + public.to_bytes() + commitment
        return replaced(
            envelope,
            sections={
                "identity": public.to_bytes(),
                "signature": identity.sign("site card", statement),
            },
        )

    return change


@pytest.mark.parametrize("key", [bytes(32), b"\x01" + bytes(31)], ids=["zero", "one"])
@pytest.mark.parametrize("protection", ["plain", "secagg"])
def test_site_with_a_key_of_low_order_is_left_out_and_named(make_federation, protection, key):
    change = carded(lambda me: PublicIdentity(signing_key=me.public.signing_key, agreement_key=key))
    federation = make_federation(wrap=lying(change, action="fi_hello"))
    strategy = federation.strategy(protection, min_available_nodes=5)
    querier, _, result = federation.ask(strategy)
    expected = federation.probabilities()[1:].sum(axis=0)
    np.testing.assert_allclose(querier.totals(result.combined), expected, atol=1e-3)
    assert strategy.directory(federation.grid).only([f"site-{k}" for k in range(1, 5)])


def test_site_that_shows_another_s_key_takes_both_out(make_federation):
    """Nobody can tell which of the two holds the secret half."""
    keys: dict[int, bytes] = {}

    def wrap(action, place, message, context, handle):
        reply = handle(message, context)
        if action != "fi_hello":
            return reply
        envelope = unpack(reply.content)
        me = identity_of(context)
        keys[place] = me.public.agreement_key
        if place != 4 or 3 not in keys:
            return reply
        copy = carded(
            lambda me: PublicIdentity(signing_key=me.public.signing_key, agreement_key=keys[3])
        )
        return Message(pack(copy(envelope, me)), reply_to=message)

    federation = make_federation(wrap=wrap)
    federation.strategy("plain").directory(federation.grid)  # the honest keys are known now
    directory = federation.strategy("plain").directory(federation.grid)
    assert [card.profile.name for card in directory.cards] == ["site-0", "site-1", "site-2"]


def twin_of(key: bytes) -> bytes:
    """Return another X25519 key with the same shared secrets: the point plus one of order 2.

    Adding (0, 0) on a Montgomery curve turns u into 1 / u, and secret scalars are even.
    """
    return pow(int.from_bytes(key, "little"), -1, P).to_bytes(32, "little")


def test_twin_of_a_key_has_its_shared_secrets():
    a, b = X25519PrivateKey.generate(), X25519PrivateKey.generate()
    public = b.public_key().public_bytes_raw()
    twin = X25519PublicKey.from_public_bytes(twin_of(public))
    assert twin.public_bytes_raw() != public
    assert a.exchange(twin) == a.exchange(b.public_key())


def test_masks_with_a_key_and_with_its_twin_do_not_cancel():
    """A site that takes the twin of another's key would undo the masks between the two.

    With shared secrets alone, a site between them in the roster would add a mask and take
    it away again. Pair keys have both public keys in them.
    """
    plan = ScorePlan(width=2, bound=1.0, sensitivity_l2=1.0, n_sites_max=3, n_classes=2)
    secagg = SecAgg()
    keys = secagg.make_keys()
    scores = np.array([[0.25, 0.75]] * 20)
    querier = X25519PrivateKey.from_private_bytes(keys.secret_key)
    while True:
        victim, other = Identity.generate(), Identity.generate()
        spy = PublicIdentity(
            signing_key=Identity.generate().public.signing_key,
            agreement_key=twin_of(other.public.agreement_key),
        )
        publics = (victim.public, other.public, spy)
        roster = Roster(tuple(Seat(identity=p, commitment="0" * 64) for p in publics))
        if roster.place_of(victim.key_id) == 1:
            break
    cohort = Cohort(query_id="q", roster=roster, public_key=keys.public_key)
    side = secagg.site_side(plan, public_key=keys.public_key, cohort=cohort, identity=victim)
    answer = MaskedAnswer.from_bytes(
        side.protect(scores), context=cohort.context(), count=scores.size, n_shares=0
    )
    session = cohort.session()
    seed = leaf(pair_key(querier, victim.public.agreement_key, session), "querier", "q")
    opened = secagg.codec(plan).decode(answer.entries - mask(seed, scores.size))
    # 40 entries uniform over a range of thousands: within 2 of the scores by chance never.
    assert np.abs(opened - scores.ravel()).max() > 2.0


def test_querier_is_told_of_no_site_that_it_did_not_ask(make_federation):
    federation = make_federation()
    strategy = federation.strategy("secagg")
    querier, job, result = federation.ask(strategy, only=("site-0", "site-2", "site-4"))
    assert len(job.roster) == 3
    assert result.combined.roster == job.roster
    expected = federation.probabilities()[[0, 2, 4]].sum(axis=0)
    np.testing.assert_allclose(querier.totals(result.combined), expected, atol=1e-3)
    assert isinstance(querier, Querier)
