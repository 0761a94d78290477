"""A gate's options as real models give them: on caches that a trained fuser reads."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from fedinfer_flower.errors import ShapeError
from fedinfer_flower.kv.fuser import make_fuser
from fedinfer_flower.kv.gate import make_gate
from fedinfer_flower.refine.evaluation import answers_alone, answers_fused
from fedinfer_flower.refine.fuser_training import TrainingOptions, default_spec, train_fuser
from fedinfer_flower.refine.gate_calibration import assess_gate
from fedinfer_flower.refine.gate_data import read_gate_trial
from fedinfer_flower.refine.gate_training import GateTrainingOptions, train_gate
from fedinfer_flower.simulation.facts.checkpoints import NAMES, load
from fedinfer_flower.simulation.facts.fuser_data import fuser_examples, gate_examples


@pytest.fixture(scope="module")
def trial(models, examples):
    """Model 0 with two sharers of random weights; every other document is at the first."""
    fusers = [make_fuser(default_spec(models[0], models[j], width=8)).eval() for j in (1, 2)]
    holders = [(at % 2,) if e.document else () for at, e in enumerate(examples)]
    return read_gate_trial(
        models[0], list(zip(models[1:], fusers, strict=True)), examples, holders=holders
    )


def test_no_sharer_is_the_receiver_alone(trial, models, examples):
    assert trial.answers(trial.only(None)) == answers_alone(models[0], examples)


def test_one_open_gate_is_that_sharer_alone(trial, models):
    # The other sharer's entries are there, behind a closed gate.
    for j, (fuser, pair) in enumerate(zip(trial.fusers, trial.pairs, strict=True)):
        assert trial.answers(trial.only(j)) == answers_fused(models[0], fuser, pair)


def test_gates_are_taken_row_by_row(trial):
    rows = torch.arange(len(trial))
    mixed = torch.stack([rows % 3 == 1, rows % 3 == 2], 1).float()
    options = [trial.answers(trial.only(j)) for j in (None, 0, 1)]
    assert trial.answers(mixed) == [options[i % 3][i] for i in range(len(trial))]


def test_losses_are_of_whole_answers(trial, models):
    # Against the mean over a batch of one, times its tokens: two ways to the same sum.
    found = trial.losses(trial.only(0))[:3]
    for row, loss in enumerate(found.tolist()):
        one = trial.pairs[0].select(torch.tensor([row]))
        tokens = int((one.labels >= 0).sum())
        expected = float(one.loss(models[0], trial.fusers[0]).detach()) * tokens
        assert loss == pytest.approx(expected, rel=1e-4)


def test_only_holders_read_a_document(trial, models, examples):
    at = next(i for i, e in enumerate(examples) if e.document)
    first, second = trial.evidence[at]
    with_it, without = (
        [
            model.prefill([model.prompts.ask(examples[at].question, documents=read)]).evidence[0]
            for model in models[1:]
        ]
        for read in (examples[at].documents, ())
    )
    held = [with_it[0], without[1]] if at % 2 == 0 else [without[0], with_it[1]]
    # In a batch of other lengths sums run in another order.
    assert torch.allclose(torch.stack([first, second]), torch.stack(held), atol=1e-4)
    assert not torch.allclose(with_it[0], without[0], atol=1e-3)


def test_examples_have_the_options_in_order(trial):
    found = trial.gate_examples()
    assert found.losses.shape == found.correct.shape == (len(trial), 3)
    assert torch.equal(found.correct[:, 2], trial.right(trial.only(1)))
    assert torch.equal(found.own, trial.pairs[0].own.evidence)


def test_wrong_shapes_are_refused(trial, models, examples):
    with pytest.raises(ShapeError):
        trial.answers(torch.ones(len(trial), 3))
    with pytest.raises(ShapeError):
        read_gate_trial(models[0], [], examples, holders=[()] * len(examples))
    with pytest.raises(ShapeError):
        read_gate_trial(models[0], [(models[1], trial.fusers[0])], examples, holders=[()])


@pytest.mark.slow
def test_a_gate_keeps_what_the_receiver_knows(world):
    receiver, *sharers = (load(name) for name in NAMES)
    fusers = [
        train_fuser(
            receiver,
            sharer,
            default_spec(receiver, sharer),
            fuser_examples(world, sharer=number, receiver=0, documents=300),
            TrainingOptions(steps=150),
        ).fuser
        for number, sharer in enumerate(sharers, 1)
    ]
    held = gate_examples(world, receiver=0, sharers=(1, 2), documents=300)
    trial = read_gate_trial(
        receiver,
        list(zip(sharers, fusers, strict=True)),
        [replace(h.example, task=h.example.task[:3]) for h in held],
        holders=[() if h.holder is None else (h.holder,) for h in held],
    )
    examples = trial.gate_examples()
    # Own questions are 100, of which 60 are held out: 59 are needed for 5 %.
    made = train_gate(examples, GateTrainingOptions(holdout=0.6))
    learned, ungated = (
        assess_gate(gate, examples).tasks for gate in (made.gate, make_gate("top-k"))
    )

    assert made.card.held_out.worst_harm_bound <= 0.05
    # 100 questions: a standard error of 2 points at 0.96.
    assert learned["own"].gate >= 0.95
    assert learned["fac"].gate >= learned["fac"].own + 0.4
    assert learned["own"].gate >= ungated["own"].gate
