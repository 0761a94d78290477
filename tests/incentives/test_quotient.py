"""Copies are paid once."""

import numpy as np
import pytest

from fedinfer_flower.errors import InvalidValueError, ShapeError
from fedinfer_flower.incentives import AuditedAnswers, Sight, make_scheme
from fedinfer_flower.incentives.measures import clone_gain
from fedinfer_flower.incentives.quotient import (
    Quotient,
    duplicate_clusters,
    owner_clusters,
    split_within,
)

SCORED = ["audited-blend", "brier-shapley", "shapley", "linear-ca", "correlated-agreement"]


def answers_of(seed, *, n_sites=5, n_queries=200, n_classes=5, skill=1.5, **more):
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, n_classes, n_queries)
    logits = rng.normal(size=(n_sites, n_queries, n_classes))
    logits += skill * np.eye(n_classes)[labels]
    p = np.exp(logits) / np.exp(logits).sum(axis=-1, keepdims=True)
    return AuditedAnswers(probabilities_ktc=p, labels=labels, **more)


def with_copy(answers, site, *, noise=0.0, seed=0):
    rng = np.random.default_rng(seed)
    copy = answers.probabilities_ktc[site] + noise * rng.random(answers.public().total_tc.shape)
    copy /= copy.sum(axis=1, keepdims=True)
    p = np.concatenate([answers.probabilities_ktc, copy[None]])
    return AuditedAnswers(probabilities_ktc=p, labels=answers.labels)


def test_honest_sites_are_not_taken_for_copies():
    for seed in range(10):
        assert duplicate_clusters(answers_of(seed)) == (0, 1, 2, 3, 4)


@pytest.mark.parametrize("noise", [0.0, 1e-3, 0.02])
def test_copies_are_found_though_they_are_not_exact(noise):
    clusters = duplicate_clusters(with_copy(answers_of(0), 2, noise=noise))

    assert clusters == (0, 1, 2, 3, 4, 2)


def test_exact_copies_are_found_though_they_never_deviate():
    sure = np.eye(3)[np.arange(30) % 3]
    nearly = 0.9 * sure + 0.1 / 3
    p = np.stack([sure, nearly, sure])

    assert duplicate_clusters(AuditedAnswers(probabilities_ktc=p)) == (0, 1, 0)


def test_one_owner_is_one_cluster_and_links_chain():
    answers = answers_of(1)
    p = with_copy(answers, 3).probabilities_ktc
    owners = ("a", "b", "c", "d", "a", "b")

    # 0 and 4 are of one owner; 1 and 5 too, and 5 answers as 3 does.
    linked = duplicate_clusters(AuditedAnswers(probabilities_ktc=p, owners=owners))
    assert linked == (0, 1, 2, 1, 0, 1)


@pytest.mark.parametrize("name", SCORED)
def test_exact_copy_of_the_best_site_gains_nothing(name):
    for seed in range(3):
        answers = answers_of(seed)
        best = int((answers.votes() == answers.labels).mean(axis=1).argmax())
        scheme = Quotient(make_scheme(name))

        before = scheme.contributions(answers)
        after = scheme.contributions(with_copy(answers, best))

        gain = clone_gain(before, after, original=best, family={best, 5})
        # The merged game is the game before: equal up to rounding.
        assert gain == pytest.approx(1.0, abs=1e-9)


@pytest.mark.parametrize("name", SCORED)
def test_copy_gains_where_nobody_merges_it(name):
    answers = answers_of(0)
    best = int((answers.votes() == answers.labels).mean(axis=1).argmax())
    scheme = make_scheme(name)

    before = scheme.contributions(answers)
    after = scheme.contributions(with_copy(answers, best))

    assert clone_gain(before, after, original=best, family={best, 5}) > 1.1


def test_quotient_is_the_scheme_itself_without_copies():
    answers, scheme = answers_of(2), make_scheme("audited-blend")
    quotient = Quotient(scheme)

    values = quotient.contributions(answers)

    assert np.allclose(values, scheme.contributions(answers), atol=1e-12)
    assert quotient.sees is Sight.ANSWERS
    assert quotient.needs_labels
    assert quotient.name == "quotient audited-blend"


def test_members_of_a_cluster_share_what_it_earns():
    owners = ("a", "b", "a", "c", "d")
    values = Quotient(make_scheme("audited-blend")).contributions(answers_of(3, owners=owners))

    assert values[0] == values[2]


def test_row_sums_are_split_by_owner():
    values = np.array([0.4, 0.3, 0.2])

    paid = split_within(values, owner_clusters(("ward", "lab", "ward")))

    assert paid.tolist() == pytest.approx([0.15, 0.3, 0.15])
    with pytest.raises(ShapeError):
        split_within(values, (0, 1))


@pytest.mark.parametrize(
    "options", [{"threshold": 1.0}, {"threshold": -0.1}, {"min_deviations": 0}]
)
def test_thresholds_out_of_range_are_refused(options):
    with pytest.raises(InvalidValueError):
        duplicate_clusters(answers_of(0), **options)
