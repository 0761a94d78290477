"""A coordinator that replays, invents sites, and sends what costs much; code that panics."""

from __future__ import annotations

import dataclasses
import logging

import pytest

from fedinfer_flower.clients.language_mod import LanguagePolicy
from fedinfer_flower.errors import (
    HandleError,
    ModelAnswerError,
    ReplayError,
    UntrustedKeyError,
)
from fedinfer_flower.language import model as language_model
from fedinfer_flower.refine.receiver import Receiver
from fedinfer_flower.wire.actions import GENERATE
from fedinfer_flower.wire.identity import Identity
from fedinfer_flower.wire.refine_ask import ShareAsk, open_body, pack_ask
from fedinfer_flower.wire.refine_asked import QuerierConsent
from fedinfer_flower.wire.refine_documents import ShareRequest, read_share_reply

WORD = "pelican"


class PanicError(BaseException):
    """What a tokenizer written in Rust raises: not an `Exception`."""


def test_replay_costs_the_site_nothing(pair, make_ask, questions, monkeypatch):
    receiver, _ = pair
    ask = make_ask(receiver, [], questions)
    ask.refined(asked=ask.asked())
    read = []
    monkeypatch.setattr(Receiver, "own", lambda *a: read.append(a))
    with pytest.raises(ReplayError):
        ask.refined(asked=ask.asked())
    assert not read


def test_state_too_large_to_keep_is_computed_anew(
    federation, models, bank, make_ask, questions, open_policy
):
    policy = dataclasses.replace(open_policy, max_handle_bytes=1)
    receiver = federation.site(models["qwen3"], fusers=bank, policy=policy)
    sharer = federation.site(models["llama"])
    ask = make_ask(receiver, [sharer], questions)
    reply = ask.rephrased()
    assert reply.handle == ""
    parts = ask.parts(reply)
    with pytest.raises(HandleError):
        ask.refined(handle="", parts=parts)
    _, answers = ask.refined(handle="", parts=parts, asked=ask.asked(), sharers=ask.seats())
    assert answers.sharers == (sharer.card.key_id,)


def invented_ask(site, questions, *, me, query_id, medium="text"):
    """Ask a sharer as a receiver that does not exist, for a querier that does not either."""
    consent = QuerierConsent(run_id=site.context.run_id, query_id=query_id, allow=("text",))
    ask = ShareAsk(
        questions=tuple(questions),
        consent=consent,
        round_number=1,
        medium=medium,
        sharer=site.card.key_id,
        reply_to=me.public,
    )
    body = pack_ask(ask, identity=me, sharer=site.card.identity)
    request = ShareRequest(query_id=query_id, medium=medium, body=body)
    reply = site.answer(request.to_envelope(run_id=site.context.run_id), GENERATE)
    given = read_share_reply(reply, query_id=query_id, **site.where)
    return open_body(
        given.body,
        identity=me,
        sharer=site.card.identity,
        run_id=site.context.run_id,
        query_id=query_id,
        round_number=1,
        sealed=True,
    )


def test_pins_keep_out_a_receiver_that_the_coordinator_invents(federation, models, questions):
    me = Identity.generate()
    policy = LanguagePolicy(text=True, share_speeds=False)
    # Without pins the coordinator reads notes, whatever is sealed: it is the receiver.
    unpinned = federation.site(models["llama"], policy=policy)
    body = invented_ask(unpinned, questions, me=me, query_id="made-up")
    assert len(body.notes) == len(questions)
    pinned = federation.site(models["llama"], policy=policy, peer_key_ids={"0" * 64})
    with pytest.raises(UntrustedKeyError):
        invented_ask(pinned, questions, me=me, query_id="made-up-2")


@pytest.mark.parametrize("error", [PanicError, SystemExit, RecursionError, MemoryError])
def test_whatever_is_raised_stays_at_the_site(
    federation, models, questions, make_site_of, make_ask, caplog, error
):
    def documents(question):
        raise error(f"{WORD} {question}")

    caplog.set_level(logging.DEBUG)
    sharer = federation.site(lambda: make_site_of(model=models["llama"], documents=documents))
    receiver = federation.site(models["qwen3"])
    ask = make_ask(receiver, [sharer], questions, medium="text")
    reply = ask.rephrased()
    with pytest.raises(ModelAnswerError) as info:
        ask.shared(reply)
    told = f"{info.value} {caplog.text}"
    assert WORD not in told
    assert questions[0] not in told


def test_interrupt_still_interrupts(federation, models, questions, make_site_of, make_ask):
    def documents(question):
        raise KeyboardInterrupt

    sharer = federation.site(lambda: make_site_of(model=models["llama"], documents=documents))
    receiver = federation.site(models["qwen3"])
    ask = make_ask(receiver, [sharer], questions, medium="text")
    reply = ask.rephrased()
    with pytest.raises(KeyboardInterrupt):
        ask.shared(reply)


def test_one_text_is_one_document(federation, models, questions, make_site_of, make_ask):
    seen = []
    prompts = models["llama"].prompts

    class Watching:
        stop, abstentions = prompts.stop, prompts.abstentions

        def help(self, question, *, documents=()):
            seen.append(list(documents))
            return prompts.help(question)

    model = models["llama"]
    text = "one text"
    site = make_site_of(model=model, documents=lambda question: text)
    sharer, receiver = federation.site(site), federation.site(models["qwen3"])
    ask = make_ask(receiver, [sharer], questions, medium="text")
    reply = ask.rephrased()
    model.prompts = Watching()
    try:
        ask.shared(reply)
    finally:
        model.prompts = prompts
    assert seen == [[text]] * len(questions)


# -- memory ------------------------------------------------------------------------------


def test_reading_a_prompt_keeps_no_logits_but_the_last(models, questions, monkeypatch):
    model = models["llama"]
    shapes, forward = [], model.model.forward

    def watched(*args, **kwargs):
        out = forward(*args, **kwargs)
        shapes.append(out.logits.shape[1])
        return out

    monkeypatch.setattr(model.model, "forward", watched)
    model.generate(list(questions), language_model.Decoding(max_new_tokens=2))
    assert set(shapes) == {1}


def test_scoring_takes_few_prompts_at_a_time(models, questions, monkeypatch):
    model = models["llama"]
    candidates = [questions[0].split()[0], " ".join(questions[0].split()[:3])]
    at_once = model.score(questions, candidates)
    rows = []
    prefill = model.prefill
    monkeypatch.setattr(
        model, "prefill", lambda prompts, **k: rows.append(len(prompts)) or prefill(prompts, **k)
    )
    monkeypatch.setattr(language_model, "_MOST_LOGITS", 1)
    one_by_one = model.score(questions, candidates)
    assert rows == [1] * len(questions)
    # Padding moves a row in its batch: the same sums in another order, in float32.
    assert (at_once - one_by_one).abs().max() < 1e-4
