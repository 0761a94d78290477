"""The gradient is the gradient, training withstands what it was trained for, names bind."""

from __future__ import annotations

import numpy as np
import pytest

from fedinfer_flower.ensemble import SiteContext
from fedinfer_flower.ensemble.deep_set_trimmed import DeepSetTrimmed, trimmed_mean
from fedinfer_flower.ensemble.deep_set_trimmed_training import (
    loss_and_gradient,
    train_deep_set_trimmed,
    worst_answers,
)
from fedinfer_flower.ensemble.fitted import remember
from fedinfer_flower.ensemble.stack_shapes import start_arrays
from fedinfer_flower.errors import InvalidValueError, ShapeError

N_SITES, N_CLASSES = 5, 3
CLASSES = ("a", "b", "c")
SITES = tuple(f"{k:064x}" for k in range(N_SITES))


def answers(rng, n_rows, noise=1.0):
    """Return (probabilities of shape (n_sites, n_rows, n_classes), labels): alike sites."""
    labels = rng.integers(0, N_CLASSES, n_rows)
    logits = 2.0 * np.eye(N_CLASSES)[labels] + noise * rng.normal(size=(N_SITES, n_rows, N_CLASSES))
    p = np.exp(logits)
    return p / p.sum(axis=-1, keepdims=True), labels


def weights_of(seed):
    rng = np.random.default_rng(seed)
    start = start_arrays("deep-set", n_sites=N_SITES, n_classes=N_CLASSES, hidden=7, seed=seed)
    # Away from zero, where whole layers have no gradient.
    return {name: array + 0.3 * rng.normal(size=array.shape) for name, array in start.items()}


@pytest.mark.parametrize("trim", [0, 1, 2])
def test_gradient_is_that_of_finite_differences(trim):
    rng = np.random.default_rng(trim)
    p, labels = answers(rng, 6)
    weights, p_tkc = weights_of(trim), p.transpose(1, 0, 2)
    _, gradient = loss_and_gradient(weights, p_tkc, labels, trim=trim)

    for name, array in weights.items():
        place = tuple(int(rng.integers(0, n)) for n in array.shape)
        step = 1e-6
        sides = []
        for sign in (1.0, -1.0):
            moved = {k: v.copy() for k, v in weights.items()}
            moved[name][place] += sign * step
            sides.append(loss_and_gradient(moved, p_tkc, labels, trim=trim)[0])
        # Central differences: an error of order step^2 and 1e-16 / step.
        assert (sides[0] - sides[1]) / (2 * step) == pytest.approx(
            gradient[name][place], abs=1e-7, rel=1e-5
        ), name


def test_rule_decides_as_the_trainer_saw_it():
    rng = np.random.default_rng(3)
    p, labels = answers(rng, 40)
    fitted = train_deep_set_trimmed(p, labels, classes=CLASSES, sites=SITES, steps=20)
    rule = DeepSetTrimmed(stack=remember(fitted), trim=1)
    site = SiteContext(present=np.ones(N_CLASSES, dtype=bool))

    scores = np.stack([rule.score(np.log(row), site) for row in p])
    prediction = rule.decide(rule.combine(scores), N_SITES, CLASSES)

    loss, _ = loss_and_gradient(dict(fitted.arrays), p.transpose(1, 0, 2), labels, trim=1)
    said = -np.log(prediction.probabilities[np.arange(40), labels]).mean()
    # The rule floors probabilities of sites at 1e-6; the trainer did so before.
    assert said == pytest.approx(loss, abs=1e-4)


def test_training_against_hostile_sites_withstands_them_and_honest_training_does_not():
    rng = np.random.default_rng(4)
    p, labels = answers(rng, 300)
    q, truth = answers(rng, 300)
    hostile = np.zeros((300, N_SITES), dtype=bool)
    hostile[:, :2] = True

    accuracy = {}
    for name, n_hostile, trim in (("mean", 0, 0), ("adversarial", 2, 2)):
        fitted = train_deep_set_trimmed(
            p, labels, classes=CLASSES, sites=SITES, n_hostile=n_hostile, trim=trim, steps=250
        )
        rule = DeepSetTrimmed(stack=remember(fitted), trim=trim)
        site = SiteContext(present=np.ones(N_CLASSES, dtype=bool))
        bent = worst_answers(
            dict(fitted.arrays), q.transpose(1, 0, 2), truth, hostile, trim=trim
        ).transpose(1, 0, 2)
        for kind, given in (("clean", q), ("attacked", bent)):
            scores = np.stack([rule.score(np.log(row), site) for row in given])
            said = rule.decide(rule.combine(scores), N_SITES, CLASSES).labels
            accuracy[name, kind] = float((said == truth).mean())

    assert min(accuracy["mean", "clean"], accuracy["adversarial", "clean"]) > 0.9
    assert accuracy["mean", "attacked"] < accuracy["adversarial", "attacked"] - 0.1
    assert accuracy["adversarial", "attacked"] > 0.55


def test_worst_answer_is_a_wrong_class_and_only_of_hostile_sites():
    p, labels = answers(np.random.default_rng(5), 20)
    p_tkc = p.transpose(1, 0, 2)
    hostile = np.zeros((20, N_SITES), dtype=bool)
    hostile[:, 3] = True
    weights = weights_of(1)

    bent = worst_answers(weights, p_tkc, labels, hostile, trim=1)

    assert (bent[:, [0, 1, 2, 4]] == p_tkc[:, [0, 1, 2, 4]]).all()
    assert (bent[:, 3] != p_tkc[:, 3]).any(axis=1).all()
    before = loss_and_gradient(weights, p_tkc, labels, trim=0)[0]
    worst = worst_answers(weights, p_tkc, labels, hostile, trim=0)
    assert loss_and_gradient(weights, worst, labels, trim=0)[0] > before
    # Colluders are not told by their certainty alone.
    assert worst[:, 3].max(axis=1).min() < 0.9 < worst[:, 3].max(axis=1).max()
    # Floats that were divided by their sum.
    assert np.allclose(worst.sum(axis=2), 1.0, rtol=0.0, atol=1e-9)


def test_minority_moves_no_entry_of_the_total_beyond_honest_entries():
    rng = np.random.default_rng(6)
    scores = rng.normal(size=(5, 8, 4))
    scores[:2] = 1e9
    total = trimmed_mean(scores, 2)

    assert (total >= scores[2:].min(axis=0)).all()
    assert (total <= scores[2:].max(axis=0)).all()


def test_aggregator_of_another_training_is_refused():
    p, labels = answers(np.random.default_rng(7), 30)
    fitted = train_deep_set_trimmed(p, labels, classes=CLASSES, sites=SITES, steps=1)
    digest = remember(fitted)

    assert DeepSetTrimmed(stack=digest, trim=1).fitted is not None
    with pytest.raises(InvalidValueError, match="trim 2"):
        DeepSetTrimmed(stack=digest, trim=2)
    with pytest.raises(InvalidValueError):
        DeepSetTrimmed(stack="0" * 64)


@pytest.mark.parametrize(
    ("change", "error"),
    [
        ({"labels": np.zeros(3, dtype=int)}, ShapeError),
        ({"classes": ("a", "b")}, ShapeError),
        ({"n_hostile": 3}, InvalidValueError),
        ({"labels": np.full(30, 3)}, InvalidValueError),
        ({"steps": 0}, InvalidValueError),
    ],
)
def test_what_cannot_be_trained_is_refused(change, error):
    p, labels = answers(np.random.default_rng(7), 30)
    options = {"labels": labels, "classes": CLASSES, "sites": SITES, "steps": 1} | change
    with pytest.raises(error):
        train_deep_set_trimmed(p, options.pop("labels"), **options)
