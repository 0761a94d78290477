"""The receiver's side: whom it asks and how, what it believes, and its own answer always."""

from __future__ import annotations

import dataclasses
import logging
import time

import numpy as np
import pytest
import torch

from fedinfer_flower.clients import language_state
from fedinfer_flower.clients.language_mod import LanguagePolicy, LanguageSite
from fedinfer_flower.errors import (
    BindingError,
    CacheError,
    EnvelopeError,
    ExpiredError,
    FuserError,
    HandleError,
    MediumRefusedError,
    ModelAnswerError,
    PromptTooLongError,
    ReplayError,
    SealError,
    ShapeError,
    SignatureError,
    SizeLimitError,
    UntrustedKeyError,
)
from fedinfer_flower.kv.fuser import FuserSpec, make_fuser
from fedinfer_flower.kv.fuser_bank import FuserBank
from fedinfer_flower.kv.gate import Gate
from fedinfer_flower.kv.payload import PayloadLimits, decode_entries, encode_entries
from fedinfer_flower.kv.share import ShareSpec
from fedinfer_flower.kv.static_scales import StaticScales
from fedinfer_flower.refine.receiver import Receiver
from fedinfer_flower.refine.sharer import Sharer
from fedinfer_flower.wire.actions import CANDIDATES, REFINE, REPHRASE
from fedinfer_flower.wire.identity import Identity
from fedinfer_flower.wire.refine_answers import AnswerReply, open_answers
from fedinfer_flower.wire.refine_ask import ShareBody, open_ask, open_body, pack_body
from fedinfer_flower.wire.refine_asked import Asked, QuerierConsent, seal_asked
from fedinfer_flower.wire.refine_documents import RephraseReply, RephraseRequest
from fedinfer_flower.wire.refine_request import CandidatesRequest, Part, RefineRequest

CANARY = "CANARY-1f9b"
SPEC = ShareSpec(last=1, decode=1)


def identity_of(site) -> Identity:
    return site.mod._memory(site.context).identity


def own_answers(site, questions) -> tuple[str, ...]:
    receiver = Receiver(site.mod._state(site.context).model)
    return tuple(receiver.answer(receiver.own(questions)))


def packed(ask, sharer, body: ShareBody, **changes) -> Part:
    """Return a part as the sharer would have packed it, with something else in it."""
    options = {
        "identity": identity_of(sharer),
        "reply_to": ask.receiver.card.identity,
        "run_id": ask.run_id,
        "query_id": ask.query_id,
        "round_number": ask.round_number,
    }
    data = pack_body(body, **options | changes)
    return Part(sharer=sharer.card.key_id, medium=ask.medium, body=data)


def opened(ask, sharer, data: bytes, **changes) -> ShareBody:
    options = {
        "identity": identity_of(ask.receiver),
        "sharer": sharer.card.identity,
        "run_id": ask.run_id,
        "query_id": ask.query_id,
        "round_number": ask.round_number,
        "sealed": True,
    }
    return open_body(data, **options | changes)


# -- answers -----------------------------------------------------------------------------


def test_no_parts_is_the_own_answer(pair, make_ask, questions):
    receiver, sharer = pair
    ask = make_ask(receiver, [sharer], questions)
    reply, answers = ask.refined(handle=ask.rephrased().handle)
    assert answers.texts == own_answers(receiver, questions)
    assert not reply.sealed
    assert answers.sharers == ()


def test_text_brings_what_the_sharer_knows(pair, make_ask, questions, world):
    receiver, sharer = pair
    facts = world.facts(world.private[1])[:16]
    asked = tuple(fact.question() for fact in facts)
    reply, answers = make_ask(receiver, [sharer], asked, medium="text").whole()
    right = sum(a == f.value for a, f in zip(answers.texts, facts, strict=True))
    alone = sum(a == f.value for a, f in zip(own_answers(receiver, asked), facts, strict=True))
    # The sharer knows these facts by heart, the receiver knows none.
    assert alone <= 2
    assert right >= 12
    assert not reply.dropped


def test_cache_changes_the_state_and_is_reported(pair, make_ask, questions, models, bank):
    receiver, sharer = pair
    reply, answers = make_ask(receiver, [sharer], questions, rephrase="none").whole()
    shared = Sharer(models["llama"]).share(questions, SPEC)
    fuser = bank.get(models["llama"].layout, models["qwen3"].layout)
    own = Receiver(models["qwen3"]).own(questions)
    # What travelled was int8: the same tokens come out of entries that passed through it.
    read = decode_entries(encode_entries(shared.entries, codec="int8"), limits=PayloadLimits())
    expected = Receiver(models["qwen3"]).answer(
        Receiver(models["qwen3"]).fuse(own, [(fuser, read)])
    )
    assert list(answers.texts) == expected
    assert answers.used.tolist() == [[1], [1], [1]]
    assert not reply.dropped


def test_cache_and_text_of_two_sharers_are_used_together(
    federation, models, bank, make_ask, questions
):
    receiver = federation.site(models["qwen3"], fusers=bank)
    sharers = [federation.site(models["llama"]), federation.site(models["qwen2"])]
    ask = make_ask(receiver, sharers, questions)
    caches, texts = ask.seats(), ask.seats(medium="text")
    reply = ask.rephrased(sharers=(caches[0], texts[1]))
    assert [a.medium for a in reply.asks] == ["cache", "text"]
    done, answers = ask.refined(handle=reply.handle, parts=ask.parts(reply))
    assert not done.dropped
    assert set(answers.sharers) == {s.card.key_id for s in sharers}
    assert answers.used.shape == (3, 2)


def test_sharers_get_different_wordings(federation, models, make_ask, questions):
    receiver = federation.site(models["qwen3"])
    sharers = [federation.site(models["llama"]), federation.site(models["qwen2"])]
    ask = make_ask(receiver, sharers, questions, medium="text", rephrase="template")
    reply = ask.rephrased()
    asked = [
        open_ask(
            a.body, identity=identity_of(s), run_id=ask.run_id, query_id=ask.query_id, sealed=True
        ).questions
        for a, s in zip(reply.asks, sharers, strict=True)
    ]
    assert len({questions, *asked}) == 3


def test_decoding_is_capped_by_the_site(federation, models, make_ask, questions, open_policy):
    policy = dataclasses.replace(open_policy, max_new_tokens=1)
    receiver = federation.site(models["llama"], policy=policy)  # three letters a token
    ask = make_ask(receiver, [], questions)
    _, answers = ask.refined(asked=ask.asked(decoding={"max_new_tokens": 500, "stop": ("#",)}))
    assert all(len(text) <= 3 for text in answers.texts)


@pytest.mark.parametrize("decoding", [{"max_new_tokens": 0}, {"beams": 3}, {"top_p": "all"}])
def test_decoding_out_of_range_is_refused(pair, make_ask, questions, decoding):
    ask = make_ask(pair[0], [], questions)
    with pytest.raises(EnvelopeError):
        ask.refined(asked=ask.asked(decoding=decoding))


def test_notes_that_say_nothing_are_not_quoted(pair, make_ask, questions):
    receiver, sharer = pair
    ask = make_ask(receiver, [sharer], questions, medium="text")
    handle = ask.rephrased().handle
    part = packed(ask, sharer, ShareBody(notes=("unk", "", "I do not know.")))
    _, answers = ask.refined(handle=handle, parts=(part,))
    assert answers.used.tolist() == [[0], [0], [0]]
    assert answers.texts == own_answers(receiver, questions)


# -- whom it asks ------------------------------------------------------------------------


def test_missing_fuser_falls_back_to_text_where_both_allow_it(
    federation, models, make_ask, questions
):
    receiver, sharer = federation.site(models["qwen3"]), federation.site(models["llama"])
    key_id = sharer.card.key_id
    reply = make_ask(receiver, [sharer], questions).rephrased()
    assert [a.medium for a in reply.asks] == ["text"]
    assert reply.changed == {key_id: FuserError.code}
    ask = make_ask(receiver, [sharer], questions, allow=("cache",))
    reply = ask.rephrased()
    assert reply.refused == {key_id: FuserError.code}
    assert not reply.asks


@pytest.mark.parametrize("allow", [(), ("text",), ("full-cache",)])
def test_cache_is_not_asked_for_without_the_queriers_consent(pair, make_ask, questions, allow):
    receiver, sharer = pair
    reply = make_ask(receiver, [sharer], questions, allow=allow).rephrased()
    assert "cache" not in [a.medium for a in reply.asks]
    found = reply.changed if "text" in allow else reply.refused
    assert found == {sharer.card.key_id: MediumRefusedError.code}


def test_cache_is_not_asked_of_a_site_that_does_not_share_it(
    federation, models, bank, make_ask, questions
):
    receiver = federation.site(models["qwen3"], fusers=bank)
    sharer = federation.site(models["llama"], policy=LanguagePolicy(share_speeds=False))
    reply = make_ask(receiver, [sharer], questions).rephrased()
    assert reply.refused == {sharer.card.key_id: MediumRefusedError.code}


def test_full_cache_fuser_needs_the_second_consent(federation, models, make_ask, questions):
    spec = FuserSpec.for_pair("concat", models["llama"].layout, models["qwen3"].layout, width=16)
    fusers = FuserBank({spec.pair: make_fuser(spec)})
    receiver, sharer = (
        federation.site(models["qwen3"], fusers=fusers),
        federation.site(models["llama"]),
    )
    refused = make_ask(receiver, [sharer], questions, allow=("cache",)).rephrased().refused
    assert refused == {sharer.card.key_id: MediumRefusedError.code}
    reply, answers = make_ask(receiver, [sharer], questions, allow=("full-cache",)).whole()
    assert not reply.dropped
    assert answers.used.all()


def test_fuser_that_aligns_tokens_needs_the_same_words(federation, models, make_ask, questions):
    spec = FuserSpec.for_pair("fuse", models["llama"].layout, models["qwen3"].layout, width=16)
    fusers = FuserBank({spec.pair: make_fuser(spec)})
    receiver = federation.site(models["qwen3"], fusers=fusers)
    sharer = federation.site(models["llama"])
    reply = make_ask(receiver, [sharer], questions, rephrase="template").rephrased()
    assert reply.changed == {sharer.card.key_id: FuserError.code}
    done, answers = make_ask(receiver, [sharer], questions, rephrase="none").whole()
    assert not done.dropped
    assert answers.used.all()


@pytest.mark.parametrize(("rows", "bits"), [(24, 4), (1, 8)])
def test_static_scales_travel_with_the_ask_where_they_save_more_than_they_weigh(
    federation, models, make_ask, questions, rows, bits
):
    spec = FuserSpec.for_pair(
        "last-token", models["llama"].layout, models["qwen3"].layout, width=16
    )
    fuser = make_fuser(spec)
    fuser.scales = StaticScales.fit(Sharer(models["llama"]).share(questions, SPEC).entries)
    receiver = federation.site(models["qwen3"], fusers=FuserBank({spec.pair: fuser}))
    sharer = federation.site(models["llama"])
    ask = make_ask(receiver, [sharer], (list(questions) * 24)[:rows])
    reply = ask.rephrased()
    body = opened(ask, sharer, ask.shared(reply).body)
    floats = 2 * models["llama"].layout.floats_per_token(hidden=False) * rows
    # Bits a number, two tokens a question; the header, and in-message scales of int8.
    assert floats * bits // 8 < len(body.payload) <= floats * bits // 8 + 700 + 40 * rows
    part = Part(sharer=sharer.card.key_id, medium="cache", body=b"")
    done, _ = ask.refined(handle=reply.handle, parts=(part,))
    assert done.dropped == {sharer.card.key_id: SealError.code}


def test_receiver_asks_no_site_that_it_does_not_know_or_that_is_itself(
    federation, models, bank, make_ask, questions
):
    receiver = federation.site(models["qwen3"], fusers=bank, peer_key_ids=("0" * 64,))
    sharer = federation.site(models["llama"])
    reply = make_ask(receiver, [sharer, receiver], questions).rephrased()
    assert reply.refused == {
        sharer.card.key_id: UntrustedKeyError.code,
        receiver.card.key_id: BindingError.code,
    }


def test_forged_card_is_refused(pair, make_ask, questions):
    receiver, sharer = pair
    ask = make_ask(receiver, [sharer], questions)
    (seat,) = ask.seats()
    forged = dataclasses.replace(seat.card, media=("cache",), name="other")
    with pytest.raises(SignatureError):
        ask.rephrased(sharers=(dataclasses.replace(seat, card=forged),))


def test_pure_sharer_answers_nothing(federation, models, make_ask, questions, open_policy):
    policy = dataclasses.replace(open_policy, answers=False)
    site = federation.site(models["llama"], policy=policy)
    with pytest.raises(MediumRefusedError):
        make_ask(site, [], questions).rephrased()
    ask = make_ask(site, [], questions)
    with pytest.raises(MediumRefusedError):
        ask.refined(asked=ask.asked())


# -- what it believes --------------------------------------------------------------------


def lies(models, questions):
    """Return payloads and evidence that must cost their sharer its place, with the reason."""
    good = Sharer(models["llama"]).share(questions, SPEC)
    other = Sharer(models["qwen2"]).share(questions, SPEC).entries
    entries, shown = good.entries, good.evidence.numpy()
    huge = tuple(k * 1e12 for k in entries.keys)
    payload = encode_entries(entries, codec="fp32")
    with_nan = bytearray(encode_entries(entries, codec="fp32", squeeze=False))
    with_nan[-4:] = np.array([np.nan], "<f4").tobytes()
    more = Sharer(models["llama"]).share([*questions, questions[0]], SPEC).entries
    wide = Sharer(models["llama"]).share(questions, ShareSpec(last=3, decode=1)).entries
    scales = StaticScales.fit(entries)
    return [
        ("another model's", encode_entries(other, codec="fp32"), shown, CacheError),
        ("not finite", bytes(with_nan), shown, CacheError),
        (
            "huge",
            encode_entries(dataclasses.replace(entries, keys=huge), codec="fp32"),
            shown,
            CacheError,
        ),
        ("truncated", payload[:-1], shown, CacheError),
        ("nothing", b"", shown, CacheError),
        ("more rows", encode_entries(more, codec="fp32"), shown, SizeLimitError),
        ("fewer rows", encode_entries(entries.select([0]), codec="fp32"), shown, ShapeError),
        ("more tokens", encode_entries(wide, codec="fp32"), shown, SizeLimitError),
        (
            "other scales",
            encode_entries(entries, codec="static4", scales=scales),
            shown,
            CacheError,
        ),
        ("other evidence", payload, shown[:1], ShapeError),
    ]


@pytest.mark.parametrize("number", range(10))
def test_lying_sharer_is_dropped_and_the_own_answer_stands(
    pair, make_ask, questions, models, number
):
    receiver, sharer = pair
    _, payload, evidence, error = lies(models, questions)[number]
    ask = make_ask(receiver, [sharer], questions)
    handle = ask.rephrased().handle
    part = packed(ask, sharer, ShareBody(payload=payload, evidence=evidence))
    reply, answers = ask.refined(handle=handle, parts=(part,))
    assert reply.dropped == {sharer.card.key_id: error.code}
    assert answers.texts == own_answers(receiver, questions)
    assert answers.sharers == ()


def test_oversized_payload_is_dropped(federation, models, bank, make_ask, questions, open_policy):
    policy = dataclasses.replace(open_policy, max_payload_bytes=1000)
    receiver = federation.site(models["qwen3"], fusers=bank, policy=policy)
    sharer = federation.site(models["llama"])
    reply, answers = make_ask(receiver, [sharer], questions).whole()
    assert reply.dropped == {sharer.card.key_id: SizeLimitError.code}
    assert answers.texts == own_answers(receiver, questions)


@pytest.mark.parametrize(
    ("notes", "error"),
    [(("x",), ShapeError), (("x", "y", "z" * 5000), SizeLimitError)],
)
def test_notes_that_do_not_fit_are_dropped(pair, make_ask, questions, notes, error):
    receiver, sharer = pair
    ask = make_ask(receiver, [sharer], questions, medium="text")
    handle = ask.rephrased().handle
    part = packed(ask, sharer, ShareBody(notes=notes))
    reply, answers = ask.refined(handle=handle, parts=(part,))
    assert reply.dropped == {sharer.card.key_id: error.code}
    assert answers.texts == own_answers(receiver, questions)


def test_notes_longer_than_the_window_are_dropped(
    federation, models, make_ask, questions, monkeypatch
):
    receiver, sharer = federation.site(models["qwen3"]), federation.site(models["llama"])

    def ask_with_notes(self, question, notes, *, documents=()):
        return " ".join(["tukem"] * models["qwen3"].layout.window + [question])

    monkeypatch.setattr(type(models["qwen3"].prompts), "ask_with_notes", ask_with_notes)
    reply, answers = make_ask(receiver, [sharer], questions, medium="text").whole()
    assert reply.dropped == {sharer.card.key_id: PromptTooLongError.code}
    assert answers.texts == own_answers(receiver, questions)


@pytest.mark.parametrize("change", [{"query_id": "q-x"}, {"round_number": 2}])
def test_part_of_another_batch_or_round_is_dropped(pair, make_ask, questions, models, change):
    receiver, sharer = pair
    good = Sharer(models["llama"]).share(questions, SPEC)
    body = ShareBody(payload=encode_entries(good.entries, codec="int8"))
    ask = make_ask(receiver, [sharer], questions)
    handle = ask.rephrased().handle
    reply, _ = ask.refined(handle=handle, parts=(packed(ask, sharer, body, **change),))
    assert reply.dropped == {sharer.card.key_id: SealError.code}


def test_part_by_somebody_else_is_dropped(pair, make_ask, questions, models):
    receiver, sharer = pair
    good = Sharer(models["llama"]).share(questions, SPEC)
    body = ShareBody(payload=encode_entries(good.entries, codec="int8"))
    ask = make_ask(receiver, [sharer], questions)
    handle = ask.rephrased().handle
    forged = packed(ask, sharer, body, identity=Identity.generate())
    unasked = dataclasses.replace(forged, sharer="1" * 64)
    reply, answers = ask.refined(handle=handle, parts=(forged, unasked))
    assert reply.dropped == {forged.sharer: SealError.code, unasked.sharer: BindingError.code}
    assert answers.texts == own_answers(receiver, questions)


def test_one_bad_part_does_not_harm_the_others(federation, models, bank, make_ask, questions):
    receiver = federation.site(models["qwen3"], fusers=bank)
    sharers = [federation.site(models["llama"]), federation.site(models["qwen2"])]
    ask = make_ask(receiver, sharers, questions)
    reply = ask.rephrased()
    first, second = ask.parts(reply)
    broken = dataclasses.replace(first, body=first.body[:-1])
    done, answers = ask.refined(handle=reply.handle, parts=(broken, second))
    assert done.dropped == {first.sharer: SealError.code}
    assert answers.sharers == (second.sharer,)


class NeverGate(Gate):
    def _pick(self, own, sharers, seen, agreement):
        return torch.zeros_like(seen)


def test_closed_gate_is_exactly_the_own_answer(federation, models, bank, make_ask, questions):
    receiver = federation.site(models["qwen3"], fusers=bank, gate=NeverGate())
    sharer = federation.site(models["llama"])
    reply, answers = make_ask(receiver, [sharer], questions).whole()
    assert not reply.dropped
    assert answers.used.tolist() == [[0], [0], [0]]
    assert answers.texts == own_answers(receiver, questions)


def test_gate_by_name_chooses_one_sharer_a_question(federation, models, bank, make_ask, questions):
    receiver = federation.site(models["qwen3"], fusers=bank, gate="top-k")
    sharers = [federation.site(models["llama"]), federation.site(models["qwen2"])]
    _, answers = make_ask(receiver, sharers, questions).whole()
    assert (answers.used.sum(1) <= 1).all()
    # The first knows these people by heart, the second abstains.
    assert answers.used[:, 0].all()


# -- candidates --------------------------------------------------------------------------


def scored(site, asked, query_id):
    request = CandidatesRequest(query_id=query_id, asked=asked)
    envelope = site.answer(request.to_envelope(run_id=site.context.run_id), CANDIDATES)
    return AnswerReply.read(envelope, query_id=query_id, **site.where)


def test_candidates_are_scored_as_the_model_would(federation, models, questions, open_policy):
    policy = dataclasses.replace(open_policy, candidates=True)
    site = federation.site(models["llama"], policy=policy)
    consent = QuerierConsent(run_id=federation.run_id, query_id="c-1")
    asked = Asked(questions=questions, consent=consent, candidates=("unk", "tukem", "dodam"))
    reply = scored(site, asked.to_bytes(), "c-1")
    answers = open_answers(
        reply.body,
        site=site.card.identity,
        run_id=federation.run_id,
        query_id="c-1",
        round_number=1,
        rows=len(questions),
    )
    model = models["llama"]
    expected = model.score([model.prompts.ask(q) for q in questions], asked.candidates)
    np.testing.assert_allclose(answers.scores, expected.numpy(), rtol=1e-6)
    assert answers.texts == ()
    with pytest.raises(ReplayError):
        scored(site, asked.to_bytes(), "c-1")


@pytest.mark.parametrize(
    ("candidates", "error"),
    [
        ((), EnvelopeError),
        (("",), EnvelopeError),
        (("x",) * 300, EnvelopeError),
        (("x" * 5000,), SizeLimitError),
    ],
)
def test_candidates_out_of_range_are_refused(
    federation, models, questions, open_policy, candidates, error
):
    policy = dataclasses.replace(open_policy, candidates=True)
    site = federation.site(models["llama"], policy=policy)
    consent = QuerierConsent(run_id=federation.run_id, query_id="c-2")
    asked = Asked(questions=questions, consent=consent, candidates=candidates)
    with pytest.raises(error):
        scored(site, asked.to_bytes(), "c-2")


# -- handles, replay, expiry -------------------------------------------------------------


def test_lost_state_is_computed_anew_from_the_questions(pair, make_ask, questions):
    receiver, sharer = pair
    ask = make_ask(receiver, [sharer], questions, rephrase="none")
    reply = ask.rephrased()
    parts = ask.parts(reply)
    seats = ask.seats()
    before = own_answers(receiver, questions)
    language_state.clear()  # a new process
    with pytest.raises(HandleError):
        ask.refined(handle=reply.handle, parts=parts)
    done, answers = ask.refined(
        handle=reply.handle,
        asked=ask.asked(rephrase="none"),
        sharers=seats,
        parts=parts,
    )
    assert not done.dropped
    assert answers.used.all()
    assert len(before) == len(answers.texts)


def test_handle_of_another_query_or_round_is_refused(pair, make_ask, questions):
    receiver, sharer = pair
    first, second = (make_ask(receiver, [sharer], questions, rounds=2) for _ in range(2))
    handle = first.rephrased().handle
    with pytest.raises(HandleError):
        second.refined(handle=handle)
    with pytest.raises(BindingError):
        dataclasses.replace(first, round_number=2).refined(handle=handle)


def test_handle_expires(federation, models, bank, make_ask, questions, open_policy):
    policy = dataclasses.replace(open_policy, handle_ttl_s=1e-9)
    ask = make_ask(federation.site(models["qwen3"], policy=policy), [], questions)
    with pytest.raises(HandleError):
        ask.refined(handle=ask.rephrased().handle)


def test_replayed_requests_are_refused(pair, make_ask, questions):
    receiver, sharer = pair
    ask = make_ask(receiver, [sharer], questions)
    handle = ask.rephrased().handle
    with pytest.raises(ReplayError):
        ask.rephrased()
    ask.refined(handle=handle)
    with pytest.raises(HandleError):
        ask.refined(handle=handle)
    with pytest.raises(ReplayError):
        ask.refined(asked=ask.asked())


def test_expired_questions_are_refused(pair, make_ask, questions):
    receiver, sharer = pair
    with pytest.raises(ExpiredError):
        make_ask(receiver, [sharer], questions, expires_at=time.time() - 1).rephrased()


def test_more_rounds_than_agreed_are_refused(pair, make_ask, questions):
    receiver, sharer = pair
    with pytest.raises(BindingError):
        make_ask(receiver, [sharer], questions, round_number=2).rephrased()
    # In the first round as well: what is given then is passed on later.
    for number in (1, 5):
        with pytest.raises(MediumRefusedError):
            make_ask(receiver, [sharer], questions, round_number=number, rounds=5).rephrased()


def test_question_that_is_too_long_is_a_typed_error(federation, models, make_ask, open_policy):
    policy = dataclasses.replace(open_policy, max_question_chars=65_536)
    site = federation.site(models["qwen3"], policy=policy)
    asked = ("tukem " * models["qwen3"].layout.window,)
    with pytest.raises(PromptTooLongError) as caught:
        make_ask(site, [], asked).rephrased()
    assert "tukem" not in str(caught.value)


@pytest.mark.parametrize("step", ["rephrase", "refine"])
def test_nothing_of_a_question_is_in_a_receivers_error_or_log(
    pair, make_ask, questions, models, monkeypatch, caplog, step
):
    caplog.set_level(logging.DEBUG)
    receiver, sharer = pair
    ask = make_ask(receiver, [sharer], (*questions, f"Q city of {CANARY} ?"))
    _ = receiver.card, sharer.card  # loads the models

    def failing(self, prompts, **options):
        raise RuntimeError(f"cannot read {prompts}")

    monkeypatch.setattr(type(models["qwen3"]), "prefill", failing)
    with pytest.raises(ModelAnswerError) as caught:
        ask.rephrased() if step == "rephrase" else ask.refined(asked=ask.asked())
    assert CANARY not in str(caught.value)
    assert CANARY not in caplog.text
    assert "RuntimeError" in caplog.text  # it was logged, without its text


# -- a querier of its own ----------------------------------------------------------------


@pytest.fixture
def querier() -> Identity:
    return Identity.generate()


def sealed_for(ask, querier, *, sharers=None, **changes) -> bytes:
    named = [s.card.key_id for s in ask.sharers] if sharers is None else sharers
    consent = dataclasses.replace(
        ask.consent, receiver=ask.receiver.card.key_id, sharers=tuple(named)
    ).signed(querier)
    asked = Asked(questions=ask.questions, consent=consent, **changes)
    return seal_asked(asked, identity=querier, receiver=ask.receiver.card.identity)


def test_sealed_questions_get_sealed_answers(
    federation, models, bank, make_ask, questions, querier
):
    options = {"querier_key_ids": (querier.key_id,), "require_seal": True}
    receiver = federation.site(models["qwen3"], fusers=bank, **options)
    sharer = federation.site(models["llama"], **options)
    ask = make_ask(receiver, [sharer], questions)
    reply = ask.rephrased(asked=sealed_for(ask, querier), sealed=True)
    request = RefineRequest(
        query_id=ask.query_id, round_number=1, handle=reply.handle, parts=ask.parts(reply)
    )
    envelope = receiver.answer(request.to_envelope(run_id=ask.run_id), REFINE)
    done = AnswerReply.read(envelope, query_id=ask.query_id, **receiver.where)
    assert done.sealed
    assert not done.dropped
    about = {
        "site": receiver.card.identity,
        "run_id": ask.run_id,
        "query_id": ask.query_id,
        "round_number": 1,
        "rows": len(questions),
    }
    assert open_answers(done.body, identity=querier, **about).used.all()
    with pytest.raises(SealError):
        open_answers(done.body, identity=Identity.generate(), **about)


def test_sharer_that_the_querier_did_not_name_is_not_asked(pair, make_ask, questions, querier):
    receiver, sharer = pair
    ask = make_ask(receiver, [sharer], questions)
    reply = ask.rephrased(asked=sealed_for(ask, querier, sharers=("1" * 64,)), sealed=True)
    assert reply.refused == {sharer.card.key_id: UntrustedKeyError.code}
    assert not reply.asks


@pytest.mark.parametrize("chosen", ["template", ""])
def test_coordinator_cannot_choose_the_wording_of_sealed_questions(
    pair, make_ask, questions, querier, chosen
):
    receiver, sharer = pair
    ask = make_ask(receiver, [sharer], questions, medium="text", rephrase="none")
    sealed = sealed_for(ask, querier, rephrase=chosen)
    reply = ask.rephrased(asked=sealed, sealed=True)
    about = {"run_id": ask.run_id, "query_id": ask.query_id, "sealed": True}
    seen = open_ask(reply.asks[0].body, identity=identity_of(sharer), **about)
    assert seen.questions != questions
    assert seen.consent.querier == querier.public


def test_questions_in_clear_are_refused_where_only_seals_are_taken(
    federation, models, make_ask, questions, querier
):
    site = federation.site(models["qwen3"], require_seal=True)
    with pytest.raises(MediumRefusedError):
        make_ask(site, [], questions).rephrased()
    pinned = federation.site(models["qwen3"], querier_key_ids=(querier.key_id,))
    with pytest.raises(UntrustedKeyError):
        make_ask(pinned, [], questions).rephrased()


def test_querier_in_clear_and_seal_at_the_coordinator_are_refused(
    pair, make_ask, questions, querier, federation, models, open_policy
):
    receiver, sharer = pair
    ask = make_ask(receiver, [sharer], questions)
    signed = dataclasses.replace(ask.consent, receiver=receiver.card.key_id).signed(querier)
    with pytest.raises(EnvelopeError):
        ask.rephrased(asked=ask.asked(consent=signed))
    policy = dataclasses.replace(open_policy, coordinator_fusers=True)
    hosted = make_ask(
        federation.site(models["qwen3"], policy=policy), [sharer], questions, host="coordinator"
    )
    with pytest.raises(BindingError):
        hosted.rephrased(asked=sealed_for(hosted, querier), sealed=True)


def test_questions_sealed_to_another_site_do_not_open(pair, make_ask, questions, querier):
    receiver, sharer = pair
    ask = make_ask(sharer, [receiver], questions)
    sealed = sealed_for(ask, querier)
    moved = dataclasses.replace(ask, receiver=receiver, sharers=[sharer])
    with pytest.raises(SealError):
        moved.rephrased(asked=sealed, sealed=True)


def test_questions_in_clear_for_another_site_are_refused(pair, make_ask, questions):
    receiver, sharer = pair
    ask = make_ask(receiver, [sharer], questions)
    elsewhere = dataclasses.replace(ask.consent, receiver=sharer.card.key_id)
    with pytest.raises(BindingError):
        ask.rephrased(asked=ask.asked(consent=elsewhere))


# -- fusers at the coordinator -----------------------------------------------------------


def test_coordinator_hosts_fusers_only_where_sites_agree(
    pair, federation, models, bank, make_ask, questions, open_policy
):
    policy = dataclasses.replace(open_policy, coordinator_fusers=True, share_evidence=True)
    hosted = {"host": "coordinator"}
    with pytest.raises(MediumRefusedError):
        make_ask(pair[0], [pair[1]], questions, **hosted).rephrased()
    receiver = federation.site(models["qwen3"], policy=policy)
    sharer = federation.site(models["llama"], policy=policy)
    fuser = bank.get(models["llama"].layout, models["qwen3"].layout)
    ask = make_ask(receiver, [sharer], questions, **hosted)
    reply = ask.rephrased(sharers=ask.seats(share=fuser.spec.share.to_dict(), codec="int8"))
    assert reply.evidence.shape == (3, 4)
    given = opened(
        ask,
        sharer,
        ask.shared(reply).body,
        identity=None,
        receiver=receiver.card.key_id,
        sealed=False,
    )
    assert given.evidence.shape == (3, 4)
    entries = decode_entries(given.payload, limits=PayloadLimits())
    with torch.no_grad():
        data = encode_entries(fuser.project(entries), codec="fp32")
    key_id = sharer.card.key_id
    gate = np.array([1, 0, 1], np.uint8)
    part = Part(sharer=key_id, medium="projected", body=data, gate=gate)
    done, answers = ask.refined(handle=reply.handle, parts=(part,))
    assert not done.dropped
    assert answers.used.tolist() == [[1], [0], [1]]
    own = Receiver(models["qwen3"]).own(questions)
    gates = torch.tensor([[1.0], [0.0], [1.0]])
    fused = Receiver(models["qwen3"]).fuse(own, [(fuser, entries)], gates)
    assert list(answers.texts) == Receiver(models["qwen3"]).answer(fused)


def test_projected_entries_are_refused_where_fusers_run_at_the_receiver(
    pair, make_ask, questions, models
):
    receiver, sharer = pair
    ask = make_ask(receiver, [sharer], questions)
    handle = ask.rephrased().handle
    entries = Sharer(models["qwen3"]).share(questions, SPEC).entries
    data = encode_entries(entries, codec="fp32")
    part = Part(sharer=sharer.card.key_id, medium="projected", body=data)
    done, _ = ask.refined(handle=handle, parts=(part,))
    assert done.dropped == {sharer.card.key_id: BindingError.code}


# -- rounds ------------------------------------------------------------------------------


def test_second_round_builds_on_what_the_sharer_fused_in_the_first(
    federation, models, bank, make_ask, questions
):
    sites = [federation.site(models[name], fusers=bank) for name in ("qwen3", "llama")]
    batch = {"batch": "batch-0", "rounds": 2}
    first = [
        make_ask(site, [other], questions, **batch)
        for site, other in zip(sites, sites[::-1], strict=True)
    ]
    for ask in first:
        ask.whole(keep=True)
    second = dataclasses.replace(first[0], round_number=2)
    reply = second.rephrased()
    (part,) = second.parts(reply)
    assert opened(second, sites[1], part.body).on_refined
    done, answers = second.refined(handle=reply.handle, parts=(part,))
    assert not done.dropped
    assert answers.used.all()
    # Another batch, or a sharer that kept nothing, starts from the questions.
    other = make_ask(sites[0], [sites[1]], questions, batch="batch-1", rounds=2, round_number=2)
    assert not opened(other, sites[1], other.shared(other.rephrased()).body).on_refined


def test_reply_is_bound_to_its_query(pair, make_ask, questions):
    receiver, sharer = pair
    ask = make_ask(receiver, [sharer], questions)
    request = RephraseRequest(
        query_id=ask.query_id, round_number=1, asked=ask.asked(), sealed=False, sharers=ask.seats()
    )
    envelope = receiver.answer(request.to_envelope(run_id=ask.run_id), REPHRASE)
    with pytest.raises(BindingError):
        RephraseReply.read(envelope, query_id="q-x", **receiver.where)


def test_batch_is_answered_once_refined_or_alone(pair, make_ask, questions):
    receiver, sharer = pair
    for first_alone in (False, True):
        ask = make_ask(receiver, [sharer], questions)
        parts = ask.parts(ask.rephrased())
        asks = [{"parts": parts}, {"parts": ()}]
        first, second = reversed(asks) if first_alone else asks
        _, answers = ask.refined(handle="", asked=ask.asked(), sharers=ask.seats(), **first)
        assert len(answers.texts) == len(questions)
        with pytest.raises(ReplayError):
            ask.refined(handle="", asked=ask.asked(), sharers=ask.seats(), **second)


def test_own_answer_is_to_be_had_where_the_refined_one_failed(
    pair, make_ask, questions, monkeypatch
):
    receiver, sharer = pair
    ask = make_ask(receiver, [sharer], questions)
    parts = ask.parts(ask.rephrased())
    broken = {"handle": "", "asked": ask.asked(), "sharers": ask.seats()}
    with monkeypatch.context() as patched:
        patched.setattr("fedinfer_flower.clients.refine_answering.fuse_parts", lambda *_: 1 // 0)
        with pytest.raises(ModelAnswerError):
            ask.refined(parts=parts, **broken)
    _, own = ask.refined(parts=(), **broken)
    assert own.texts == own_answers(receiver, questions)


@pytest.mark.parametrize("agreed", [True, False])
def test_receiver_reads_its_own_documents_only_where_its_policy_says_so(
    federation, models, make_ask, questions, open_policy, agreed
):
    seen, model = [], models["qwen3"]

    def documents(question):
        seen.append(question)
        return ["D city of kim lot is oslo ."]

    policy = dataclasses.replace(open_policy, answers_from_documents=agreed)
    receiver = federation.site(LanguageSite(model=model, documents=documents), policy=policy)
    ask = make_ask(receiver, [], questions)
    _, answers = ask.refined(handle=ask.rephrased().handle)
    assert seen == (list(questions) if agreed else [])
    alone = Receiver(model)
    read = [documents("")] * len(questions) if agreed else None
    assert list(answers.texts) == alone.answer(alone.own(questions, read))
    assert (alone.answer(alone.own(questions)) == list(answers.texts)) is not agreed


def test_documents_that_do_not_fit_leave_the_own_answer(
    federation, models, make_ask, questions, open_policy
):
    model = models["qwen3"]
    policy = dataclasses.replace(open_policy, answers_from_documents=True)
    endless = " ".join(["tukem"] * model.layout.window)
    loaded = LanguageSite(model=model, documents=lambda question: [endless])
    ask = make_ask(federation.site(loaded, policy=policy), [], questions)
    _, answers = ask.refined(handle=ask.rephrased().handle)
    assert answers.texts == own_answers(federation.site(model), questions)


def test_documents_that_cannot_be_read_leave_the_own_answer(
    federation, models, make_ask, questions, open_policy
):
    model = models["qwen3"]
    policy = dataclasses.replace(open_policy, answers_from_documents=True)
    loaded = LanguageSite(model=model, documents=lambda question: 1 // 0)
    ask = make_ask(federation.site(loaded, policy=policy), [], questions)
    _, answers = ask.refined(handle=ask.rephrased().handle)
    assert answers.texts == own_answers(federation.site(model), questions)
