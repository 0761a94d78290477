"""Sampled values: within their bounds, unbiased, from what they are allowed to see."""

import itertools
import warnings

import numpy as np
import pytest

from fedinfer_flower.errors import InvalidValueError
from fedinfer_flower.incentives import AuditedAnswers, CoalitionSums, make_scheme
from fedinfer_flower.incentives.banzhaf_coalitions import BanzhafCoalitions
from fedinfer_flower.incentives.games import Utility, all_coalition_values
from fedinfer_flower.incentives.shapley_sampled import ShapleySampled


def answers_of(seed, *, n_sites=6, n_queries=30, n_classes=4):
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, n_classes, n_queries)
    logits = rng.normal(size=(n_sites, n_queries, n_classes)) + 2 * np.eye(n_classes)[labels]
    p = np.exp(logits)
    return AuditedAnswers(probabilities_ktc=p / p.sum(axis=-1, keepdims=True), labels=labels)


@pytest.mark.parametrize("utility", ["accuracy", "brier"])
@pytest.mark.parametrize("truncation", [0.0, 0.05])
def test_sampled_shapley_is_within_its_bound(utility, truncation):
    answers = answers_of(0)
    exact = make_scheme("shapley", {"utility": utility}).contributions(answers)

    for seed in range(10):
        # A bound that may fail once in a million runs of one of these seeds.
        estimate = ShapleySampled(
            n_permutations=200, delta=1e-7, utility=utility, truncation=truncation, seed=seed
        ).estimate(answers)

        assert np.abs(estimate.values - exact).max() <= estimate.half_width
        assert estimate.n_permutations == 200


def test_bound_is_hoeffdings_and_shrinks_with_the_root_of_the_draws():
    answers = answers_of(1)

    few = ShapleySampled(n_permutations=200, delta=0.05).estimate(answers).half_width
    many = ShapleySampled(n_permutations=800, delta=0.05).estimate(answers).half_width

    assert few == pytest.approx(np.sqrt(2 * np.log(2 * 6 / 0.05) / 100), rel=1e-12)
    assert many == pytest.approx(few / 2, rel=1e-12)


def test_sampled_shapley_shares_out_everything_in_every_run():
    answers = answers_of(2)
    values = all_coalition_values(answers, Utility.ACCURACY)

    # Each walk's marginals sum to the whole, so that any number of walks does.
    shared = ShapleySampled(n_permutations=2).contributions(answers).sum()

    assert shared == pytest.approx(values[-1] - values[0], abs=1e-9)


def test_reverse_walks_make_the_estimate_better():
    answers = answers_of(3)
    exact = make_scheme("shapley").contributions(answers)
    orders = np.random.default_rng(0).permuted(np.tile(np.arange(6), (4000, 1)), axis=1)
    values = all_coalition_values(answers, Utility.ACCURACY)

    def walked(order):
        gains, place = np.zeros(6), 0
        for k in order:
            gains[k] = values[place | (1 << k)] - values[place]
            place |= 1 << k
        return gains

    alone = np.array([walked(order) for order in orders])
    pairs = np.array([(walked(order) + walked(order[::-1])) / 2 for order in orders[:2000]])

    # As many walks each: variance of a pair against half the variance of one walk.
    assert (pairs.var(axis=0) < alone.var(axis=0) / 2).all()
    assert np.allclose(pairs.mean(axis=0), exact, atol=0.03)  # six standard errors


def test_truncation_pays_for_what_it_skips():
    answers = answers_of(4)

    whole = ShapleySampled(n_permutations=200).estimate(answers)
    cut = ShapleySampled(n_permutations=200, truncation=0.05).estimate(answers)

    assert cut.half_width > whole.half_width


def test_odd_number_of_orders_is_refused():
    with pytest.raises(InvalidValueError, match="even"):
        ShapleySampled(n_permutations=3)


def test_many_sites_are_sampled():
    answers = answers_of(5, n_sites=60, n_queries=10)

    values = make_scheme("shapley-sampled", {"n_permutations": 20}).contributions(answers)

    assert np.isfinite(values).all()
    assert len(np.unique(values)) > 1


def test_banzhaf_of_many_sites_is_near_the_exact_one():
    answers = answers_of(6, n_sites=13, n_queries=10)
    options = {"utility": "brier", "n_coalitions": 50_000}

    values = make_scheme("banzhaf", options).contributions(answers)

    # Both values of the Brier game are the closed form. Utilities spread by less than 0.5,
    # so that a difference of two means of 25 000 has a standard error below 0.005.
    exact = make_scheme("brier-shapley").contributions(answers)
    assert np.abs(values - exact).max() < 0.03


# -- from coalition sums alone -------------------------------------------------------------------


def test_coalitions_estimate_the_brier_values_without_bias():
    answers = answers_of(7, n_sites=5, n_queries=8)
    p, exact = answers.probabilities_ktc, make_scheme("brier-shapley").contributions(answers)
    every = np.array(list(itertools.product([False, True], repeat=5)))

    # Every coalition asked every query once: the expectation over draws, with no noise.
    estimate = BanzhafCoalitions(min_members=1).from_coalitions(
        CoalitionSums(
            members_tk=np.repeat(every, 8, axis=0),
            totals_tc=np.einsum("mk,ktc->mtc", every, p).reshape(-1, 4),
            labels=np.tile(answers.labels, len(every)),
        )
    )

    assert np.allclose(estimate, exact, atol=1e-9)


def test_coalitions_that_are_drawn_are_large_enough_to_open():
    answers = answers_of(8, n_queries=400)

    sums = BanzhafCoalitions(min_members=3).draw(answers)

    sizes = sums.members_tk.sum(axis=1)
    assert sizes.min() >= 3
    assert np.allclose(sums.totals_tc.sum(axis=1), sizes)
    # All six together where two or fewer were drawn: 22 of 64, and those that drew all.
    assert 0.2 < (sizes == 6).mean() < 0.5


def test_coalitions_of_too_few_sites_say_nothing():
    values = BanzhafCoalitions(min_members=3).contributions(answers_of(9, n_sites=2))

    assert values.tolist() == [0.0, 0.0]


def test_coalitions_find_the_better_site_with_many_audits():
    answers = answers_of(10, n_sites=5, n_queries=4000)
    p = answers.probabilities_ktc.copy()
    p[0] = 1 / 4

    values = BanzhafCoalitions().contributions(
        AuditedAnswers(probabilities_ktc=p, labels=answers.labels)
    )

    assert values.argmin() == 0


# -- another library's word ----------------------------------------------------------------------


def test_shapley_agrees_with_pydvl():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        naive = pytest.importorskip(
            "pydvl.value.shapley.naive",
            reason="pyDVL is no dependency (LGPL, numpy < 2): pip install pyDVL to compare",
        )
    answers = answers_of(11, n_sites=5)
    values = all_coalition_values(answers, Utility.ACCURACY)

    class Sites:
        indices = np.arange(5)
        data_names = np.arange(5)

        def __len__(self):
            return 5

    class Worth:
        data = Sites()

        def __call__(self, members):
            return values[sum(1 << int(k) for k in members)]

    theirs = naive.permutation_exact_shapley(Worth(), progress=False).values

    ours = make_scheme("shapley").contributions(answers)
    assert np.allclose(ours, theirs, atol=1e-9)
