"""Documents of a refinement: round trips, seals, signatures, and strict readers."""

from __future__ import annotations

import dataclasses
import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedinfer_flower.errors import (
    BindingError,
    EnvelopeError,
    ExpiredError,
    FedInferError,
    InvalidScoresError,
    InvalidValueError,
    MediumRefusedError,
    ProtocolError,
    SealError,
    ShapeError,
    SignatureError,
    SizeLimitError,
    UntrustedKeyError,
)
from fedinfer_flower.wire import refine_ask, refine_asked, refine_fields
from fedinfer_flower.wire.actions import ACTIONS, LANGUAGE_ACTIONS
from fedinfer_flower.wire.envelope import decode, encode
from fedinfer_flower.wire.identity import Identity
from fedinfer_flower.wire.language_card import LanguageCard
from fedinfer_flower.wire.refine_answers import AnswerReply, Answers, open_answers, pack_answers
from fedinfer_flower.wire.refine_ask import (
    ShareAsk,
    ShareBody,
    open_ask,
    open_body,
    pack_ask,
    pack_body,
)
from fedinfer_flower.wire.refine_asked import Asked, QuerierConsent, open_asked, seal_asked
from fedinfer_flower.wire.refine_documents import (
    FetchRequest,
    RelayedAsk,
    RephraseReply,
    RephraseRequest,
    ShareOffer,
    ShareReply,
    ShareRequest,
    read_share_reply,
)
from fedinfer_flower.wire.refine_request import CandidatesRequest, Part, RefineRequest
from fedinfer_flower.wire.refine_seats import SharerSeat
from fedinfer_flower.wire.sealing import seal_to

RUN, NODE, QUERY = 7, 1000, "q-0"
QUERIER, RECEIVER, SHARER, OTHER = (Identity.generate() for _ in range(4))
LAYOUT = json.dumps({"model_digest": "ab" * 32})
CARD = LanguageCard(run_id=RUN, name="b", layout=LAYOUT, media=("text",)).signed(SHARER)
SEAT = SharerSeat(card=CARD, medium="cache", share={"last": 1}, codec="int8", scales=b"s")
CONSENT = QuerierConsent(
    run_id=RUN,
    query_id=QUERY,
    batch="b-0",
    allow=("cache", "text"),
    receiver=RECEIVER.key_id,
    sharers=(SHARER.key_id,),
    max_rounds=3,
    expires_at=1e9,
).signed(QUERIER)
ASKED = Asked(
    questions=("why ?", "wo öä?"),
    consent=CONSENT,
    decoding={"max_new_tokens": 4, "stop": (".",)},
    candidates=("x",),
    rephrase="template",
)
ASK = ShareAsk(
    questions=("really why ?",),
    consent=CONSENT,
    round_number=2,
    medium="cache",
    sharer=SHARER.key_id,
    reply_to=RECEIVER.public,
    share={"last": 1, "hidden": False},
    codec="static4",
    scales=b"scales",
)
EVIDENCE = np.array([[0.5, 1.0, 0.25, 0.0], [0.75, 0.5, 0.5, 0.125]], np.float32)
ABOUT = {"run_id": RUN, "query_id": QUERY, "round_number": 1}
REPHRASED = RephraseReply(
    query_id=QUERY,
    round_number=1,
    handle="h",
    asks=(RelayedAsk(sharer=SHARER.key_id, medium="text", body=b"ask"),),
    refused={OTHER.key_id: "FI320"},
    changed={SHARER.key_id: "FI409"},
    evidence=EVIDENCE,
)
REQUESTS = [
    RephraseRequest(
        query_id=QUERY,
        round_number=2,
        asked=b"asked",
        sealed=True,
        sharers=(SEAT,),
        host="coordinator",
        rephrase="none",
    ),
    ShareRequest(query_id=QUERY, medium="text", body=b"ask", sealed=False),
    FetchRequest(query_id=QUERY, handle="h", ask=b"ask"),
    RefineRequest(
        query_id=QUERY,
        round_number=3,
        handle="h",
        asked=b"asked",
        sealed=True,
        sharers=(SEAT,),
        parts=(Part(sharer=SHARER.key_id, medium="text", body=b"body"),),
        keep=True,
    ),
    CandidatesRequest(query_id=QUERY, asked=b"asked", sealed=True),
]


def sent(envelope):
    """Return the envelope after its journey."""
    return decode(encode(envelope))


# -- round trips -------------------------------------------------------------------------


def test_actions_are_apart_from_those_of_other_mods():
    assert not set(ACTIONS) & set(LANGUAGE_ACTIONS)
    assert len(set(LANGUAGE_ACTIONS)) == 6


@pytest.mark.parametrize("request_", REQUESTS, ids=lambda r: type(r).__name__)
def test_request_round_trips(request_):
    there = type(request_).read(sent(request_.to_envelope(run_id=RUN)))
    assert there == request_


def test_gates_of_projected_parts_round_trip():
    gate = np.array([1, 0, 1], np.uint8)
    part = Part(sharer=SHARER.key_id, medium="projected", body=b"e", gate=gate)
    request = RefineRequest(query_id=QUERY, round_number=1, parts=(part,), host="coordinator")
    (there,) = RefineRequest.read(sent(request.to_envelope(run_id=RUN))).parts
    assert there.gate.tolist() == [1, 0, 1]


def test_replies_round_trip():
    where = {"run_id": RUN, "sender": NODE}
    bound = {**where, "query_id": QUERY}
    there = RephraseReply.read(sent(REPHRASED.to_envelope(**where)), **bound)
    np.testing.assert_array_equal(there.evidence, EVIDENCE)
    assert dataclasses.replace(there, evidence=None) == dataclasses.replace(
        REPHRASED, evidence=None
    )
    reply = ShareReply(query_id=QUERY, body=b"body")
    assert read_share_reply(sent(reply.to_envelope(**where)), **bound) == reply
    offer = ShareOffer(query_id=QUERY, handle="h", body_bytes=9)
    assert read_share_reply(sent(offer.to_envelope(**where)), **bound) == offer
    done = AnswerReply(query_id=QUERY, body=b"body", sealed=True, dropped={SHARER.key_id: "FI318"})
    assert AnswerReply.read(sent(done.to_envelope(**where)), **bound) == done


@pytest.mark.parametrize("change", [{"run_id": 8}, {"sender": 1}, {"query_id": "q-1"}])
def test_reply_of_another_run_sender_or_query_is_refused(change):
    bound = {"run_id": RUN, "sender": NODE, "query_id": QUERY} | change
    offer = ShareOffer(query_id=QUERY, handle="h", body_bytes=9)
    done = AnswerReply(query_id=QUERY, body=b"", sealed=False)
    for document, read in (
        (REPHRASED, RephraseReply.read),
        (offer, read_share_reply),
        (done, AnswerReply.read),
    ):
        with pytest.raises(BindingError):
            read(sent(document.to_envelope(run_id=RUN, sender=NODE)), **bound)


questions = st.lists(st.text(max_size=30), min_size=1, max_size=4).map(tuple)


@settings(max_examples=50)
@given(questions, st.booleans())
def test_asked_round_trips(texts, sealed):
    asked = dataclasses.replace(ASKED, questions=texts)
    if not sealed:
        assert Asked.from_bytes(asked.to_bytes()) == asked
        return
    data = seal_asked(asked, identity=QUERIER, receiver=RECEIVER.public)
    assert open_asked(data, identity=RECEIVER, run_id=RUN, query_id=QUERY) == asked


@pytest.mark.parametrize("seal", [True, False])
def test_ask_round_trips(seal):
    ask = ASK if seal else dataclasses.replace(ASK, consent=CLEAR)
    data = pack_ask(ask, identity=RECEIVER, sharer=SHARER.public, seal=seal)
    assert open_ask(data, identity=SHARER, run_id=RUN, query_id=QUERY, sealed=seal) == ask


@pytest.mark.parametrize("seal", [True, False])
def test_body_round_trips(seal):
    body = ShareBody(
        payload=b"p",
        notes=("a", "b"),
        evidence=EVIDENCE,
        spans=(((0, 2), (2, 5)), ((0, 1),)),
        sections=((0, 5), (0, 1)),
        on_refined=True,
    )
    data = pack_body(body, identity=SHARER, reply_to=RECEIVER.public, seal=seal, **ABOUT)
    keys = {"identity": RECEIVER} if seal else {"receiver": RECEIVER.key_id}
    there = open_body(data, sharer=SHARER.public, sealed=seal, **keys, **ABOUT)
    np.testing.assert_array_equal(there.evidence, EVIDENCE)
    assert dataclasses.replace(there, evidence=None) == dataclasses.replace(body, evidence=None)


@pytest.mark.parametrize("querier", [QUERIER, None])
def test_answers_round_trip(querier):
    answers = Answers(
        texts=("x", "y"),
        sharers=(SHARER.key_id, OTHER.key_id),
        used=np.array([[1, 0], [0, 0]], np.uint8),
        evidence=EVIDENCE,
    )
    public = None if querier is None else querier.public
    data = pack_answers(answers, identity=RECEIVER, querier=public, **ABOUT)
    there = open_answers(data, site=RECEIVER.public, identity=querier, rows=2, **ABOUT)
    assert there.texts == answers.texts
    np.testing.assert_array_equal(there.used, answers.used)
    np.testing.assert_array_equal(there.evidence, EVIDENCE)
    scored = Answers(texts=(), scores=np.array([[-1.0, -2.0, -3.0]], np.float32))
    data = pack_answers(scored, identity=RECEIVER, querier=public, **ABOUT)
    there = open_answers(data, site=RECEIVER.public, identity=querier, rows=1, **ABOUT)
    np.testing.assert_array_equal(there.scores, scored.scores)


# -- who may read, and who said it -------------------------------------------------------

CLEAR = QuerierConsent(run_id=RUN, query_id=QUERY, allow=("text",))
SEALED = {
    "asked": seal_asked(ASKED, identity=QUERIER, receiver=RECEIVER.public),
    "ask": pack_ask(ASK, identity=RECEIVER, sharer=SHARER.public),
    "body": pack_body(ShareBody(notes=("a",)), identity=SHARER, reply_to=RECEIVER.public, **ABOUT),
    "answers": pack_answers(
        Answers(texts=("x",)), identity=RECEIVER, querier=QUERIER.public, **ABOUT
    ),
}


def opening(name, data, **changes):
    about = {k: v for k, v in (ABOUT | changes).items() if k != "me"}
    two = {k: v for k, v in about.items() if k != "round_number"}
    if name == "asked":
        return open_asked(data, identity=changes.get("me", RECEIVER), **two)
    if name == "ask":
        return open_ask(data, identity=changes.get("me", SHARER), sealed=True, **two)
    if name == "body":
        me = changes.get("me", RECEIVER)
        return open_body(data, identity=me, sharer=SHARER.public, sealed=True, **about)
    me = changes.get("me", QUERIER)
    return open_answers(data, identity=me, site=RECEIVER.public, rows=1, **about)


@pytest.mark.parametrize("name", SEALED)
def test_seal_opens_for_its_recipient_alone(name):
    assert opening(name, SEALED[name])
    with pytest.raises(SealError):
        opening(name, SEALED[name], me=OTHER)


@pytest.mark.parametrize("name", SEALED)
@pytest.mark.parametrize("change", [{"run_id": 8}, {"query_id": "q-1"}, {"round_number": 2}])
def test_seal_of_another_run_query_or_round_does_not_open(name, change):
    if "round_number" in change and name in ("asked", "ask"):
        return  # the ask says its round itself, and questions serve all rounds
    with pytest.raises(SealError):
        opening(name, SEALED[name], **change)


@settings(max_examples=100)
@given(st.sampled_from(sorted(SEALED)), st.data())
def test_altered_seal_does_not_open(name, data):
    good = SEALED[name]
    at = data.draw(st.integers(0, len(good) - 1))
    with pytest.raises(SealError):
        opening(name, good[:at] + bytes([good[at] ^ 1]) + good[at + 1 :])


def test_one_seal_is_not_taken_for_another():
    for name, other in (("asked", "body"), ("body", "asked")):  # both are to the receiver
        with pytest.raises(SealError):
            opening(name, SEALED[other])


def test_body_that_another_site_signed_is_refused():
    data = pack_body(
        ShareBody(notes=("a",)), identity=OTHER, reply_to=RECEIVER.public, seal=False, **ABOUT
    )
    with pytest.raises(SignatureError):
        open_body(data, sharer=SHARER.public, receiver=RECEIVER.key_id, sealed=False, **ABOUT)


def test_coordinator_cannot_open_a_sealed_body():
    with pytest.raises(BindingError):
        open_body(SEALED["body"], sharer=SHARER.public, sealed=True, **ABOUT)


def test_ask_names_who_makes_it_and_for_whom():
    for options in ({"identity": OTHER}, {"sharer": OTHER.public}):
        with pytest.raises(BindingError):
            pack_ask(ASK, **{"identity": RECEIVER, "sharer": SHARER.public} | options)
    forged = dataclasses.replace(ASK, reply_to=OTHER.public)
    data = pack_ask(forged, identity=OTHER, sharer=SHARER.public)
    with pytest.raises(BindingError):
        opening("ask", data)  # the querier named another receiver


def test_ask_that_its_receiver_did_not_sign_is_refused():
    # Anybody can seal to the sharer, with a consent that it has seen.
    info, plain = refine_ask._ask_info(RUN, QUERY, SHARER.key_id), ASK.to_bytes()
    for author, error in ((RECEIVER, None), (OTHER, SignatureError)):
        signed = author.sign("language ask", info + plain) + plain
        data = seal_to(SHARER.public, signed, info=info)
        if error is None:
            assert opening("ask", data) == ASK
        else:
            with pytest.raises(error):
                opening("ask", data)


def test_questions_that_their_querier_did_not_sign_are_refused():
    # Whoever has seen a consent could otherwise put questions of its own under it.
    info = refine_asked._info(RUN, QUERY, RECEIVER.key_id)
    plain = dataclasses.replace(ASKED, questions=("something else ?",)).to_bytes()
    for author, error in ((QUERIER, None), (OTHER, SignatureError)):
        signed = author.sign("language question", info + plain) + plain
        data = seal_to(RECEIVER.public, signed, info=info)
        if error is None:
            assert opening("asked", data).questions == ("something else ?",)
        else:
            with pytest.raises(error):
                opening("asked", data)


def test_questions_of_a_querier_are_sealed_and_signed_by_it():
    with pytest.raises(BindingError):
        seal_asked(ASKED, identity=OTHER, receiver=RECEIVER.public)
    with pytest.raises(BindingError):
        seal_asked(ASKED, identity=QUERIER, receiver=OTHER.public)
    data = pack_ask(ASK, identity=RECEIVER, sharer=SHARER.public, seal=False)
    with pytest.raises(SignatureError):
        open_ask(data, identity=SHARER, run_id=RUN, query_id=QUERY, sealed=False)


# -- consent -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "change",
    [
        {"allow": ("cache", "full-cache", "text")},
        {"sharers": (OTHER.key_id,)},
        {"receiver": OTHER.key_id},
        {"max_rounds": 4},
        {"expires_at": 2e9},
        {"batch": "b-1"},
        {"querier": OTHER.public},
        {"querier": None},
    ],
)
def test_consent_that_was_altered_does_not_verify(change):
    with pytest.raises(SignatureError):
        dataclasses.replace(CONSENT, **change).require_signature()


def test_consent_covers_what_it_says_and_no_more():
    CONSENT.require_medium("text")
    CONSENT.require_sharer(SHARER.key_id)
    CONSENT.require_open(now_s=1e9, round_number=3)
    with pytest.raises(MediumRefusedError):
        CONSENT.require_medium("full-cache")
    with pytest.raises(UntrustedKeyError):
        CONSENT.require_sharer(OTHER.key_id)
    with pytest.raises(ExpiredError):
        CONSENT.require_open(now_s=1e9 + 1, round_number=1)
    for number in (0, 4):
        with pytest.raises(BindingError):
            CONSENT.require_open(now_s=0.0, round_number=number)


def test_consent_in_clear_names_sharers_or_takes_any():
    CLEAR.require_signature()
    CLEAR.require_sharer(OTHER.key_id)
    named = dataclasses.replace(CLEAR, sharers=(SHARER.key_id,))
    with pytest.raises(UntrustedKeyError):
        named.require_sharer(OTHER.key_id)
    nobody = dataclasses.replace(CONSENT, sharers=()).signed(QUERIER)
    with pytest.raises(UntrustedKeyError):
        nobody.require_sharer(OTHER.key_id)


@pytest.mark.parametrize(
    "change", [{"allow": ("mail",)}, {"max_rounds": 0}, {"query_id": ""}, {"receiver": ""}]
)
def test_consent_that_cannot_be_fails_when_built(change):
    with pytest.raises(InvalidValueError):
        dataclasses.replace(CONSENT, **change)


@pytest.mark.parametrize(
    ("share", "medium"),
    [
        ({"last": 1}, "cache"),
        ({"last": 8}, "cache"),
        ({"last": 9}, "full-cache"),
        ({"last": 0}, "full-cache"),
        ({"last": True}, "full-cache"),
        ({"last": -1}, "full-cache"),
        ({"last": 1.0}, "full-cache"),
        ({}, "full-cache"),
    ],
)
def test_share_of_many_tokens_needs_the_consent_for_full_caches(share, medium):
    assert refine_fields.medium_of(share) == medium


# -- strict readers ----------------------------------------------------------------------

DOCUMENTS = [
    *((type(r).read, r.to_envelope(run_id=RUN)) for r in REQUESTS),
    (
        lambda e: RephraseReply.read(e, run_id=RUN, sender=NODE, query_id=QUERY),
        REPHRASED.to_envelope(run_id=RUN, sender=NODE),
    ),
    (
        lambda e: read_share_reply(e, run_id=RUN, sender=NODE, query_id=QUERY),
        ShareOffer(query_id=QUERY, handle="h", body_bytes=1).to_envelope(run_id=RUN, sender=NODE),
    ),
    (
        lambda e: AnswerReply.read(e, run_id=RUN, sender=NODE, query_id=QUERY),
        AnswerReply(query_id=QUERY, body=b"b", sealed=False).to_envelope(run_id=RUN, sender=NODE),
    ),
    (lambda e: Asked.from_bytes(encode(e)), decode(ASKED.to_bytes())),
    (lambda e: ShareAsk.from_bytes(encode(e)), decode(ASK.to_bytes())),
    (
        lambda e: ShareBody.from_bytes(encode(e)),
        decode(ShareBody(notes=("a",)).to_bytes(run_id=RUN, query_id=QUERY)),
    ),
    (
        lambda e: Answers.from_bytes(encode(e), rows=1),
        decode(Answers(texts=("x",)).to_bytes(run_id=RUN, query_id=QUERY)),
    ),
]
WRONG = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-2, 1 << 70),
    st.floats(allow_nan=False, allow_infinity=False),
    st.text(max_size=5),
    st.lists(st.integers(), max_size=2),
    st.dictionaries(st.text(max_size=3), st.none(), max_size=2),
)


@settings(max_examples=400)
@given(st.sampled_from(DOCUMENTS), st.data())
def test_document_with_a_wrong_field_is_a_typed_error_or_another_document(document, data):
    read, envelope = document
    name = data.draw(st.sampled_from(sorted(envelope.meta)))
    value = data.draw(WRONG.filter(lambda v: v != envelope.meta[name]))
    try:
        read(dataclasses.replace(envelope, meta={**envelope.meta, name: value}))
    except FedInferError as exc:
        assert isinstance(exc, ProtocolError)  # noqa: PT017  the other way is fine as well


@settings(max_examples=300)
@given(st.sampled_from(DOCUMENTS), st.data())
def test_document_with_a_wrong_section_is_a_typed_error_or_another_document(document, data):
    read, envelope = document
    at = data.draw(st.integers(0, len(envelope.sections) - 1))
    noise = st.binary(max_size=40) | st.sampled_from([b"[", b"[[]]", b"[3]", b'["\\ud800"]'])
    sections = [*envelope.sections]
    sections[at] = (sections[at][0], data.draw(noise))
    try:
        read(dataclasses.replace(envelope, sections=tuple(sections)))
    except FedInferError as exc:
        assert isinstance(exc, ProtocolError)  # noqa: PT017


@pytest.mark.parametrize("document", range(len(DOCUMENTS)))
def test_document_with_a_field_or_section_more_or_less_is_refused(document):
    read, envelope = DOCUMENTS[document]
    read(envelope)
    with pytest.raises(EnvelopeError):
        read(dataclasses.replace(envelope, meta={**envelope.meta, "more": 1}))
    with pytest.raises(EnvelopeError):
        read(dataclasses.replace(envelope, sections=(*envelope.sections, ("more", b""))))
    with pytest.raises(EnvelopeError):
        read(dataclasses.replace(envelope, sections=envelope.sections[1:]))
    for name in envelope.meta:
        rest = {k: v for k, v in envelope.meta.items() if k != name}
        with pytest.raises(EnvelopeError):
            read(dataclasses.replace(envelope, meta=rest))


def test_same_sharer_twice_is_refused():
    double = dataclasses.replace(REQUESTS[0], sharers=(SEAT, SEAT))
    with pytest.raises(EnvelopeError):
        RephraseRequest.read(double.to_envelope(run_id=RUN))
    part = REQUESTS[3].parts[0]
    twice = dataclasses.replace(REQUESTS[3], parts=(part, part))
    with pytest.raises(EnvelopeError):
        RefineRequest.read(twice.to_envelope(run_id=RUN))
    asks = dataclasses.replace(REPHRASED, asks=REPHRASED.asks * 2)
    with pytest.raises(EnvelopeError):
        RephraseReply.read(
            asks.to_envelope(run_id=RUN, sender=NODE), run_id=RUN, sender=NODE, query_id=QUERY
        )


def test_numbers_are_bounded_and_finite():
    with pytest.raises(InvalidScoresError):
        refine_fields.evidence_from_bytes(np.full((1, 4), np.nan, "<f4").tobytes())
    with pytest.raises(ShapeError):
        refine_fields.evidence_from_bytes(bytes(17))
    with pytest.raises(ShapeError):
        refine_fields.evidence_from_bytes(bytes(16), rows=2)
    with pytest.raises(EnvelopeError):
        refine_fields.bits_from_bytes(b"\x02", rows=1, sharers=1)
    with pytest.raises(SizeLimitError):
        refine_fields.texts_from_bytes(refine_fields.texts_to_bytes(["x"] * 5000))
    with pytest.raises(EnvelopeError):
        refine_fields.spans_from_bytes(b"[[[2,1]]]")
    with pytest.raises(SizeLimitError):
        refine_fields.spans_from_bytes(b"[[" + b"0," * (1 << 20) + b"0]]")
    with pytest.raises(InvalidValueError):
        Asked(questions=(), consent=CLEAR)
