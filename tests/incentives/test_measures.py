"""Measures of a reward split against SciPy and against their definitions."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from scipy import stats

from fedinfer_flower.errors import InvalidValueError, ShapeError
from fedinfer_flower.incentives import measures

thorough = settings(max_examples=60, derandomize=True, deadline=None)
numbers = arrays(np.float64, 6, elements=st.floats(-5, 5).map(lambda x: round(x, 1)))


@thorough
@given(first=numbers, second=numbers)
def test_rank_correlations_are_scipys(first, second):
    if np.ptp(first) == 0 or np.ptp(second) == 0:
        assert measures.spearman(first, second) == 0.0
        assert measures.kendall(first, second) == 0.0
        return

    assert measures.spearman(first, second) == pytest.approx(
        stats.spearmanr(first, second).statistic, abs=1e-9
    )
    assert measures.kendall(first, second) == pytest.approx(
        stats.kendalltau(first, second).statistic, abs=1e-9
    )


@thorough
@given(merit=numbers, reward=numbers)
def test_measures_of_shares_keep_their_ranges(merit, reward):
    assert 0.0 <= measures.fairness_f(merit, reward) <= 1.0 + 1e-12
    assert measures.fairness_f(merit, merit) == pytest.approx(1.0)
    assert measures.kl_divergence(merit, reward) >= -1e-9
    assert measures.kl_divergence(merit, merit) == pytest.approx(0.0, abs=1e-9)
    assert -1.0 - 1e-12 <= measures.cosine(merit, reward) <= 1.0 + 1e-12
    assert measures.shares(reward).sum() == pytest.approx(1.0)


def test_chance_adjusted_f_gives_guessing_no_merit():
    accuracy = np.array([0.9, 0.1, 0.1])

    assert measures.chance_adjusted_f(accuracy, np.array([1.0, 0, 0]), 10) == pytest.approx(1.0)
    assert measures.fairness_f(accuracy, np.array([1.0, 0, 0])) < 0.85


def test_top_one_hit_counts_equals_and_misses():
    assert measures.top_one_hit(np.array([2.0, 2.0, 1.0]), np.array([0.0, 1.0, 0.0]))
    assert not measures.top_one_hit(np.array([2.0, 1.0]), np.array([0.0, 1.0]))


def test_attackers_are_counted_once_and_together():
    rewards = np.array([1.0, 1.0, 2.0, -5.0])

    assert measures.attacker_share(rewards, [2, 3, 2]) == pytest.approx(0.5)
    assert measures.attacker_share(rewards, set()) == 0.0


def test_clone_gain_is_the_familys_pay_over_the_single_ones():
    before, after = np.array([1.0, 1.0]), np.array([1.0, 1.0, 1.0])

    gain = measures.clone_gain(before, after, original=1, family={1, 2})

    assert gain == pytest.approx((2 / 3) / (1 / 2))
    worthless = measures.clone_gain(
        np.array([1.0, 0.0]), np.array([1.0, 0.0, 0.0]), original=1, family={1, 2}
    )
    assert worthless == 0.0


def test_cosine_of_nothing_is_nothing():
    assert measures.cosine(np.zeros(2), np.ones(2)) == 0.0


@pytest.mark.parametrize("scores", [np.array([]), np.array([np.nan]), np.ones((2, 2))])
def test_shares_refuse_what_is_no_score(scores):
    with pytest.raises(InvalidValueError):
        measures.shares(scores)


def test_measures_refuse_unlike_lengths():
    for measure in (measures.fairness_f, measures.spearman, measures.cosine):
        with pytest.raises(ShapeError):
            measure(np.ones(2), np.ones(3))
