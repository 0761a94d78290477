"""Row sums in fixed point: the stated bounds, and what no reveal may do."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedinfer_flower.errors import InvalidValueError, SettlementError
from fedinfer_flower.incentives import LinearScheme, PublicFacts, make_scheme
from fedinfer_flower.settlement import EvidenceBook, EvidenceForm
from fedinfer_flower.settlement.release_noise import gaussian_sums
from fedinfer_flower.settlement.ring import ONE, encode_rows
from fedinfer_flower.settlement.row_sums import MIN_AUDITS, RowWeights, check_totals
from fedinfer_flower.settlement.shares import split_rows

SEED = 11


class Given(LinearScheme):
    """Weights that a test draws."""

    name = "given"
    drawn = np.zeros((0, 0))

    def weights(self, facts):
        return self.drawn


def row_weights(weights):
    scheme = Given()
    object.__setattr__(scheme, "drawn", weights)
    n_queries, n_classes = weights.shape
    facts = PublicFacts(
        total_tc=np.full(weights.shape, 5.0 / n_classes),
        n_sites=5,
        labels=np.zeros(n_queries, dtype=np.int64),
    )
    return RowWeights.of(scheme, facts)


@given(st.integers(0, 2**32 - 1), st.integers(30, 80), st.integers(2, 12), st.floats(-12.0, 6.0))
def test_row_sum_is_within_its_stated_error(seed, n_queries, n_classes, magnitude):
    rng = np.random.default_rng(seed)
    weights = rng.uniform(0.5, 1.0, size=(n_queries, n_classes)) * 10.0**magnitude
    weights *= rng.choice([-1.0, 1.0], size=weights.shape)
    answers = rng.dirichlet(np.full(n_classes, 0.1), size=n_queries)

    of = row_weights(weights)

    clear = ((answers - 1.0 / n_classes) * weights).sum()
    found = of.value(of.ring_sum(encode_rows(answers)))
    assert abs(found - clear) <= of.error
    assert abs(clear) <= of.largest * (1.0 + 1e-9)


@given(st.integers(0, 2**32 - 1))
def test_shares_of_a_row_sum_add_up_exactly(seed):
    rng = np.random.default_rng(seed)
    of = row_weights(rng.normal(size=(MIN_AUDITS, 4)) + 3.0 * rng.choice([-1, 1], (MIN_AUDITS, 1)))
    whole = encode_rows(rng.dirichlet(np.ones(4), size=MIN_AUDITS))
    mask = rng.integers(0, 2**64, size=whole.shape, dtype=np.uint64)

    both = (of.ring_sum(whole - mask) + of.ring_sum(mask)) % 2**64

    assert both == of.ring_sum(whole)


def test_weights_that_are_none_are_refused():
    for weights in (np.zeros((40, 2)), np.ones((40, 2)), np.full((40, 2), np.nan)):
        with pytest.raises(SettlementError):
            row_weights(weights)


@pytest.mark.parametrize("step", [2, -2, 2**62, -(2**63)])
def test_grid_of_another_role_may_be_one_step_away_and_no_more(step):
    of = row_weights(np.random.default_rng(SEED).normal(size=(40, 3)))
    near, far = of.grid_tc + 1, of.grid_tc.copy()
    far[3, 1] = (int(far[3, 1]) + step + 2**63) % 2**64 - 2**63

    assert (of.on_grid(near).grid_tc == near).all()
    with pytest.raises(SettlementError, match="other role's weights"):
        of.on_grid(far)
    with pytest.raises(SettlementError):
        of.on_grid(near[:5])


@pytest.mark.parametrize("bad", [np.nan, np.inf, -1.0, 6.0])
def test_totals_that_no_distributions_have_are_refused(bad):
    totals = np.full((3, 2), 2.5)
    check_totals(totals, 5, slack=1e-5)
    totals[1] = [bad, 5.0 - bad]

    with pytest.raises(SettlementError):
        check_totals(totals, 5, slack=1e-5)


@pytest.mark.parametrize("std", [100.0, 2.0**39, 2.0**41, 2.0**50])
def test_release_noise_has_its_deviation_and_no_grid(std):
    drawn = gaussian_sums(4000, std)

    # 4000 draws: the deviation is within 6 % at 1e-6.
    assert 0.94 < np.std(drawn.astype(float)) / std < 1.06
    # No low bits that a coarse grid would leave at zero: 4000 coin flips, 300 is 9 deviations.
    assert abs(int((drawn & 1).sum()) - 2000) < 300


def test_release_noise_that_does_not_fit_is_refused():
    assert (gaussian_sums(3, 0.0) == 0).all()
    for std in (-1.0, 2.0**60, np.nan):
        with pytest.raises(InvalidValueError):
            gaussian_sums(3, std)


def inflated_world(make_world, place, factor):
    """Return a desk and a querier where one site sends answers that are no distributions."""
    world = make_world(EvidenceForm.SHARES)
    book = EvidenceBook(EvidenceForm.SHARES)
    cheat = world.sites[place]
    for (query_id, site), payload in world.payloads.items():
        sent = payload
        if site == cheat.key_id:
            rows = world.probabilities_ktc[place, world.queries[query_id]]
            ring = np.rint((1 / 3 + factor * (rows - 1 / 3)) * ONE).astype(np.int64)
            half = split_rows(
                ring.view(np.uint64),
                querier=world.querier.public,
                identity=cheat,
                query_id=query_id,
            )
            sent = half.to_bytes()
        book.add(query_id, site, sent, n_queries=world.asked[query_id], n_classes=3)
    desk = world.desk(book=book)
    return world, desk, world.querier_desk(desk.request())


def test_evidence_that_is_no_distribution_is_caught_where_totals_or_scores_show_it(make_world):
    # The best site, three times as sure as sure: no sum of distributions.
    world, _, querier = inflated_world(make_world, 3, 3.0)
    with pytest.raises(SettlementError, match="no sums of distributions"):
        querier.settle(world.audits)


def test_mildly_inflated_evidence_is_not_caught(make_world):
    # Declared: there is no range proof. What it can earn is capped by `RowWeights.largest`.
    world, desk, querier = inflated_world(make_world, 1, 1.2)
    honest = make_scheme("brier-shapley").contributions(world.audited())

    value = world.in_order(desk.finish(querier.settle(world.audits)))[1]

    assert value > 1.05 * honest[1]


def test_unsealed_settlement_needs_no_keys(make_world):
    world = make_world(EvidenceForm.CLEAR)
    desk = world.desk(querier=None)
    reply = world.querier_desk(desk.request(), identity=None, sites=None).settle(world.audits)

    assert reply.signature == b""
    assert desk.finish(reply).noise_scale == 0.0
    assert replace(reply, signature=b"x").digest != reply.digest
