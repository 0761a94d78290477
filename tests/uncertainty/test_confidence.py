"""Confidence that says how often it is right, learnt on audits and judged on other rows."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedinfer_flower.errors import InvalidValueError, ShapeError
from fedinfer_flower.simulation.evaluation import reliability
from fedinfer_flower.uncertainty.confidence import IsotonicConfidence, JointTemperature


def ece(confidence, right):
    return reliability(confidence, right)[1]


@pytest.mark.parametrize("sharpness", [0.4, 2.5])
def test_temperature_and_steps_mend_what_they_were_not_fitted_on(sharpness, rows, as_prediction):
    p, labels = rows(np.random.default_rng(1), 4000, sharpness=sharpness)
    audits, rest = as_prediction(p[:500]), as_prediction(p[500:])
    right = rest.labels == labels[500:]
    before = ece(rest.probabilities.max(axis=1), right)

    temperature = JointTemperature.from_audits(audits, labels[:500])
    steps = IsotonicConfidence.from_audits(audits, labels[:500])

    # The labels follow p^sharpness, so the best temperature is its inverse: within 15 % for
    # 500 rows, some four standard errors.
    assert temperature.tau == pytest.approx(1.0 / sharpness, rel=0.15)
    after = temperature.calibrated(rest)
    assert ece(after.probabilities.max(axis=1), right) < before / 2
    assert ece(steps.confidence(rest), right) < before / 2
    assert (after.labels == rest.labels).all()
    assert (after.margin == rest.margin).all()


@given(tau=st.floats(0.02, 50.0), seed=st.integers(0, 1000))
def test_temperature_keeps_ranking_and_sums(tau, seed):
    p = np.random.default_rng(seed).dirichlet([0.5] * 4, size=5)
    out = JointTemperature(tau=tau).probabilities(p)

    # Sums of four floats of size one.
    assert np.allclose(out.sum(axis=1), 1.0, rtol=0.0, atol=1e-12)
    for before, after in zip(p, out, strict=True):
        order = np.argsort(before)
        assert (np.diff(after[order]) >= 0.0).all()


def test_class_at_zero_can_come_back():
    assert JointTemperature(tau=50.0).probabilities(np.array([[1.0, 0.0]]))[0, 1] > 0.3


@given(st.lists(st.tuples(st.floats(0.5, 1.0), st.booleans()), min_size=30, max_size=80))
def test_steps_never_fall_and_never_say_never(
    pairs,
):
    from fedinfer_flower.query import Prediction

    top = np.array([pair[0] for pair in pairs])
    prediction = Prediction(
        classes=("a", "b"),
        labels=np.zeros(len(top), dtype=int),
        probabilities=np.stack([top, 1.0 - top], axis=1),
        margin=2 * top - 1,
        abstained=np.zeros(len(top), dtype=bool),
    )
    labels = np.array([0 if pair[1] else 1 for pair in pairs])

    steps = IsotonicConfidence.from_audits(prediction, labels)
    chance = steps.confidence(prediction)

    assert (np.diff(chance[np.argsort(top)]) >= 0.0).all()
    assert ((chance > 0.0) & (chance < 1.0)).all()


def test_few_audits_and_bad_labels_are_refused(as_prediction):
    few = as_prediction(np.full((29, 2), 0.5))
    for fit in (JointTemperature.from_audits, IsotonicConfidence.from_audits):
        with pytest.raises(InvalidValueError, match="needs 30"):
            fit(few, np.zeros(29, dtype=int))
        with pytest.raises(ShapeError):
            fit(few, np.zeros(30, dtype=int))
        with pytest.raises(InvalidValueError):
            fit(as_prediction(np.full((30, 2), 0.5)), np.full(30, 2))


@pytest.mark.parametrize(
    ("knots", "chances"),
    [
        ((), ()),
        ((0.5,), (0.5, 0.6)),
        ((0.6, 0.5), (0.1, 0.2)),
        ((0.5, 0.6), (0.3, 0.2)),
        ((0.5,), (1.5,)),
    ],
)
def test_steps_out_of_order_are_refused(knots, chances):
    with pytest.raises(InvalidValueError):
        IsotonicConfidence(knots=knots, chances=chances)


@pytest.mark.parametrize("tau", [0.0, -1.0, 51.0, float("nan")])
def test_temperature_out_of_range_is_refused(tau):
    with pytest.raises(InvalidValueError):
        JointTemperature(tau=tau)
