"""Rules that see each site's scores, against brute force."""

import itertools
import statistics

import numpy as np
import pytest

from fedinfer_flower.ensemble import make_rule

SEED = 7


def random_scores(n_sites, n_queries, n_classes):
    return np.random.default_rng(SEED).dirichlet(np.ones(n_classes), (n_sites, n_queries))


@pytest.mark.parametrize("n_sites", [1, 2, 5, 6])
def test_median_of_random_scores_equals_sorted_middle(n_sites):
    scores = random_scores(n_sites, 4, 3)

    total = make_rule("median").combine(scores)

    for b, c in itertools.product(range(4), range(3)):
        # Two middle values are averaged in either case: equal to the last digit.
        assert total[b, c] == pytest.approx(statistics.median(scores[:, b, c]), abs=1e-15)


@pytest.mark.parametrize(("n_sites", "trim", "kept"), [(5, 1, 3), (7, 2, 3), (2, 1, 2), (4, 9, 2)])
def test_trimmed_mean_of_random_scores_equals_mean_of_middle(n_sites, trim, kept):
    scores = random_scores(n_sites, 4, 3)

    total = make_rule("trimmed-mean", {"trim": trim}).combine(scores)

    cut = (n_sites - kept) // 2
    for b, c in itertools.product(range(4), range(3)):
        middle = sorted(scores[:, b, c])[cut : cut + kept]
        # A sum of at most seven numbers below one.
        assert total[b, c] == pytest.approx(sum(middle) / kept, abs=1e-14)


def cost(point, answers):
    return np.linalg.norm(answers - point, axis=-1).sum()


# Smoothing may cost each site its 1e-6. The steps are slowest for four sites whose median
# is nearly one of them; by default they end within 1e-3 of the smallest sum, about 2.
@pytest.mark.parametrize(("options", "room"), [({}, 1e-3), ({"iterations": 10_000}, 1e-5)])
@pytest.mark.parametrize("n_sites", [1, 2, 3, 4, 9])
def test_geometric_median_of_random_scores_beats_every_grid_point(n_sites, options, room):
    scores = random_scores(n_sites, 3, 3)
    steps = 60
    grid = [
        np.array([i, j, steps - i - j]) / steps
        for i in range(steps + 1)
        for j in range(steps + 1 - i)
    ]

    total = make_rule("geometric-median", options).combine(scores)

    for b in range(3):
        candidates = [*grid, *scores[:, b]]
        least = min(cost(candidate, scores[:, b]) for candidate in candidates)
        assert cost(total[b], scores[:, b]) <= least + room


@pytest.mark.parametrize("name", ["median", "trimmed-mean", "geometric-median"])
def test_robust_rule_with_hostile_minority_keeps_the_honest_answer(name):
    honest = np.tile([[0.8, 0.15, 0.05]], (5, 1, 1))
    hostile = np.array([[[0.0, 0.0, 1.0]]])
    rule = make_rule(name)

    total = rule.combine(np.concatenate([honest, hostile]))

    # The honest answer itself: medians of a majority of equal values do not move. The
    # geometric median is off by its smoothing at most.
    np.testing.assert_allclose(total, honest[0], rtol=0.0, atol=1e-5)


def test_spectral_with_equal_confidences_weighs_sites_alike():
    scores = np.array([[[0.9, 0.1], [0.1, 0.9]], [[0.1, 0.9], [0.1, 0.9]]])

    total = make_rule("spectral").combine(scores)

    np.testing.assert_allclose(total, scores.mean(axis=0), rtol=0.0, atol=1e-12)


def test_spectral_with_two_equal_eigenvalues_does_not_prefer_a_site():
    # Confidences of the two sites vary alike but independently: the covariance is a
    # multiple of the identity and every vector is an eigenvector.
    first = [[0.9, 0.1], [0.5, 0.5], [0.9, 0.1], [0.5, 0.5]]
    second = [[0.9, 0.1], [0.9, 0.1], [0.5, 0.5], [0.5, 0.5]]

    total = make_rule("spectral").combine(np.array([first, second]))

    np.testing.assert_allclose(total, np.mean([first, second], axis=0), rtol=0.0, atol=1e-12)


def test_consensus_with_larger_beta_punishes_the_outlier_more():
    scores = np.array([[[0.8, 0.2]], [[0.8, 0.2]], [[0.2, 0.8]]])

    shares = [make_rule("consensus", {"beta": b}).combine(scores)[0, 1] for b in (0.0, 1.0, 5.0)]

    assert shares[0] == pytest.approx(0.4, abs=1e-12)
    assert shares[0] > shares[1] > shares[2]


def test_hybrid_with_huge_beta_and_far_outlier_stays_finite():
    scores = np.array([[[1.0, 0.0]], [[1.0, 0.0]], [[0.0, 1.0]]])

    total = make_rule("hybrid", {"beta": 100.0}).combine(scores)

    np.testing.assert_allclose(total, [[1.0, 0.0]], rtol=0.0, atol=1e-5)
