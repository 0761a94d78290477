"""Diversity: overlap counted right, the determinant grown right, and clones left out."""

import itertools
import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedinfer_flower.errors import InvalidValueError, SelectionError, ShapeError
from fedinfer_flower.profile import CountsKind, SiteProfile
from fedinfer_flower.selection.base import SelectionNeed
from fedinfer_flower.selection.candidate import AuditTally, Candidate, SiteRecord
from fedinfer_flower.selection.diversity import Diversity, class_similarity
from fedinfer_flower.selection.diversity_overlap import (
    error_overlap,
    overlap_from_json,
    overlap_to_json,
)

CLASSES = ("x", "y", "z")
thorough = settings(max_examples=60, derandomize=True, deadline=None)


def site(number, counts=(5.0, 5.0, 5.0), *, key_id="", right=None, price=0.0):
    tallies = ()
    if right is not None:
        tallies = (AuditTally(epoch=1, right={"x": right}, asked={"x": 100.0}),)
    return Candidate(
        site_id=number,
        key_id=key_id,
        profile=SiteProfile(
            name=f"s{number}",
            classes=CLASSES,
            counts_kind=CountsKind.COUNTS,
            class_counts=tuple(counts),
            price_per_query=price,
        ),
        record=SiteRecord(tallies=tallies),
    )


def need(**limits):
    return SelectionNeed(classes=CLASSES, **limits)


# -- overlap -----------------------------------------------------------------------------


@thorough
@given(seed=st.integers(0, 10**6), n_sites=st.integers(1, 5), n_audits=st.integers(1, 12))
def test_overlap_is_the_share_of_common_votes_where_either_deviates(seed, n_sites, n_audits):
    rng = np.random.default_rng(seed)
    votes = rng.integers(0, 3, (n_sites, n_audits))
    consensus = rng.integers(0, 3, n_audits)

    found = error_overlap(votes, consensus)

    for i, j in itertools.permutations(range(n_sites), 2):
        rows = [
            t for t in range(n_audits) if votes[i, t] != consensus[t] or votes[j, t] != consensus[t]
        ]
        alike = sum(votes[i, t] == votes[j, t] for t in rows)
        assert found[i, j] == pytest.approx(alike / len(rows) if rows else 0.0)
    assert (found.diagonal() == 1.0).all()


def test_clone_overlaps_fully_and_an_expert_does_not():
    rng = np.random.default_rng(7)
    labels = rng.integers(0, 4, 300)
    weak = np.where(rng.random(300) < 0.6, labels, rng.integers(0, 4, 300))
    other = np.where(rng.random(300) < 0.6, labels, rng.integers(0, 4, 300))

    found = error_overlap(np.stack([weak, weak, other]), labels)

    assert found[0, 1] == 1.0
    # Two that err by themselves agree in error on a quarter of a quarter of the rows.
    assert found[0, 2] < 0.2


def test_votes_that_do_not_fit_are_refused():
    with pytest.raises(ShapeError):
        error_overlap(np.zeros((2, 3), dtype=np.int64), np.zeros(2, dtype=np.int64))


@thorough
@given(seed=st.integers(0, 10**6), n_sites=st.integers(1, 6))
def test_overlap_comes_back_from_its_text(seed, n_sites):
    half = np.random.default_rng(seed).random((n_sites, n_sites))
    overlap = (half + half.T) / 2.0
    np.fill_diagonal(overlap, 1.0)
    names = [f"s{k}" for k in range(n_sites)]

    sites, found = overlap_from_json(overlap_to_json(names, overlap))

    assert sites == tuple(names)
    assert np.abs(found - overlap).max() <= 0.5e-4 + 1e-12  # four digits


PLAIN = {"format": "fedinfer-overlap/1", "sites": ["a", "b"], "overlap": [[1, 0.5], [0.5, 1]]}


@pytest.mark.parametrize(
    "change",
    [
        {"format": "other"},
        {"more": 1},
        {"sites": ["a", "a"]},
        {"sites": ["a"]},
        {"sites": ["a", 1]},
        {"sites": [[], {}]},
        {"sites": "ab"},
        {"overlap": [[1, 0.5], [0.4, 1]]},
        {"overlap": [[1, 1.5], [1.5, 1]]},
        {"overlap": [[0.9, 0.5], [0.5, 1]]},
        {"overlap": [[1, True], [True, 1]]},
        {"overlap": [[1, 0.5]]},
        {"overlap": [[1, float("nan")], [float("nan"), 1]]},
        {"overlap": [[1, 10**400], [10**400, 1]]},
    ],
)
def test_other_texts_are_refused_when_the_selector_is_built(change):
    Diversity(overlap=json.dumps(PLAIN))
    with pytest.raises(InvalidValueError, match="overlap"):
        Diversity(overlap=json.dumps(PLAIN | change))


@pytest.mark.parametrize("text", ["{", "[]", "[" * 100_000, "1"])
def test_texts_that_are_no_overlap_are_refused(text):
    with pytest.raises(InvalidValueError, match="overlap"):
        Diversity(overlap=text)


# -- selecting ---------------------------------------------------------------------------


@thorough
@given(seed=st.integers(0, 10**6), quality=st.sampled_from([0.0, 1.0, 4.0]))
def test_each_step_adds_the_site_with_the_largest_determinant(seed, quality):
    rng = np.random.default_rng(seed)
    counts = rng.dirichlet([0.3] * 3, 7) * rng.integers(5, 60, (7, 1))
    sites = [site(k, counts[k]) for k in range(7)]
    selector = Diversity(quality=quality)

    order = selector.select(sites, need(at_most=4)).site_ids

    worth = selector.score(sites, need())
    similarity = 0.999 * class_similarity(counts) + 0.001 * np.eye(7)
    kernel = np.exp(quality * (worth[:, None] + worth[None, :]) / 2.0) * similarity

    def volume(chosen):
        return np.linalg.slogdet(kernel[np.ix_(chosen, chosen)])[1]

    for number in range(4):
        taken = list(order[:number])
        best = max(volume([*taken, k]) for k in range(7) if k not in taken)
        # Rounding of a product of up to four numbers, the least about 1e-3.
        assert volume(list(order[: number + 1])) == pytest.approx(best, abs=1e-6)


@pytest.mark.parametrize("method", ["determinant", "overlap"])
def test_clones_are_taken_last(method):
    sites = [*(site(k, (30.0, 20.0, 10.0)) for k in range(4)), site(4, (1.0, 5.0, 20.0))]
    sites.append(site(5, (20.0, 1.0, 1.0)))

    found = (
        Diversity(method=method, quality=1.0, penalty=10.0).select(sites, need(at_most=3)).site_ids
    )

    assert len(set(found) & {0, 1, 2, 3}) == 1
    assert {4, 5} <= set(found)


@pytest.mark.parametrize("method", ["determinant", "overlap"])
def test_overlap_from_audits_wins_over_class_counts(method):
    overlap = np.array([[1.0, 0.95, 0.1], [0.95, 1.0, 0.1], [0.1, 0.1, 1.0]])
    text = overlap_to_json(["k0", "k1", "s2"], overlap)
    sites = [site(0, key_id="k0"), site(1, key_id="k1"), site(2, key_id="")]
    selector = Diversity(method=method, overlap=text)

    for seed in range(5):
        assert 2 in selector.select(sites, need(at_most=2, seed=seed)).site_ids


def test_site_that_the_overlap_does_not_name_is_like_the_average():
    overlap = np.array([[1.0, 0.8, 0.2], [0.8, 1.0, 0.2], [0.2, 0.2, 1.0]])
    text = overlap_to_json(["s0", "s1", "s2"], overlap)
    sites = [site(k) for k in (0, 1, 2, 7)]
    selector = Diversity(method="overlap", quality=0.0, overlap=text)

    # After s0: s2 overlaps 0.2, the unknown 0.4, s1 0.8.
    for seed in range(20):
        order = selector.select(sites, need(seed=seed)).site_ids
        if order[0] == 0:
            assert order[1] == 2
            return
    pytest.fail("no seed began with s0")


def test_audited_accuracy_is_what_makes_a_site_good():
    sites = [site(0, right=20.0), site(1, right=95.0), site(2, right=50.0)]

    assert Diversity().select(sites, need(at_most=1)).site_ids == (1,)


@pytest.mark.parametrize("method", ["determinant", "overlap"])
def test_many_more_sites_than_classes_can_be_taken(method):
    sites = [site(k, (1.0 + k, 2.0, 3.0), price=1.0) for k in range(20)]

    found = Diversity(method=method).select(sites, need(budget=15.0))

    assert len(found.site_ids) == 15
    with pytest.raises(SelectionError):
        Diversity(method=method).select(sites, need(at_least=3, budget=2.0))


@pytest.mark.parametrize("options", [{"method": "best"}, {"quality": -1.0}, {"penalty": 101.0}])
def test_option_out_of_range_is_refused_when_built(options):
    with pytest.raises(InvalidValueError):
        Diversity(**options)
