"""A sharer that lies about sizes, and one that writes too much."""

from __future__ import annotations

import dataclasses
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from fedinfer_flower.errors import PromptTooLongError, SizeLimitError
from fedinfer_flower.kv import payload as payloads
from fedinfer_flower.kv.layout import CacheEntries
from fedinfer_flower.kv.payload import decode_entries, encode_entries
from fedinfer_flower.strategies.refine_hosting import FuserHost
from fedinfer_flower.wire.refine_ask import ShareBody, pack_body
from fedinfer_flower.wire.refine_request import Part


def hollow_cache(layout, *, rows, tokens):
    """Return a payload of nothing but padding: a few hundred bytes, whatever its shape."""
    zeros = torch.zeros(rows, layout.heads, tokens, layout.head_size)
    mask = torch.zeros(rows, tokens, dtype=torch.long)
    mask[:, -1] = 1
    entries = CacheEntries(
        keys=(zeros,) * layout.layers, values=(zeros,) * layout.layers, mask=mask, layout=layout
    )
    return encode_entries(entries, codec="int4")


def part_of(ask, sharer, body, *, medium="cache"):
    packed = pack_body(
        body,
        identity=sharer.mod._memory(sharer.context).identity,
        reply_to=ask.receiver.card.identity,
        run_id=ask.run_id,
        query_id=ask.query_id,
        round_number=ask.round_number,
    )
    return Part(sharer=sharer.card.key_id, medium=medium, body=packed)


def own_answers(receiver, questions, make_ask):
    ask = make_ask(receiver, [], questions)
    return ask.refined(asked=ask.asked())[1].texts


def test_cache_of_padding_is_refused_before_it_takes_memory(
    pair, make_ask, questions, models, monkeypatch
):
    receiver, sharer = pair
    data = hollow_cache(models["llama"].layout, rows=len(questions), tokens=8192)
    # What it would unfold to: this is what the limits are for.
    full = decode_entries(data, limits=payloads.PayloadLimits())
    unfolded = sum(x.numel() * 4 for x in (*full.keys, *full.values))
    assert unfolded > 1000 * len(data)
    built = []
    monkeypatch.setattr(payloads, "entries_of", lambda *a: built.append(a))
    ask = make_ask(receiver, [sharer], questions)
    handle = ask.rephrased().handle
    reply, answers = ask.refined(
        handle=handle,
        parts=(part_of(ask, sharer, ShareBody(payload=data)),),
    )
    assert reply.dropped == {sharer.card.key_id: SizeLimitError.code}
    assert not built
    assert answers.texts == own_answers(receiver, questions, make_ask)


def test_cache_of_an_enormous_layout_is_refused_before_it_takes_memory(
    pair, make_ask, questions, models, monkeypatch
):
    receiver, sharer = pair
    layout = dataclasses.replace(models["llama"].layout, head_size=8192, layers=64)
    data = hollow_cache(layout, rows=len(questions), tokens=2)
    built = []
    monkeypatch.setattr(payloads, "entries_of", lambda *a: built.append(a))
    ask = make_ask(receiver, [sharer], questions)
    handle = ask.rephrased().handle
    part = part_of(ask, sharer, ShareBody(payload=data))
    reply, _ = ask.refined(handle=handle, parts=(part,))
    assert reply.dropped == {sharer.card.key_id: SizeLimitError.code}
    assert not built


def test_the_honest_size_still_fits(pair, make_ask, questions, models):
    receiver, sharer = pair
    data = hollow_cache(models["llama"].layout, rows=len(questions), tokens=2)
    ask = make_ask(receiver, [sharer], questions)
    handle = ask.rephrased().handle
    part = part_of(ask, sharer, ShareBody(payload=data))
    reply, answers = ask.refined(handle=handle, parts=(part,))
    assert not reply.dropped
    assert answers.sharers == (sharer.card.key_id,)


@pytest.mark.parametrize("value", [3e38, -3e38, 1e-45])
def test_extreme_evidence_harms_nobody(pair, make_ask, questions, models, bank, federation, value):
    gated = federation.site(models["qwen3"], fusers=bank, gate="top-k")
    _, sharer = pair
    data = hollow_cache(models["llama"].layout, rows=len(questions), tokens=2)
    ask = make_ask(gated, [sharer], questions)
    handle = ask.rephrased().handle
    evidence = np.full((len(questions), 4), value, np.float32)
    part = part_of(ask, sharer, ShareBody(payload=data, evidence=evidence))
    reply, answers = ask.refined(handle=handle, parts=(part,))
    assert len(answers.texts) == len(questions)
    assert set(reply.dropped) | set(answers.sharers) == {sharer.card.key_id}


def uncut(prompts):
    """Return a prompt format that quotes notes whole, as far as the site's policy lets it."""
    return SimpleNamespace(
        ask=prompts.ask,
        ask_with_notes=lambda question, notes, **_: " ".join([*notes, prompts.ask(question)]),
        stop=prompts.stop,
        abstentions=prompts.abstentions,
    )


def test_whoever_writes_too_much_loses_its_own_place_alone(
    pair, federation, make_ask, questions, models, monkeypatch
):
    receiver, brief = pair
    verbose = federation.site(models["qwen2"])
    long = " ".join(["the"] * 1000)
    assert len(long) <= receiver.mod._policy.max_note_chars
    monkeypatch.setattr(models["qwen3"], "prompts", uncut(models["qwen3"].prompts))
    ask = make_ask(receiver, [brief, verbose], questions, medium="text")
    handle = ask.rephrased().handle
    word = questions[0].split()[0]
    parts = (
        part_of(ask, brief, ShareBody(notes=(word,) * len(questions)), medium="text"),
        part_of(ask, verbose, ShareBody(notes=(long,) * len(questions)), medium="text"),
    )
    reply, answers = ask.refined(handle=handle, parts=parts)
    assert reply.dropped == {verbose.card.key_id: PromptTooLongError.code}
    assert answers.sharers == (brief.card.key_id,)
    assert answers.used is not None
    assert answers.used.all()


def test_coordinator_refuses_a_cache_of_padding_too(models, questions, bank, monkeypatch):
    sharer, receiver = models["llama"], models["qwen3"]
    host = FuserHost(bank)
    sites = [
        SimpleNamespace(card=SimpleNamespace(model_digest=model.layout.model_digest))
        for model in (sharer, receiver)
    ]
    who = {"sharer": sites[0], "receiver": sites[1], "rows": len(questions)}
    honest = hollow_cache(sharer.layout, rows=len(questions), tokens=2)
    assert host.project(ShareBody(payload=honest), **who)
    built = []
    monkeypatch.setattr(payloads, "entries_of", lambda *a: built.append(a))
    hollow = hollow_cache(sharer.layout, rows=len(questions), tokens=8000)
    with pytest.raises(SizeLimitError):
        host.project(ShareBody(payload=hollow), **who)
    assert not built
