"""A gate trained on the evidence of the small models that come with the package.

A sharer's option is here the sharer's own answer, so the test is of evidence and gate
alone, without any fuser. Training asks public people, the test private ones.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import fedinfer_flower
from fedinfer_flower.language.model import LanguageModel
from fedinfer_flower.refine.evaluation import answers_alone
from fedinfer_flower.refine.examples import FuserExample
from fedinfer_flower.refine.gate_calibration import GateExamples, assess_gate
from fedinfer_flower.refine.gate_training import GateTrainingOptions, train_gate
from fedinfer_flower.simulation.facts.prompts import FactPrompts
from fedinfer_flower.simulation.facts.world import FactWorld

FOLDER = Path(fedinfer_flower.__file__).parent / "simulation" / "checkpoints"
NAMES = ("qwen3", "llama", "qwen2")


@pytest.fixture(scope="module")
def world():
    return FactWorld()


@pytest.fixture(scope="module")
def models(world):
    prompts = FactPrompts(world.words)
    return [LanguageModel.from_folder(FOLDER / name, prompts=prompts) for name in NAMES]


def examples_of(world, models, people, strangers):
    """Return every model's evidence and answers; the first model is the receiver."""
    asked = [
        FuserExample(question=fact.question(), answer=fact.value, task=task)
        for task, facts in (
            *((NAMES[i], world.facts(people[i])) for i in range(3)),
            ("nobody", world.unanswerable(strangers)),
        )
        for fact in facts
    ]
    evidence, correct = [], []
    for model in models:
        prompts = [model.prompts.ask(e.question) for e in asked]
        evidence.append(model.prefill(prompts).evidence)
        answers = map(model.prompts.answer_in, answers_alone(model, asked))
        correct.append([a == e.answer for a, e in zip(answers, asked, strict=True)])
    right = torch.tensor(correct).T
    return GateExamples(
        own=evidence[0],
        sharers=torch.stack(evidence[1:], 1),
        losses=torch.where(right, 0.05, 4.0),
        correct=right,
        tasks=tuple(e.task for e in asked),
    )


@pytest.mark.slow
def test_gate_of_real_evidence_gains_what_sharers_know_and_harms_little(world, models):
    public = examples_of(world, models, world.gate_people, world.strangers_new[:30])
    some = [people[:30] for people in world.private]
    private = examples_of(world, models, some, world.strangers_new[30:60])
    # 100 questions of each task: 60 held out are just enough for 5 % at 95 %.
    trained = train_gate(public, GateTrainingOptions(holdout=0.6))
    report = assess_gate(trained.gate, private)
    assert trained.card.held_out.worst_harm_bound <= 0.05
    # 120 questions a task: a share of 5 % has a standard error of 2 points.
    assert report.worst_harm <= 0.05 + 0.04
    # The control: no fixed choice knows the facts of two institutions.
    assert report.best_fixed < 0.6
    assert report.regret < -0.25
