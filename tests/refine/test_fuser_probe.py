"""The probe on caches whose content is known."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import fedinfer_flower.simulation
from fedinfer_flower.errors import InvalidValueError
from fedinfer_flower.kv.share import ShareSpec
from fedinfer_flower.language.model import LanguageModel
from fedinfer_flower.refine.examples import FuserExample
from fedinfer_flower.refine.fuser_probe import ProbeReport, _ridge_accuracy, probe
from fedinfer_flower.simulation.facts.fuser_data import fuser_examples
from fedinfer_flower.simulation.facts.prompts import FactPrompts
from fedinfer_flower.simulation.facts.world import FactWorld

FOLDER = Path(fedinfer_flower.simulation.__file__).parent / "checkpoints"


@pytest.mark.parametrize("features", [20, 400])  # fewer and more than the 200 examples to fit
def test_ridge_reads_what_is_there_and_nothing_else(features: int) -> None:
    draws = torch.Generator().manual_seed(0)
    labels = torch.randint(4, (300,), generator=draws)
    noise = torch.randn(300, features, generator=draws)
    noise[:, 0] = 1.0  # constant: carries nothing, and has no deviation to divide by
    signal = noise.clone()
    signal[:, 1:5] += 8.0 * torch.nn.functional.one_hot(labels, 4)

    # Four features of 400 carry it, each scaled to the deviation of the others.
    assert _ridge_accuracy(signal, labels, 200, 30.0, 4) > 0.8
    # Of 100 fair guesses among 4 more than half are right once in 1e7.
    assert _ridge_accuracy(noise, labels, 200, 30.0, 4) < 0.5


def test_both_forms_of_the_ridge_agree() -> None:
    draws = torch.Generator().manual_seed(1)
    labels = torch.randint(3, (90,), generator=draws)
    few = torch.randn(90, 50, generator=draws) + labels[:, None]

    primal = _ridge_accuracy(few, labels, 60, 5.0, 3)
    # Columns of zeros change nothing but the form that is solved.
    dual = _ridge_accuracy(torch.cat([few, torch.zeros(90, 50)], 1), labels, 60, 5.0, 3)

    assert primal == dual


def test_trained_sharer_has_the_answer_in_what_it_decodes(world: FactWorld) -> None:
    model = LanguageModel.from_folder(FOLDER / "llama", prompts=FactPrompts(world.words))
    every = fuser_examples(world, sharer=1, receiver=0, documents=3)
    examples = [e for e in every if e.task in ("fact", "nobody")]

    found = probe(model, examples, last=2)

    assert found.asked == 460
    assert found.known > 450
    assert found.chance < 0.1
    assert [len(row) for row in found.layers] == [3] * model.layout.layers
    # A token's own entries in the first layer are a table of tokens: the answer's first three
    # letters name it, and the last prompt token is the same in all prompts.
    assert found.layers[0][-1] > 0.9
    assert found.layers[0][-2] < 0.15
    assert found.decoded > 0.9
    assert found.decoded > found.plain


def test_advice_is_the_cheapest_share_that_serves() -> None:
    fields = {"asked": 9, "known": 9, "held_out": 3, "answers": 2, "chance": 0.5, "layers": []}
    shares = {"plain": 0.2, "hidden": 0.95, "decoded": 0.95, "decoded_hidden": 1.0}

    report = ProbeReport(**fields, **shares)

    assert report.advice() == ShareSpec(last=1, decode=0, hidden=True)
    assert report.advice(0.1) == ShareSpec(last=1, decode=0)
    assert report.advice(0.99) == ShareSpec(last=1, decode=1, hidden=True)
    assert ProbeReport(**fields, **{**shares, "decoded_hidden": 0.95}).advice(0.99) is None


def test_sharer_that_knows_nothing_is_refused(
    models: list[LanguageModel], examples: list[FuserExample]
) -> None:
    with pytest.raises(InvalidValueError, match="answers 0 of 40 examples rightly"):
        probe(models[0], examples)


def test_answers_that_never_recur_are_refused(
    models: list[LanguageModel], monkeypatch: pytest.MonkeyPatch
) -> None:
    from fedinfer_flower.refine import fuser_probe

    monkeypatch.setattr(fuser_probe, "_answered", lambda sharer, examples: list(examples))
    examples = [FuserExample(f"Q city of x{i} ?", f"a{i}") for i in range(60)]

    with pytest.raises(InvalidValueError, match="do not recur"):
        probe(models[0], examples)
