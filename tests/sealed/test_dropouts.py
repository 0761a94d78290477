"""Sites that fail or are late, through the whole stack."""

from __future__ import annotations

import time

import numpy as np
import pytest

from fedinfer_flower.errors import FedInferError, QuorumNotMetError
from fedinfer_flower.privacy.secagg import SecAgg
from fedinfer_flower.privacy.secagg_dp import SecAggDP
from fedinfer_flower.query import Deadline
from fedinfer_flower.receipts.verification import verify

from .conftest import ROWS


def failing(*partitions: int, action: str = "fi_predict"):
    def wrap(asked, place, message, context, handle):
        if asked == action and place in partitions:
            raise RuntimeError("the process of the site ended")
        return handle(message, context)

    return wrap


@pytest.mark.parametrize("self_mask", [False, True])
@pytest.mark.parametrize("down", range(5))
def test_sum_without_one_site_is_exact(make_federation, down, self_mask):
    federation = make_federation(wrap=failing(down))
    querier, _, result = federation.ask(federation.strategy(SecAgg(self_mask=self_mask)))
    rest = [k for k in range(5) if k != down]
    expected = federation.probabilities()[rest].sum(axis=0)
    np.testing.assert_allclose(querier.totals(result.combined), expected, atol=1e-3)
    assert result.combined.batches[0].n_sites == 4
    assert result.degraded
    verify(result.receipt.to_bytes()).require_ok()


@pytest.mark.parametrize("self_mask", [False, True])
def test_too_many_down_end_the_run_naming_them(make_federation, self_mask):
    federation = make_federation(wrap=failing(1, 3))
    with pytest.raises(QuorumNotMetError, match=r"site-1.*site-3") as caught:
        federation.ask(federation.strategy(SecAgg(self_mask=self_mask)))
    assert "3 of 5 sites" in caught.value.message
    assert "4 are needed" in caught.value.message


def test_answers_of_others_stay_masked_when_too_many_are_down(make_federation):
    federation = make_federation(wrap=failing(1, 3))
    with pytest.raises(QuorumNotMetError):
        federation.ask(federation.strategy("secagg"))
    recoveries = [data for data in federation.grid.sent if b'"kind":"recover"' in data]
    assert recoveries == []


@pytest.mark.parametrize("self_mask", [False, True])
def test_survivor_that_leaves_before_it_has_helped(make_federation, self_mask):
    federation = make_federation(
        wrap=lambda action, place, message, context, handle: (
            failing(0)(action, place, message, context, handle)
            if action == "fi_predict"
            else failing(1, action="fi_recover")(action, place, message, context, handle)
        ),
        timeout_s=3.0,
    )
    with pytest.raises(FedInferError) as caught:
        federation.ask(federation.strategy(SecAgg(self_mask=self_mask)))
    assert caught.value.code == "FI407"


def test_helper_that_leaves_when_nobody_dropped_out_is_made_good_for(make_federation):
    # With self-masks everybody helps in every batch; of four neighbours three suffice.
    federation = make_federation(wrap=failing(1, action="fi_recover"), timeout_s=3.0)
    querier, _, result = federation.ask(federation.strategy(SecAgg(self_mask=True)))
    expected = federation.probabilities().sum(axis=0)
    np.testing.assert_allclose(querier.totals(result.combined), expected, atol=1e-3)


@pytest.mark.parametrize("self_mask", [False, True])
def test_late_site_is_left_out_by_the_deadline(make_federation, self_mask):
    late: set[int] = set()
    federation = make_federation(latency_s=lambda node: 2.5 if node in late else 0.0)
    deadline = Deadline(timeout_s=1.5, quorum=1)
    strategy = federation.strategy(SecAgg(self_mask=self_mask), deadline=deadline)
    directory = strategy.directory(federation.grid)
    late.add(1002)
    from fedinfer_flower import Querier

    querier = Querier(protection=strategy.protection)
    job = querier.ask(ROWS, directory=directory, rule="mean-probability")
    start = time.monotonic()
    result = strategy.start(federation.grid, job)
    # Generous: a hang would last until the test's own time limit.
    assert time.monotonic() - start < 10.0
    assert [s.name for s in result.reports[0].sites if s.status.value == "late"] == ["site-2"]
    expected = federation.probabilities()[[0, 1, 3, 4]].sum(axis=0)
    np.testing.assert_allclose(querier.totals(result.combined), expected, atol=1e-3)


def test_site_of_the_roster_that_is_gone_counts_as_missing(make_federation):
    gone: set[int] = set()

    def wrap(action, place, message, context, handle):
        if place in gone:
            raise RuntimeError("gone")
        return handle(message, context)

    federation = make_federation(wrap=wrap)
    strategy = federation.strategy("secagg")
    directory = strategy.directory(federation.grid)
    from fedinfer_flower import Querier

    querier = Querier(protection="secagg")
    job = querier.ask(ROWS, directory=directory, rule="mean-probability")
    gone.add(3)
    # Another coordinator object, which has to onboard the sites itself.
    result = federation.strategy("secagg").start(federation.grid, job)
    expected = federation.probabilities()[[0, 1, 2, 4]].sum(axis=0)
    np.testing.assert_allclose(querier.totals(result.combined), expected, atol=1e-3)
    assert len(result.reports[0].answered) == 4


def test_relayed_answers_of_those_who_are_there(make_federation):
    federation = make_federation(wrap=failing(0, 1, 2))
    querier, _, result = federation.ask(federation.strategy("plain"))
    expected = federation.probabilities()[3:].sum(axis=0)
    np.testing.assert_allclose(querier.totals(result.combined), expected, atol=1e-3)
    verify(result.receipt.to_bytes()).require_ok()


def test_nobody_answers(make_federation):
    federation = make_federation(wrap=failing(*range(5)))
    for protection in ("plain", "secagg"):
        with pytest.raises(QuorumNotMetError, match="0 of 5"):
            federation.ask(federation.strategy(protection))


def test_rows_that_were_summed_twice_are_not_recovered(make_federation, home):
    """The sum over all may have been opened: without a site it would give that one away."""
    down: set[int] = set()

    def wrap(action, place, message, context, handle):
        if action == "fi_predict" and place in down:
            raise RuntimeError("down")
        return handle(message, context)

    federation = make_federation(wrap=wrap, home=home, timeout_s=2.0)
    strategy = federation.strategy("secagg")
    federation.ask(strategy)
    down.add(2)
    with pytest.raises(FedInferError) as caught:
        federation.ask(strategy)
    assert caught.value.code == "FI407"
    assert "FI316" in federation.grid.errors()


def test_noise_is_there_after_a_dropout(make_federation):
    federation = make_federation(wrap=failing(4))
    querier, _, result = federation.ask(federation.strategy(SecAggDP(epsilon=2.0)))
    expected = federation.probabilities()[:4].sum(axis=0)
    error = querier.totals(result.combined) - expected
    # 18 entries of noise with standard deviation above 1.4: below 0.2 never by chance.
    assert error.std() > 0.2
