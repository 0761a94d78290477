"""Reputations: counts that fade, and bounds that are SciPy's."""

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from fedinfer_flower.errors import InvalidValueError
from fedinfer_flower.incentives.reputation import NEWCOMER, lower_bound, mean, update

thorough = settings(max_examples=80, derandomize=True, deadline=None)
positive = st.floats(0.05, 5000)


@thorough
@given(alpha=positive, beta=positive, confidence=st.floats(0.01, 0.99))
def test_lower_bound_is_the_quantile(alpha, beta, confidence):
    bound = lower_bound((alpha, beta), confidence)

    # Compared as a probability: quantiles of nearly flat tails are not sharp themselves.
    assert stats.beta.cdf(bound, alpha, beta) == pytest.approx(1 - confidence, abs=1e-7) or (
        bound == pytest.approx(stats.beta.ppf(1 - confidence, alpha, beta), abs=1e-9)
    )


@thorough
@given(alpha=positive, beta=positive)
def test_lower_bound_falls_with_confidence_and_lies_below_the_mean(alpha, beta):
    reputation = (alpha + 1.0, beta + 1.0)

    assert lower_bound(reputation, 0.99) <= lower_bound(reputation, 0.9) <= mean(reputation)


def test_evidence_raises_the_bound_of_the_same_share():
    few, many = update(NEWCOMER, 8, 2), update(NEWCOMER, 800, 200)

    assert lower_bound(few) < lower_bound(many) < 0.8


def test_evidence_fades_towards_a_newcomer():
    reputation = update(NEWCOMER, 90, 10)

    for _ in range(500):
        reputation = update(reputation, 0, 0, decay=0.95)

    assert reputation == pytest.approx(NEWCOMER)


def test_decay_bounds_what_a_past_can_weigh():
    reputation = NEWCOMER
    for _ in range(500):
        reputation = update(reputation, 10, 0, decay=0.9)

    assert sum(reputation) - 2 <= 10 / (1 - 0.9) + 1e-6
    # So a site that turns bad falls below one half in a few epochs.
    for _ in range(7):
        reputation = update(reputation, 0, 10, decay=0.9)
    assert mean(reputation) < 0.5


def test_without_decay_order_does_not_matter():
    there = update(update(NEWCOMER, 3, 1, 1.0), 1, 5, 1.0)
    back = update(update(NEWCOMER, 1, 5, 1.0), 3, 1, 1.0)

    assert there == back == (5.0, 7.0)


@pytest.mark.parametrize(
    "call",
    [
        lambda: update((0.0, 1.0), 1, 1),
        lambda: update((math.inf, 1.0), 1, 1),
        lambda: update(NEWCOMER, -1, 1),
        lambda: update(NEWCOMER, math.nan, 1),
        lambda: update(NEWCOMER, 1, 1, decay=1.5),
        lambda: mean((-1.0, 1.0)),
        lambda: lower_bound(NEWCOMER, 1.0),
    ],
)
def test_impossible_reputations_are_refused(call):
    with pytest.raises(InvalidValueError):
        call()
