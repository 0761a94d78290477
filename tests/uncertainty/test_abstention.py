"""Abstaining below a margin keeps the error within its target as often as promised."""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import pytest

from fedinfer_flower.errors import InvalidValueError, ShapeError
from fedinfer_flower.uncertainty.abstention import margin_for_risk, risk_coverage


def test_curve_is_that_of_sorting_by_margin(rows, as_prediction):
    p, labels = rows(np.random.default_rng(2), 300)
    prediction = as_prediction(p)
    curve = risk_coverage(prediction, labels)

    order = np.argsort(-prediction.margin)
    wrong = (prediction.labels != labels)[order]
    for n in (10, 100, 300):
        assert curve.risk_at(n / 300) == pytest.approx(wrong[:n].mean(), abs=1e-12)
    assert curve.coverage[-1] == 1.0
    assert 0.0 < curve.area < curve.risk[-1]
    # Each point is what abstaining there gives.
    kept = prediction.abstain_below(float(curve.margins[49]))
    assert (~kept.abstained).mean() == pytest.approx(float(curve.coverage[49]))


def test_rows_abstained_on_are_never_in_the_curve(rows, as_prediction):
    p, labels = rows(np.random.default_rng(2), 50)
    silent = np.arange(50) < 20
    prediction = dataclasses.replace(as_prediction(p), abstained=silent)

    assert risk_coverage(prediction, labels).coverage[-1] == pytest.approx(0.6)
    found = margin_for_risk(prediction, labels, target_risk=0.9)
    assert found.coverage <= 0.6


def test_target_holds_as_often_as_promised(rows, as_prediction):
    rng = np.random.default_rng(11)
    p, labels = rows(rng, 10_000, sharpness=4.0)
    new = as_prediction(p)
    wrong = new.labels != labels
    target, delta, n_runs = 0.12, 0.1, 150
    broken = naive = answered = 0
    for _ in range(n_runs):
        q, y = rows(rng, 300, sharpness=4.0)
        audits = as_prediction(q)
        found = margin_for_risk(audits, y, target_risk=target, delta=delta)
        kept = new.margin >= found.margin
        broken += bool(kept.any()) and wrong[kept].mean() > target
        answered += found.coverage > 0.0
        # The unprotected form: the largest coverage whose error on the audits is on target.
        curve = risk_coverage(audits, y)
        fits = np.flatnonzero(curve.risk <= target)
        naive += len(fits) > 0 and wrong[new.margin >= curve.margins[fits[-1]]].mean() > target

    assert naive > 0.3 * n_runs
    assert answered > 0.9 * n_runs
    # Binomial with mean at most delta; five standard errors.
    assert broken <= n_runs * delta + 5.0 * math.sqrt(n_runs * delta * (1 - delta))


def test_applying_the_margin_answers_the_share_that_it_says(rows, as_prediction):
    p, labels = rows(np.random.default_rng(3), 500, sharpness=4.0)
    prediction = as_prediction(p)
    found = margin_for_risk(prediction, labels, target_risk=0.2)

    kept = ~found.apply(prediction).abstained
    assert kept.mean() == pytest.approx(found.coverage)
    assert (prediction.labels != labels)[kept].mean() == pytest.approx(found.risk)
    assert found.risk <= found.risk_bound <= 0.2


def test_target_that_nothing_keeps_answers_nothing(as_prediction):
    prediction = as_prediction(np.tile([0.6, 0.4], (50, 1)))
    found = margin_for_risk(prediction, np.ones(50, dtype=int), target_risk=0.1)

    assert (found.margin, found.coverage, found.risk_bound) == (math.inf, 0.0, 1.0)
    assert found.apply(prediction).abstained.all()


def test_target_that_all_keep_answers_everything(as_prediction):
    prediction = as_prediction(np.tile([0.6, 0.4], (200, 1)))
    found = margin_for_risk(prediction, np.zeros(200, dtype=int), target_risk=0.1)

    assert found.margin == 0.0
    assert not found.apply(prediction).abstained.any()


def test_what_cannot_be_is_refused(as_prediction):
    prediction = as_prediction(np.full((4, 2), 0.5))
    for options in ({"target_risk": 0.0}, {"target_risk": 0.1, "delta": 1.0}):
        with pytest.raises(InvalidValueError):
            margin_for_risk(prediction, np.zeros(4, dtype=int), **options)
    with pytest.raises(ShapeError):
        margin_for_risk(prediction, [0], target_risk=0.1)
    with pytest.raises(ShapeError):
        risk_coverage(as_prediction(np.empty((0, 2))), [])
