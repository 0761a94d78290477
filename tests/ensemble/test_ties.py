"""No class gains by its place in the list."""

import math

import numpy as np
import pytest

from fedinfer_flower.ensemble import make_rule
from fedinfer_flower.ensemble.majority_vote import split_vote

SIGNIFICANCE = 1e-6


def test_split_vote_of_tied_logits_shares_evenly():
    logits = np.array([[1.0, 1.0, 0.0], [0.0, -0.0, 0.0], [2.0, 1.0, 1.0]])

    votes = split_vote(logits)

    np.testing.assert_array_equal(votes, [[0.5, 0.5, 0.0], [1 / 3, 1 / 3, 1 / 3], [1.0, 0.0, 0.0]])


def test_majority_vote_of_undecided_sites_abstains(plain_site):
    rule = make_rule("majority-vote")

    total = rule.combine(np.stack([rule.score(np.zeros((1, 3)), plain_site(3))] * 4))

    assert rule.decide(total, 4, ("a", "b", "c")).abstained.all()


@pytest.mark.parametrize("tied", [(0, 1), (1, 3), (0, 2, 3)])
def test_decide_over_many_ties_picks_tied_classes_equally_often(tied):
    n_queries, seed = 30_000, 20260302
    total = np.zeros((n_queries, 4))
    total[:, list(tied)] = 2.0

    labels = make_rule("majority-vote").decide(total, 5, ("a", "b", "c", "d"), tie_seed=seed).labels

    counts = np.bincount(labels, minlength=4)
    # Hoeffding's bound for each count, Bonferroni over the tied classes.
    room = math.sqrt(n_queries * math.log(2 * len(tied) / SIGNIFICANCE) / 2)
    assert counts.sum() == counts[list(tied)].sum(), f"seed {seed}: an untied class won"
    worst = np.abs(counts[list(tied)] - n_queries / len(tied)).max()
    assert worst <= room, f"seed {seed}: {counts} of {n_queries}, {room:.0f} allowed"


def test_decide_with_the_same_seed_breaks_ties_the_same_way():
    rule, total = make_rule("majority-vote"), np.ones((50, 3)) + np.eye(3)[[0] * 50] * 0.0

    first = rule.decide(total, 3, ("a", "b", "c"), tie_seed=4).labels
    second = rule.decide(total, 3, ("a", "b", "c"), tie_seed=4).labels

    np.testing.assert_array_equal(first, second)


def test_borda_of_tied_and_unknown_classes_shares_ranks():
    from fedinfer_flower.ensemble import SiteContext

    site = SiteContext(present=np.array([True, True, True, False, False]))
    logits = np.array([[2.0, 2.0, -50.0, -13.8, -13.9]])

    ranks = make_rule("borda").score(logits, site)

    # Unknown classes tie for the last place, below a known one with a lower logit.
    np.testing.assert_array_equal(ranks, [[0.875, 0.875, 0.5, 0.125, 0.125]])
