"""Sets hold the right class as often as promised; who was scored decides what is promised."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedinfer_flower.errors import InvalidValueError, ShapeError
from fedinfer_flower.uncertainty.binomial import (
    at_most_probability,
    beta_lower_quantile,
    upper_bound,
)
from fedinfer_flower.uncertainty.conformal import OWN, ConformalPredictor, conformal_rank
from fedinfer_flower.uncertainty.nonconformity import METHODS, label_scores, nonconformity


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("sharpness", [0.3, 1.0, 3.0])
def test_sets_cover_as_promised_however_wrong_the_model_is(method, sharpness, rows, as_prediction):
    rng = np.random.default_rng(7)
    alpha, n_audits, n_new, n_runs = 0.1, 60, 40, 250
    hits = []
    for _ in range(n_runs):
        p, labels = rows(rng, n_audits + n_new, sharpness=sharpness)
        sets = ConformalPredictor.from_audits(
            as_prediction(p[:n_audits]), labels[:n_audits], alpha=alpha, method=method
        ).sets(as_prediction(p[n_audits:]))
        hits.append(sets[np.arange(n_new), labels[n_audits:]].mean())

    # Means of independent runs, each within [0, 1]: five standard errors of what was seen.
    error = 5.0 * np.std(hits) / math.sqrt(n_runs)
    assert np.mean(hits) >= 1.0 - alpha - error
    if method == "lac":  # its scores do not tie, so that coverage is bounded above as well
        assert np.mean(hits) <= 1.0 - alpha + 1.0 / (n_audits + 1) + error


def test_quantile_without_the_correction_covers_less_than_promised(rows):
    # The form that the finite-sample rank protects from: the plain quantile of few audits.
    rng = np.random.default_rng(8)
    plain, corrected = [], []
    for _ in range(400):
        p, labels = rows(rng, 10 + 40)
        scores = label_scores(p, labels)
        plain.append((scores[10:] <= np.quantile(scores[:10], 0.9)).mean())
        threshold = ConformalPredictor.from_scores(scores[:10], alpha=0.1).threshold
        corrected.append((scores[10:] <= threshold).mean())

    assert np.mean(plain) < 0.88
    assert np.mean(corrected) > 0.89


def test_few_audits_give_the_set_of_all_classes():
    predictor = ConformalPredictor.from_scores(np.zeros(8), alpha=0.1)

    assert math.isinf(predictor.threshold)
    assert predictor.sets(np.array([[1.0, 0.0]])).all()
    assert predictor.coverage_with_confidence() == 1.0


@given(n_rows=st.integers(1, 400), alpha=st.floats(0.01, 0.99), n_groups=st.integers(1, 20))
def test_rank_is_the_smallest_that_suffices(n_rows, alpha, n_groups):
    rank = conformal_rank(n_rows, alpha, n_groups=n_groups)

    wanted = (1.0 - alpha) * (n_rows + n_groups)
    # Float products of numbers below 500 are right to far better than 1e-8.
    assert rank >= wanted - 1e-8
    assert rank - 1 < wanted


@given(
    st.lists(st.integers(0, 4), min_size=1, max_size=6).filter(lambda parts: sum(parts) > 0),
    st.permutations(range(6)),
)
def test_scores_do_not_depend_on_a_class_s_place(parts, order):
    p = np.array([parts], dtype=float) / sum(parts)
    order = [k for k in order if k < len(parts)]
    for method in METHODS:
        here = nonconformity(p, method=method)[0][order]
        there = nonconformity(p[:, order], method=method)[0]
        # Sums of six numbers of size one, in another order.
        assert np.allclose(here, there, rtol=0.0, atol=1e-12)


def test_aps_is_the_mass_of_the_likelier_classes_and_ties_share_it():
    assert np.allclose(nonconformity([[0.2, 0.4, 0.4]], method="aps"), [[1.0, 0.8, 0.8]])


def test_label_outside_the_classes_is_never_covered():
    scores = label_scores([[0.5, 0.5]] * 20, np.array([-1] * 20))

    assert np.isinf(scores).all()
    assert math.isinf(ConformalPredictor.from_scores(scores, alpha=0.5).threshold)


def test_abstaining_keeps_rows_with_one_class_only(as_prediction):
    p = np.array([[0.9, 0.1], [0.55, 0.45], [0.7, 0.3]])
    predictor = ConformalPredictor(threshold=0.5, alpha=0.1)

    # Sets: {0}, {0}, {0} at 0.5; {0}, {0, 1}, {0} at 0.6; none for row 1 at 0.4.
    assert not predictor.abstain(as_prediction(p)).abstained.any()
    wider = ConformalPredictor(threshold=0.6, alpha=0.1)
    assert wider.undecided(p).tolist() == [False, True, False]
    assert wider.abstain(as_prediction(p)).abstained.tolist() == [False, True, False]
    assert not wider.abstain(as_prediction(p), most_classes=2).abstained.any()
    narrow = ConformalPredictor(threshold=0.4, alpha=0.1)
    assert narrow.abstain(as_prediction(p)).abstained.tolist() == [False, True, False]


def test_threshold_of_own_answers_is_refused_for_joint_ones(as_prediction):
    p = np.array([[0.9, 0.1]])
    own = ConformalPredictor(threshold=0.5, alpha=0.1, scope=OWN)

    assert own.sets(p).tolist() == [[True, False]]
    with pytest.raises(InvalidValueError, match="joint"):
        own.sets(as_prediction(p))


def test_confidence_over_the_audits_is_what_repeated_audits_show():
    rng = np.random.default_rng(3)
    n, delta = 100, 0.1
    # Scores are uniform, so a threshold's coverage is the threshold itself.
    predictors = [ConformalPredictor.from_scores(rng.random(n), alpha=0.1) for _ in range(2000)]
    promised = predictors[0].coverage_with_confidence(delta)
    below = np.mean([p.threshold < promised for p in predictors])

    # Binomial with mean delta; six standard errors, significance 1e-8.
    assert abs(below - delta) < 6.0 * math.sqrt(delta * (1 - delta) / 2000)


@pytest.mark.parametrize(
    "arguments",
    [
        {"threshold": math.nan, "alpha": 0.1},
        {"threshold": 0.5, "alpha": 0.0},
        {"threshold": 0.5, "alpha": 0.1, "method": "other"},
        {"threshold": 0.5, "alpha": 0.1, "scope": "mine"},
        {"threshold": 0.5, "alpha": 0.1, "n_groups": 0},
    ],
)
def test_predictor_out_of_range_is_refused_when_built(arguments):
    with pytest.raises(InvalidValueError):
        ConformalPredictor(**arguments)


def test_bad_probabilities_and_labels_are_refused():
    with pytest.raises(InvalidValueError):
        nonconformity([[0.5, 0.6]])
    with pytest.raises(InvalidValueError):
        nonconformity([[math.nan, 1.0]])
    with pytest.raises(ShapeError):
        label_scores([[0.5, 0.5]], [0, 1])
    with pytest.raises(InvalidValueError):
        label_scores([[0.5, 0.5]], [2])


def test_bounds_agree_with_scipy():
    stats = pytest.importorskip("scipy.stats")
    for wrong, n, delta in [(0, 20, 0.05), (3, 50, 0.01), (40, 1000, 0.1), (7, 7, 0.05)]:
        exact = 1.0 if wrong == n else stats.beta.ppf(1 - delta, wrong + 1, n - wrong)
        # Bisection to the last bit; the sum of terms is right to some 1e-12 of itself.
        assert upper_bound(wrong, n, delta=delta) == pytest.approx(exact, abs=1e-9)
        assert at_most_probability(wrong, n, 0.3) == pytest.approx(
            stats.binom.cdf(wrong, n, 0.3), abs=1e-10
        )
    assert beta_lower_quantile(181, 200, delta=0.05) == pytest.approx(
        stats.beta.ppf(0.05, 181, 20), abs=1e-9
    )
