"""Sealed questions, answers and jobs: what is bound to what."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedinfer_flower.errors import (
    BindingError,
    EnvelopeError,
    ProtocolError,
    SealError,
    SignatureError,
)
from fedinfer_flower.wire.envelope import DEFAULT_LIMITS, Kind, decode, encode
from fedinfer_flower.wire.identity import Identity, PublicIdentity
from fedinfer_flower.wire.messages import Question, question
from fedinfer_flower.wire.relayed import pack_relayed, read_relayed
from fedinfer_flower.wire.roster import Roster, Seat
from fedinfer_flower.wire.sealed_job import MAX_SEALED_BATCHES, SealedBatch, SealedJob
from fedinfer_flower.wire.sealed_query import (
    open_question,
    seal_question,
    sealed_query_envelope,
)
from fedinfer_flower.wire.sealing import SealedBody, seal_for

RUN = 11
QUERIER = Identity.generate()
SITES = [Identity.generate() for _ in range(3)]
ROSTER = Roster(tuple(Seat(identity=s.public, commitment="0" * 64) for s in SITES))
ASKED = Question(
    query_id="job-0",
    inputs=np.arange(6.0).reshape(2, 3),
    classes=("a", "b"),
    n_sites=3,
    rule="mean-probability",
    protection="plain",
    roster=ROSTER,
    querier=QUERIER.public,
    expires_at=2e9,
    relay=True,
)


def sealed(asked: Question = ASKED, identity: Identity = QUERIER, run_id: int = RUN):
    body = seal_question(asked, identity=identity, run_id=run_id)
    return sealed_query_envelope(body, query_id=asked.query_id, run_id=run_id)


def by_hand(plain: bytes, signer: Identity, *, query_id: str = "job-0", run_id: int = RUN):
    """Seal anything as a hostile querier would."""
    body = seal_for(
        [s.public for s in SITES],
        signer.sign("query", plain) + plain,
        info=b"question|" + run_id.to_bytes(8, "big") + query_id.encode(),
    )
    return sealed_query_envelope(body, query_id=query_id, run_id=run_id)


def job(**changes) -> SealedJob:
    facts = {
        "job_id": "job",
        "run_id": RUN,
        "rule": "mean-probability",
        "protection": "plain",
        "rule_options": {"x": 1.5},
        "classes": ("a", "b"),
        "roster": ROSTER,
        "querier": QUERIER.public,
        "expires_at": 2e9,
        "relay": True,
        "batches": (
            SealedBatch(query_id="job-0", n_queries=2, sealed=SealedBody(body=b"b", wraps=b"w")),
        ),
    }
    return SealedJob(**facts | changes)


# -- questions -----------------------------------------------------------------------------


@pytest.mark.parametrize("site", SITES)
def test_every_site_of_the_roster_reads_the_question(site):
    asked = open_question(decode(encode(sealed())), identity=site)
    np.testing.assert_array_equal(asked.inputs, ASKED.inputs)
    assert dataclasses.replace(asked, inputs=ASKED.inputs) == ASKED


def test_question_holds_no_byte_of_the_rows():
    raw = encode(sealed())
    for number in ASKED.inputs.ravel()[1:]:
        assert np.float64(number).tobytes() not in raw


def test_site_outside_the_roster_is_refused():
    with pytest.raises(SealError, match="not sealed to this party"):
        open_question(sealed(), identity=Identity.generate())


def test_every_altered_byte_of_the_envelope_is_refused_or_says_nothing():
    raw = encode(sealed())
    for place in range(len(raw)):
        changed = raw[:place] + bytes([raw[place] ^ 1]) + raw[place + 1 :]
        try:
            asked = open_question(decode(changed), identity=SITES[0])
        except ProtocolError:
            continue
        # A field of the envelope that a sealed question does not use.
        np.testing.assert_array_equal(asked.inputs, ASKED.inputs)
        assert dataclasses.replace(asked, inputs=ASKED.inputs) == ASKED


def test_altered_body_with_a_fresh_checksum_is_a_seal_error():
    envelope = sealed()
    body = bytearray(envelope.section("body"))
    body[len(body) // 2] ^= 1
    sections = (("body", bytes(body)), ("wraps", envelope.section("wraps")))
    with pytest.raises(SealError):
        open_question(dataclasses.replace(envelope, sections=sections), identity=SITES[0])


@pytest.mark.parametrize("changes", [{"query_id": "job-1"}, {"run_id": RUN + 1}], ids=str)
def test_question_carried_to_another_batch_or_run_does_not_open(changes):
    with pytest.raises(SealError):
        open_question(dataclasses.replace(sealed(), **changes), identity=SITES[0])


def test_hostile_querier_that_names_another_batch_or_run_inside_is_refused():
    inner = encode(question(ASKED, run_id=RUN))
    for changes in ({"query_id": "job-1"}, {"run_id": RUN + 1}):
        with pytest.raises(BindingError):
            open_question(by_hand(inner, QUERIER, **changes), identity=SITES[0])


def test_question_that_names_a_querier_who_did_not_sign_is_refused():
    inner = encode(question(ASKED, run_id=RUN))
    with pytest.raises(SignatureError):
        open_question(by_hand(inner, Identity.generate()), identity=SITES[0])


def test_question_resealed_by_a_site_keeps_the_querier_s_signature_or_is_refused():
    # A site in the roster knows the signed text; with one bit changed nobody believes it.
    inner = bytearray(encode(question(ASKED, run_id=RUN)))
    signature = QUERIER.sign("query", bytes(inner))
    envelope = decode(bytes(inner))
    changed = encode(dataclasses.replace(envelope, meta={**envelope.meta, "sites": 2}))
    body = seal_for(
        [s.public for s in SITES],
        signature + changed,
        info=b"question|" + RUN.to_bytes(8, "big") + b"job-0",
    )
    resealed = sealed_query_envelope(body, query_id="job-0", run_id=RUN)
    with pytest.raises((SignatureError, EnvelopeError)):
        open_question(resealed, identity=SITES[0])


def test_question_without_a_querier_is_refused():
    inner = encode(question(dataclasses.replace(ASKED, querier=None), run_id=RUN))
    with pytest.raises(SignatureError, match="names no querier"):
        open_question(by_hand(inner, QUERIER), identity=SITES[0])


@given(st.binary(max_size=200))
@settings(max_examples=50)
def test_arbitrary_sealed_text_is_a_typed_error(plain):
    with pytest.raises(ProtocolError):
        open_question(by_hand(plain, QUERIER), identity=SITES[0])


def test_sealing_for_another_querier_or_for_nobody_is_refused():
    with pytest.raises(BindingError):
        seal_question(ASKED, identity=Identity.generate(), run_id=RUN)
    with pytest.raises(BindingError):
        seal_question(dataclasses.replace(ASKED, roster=Roster(())), identity=QUERIER, run_id=RUN)


def test_envelope_with_other_sections_is_refused():
    envelope = sealed()
    for sections in ((), envelope.sections[:1], envelope.sections[::-1]):
        with pytest.raises(EnvelopeError):
            open_question(dataclasses.replace(envelope, sections=sections), identity=SITES[0])


# -- jobs ----------------------------------------------------------------------------------


@given(
    st.lists(
        st.tuples(st.integers(1, 1000), st.binary(max_size=40), st.binary(max_size=40)),
        min_size=1,
        max_size=5,
    )
)
def test_job_round_trip(rows):
    rows = [(min(n, max(len(body), 1)), body, wraps) for n, body, wraps in rows]
    batches = tuple(
        SealedBatch(query_id=f"job-{i}", n_queries=n, sealed=SealedBody(body=b, wraps=w))
        for i, (n, b, w) in enumerate(rows)
    )
    one = job(batches=batches)
    two = SealedJob.from_bytes(one.to_bytes())
    assert dataclasses.replace(two, batches=()) == dataclasses.replace(one, batches=())
    for ours, theirs in zip(one.batches, two.batches, strict=True):
        assert (ours.query_id, ours.n_queries) == (theirs.query_id, theirs.n_queries)
        assert bytes(theirs.sealed.body) == ours.sealed.body
        assert bytes(theirs.sealed.wraps) == ours.sealed.wraps
    assert two.n_queries == sum(n for n, _, _ in rows)


def test_job_with_more_rows_than_bytes_is_refused():
    sealed = SealedBody(body=bytes(20), wraps=b"w")
    raw = job(batches=(SealedBatch(query_id="job-0", n_queries=21, sealed=sealed),)).to_bytes()
    with pytest.raises(EnvelopeError, match="rows"):
        SealedJob.from_bytes(raw)


def test_every_altered_byte_of_a_job_is_refused_or_changes_no_payload():
    raw = job().to_bytes()
    for place in range(len(raw)):
        changed = raw[:place] + bytes([raw[place] ^ 1]) + raw[place + 1 :]
        try:
            other = SealedJob.from_bytes(changed)
        except ProtocolError:
            continue
        # Names and numbers in the header have no checksum: sites and querier compare them
        # with what was signed. Nothing of the payload changes unnoticed.
        assert (other.roster, other.querier, other.public_key) == (ROSTER, QUERIER.public, b"")
        assert [bytes(b.sealed.body) for b in other.batches] == [b"b"]


def test_cut_job_is_refused():
    raw = job().to_bytes()
    for n in range(len(raw)):
        with pytest.raises(EnvelopeError):
            SealedJob.from_bytes(raw[:n])


def altered(**changes) -> bytes:
    envelope = decode(job().to_bytes())
    meta = {**envelope.meta, **changes.pop("meta", {})}
    return encode(dataclasses.replace(envelope, meta=meta, **changes))


@pytest.mark.parametrize(
    "data",
    [
        altered(kind=Kind.JOB),
        altered(query_id=""),
        altered(query_id="x" * 57),
        altered(meta={"batches": []}),
        altered(meta={"batches": [["job-0"]]}),
        altered(meta={"batches": [["job-0", 0]]}),
        altered(meta={"batches": [["job-0", 2**40]]}),
        altered(meta={"batches": [["job-0", 2.0]]}),
        altered(meta={"batches": [["job-0", 2], ["job-1", 2]]}),
        altered(meta={"batches": "job-0"}),
        altered(meta={"relay": 1}),
        altered(meta={"expires-at": "soon"}),
        altered(meta={"classes": "ab"}),
        altered(meta={"more": 1}),
        altered(sections=()),
    ],
)
def test_malformed_job_is_refused(data):
    with pytest.raises(ProtocolError):
        SealedJob.from_bytes(data)


def test_largest_job_can_be_read_and_a_larger_one_not():
    def of(n: int) -> SealedJob:
        return job(
            batches=tuple(
                SealedBatch(
                    query_id=f"job-{i}", n_queries=1, sealed=SealedBody(body=b"", wraps=b"")
                )
                for i in range(n)
            )
        )

    assert DEFAULT_LIMITS.max_sections >= MAX_SEALED_BATCHES * 2 + 3
    assert SealedJob.from_bytes(of(MAX_SEALED_BATCHES).to_bytes()).n_queries == MAX_SEALED_BATCHES
    with pytest.raises(EnvelopeError):
        SealedJob.from_bytes(of(MAX_SEALED_BATCHES + 1).to_bytes())


# -- relayed answers -----------------------------------------------------------------------

key_ids = st.binary(min_size=32, max_size=32).map(bytes.hex)


@given(st.lists(st.tuples(key_ids, st.binary(max_size=50)), unique_by=lambda a: a[0], max_size=5))
def test_relayed_round_trip(answers):
    assert read_relayed(pack_relayed(answers)) == answers


@given(st.lists(st.tuples(key_ids, st.binary(max_size=20)), unique_by=lambda a: a[0], min_size=1))
def test_cut_relayed_answers_are_refused(answers):
    raw = pack_relayed(answers)
    with pytest.raises(EnvelopeError):
        read_relayed(raw[:-1])


def test_relayed_answers_with_huge_length_or_a_site_twice_are_refused():
    with pytest.raises(EnvelopeError, match="cut short"):
        read_relayed(bytes(32) + b"\xff" * 8 + b"x")
    with pytest.raises(EnvelopeError, match="twice"):
        read_relayed(pack_relayed([("0" * 64, b"a"), ("0" * 64, b"b")]))


@given(st.binary(max_size=200))
def test_arbitrary_relayed_bytes_are_answers_or_a_typed_error(raw):
    try:
        answers = read_relayed(raw)
    except EnvelopeError:
        return
    assert pack_relayed(answers) == raw


def test_job_names_a_public_identity_and_no_secret():
    raw = job().to_bytes()
    assert QUERIER.public.to_bytes() in raw
    for secret in QUERIER.to_secret().values():
        assert bytes.fromhex(secret) not in raw
    assert isinstance(job().querier, PublicIdentity)
