"""The pooled threshold from histograms alone: never below the exact one, under any protection."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedinfer_flower.errors import (
    BindingError,
    IncompatibleProtection,
    InvalidScoresError,
    InvalidValueError,
    ProtocolError,
)
from fedinfer_flower.privacy import PROTECTIONS, make_protection
from fedinfer_flower.privacy.cohort import Cohort
from fedinfer_flower.uncertainty.combined_histogram import CombinedHistogram
from fedinfer_flower.uncertainty.conformal import JOINT, conformal_rank
from fedinfer_flower.uncertainty.federated_quantile import (
    HistogramSpec,
    coordinator_sum,
    noise_std_rows,
    safe_threshold,
    site_histogram,
)
from fedinfer_flower.wire.identity import Identity
from fedinfer_flower.wire.roster import Roster, Seat

EXACT = ("plain", "secagg", "he")
NOISY = {
    "dp": {"epsilon": 4.0},
    "secagg+dp": {"epsilon": 2.0, "collusion_share": 0.0},
    "he+dp": {"epsilon": 2.0, "collusion_share": 0.0},
}
SPEC = HistogramSpec(n_bins=50, max_rows=300, scope=JOINT)


def combined(scores_of_sites, protection, spec=SPEC):
    """Run all three roles in one process and return (document, the querier's keys)."""
    keys = protection.make_keys()
    sites = [Identity.generate() for _ in scores_of_sites]
    seats = tuple(Seat(identity=s.public, commitment="0" * 64) for s in sites)
    cohort = Cohort(query_id="c-0", roster=Roster(seats), public_key=keys.public_key)
    plan = spec.plan(len(sites))
    side = coordinator_sum(
        spec, protection, n_sites_max=len(sites), public_key=keys.public_key, cohort=cohort
    )
    for site, scores in zip(sites, scores_of_sites, strict=True):
        own = protection.site_side(plan, public_key=keys.public_key, cohort=cohort, identity=site)
        side.add(own.protect(site_histogram(scores, spec)), sender=site.key_id)
    document = CombinedHistogram(
        query_id="c-0",
        spec=spec,
        classes=("a", "b"),
        n_sites=len(sites),
        protection=protection.name,
        protection_options=protection.options(),
        roster=cohort.roster,
        total=side.total(),
        key_id=keys.key_id,
    )
    return document, keys


def sites_of(rng, n_sites=5, n_rows=200):
    # Sites differ: the pooled quantile is no site's own.
    return [rng.beta(1.0, 2.0 + k, size=n_rows - 10 * k) for k in range(n_sites)]


scores_of_sites = st.lists(
    st.lists(st.floats(0.0, 1.0), min_size=0, max_size=40), min_size=1, max_size=6
)


@given(
    scores=scores_of_sites,
    alpha=st.floats(0.02, 0.8),
    n_bins=st.sampled_from([1, 7, 10, 200]),
)
def test_rounding_up_never_leaves_out_a_row_that_the_exact_threshold_covers(scores, alpha, n_bins):
    spec = HistogramSpec(n_bins=n_bins, max_rows=100)
    counts = sum(site_histogram(np.array(s), spec)[0] for s in scores)

    found = safe_threshold(counts, spec, n_sites=len(scores), alpha=alpha).predictor

    pooled = np.sort(np.concatenate([np.array(s) for s in scores]))
    rank = conformal_rank(len(pooled), alpha, n_groups=len(scores))
    exact = math.inf if rank > len(pooled) else pooled[max(rank, 1) - 1]
    assert found.threshold >= exact
    if exact < math.inf:  # by at most one bin; 1e-12 for the rounding of the edges
        assert found.threshold <= exact + 1.0 / n_bins + 1e-12


@given(st.lists(st.floats(0.0, 1.0), min_size=1, max_size=50), st.integers(1, 300))
def test_score_lies_below_the_edge_of_its_bin(scores, n_bins):
    spec = HistogramSpec(n_bins=n_bins)
    for score in scores:
        place = int(site_histogram(np.array([score]), spec)[0].argmax())
        assert place < n_bins
        assert score <= spec.edges[place]
        assert place == 0 or score > spec.edges[place - 1]


@pytest.mark.parametrize("name", EXACT)
def test_threshold_under_exact_protections_is_that_of_the_pooled_scores(name):
    if name == "he":
        pytest.importorskip("tenseal")
    scores = sites_of(np.random.default_rng(1))
    document, keys = combined(scores, make_protection(name))

    found = CombinedHistogram.from_bytes(document.to_bytes()).open(keys, alpha=0.1)

    pooled = np.sort(np.concatenate(scores))
    exact = pooled[conformal_rank(len(pooled), 0.1, n_groups=5) - 1]
    assert found.n_rows == len(pooled)
    assert found.predictor.threshold == math.ceil(exact * SPEC.n_bins) / SPEC.n_bins
    assert found.predictor.scope == JOINT
    assert found.noise_std_rows == 0.0
    assert 0.0 < found.bin_share < 0.1


@pytest.mark.parametrize("name", sorted(NOISY))
def test_threshold_under_noise_is_not_below_the_exact_one(name):
    pytest.importorskip("scipy")
    if name.startswith("he"):
        pytest.importorskip("tenseal")
    scores = sites_of(np.random.default_rng(2))
    document, keys = combined(scores, make_protection(name, NOISY[name]))

    found = document.open(keys, alpha=0.2, failure=1e-6)

    pooled = np.sort(np.concatenate(scores))
    # Fails with probability below `failure`.
    assert found.predictor.threshold >= pooled[conformal_rank(len(pooled), 0.2, n_groups=5) - 1]
    assert found.noise_std_rows > 1.0


def test_noise_that_is_ignored_breaks_the_promise():
    # The unprotected form: reading the noisy histogram as if it were exact.
    rng = np.random.default_rng(4)
    spec = HistogramSpec(n_bins=100)
    n_rows, alpha, std = 1000, 0.1, 20.0
    careless = careful = 0
    for _ in range(300):
        scores = rng.random(n_rows)
        noisy = site_histogram(scores, spec)[0] + rng.normal(0.0, std, spec.n_bins + 1)
        place = np.searchsorted(np.cumsum(noisy), (1 - alpha) * (noisy.sum() + 1))
        careless += (scores <= (place + 1) / spec.n_bins).sum() < (1 - alpha) * (n_rows + 1)
        safe = safe_threshold(
            noisy, spec, n_sites=1, alpha=alpha, noise_std=std, failure=0.02
        ).predictor.threshold
        careful += (scores <= safe).sum() < (1 - alpha) * (n_rows + 1)

    assert careless > 60
    # Expected fewer than 2 % of 300 runs; 20 is more than five standard deviations above.
    assert careful < 20


def test_noise_std_is_that_of_the_opened_bins():
    pytest.importorskip("scipy")
    protection = make_protection("dp", {"epsilon": 4.0})
    plan = SPEC.plan(5)
    document, keys = combined([np.zeros(0)] * 5, protection)
    opened = protection.querier_side(plan, keys=keys).open(document.total, n_queries=1, n_sites=5)

    std = noise_std_rows(protection, plan, 5)
    # 51 draws: the sample deviation is within 50 % but with probability below 1e-6.
    assert 0.5 * std < opened.std() < 1.5 * std


@pytest.mark.parametrize("alpha", [0.1, 0.3])
def test_pooled_threshold_covers_rows_of_the_mixture(alpha):
    rng = np.random.default_rng(5)
    n_runs, hits = 400, []
    for _ in range(n_runs):
        sites = sites_of(rng, n_sites=4, n_rows=60)
        counts = sum(site_histogram(s, SPEC)[0] for s in sites)
        threshold = safe_threshold(counts, SPEC, n_sites=4, alpha=alpha).predictor.threshold
        weights = np.array([len(s) + 1.0 for s in sites])
        site = rng.choice(4, size=50, p=weights / weights.sum())
        hits.append((rng.beta(1.0, 2.0 + site) <= threshold).mean())

    assert np.mean(hits) >= 1.0 - alpha - 5.0 * np.std(hits) / math.sqrt(n_runs)


def test_more_rows_than_agreed_are_thinned_out_at_random():
    spec = HistogramSpec(n_bins=2, max_rows=100)
    scores = np.concatenate([np.zeros(500), np.ones(500)])

    counts = site_histogram(scores, spec)[0]

    assert counts.sum() == 100
    # Hypergeometric around 50 with deviation 4.7.
    assert 15 < counts[0] < 85


def test_site_that_lies_moves_the_threshold_no_further_than_its_rows():
    spec = HistogramSpec(n_bins=100, max_rows=50)
    honest = [np.random.default_rng(k).random(50) for k in range(9)]
    counts = sum(site_histogram(s, spec)[0] for s in honest)
    lie = np.zeros(101)
    lie[0] = 50
    found = safe_threshold(counts + lie, spec, n_sites=10, alpha=0.1).predictor.threshold

    pooled = np.sort(np.concatenate(honest))
    assert found >= pooled[conformal_rank(500, 0.1, n_groups=10) - 50 - 1]


def test_what_cannot_be_is_refused():
    with pytest.raises(InvalidScoresError):
        safe_threshold(np.full(51, 1e3), SPEC, n_sites=3, alpha=0.1)
    with pytest.raises(InvalidScoresError):
        safe_threshold(np.full(51, -2.0), SPEC, n_sites=3, alpha=0.1)
    with pytest.raises(InvalidValueError):
        safe_threshold(np.zeros(51), SPEC, n_sites=3, alpha=0.1, noise_std=1.0, failure=0.2)
    with pytest.raises(InvalidValueError):
        site_histogram([math.nan], SPEC)
    with pytest.raises(InvalidValueError):
        HistogramSpec(n_bins=0)
    with pytest.raises(IncompatibleProtection):
        coordinator_sum(
            SPEC, make_protection("dp", {"mechanism": "randomised-response"}), n_sites_max=3
        )


def test_document_of_another_key_or_with_other_bytes_is_refused():
    protection = make_protection("secagg")
    document, _ = combined(sites_of(np.random.default_rng(1)), protection)
    with pytest.raises(BindingError):
        document.open(protection.make_keys())
    data = document.to_bytes()
    for place in range(0, len(data), 97):
        damaged = data[:place] + bytes([data[place] ^ 1]) + data[place + 1 :]
        with pytest.raises(ProtocolError):
            CombinedHistogram.from_bytes(damaged)


def test_every_protection_is_tried_above():
    assert {*EXACT, *NOISY} == set(PROTECTIONS.names())


@settings(max_examples=20)
@given(st.binary(max_size=200))
def test_any_bytes_are_refused(data):
    with pytest.raises(ProtocolError):
        CombinedHistogram.from_bytes(data)
