"""What a sharer hands over: the right tokens, the same on any padding, and on a fused state."""

from __future__ import annotations

import pytest
import torch

from fedinfer_flower.errors import CacheError
from fedinfer_flower.kv.share import ShareSpec
from fedinfer_flower.language.model import LanguageModel
from fedinfer_flower.refine import sharer as module
from fedinfer_flower.refine.examples import FuserExample
from fedinfer_flower.refine.sharer import Sharer, find_sections, prefill_all, share_prompts

# Float32 sums in another order: padding, batches and passes split in two give 1e-6 to 1e-5.
CLOSE = {"rtol": 1e-4, "atol": 1e-4}


def test_last_token_with_decoded_one_is_the_end_of_the_whole_cache(
    models: list[LanguageModel], examples: list[FuserExample]
) -> None:
    questions = [e.question for e in examples[:5]]
    whole = models[1].prefill([models[1].prompts.ask(q) for q in questions], decode=1, hidden=True)

    shared = Sharer(models[1]).share(questions, ShareSpec(last=1, decode=1, hidden=True))

    assert shared.entries.tokens == 2
    for got, all_of_it in zip(shared.entries.keys, whole.entries.keys, strict=True):
        torch.testing.assert_close(got, all_of_it[:, :, -2:])
    assert shared.entries.hidden is not None
    assert whole.entries.hidden is not None
    torch.testing.assert_close(shared.entries.hidden, whole.entries.hidden[:, -2:])
    torch.testing.assert_close(shared.evidence, whole.evidence)


def test_documents_are_read_by_the_sharer_and_change_its_cache(
    models: list[LanguageModel], examples: list[FuserExample]
) -> None:
    example = examples[0]
    spec = ShareSpec(last=1, decode=0)

    without = Sharer(models[1]).share([example.question], spec)
    with_it = Sharer(models[1], documents=lambda q: [example.document]).share(
        [example.question], spec
    )

    assert not torch.allclose(without.entries.values[-1], with_it.entries.values[-1])


@pytest.mark.parametrize("spec", [ShareSpec(last=0, decode=1, hidden=True), ShareSpec()])
def test_batches_give_what_single_prompts_give(
    models: list[LanguageModel],
    examples: list[FuserExample],
    monkeypatch: pytest.MonkeyPatch,
    spec: ShareSpec,
) -> None:
    monkeypatch.setattr(module, "_BATCH_ROWS", 4)
    model = models[1]
    # Documents of one and of three statements: prompts of different lengths.
    prompts = [model.prompts.ask(e.question, documents=e.documents) for e in examples[7:16]]

    together = share_prompts(model, prompts, spec).entries

    for row, prompt in enumerate(prompts):
        alone = share_prompts(model, [prompt], spec).entries
        one = together.select([row]).cut(together.tokens - alone.tokens)
        assert together.mask[row].sum() == alone.tokens
        for a, b in zip(one.keys + one.values, alone.keys + alone.values, strict=True):
            torch.testing.assert_close(a, b, **CLOSE)
    assert (share_prompts(model, prompts, spec).tokens is not None) == spec.full


def test_prefill_of_many_batches_answers_like_one(
    models: list[LanguageModel], examples: list[FuserExample], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = models[2]
    prompts = [model.prompts.ask(e.question, documents=e.documents) for e in examples[7:13]]
    one = prefill_all(model, prompts)

    monkeypatch.setattr(module, "_BATCH_ROWS", 2)
    many = prefill_all(model, prompts)

    assert torch.equal(one.tokens.ids, many.tokens.ids)
    assert one.tokens.spans == many.tokens.spans
    torch.testing.assert_close(model.logits_on(one.past()), model.logits_on(many.past()), **CLOSE)


def test_share_on_own_state_is_the_share_of_the_prompt(
    models: list[LanguageModel], examples: list[FuserExample]
) -> None:
    model, sharer = models[0], Sharer(models[0])
    questions = [e.question for e in examples[:6]]
    read = model.prefill([model.prompts.ask(q) for q in questions])

    for spec in (
        ShareSpec(last=1, decode=1, hidden=True),
        ShareSpec(last=3, decode=2),
        ShareSpec(last=0, decode=0),
    ):
        plain = sharer.share(questions, spec)
        on_state = sharer.share(questions, spec, on=read.past())
        in_parts = sharer.share(
            questions,
            spec,
            on=[read.select(torch.arange(2)).past(), read.select(torch.arange(2, 6)).past()],
        )
        for shared in (on_state, in_parts):
            both = zip(shared.entries.keys, plain.entries.keys, strict=True)
            assert all(torch.allclose(a, b, **CLOSE) for a, b in both)
            torch.testing.assert_close(shared.evidence, plain.evidence, **CLOSE)
            assert torch.equal(shared.entries.mask, plain.entries.mask)
        if spec.hidden:
            torch.testing.assert_close(on_state.entries.hidden, plain.entries.hidden, **CLOSE)


def test_share_on_a_prefix_carries_what_the_prefix_brought_but_not_the_prefix(
    models: list[LanguageModel], examples: list[FuserExample]
) -> None:
    model, sharer = models[0], Sharer(models[0])
    questions = [e.question for e in examples[:3]]
    past = model.prefill([model.prompts.ask(q) for q in questions]).past()
    prefixed = past.with_prefix(
        tuple(torch.randn_like(k[:, :, :2]) for k in past.keys),
        tuple(torch.randn_like(v[:, :, :2]) for v in past.values),
        torch.ones_like(past.mask[:, :2]),
        torch.tensor([[0, 1]]).expand(3, -1),
    )
    spec = ShareSpec(last=0, decode=0)

    plain, fused = (sharer.share(questions, spec, on=p).entries for p in (past, prefixed))

    assert fused.tokens == plain.tokens
    # The first layer reads the token alone, later ones what attention brought.
    torch.testing.assert_close(fused.keys[0], plain.keys[0], **CLOSE)
    torch.testing.assert_close(fused.keys[-1][:, :, :-1], plain.keys[-1][:, :, :-1], **CLOSE)
    assert not torch.allclose(fused.keys[-1][:, :, -1], plain.keys[-1][:, :, -1], atol=1e-3)


def test_state_that_cannot_serve_is_refused(
    models: list[LanguageModel], examples: list[FuserExample]
) -> None:
    model, sharer = models[0], Sharer(models[0])
    question = examples[0].question
    past = model.prefill([model.prompts.ask(question)]).past()

    with pytest.raises(CacheError, match="other rows"):
        sharer.share([question, question], ShareSpec(), on=past)
    with pytest.raises(CacheError, match="hidden state of its unread tokens only"):
        sharer.share([question], ShareSpec(last=2, hidden=True), on=past)
    with pytest.raises(CacheError, match="fewer tokens"):
        sharer.share([question], ShareSpec(last=400), on=past)


def test_help_ends_at_the_formats_stop(
    models: list[LanguageModel], examples: list[FuserExample]
) -> None:
    notes = Sharer(models[0]).help([e.question for e in examples[:2]], 12)

    assert len(notes) == 2
    assert not any(" ." in note for note in notes)


def test_section_of_a_question_is_where_it_stands_last() -> None:
    assert find_sections(["D is q ? q ? A"], ["q ?"]) == [(9, 12)]
    assert find_sections(["rephrased", "q"], ["q", "q"]) == []
    assert find_sections(["x"], []) == []
