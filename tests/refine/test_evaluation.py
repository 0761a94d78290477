"""Counting right answers, and the control."""

from __future__ import annotations

import pytest
import torch

from fedinfer_flower.errors import InvalidValueError, PromptTooLongError
from fedinfer_flower.kv.fuser import FuserSpec, make_fuser
from fedinfer_flower.kv.share import ShareSpec
from fedinfer_flower.language.model import LanguageModel
from fedinfer_flower.refine.evaluation import accuracy, compare, other_questions
from fedinfer_flower.refine.examples import FuserExample
from fedinfer_flower.refine.pair_data import IGNORED, prepare_pair
from fedinfer_flower.simulation.facts.prompts import FactPrompts


def test_accuracy_counts_by_task_and_takes_any_abstention_for_one() -> None:
    prompts = FactPrompts(["oslo", "bergen", "unk"])
    examples = [
        FuserExample("q1", "oslo", task="fact"),
        FuserExample("q2", "oslo", task="fact"),
        FuserExample("q3", "unk", task="nobody"),
        FuserExample("q4", "unk", task="nobody"),
    ]

    found = accuracy(["oslo and more", "bergen", "unk .", "oslo"], examples, prompts)

    assert found == {"fact": 0.5, "nobody": 0.5}
    assert accuracy(["", "", "I don't know.", ""], examples, prompts)["nobody"] == 1.0
    with pytest.raises(InvalidValueError):
        accuracy(["oslo"], examples, prompts)


def test_other_question_is_of_the_same_task_with_another_answer() -> None:
    examples = [FuserExample(f"q{i}", f"a{i % 3}", task=f"t{i % 2}") for i in range(24)]
    examples += [FuserExample(f"n{i}", "unk", task="nobody") for i in range(5)]

    other = other_questions(examples).tolist()

    for at, there in enumerate(other):
        assert examples[at].task == examples[there].task
        assert at != there
        if examples[at].task != "nobody":
            assert examples[at].answer != examples[there].answer


def test_labels_are_the_answer_and_its_end(
    models: list[LanguageModel], examples: list[FuserExample]
) -> None:
    model = models[1]  # three letters a token

    data = prepare_pair(model, models[0], examples[:3], ShareSpec())

    for row, example in zip(data.labels, examples, strict=False):
        ids = [int(i) for i in row if i != IGNORED]
        assert model.tokenizer.decode(ids) == f"{example.answer} ."


def test_labels_end_with_the_end_token_where_no_text_ends_an_answer(
    models: list[LanguageModel], examples: list[FuserExample], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = models[0]
    monkeypatch.setattr(type(model.prompts), "stop", ())

    data = prepare_pair(model, models[1], examples[:2], ShareSpec())

    assert data.labels[:, -1].tolist() == [model.tokenizer.eos_token_id] * 2


def test_answer_of_several_words_is_taken_whole(models: list[LanguageModel]) -> None:
    words = " ".join(models[0].prompts._words)[:40].rsplit(" ", 1)[0]

    data = prepare_pair(
        models[1],
        models[0],
        [FuserExample("Q city of ?", words)],
        ShareSpec(),
        max_answer_tokens=64,
    )

    assert models[1].tokenizer.decode(data.labels[0].tolist()) == f"{words} ."
    with pytest.raises(PromptTooLongError, match="the limit is 2"):
        prepare_pair(
            models[1], models[0], [FuserExample("Q ?", words)], ShareSpec(), max_answer_tokens=2
        )


def test_loss_is_that_of_the_tokens_one_by_one(
    models: list[LanguageModel], examples: list[FuserExample]
) -> None:
    spec = FuserSpec.for_pair("last-token", models[1].layout, models[0].layout, width=8)
    fuser = make_fuser(spec).eval()
    data = prepare_pair(models[0], models[1], examples[:3], spec.share)

    with torch.no_grad():
        loss = float(data.loss(models[0], fuser))
        logits = models[0].logits_on(data.fused(fuser), data.labels[:, :-1])
    logp = logits.log_softmax(-1).gather(2, data.labels[..., None])

    assert loss == pytest.approx(-float(logp.mean()), rel=1e-5)


def test_comparison_has_all_ways_and_a_document_reaches_the_sharer_alone(
    models: list[LanguageModel], examples: list[FuserExample]
) -> None:
    spec = FuserSpec.for_pair("last-token", models[1].layout, models[0].layout, width=8)

    found = compare(models[0], models[1], make_fuser(spec), examples, note_tokens=8).to_dict()

    tasks = {"doc1", "doc3", "fact", "nobody", "own"}
    for way in ("counts", "alone", "fused", "text", "shuffled"):
        assert found[way].keys() == tasks
    assert found["counts"]["doc1"] == 10
    data = prepare_pair(models[0], models[1], examples, spec.share)
    assert (
        data.own.entries.tokens
        < 12
        < prepare_pair(models[0], models[1], examples, ShareSpec(last=0)).shared.tokens
    )
