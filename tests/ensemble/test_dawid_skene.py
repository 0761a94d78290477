"""Dawid-Skene against loops, and on sites whose errors are known."""

import math

import numpy as np
import pytest

from fedinfer_flower.ensemble import make_rule

SEED = 11


def reference(votes, n_classes, iterations, smoothing):
    """Expectation maximisation in loops over whole votes, shape (n_sites, n_queries)."""
    n_sites, n_queries = votes.shape
    q = [
        [1e-3 + sum(votes[:, b] == c) / n_sites for c in range(n_classes)] for b in range(n_queries)
    ]
    q = [[x / sum(row) for x in row] for row in q]
    for _ in range(iterations):
        prior = [sum(row[c] for row in q) / n_queries + 1e-9 for c in range(n_classes)]
        likelihood = [[math.log(prior[c]) for c in range(n_classes)] for _ in range(n_queries)]
        for k in range(n_sites):
            for c in range(n_classes):
                cells = [smoothing] * n_classes
                for b in range(n_queries):
                    cells[votes[k, b]] += q[b][c]
                for b in range(n_queries):
                    likelihood[b][c] += math.log(cells[votes[k, b]] / sum(cells))
        q = []
        for row in likelihood:
            powers = [math.exp(x - max(row)) for x in row]
            q.append([p / sum(powers) for p in powers])
    return np.array(q)


def noisy_votes(truth, accuracies, n_classes):
    rng = np.random.default_rng(SEED)
    wrong = (truth + rng.integers(1, n_classes, (len(accuracies), len(truth)))) % n_classes
    right = rng.random(wrong.shape) < np.array(accuracies)[:, None]
    return np.where(right, truth, wrong)


@pytest.mark.parametrize(("iterations", "smoothing"), [(1, 0.1), (20, 0.1), (60, 1.0)])
def test_dawid_skene_of_whole_votes_equals_reference(iterations, smoothing):
    truth = np.random.default_rng(SEED).integers(0, 3, 30)
    votes = noisy_votes(truth, [0.9, 0.7, 0.6, 0.5], 3)
    rule = make_rule("dawid-skene", {"iterations": iterations, "smoothing": smoothing})

    posterior = rule.combine(np.eye(3)[votes])

    # Each step rounds to 1e-12; the steps contract, so little of it adds up.
    expected = reference(votes, 3, iterations, smoothing)
    np.testing.assert_allclose(posterior, expected, rtol=0.0, atol=1e-9)


def test_dawid_skene_with_hostile_sites_beats_majority_vote():
    truth = np.random.default_rng(SEED).integers(0, 3, 300)
    honest = noisy_votes(truth, [0.85] * 4, 3)
    hostile = np.tile((truth + 1) % 3, (4, 1))
    hostile = np.where(np.random.default_rng(SEED + 1).random(hostile.shape) < 0.8, hostile, truth)
    votes = np.eye(3)[np.concatenate([honest, hostile])]

    learned = (make_rule("dawid-skene").combine(votes).argmax(axis=1) == truth).mean()
    counted = (make_rule("majority-vote").combine(votes).argmax(axis=1) == truth).mean()

    # Seeded, so no chance: Dawid-Skene reads the hostile votes backwards.
    assert learned > counted + 0.1


@pytest.mark.parametrize("n_sites", [1, 2])
def test_dawid_skene_of_too_few_sites_averages_votes(n_sites):
    votes = np.eye(4)[noisy_votes(np.arange(4), [0.5] * n_sites, 4)]

    np.testing.assert_array_equal(make_rule("dawid-skene").combine(votes), votes.mean(axis=0))


def test_dawid_skene_of_balanced_votes_ignores_site_order():
    # A small batch may leave two answers equally likely. Without rounding, the last digit
    # of a sum then decides between them: seed 49 is such a batch and differs by 0.8.
    rule = make_rule("dawid-skene", {"iterations": 500})
    for seed in [*range(20), 49, 185]:
        rng = np.random.default_rng(seed)
        n_sites, n_classes, n_queries = rng.integers(3, 6), rng.integers(2, 4), rng.integers(1, 6)
        votes = np.eye(n_classes)[rng.integers(0, n_classes, (n_sites, n_queries))]

        shuffled = rule.combine(votes[rng.permutation(n_sites)])

        np.testing.assert_allclose(
            shuffled, rule.combine(votes), rtol=0.0, atol=1e-9, err_msg=f"seed {seed}"
        )
