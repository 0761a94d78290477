"""The numbers by which attacks are judged, against other implementations and known truths."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from sklearn.metrics import roc_auc_score

from fedinfer_flower.attacks.measures import (
    ERROR_RATE,
    area_under_curve,
    binomial_threshold,
    bootstrapped_rates,
    clopper_pearson,
    dp_bound,
    true_positive_rate,
)
from fedinfer_flower.errors import InvalidValueError
from fedinfer_flower.privacy.gaussian_dp import delta_of, mu_for

SCORED = st.lists(
    st.tuples(st.integers(-3, 3).map(float), st.booleans()), min_size=2, max_size=40
).filter(lambda rows: 0 < sum(member for _, member in rows) < len(rows))


@given(rows=SCORED)
def test_area_agrees_with_scikit_learn(rows) -> None:
    scores, members = np.array([s for s, _ in rows]), np.array([m for _, m in rows])

    assert area_under_curve(scores, members) == pytest.approx(roc_auc_score(members, scores))


@given(rows=SCORED, rate=st.floats(0.01, 0.99))
@settings(max_examples=200)
def test_rate_lies_on_the_randomised_roc_curve(rows, rate: float) -> None:
    scores, members = np.array([s for s, _ in rows]), np.array([m for _, m in rows])
    # All deterministic thresholds; a coin between two of them interpolates.
    cuts = [np.inf, *sorted(set(scores), reverse=True)]
    false = [(scores[~members] >= cut).mean() for cut in cuts]
    true = [(scores[members] >= cut).mean() for cut in cuts]
    found = true_positive_rate(scores, members, false_positive_rate=rate)

    def on_curve(at: float) -> float:
        # Of several thresholds with the same false positives the best one.
        last = np.searchsorted(false, at, side="right") - 1
        if last == len(false) - 1:
            return true[last]
        share = (at - false[last]) / (false[last + 1] - false[last])
        return true[last] + share * (true[last + 1] - true[last])

    # The curve has steps: a hair to either side decides which end of one is right.
    assert on_curve(rate - 1e-9) - 1e-6 <= found <= on_curve(rate + 1e-9) + 1e-6


def test_rate_of_two_normal_scores_is_the_known_one() -> None:
    rng, shift, n = np.random.default_rng(0), 1.0, 200_000
    members = np.arange(2 * n) < n
    scores = rng.normal(size=2 * n) + shift * members

    found = true_positive_rate(scores, members, false_positive_rate=0.01)

    expected = stats.norm.sf(stats.norm.isf(0.01) - shift)
    # Standard errors of the rate and of the threshold's rate, carried over: 0.001 together.
    assert found == pytest.approx(expected, abs=0.005)


def test_all_records_alike_give_the_chance() -> None:
    members = np.arange(1000) < 500
    scores = np.zeros(1000)

    assert true_positive_rate(scores, members, false_positive_rate=0.01) == pytest.approx(0.01)
    assert area_under_curve(scores, members) == 0.5


@pytest.mark.parametrize("members", [np.zeros(3, bool), np.ones(3, bool), np.ones(2, bool)])
def test_nobody_to_tell_apart_is_refused(members) -> None:
    with pytest.raises(InvalidValueError):
        area_under_curve(np.zeros(3), members)


@pytest.mark.parametrize(("hits", "trials"), [(0, 10), (3, 10), (10, 10), (47, 400)])
def test_interval_agrees_with_scipy(hits: int, trials: int) -> None:
    expected = stats.binomtest(hits, trials).proportion_ci(0.95, method="exact")

    assert clopper_pearson(hits, trials) == pytest.approx((expected.low, expected.high))


@given(chance=st.floats(0.0, 1.0), trials=st.integers(1, 400))
def test_guessing_seldom_beats_the_threshold(chance: float, trials: int) -> None:
    threshold = round(binomial_threshold(chance, trials) * trials)

    assert stats.binom.sf(threshold, trials, chance) <= ERROR_RATE * (1 + 1e-9)
    if threshold:
        # The next lower one would not do.
        assert stats.binom.sf(threshold - 1, trials, chance) > ERROR_RATE * (1 - 1e-9)


@pytest.mark.parametrize("epsilon", [0.5, 1.0, 4.0])
def test_no_test_of_a_gaussian_mechanism_beats_the_bound(epsilon: float) -> None:
    mu = mu_for(epsilon, 1e-3)
    rates = np.linspace(1e-4, 0.999, 500)
    best = stats.norm.cdf(stats.norm.ppf(rates) + mu)

    bounds = np.array([dp_bound(rate, epsilon=epsilon, delta=1e-3) for rate in rates])

    assert delta_of(epsilon, mu) <= 1e-3
    assert (best <= bounds + 1e-9).all()
    # And the bound is not an idle one: where it is nearest, it is near.
    assert (bounds - best).min() < 0.01


def test_resampled_rates_spread_like_independent_worlds() -> None:
    rng = np.random.default_rng(1)
    n_worlds, n = 40, 2000
    members = rng.random((n_worlds, n)) < 0.5
    scores = rng.normal(size=(n_worlds, n)) + members

    rates = bootstrapped_rates(scores, members, np.arange(n_worlds), false_positive_rate=0.05)

    direct = true_positive_rate(scores, members, false_positive_rate=0.05)
    assert rates.mean() == pytest.approx(direct, abs=0.005)
    # 40,000 members at a rate of 0.26, and as many others: 0.0022 and 0.0011 x slope 3.2.
    assert 0.002 < rates.std() < 0.008
