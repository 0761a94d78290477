"""Sequential asking adds up to asking all, and leaves nothing behind."""

from __future__ import annotations

import numpy as np
import pytest

from fedinfer_flower import FedEnsemble, Querier
from fedinfer_flower.errors import (
    BindingError,
    ConfigError,
    InvalidValueError,
    QueryError,
    QuorumNotMetError,
)
from fedinfer_flower.querier.sequential_querier import SequentialQuerier
from fedinfer_flower.query import Deadline
from fedinfer_flower.selection import make_selector
from fedinfer_flower.strategies.fed_coalitions import FedCoalitions
from fedinfer_flower.strategies.fed_group_median import FedGroupMedian
from fedinfer_flower.strategies.fed_sequential import FedSequential

N_SITES = 7


def everybody():
    """Return a selector that asks all groups about every row."""
    return make_selector("early-exit", {"tau": 1.0, "least_groups": 1000})


def whole(grid, rows, protection):
    strategy = FedEnsemble(
        rule="class-share",
        protection=protection,
        min_available_nodes=N_SITES,
        allow_coordinator_key=True,
    )
    return strategy.start(grid, rows).prediction


@pytest.mark.parametrize("protection", ["plain", "secagg", "he"])
def test_all_groups_together_are_the_whole(federation, rows, protection):
    strategy = FedSequential(
        rule="class-share",
        protection=protection,
        min_available_nodes=N_SITES,
        allow_coordinator_key=True,
        selector=everybody(),
    )
    result = strategy.start(federation(N_SITES), rows)
    expected = whole(federation(N_SITES), rows, protection)
    if result.n_sites_asked.min() == N_SITES:
        # Weights are shares of all sites' examples; the codecs round by less than 1e-3.
        np.testing.assert_allclose(
            result.prediction.probabilities, expected.probabilities, atol=1e-3
        )
    np.testing.assert_array_equal(result.prediction.labels, expected.labels)
    assert len(result.groups) == 2


def test_under_seal_weights_are_those_of_all_sites(federation, rows):
    grid = federation(N_SITES)
    strategy = FedEnsemble(protection="secagg", min_available_nodes=N_SITES)
    querier = Querier(protection="secagg")
    asker = SequentialQuerier(
        querier,
        directory=strategy.directory(grid),
        inputs=rows,
        rule="class-share",
        selector=everybody(),
    )
    totals = []
    while (job := asker.next_job()) is not None:
        combined = strategy.start(grid, job).combined
        totals.append((len(job.roster), querier.totals(combined)))
        asker.add(combined)
    # A group of n of seven sites with equal counts holds n/7 of every class.
    for n_sites, sums in totals:
        assert sums.sum(axis=1).max() <= n_sites / N_SITES + 1e-3


def test_settings_come_back_after_a_failure(federation, rows):
    strategy = FedSequential(
        protection="secagg", min_available_nodes=9, deadline=Deadline(timeout_s=5)
    )
    with pytest.raises(QueryError):
        strategy.start(federation(9, broken=frozenset(range(9))), rows)
    assert strategy.ensemble.rule is None
    assert strategy.ensemble.classes is None
    assert not strategy.start(federation(9), rows).failed


def asker_of(grid, rows, **options):
    strategy = FedEnsemble(protection="secagg", min_available_nodes=N_SITES)
    directory = strategy.directory(grid)
    querier = Querier(protection="secagg")
    options = {"rule": "mean-probability", "selector": everybody()} | options
    return strategy, SequentialQuerier(querier, directory=directory, inputs=rows, **options)


def test_same_rows_are_not_asked_again_while_an_answer_is_out(federation, rows):
    grid = federation(N_SITES)
    strategy, asker = asker_of(grid, rows)
    first = strategy.start(grid, asker.next_job()).combined
    with pytest.raises(InvalidValueError, match="second sum"):
        asker.next_job()
    asker.add(first)
    with pytest.raises(BindingError):
        asker.add(first)


def test_lossless_under_noise_is_refused_under_seal(federation, rows):
    grid = federation(N_SITES)
    strategy = FedEnsemble(protection="secagg+dp", min_available_nodes=N_SITES)
    with pytest.raises(ConfigError, match="noise"):
        SequentialQuerier(
            Querier(protection="secagg+dp"),
            directory=strategy.directory(grid),
            inputs=rows,
            rule="mean-probability",
            selector=make_selector("early-exit", {"stop": "lossless"}),
        )


def test_sites_cannot_foresee_the_groups(federation, rows):
    grid = federation(N_SITES)
    strategy = FedEnsemble(protection="secagg", min_available_nodes=N_SITES)
    directory = strategy.directory(grid)
    groupings = {
        SequentialQuerier(
            Querier(protection="secagg"), directory=directory, inputs=rows, rule="mean-probability"
        ).selection.groups
        for _ in range(6)
    }
    assert len(groupings) > 1


def test_querier_can_bring_its_own_register_of_owners():
    import inspect

    assert "history" in inspect.signature(SequentialQuerier.__init__).parameters


def test_median_of_two_groups_is_refused(federation, rows):
    # One group of three fails whole: two are left, and two have no middle.
    grid = federation(9, broken=frozenset({0, 1, 2, 3, 4}))
    with pytest.raises(QuorumNotMetError, match="groups answered"):
        FedGroupMedian(n_groups=3, min_available_nodes=9, deadline=Deadline(timeout_s=5)).start(
            grid, rows
        )


def test_groups_of_a_median_are_as_large_as_their_quorum(federation, rows):
    strategy = FedGroupMedian(n_groups=3, min_available_nodes=9, deadline=Deadline(quorum=4))
    with pytest.raises(InvalidValueError, match="do not make 3 groups of 4"):
        strategy.start(federation(9), rows)


def test_groups_of_a_median_weigh_classes_over_all_sites(federation, rows):
    strategy = FedGroupMedian(
        n_groups=3, rule="class-share", min_available_nodes=9, protection="plain"
    )
    result = strategy.start(federation(9), rows)
    for group, run in zip(result.groups, result.results, strict=True):
        total = run.combined.batches[0].total
        sums = np.frombuffer(bytes(total)[-8 * 3 * 8 :], dtype="<f8")
        # Three of nine sites with equal counts hold a third of every class.
        assert sums.reshape(8, 3).sum(axis=1).max() <= len(group) / 9 + 1e-3


def test_coalition_that_misses_an_answer_is_left_out(federation):
    queries = np.random.default_rng(0).standard_normal((20, 4))
    found = FedCoalitions(
        rows_per_coalition=1, protection="plain", min_available_nodes=7, seed=1
    ).start(federation(7, broken=frozenset({2})), queries, np.zeros(20, dtype=int))
    # Its sum is over others than were drawn: the broken site would be credited with it.
    assert not found.sums.members_tk[:, 2].any()
    assert all(result.combined.n_sites_asked >= 3 for result in found.results)
