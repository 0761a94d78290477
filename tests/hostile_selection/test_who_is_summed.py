"""Whose answers are opened together: owners, dropouts, gates, repeats. All marks are defects."""

from __future__ import annotations

import numpy as np
import pytest

from fedinfer_flower import FedEnsemble
from fedinfer_flower.errors import QueryError
from fedinfer_flower.query import Deadline
from fedinfer_flower.selection import make_selector
from fedinfer_flower.strategies.fed_coalitions import FedCoalitions
from fedinfer_flower.strategies.fed_group_median import FedGroupMedian
from fedinfer_flower.strategies.fed_sequential import FedSequential

NINE_OF_THREE = {k: "ABC"[k // 3] for k in range(9)}
ONE_OF_MANY = {k: "ABCDE"[min(k, 4)] for k in range(9)}


def place(node_id: int, node_ids) -> int:
    """Return the partition of a node of a `LocalGrid`."""
    return sorted(node_ids).index(node_id)


def sequential(**options) -> FedSequential:
    return FedSequential(rule="mean-probability", protection="secagg", **options)


def test_group_that_lost_a_site_still_has_three_owners(federation, rows):
    owners = {0: "A", 1: "B", 2: "C", 3: "A"}
    grid = federation(4, owners=owners, broken=frozenset({2}))
    try:
        result = sequential(min_available_nodes=4, gates=("quorum",)).start(grid, rows)
    except QueryError:
        return  # nothing was opened
    nodes = list(grid.get_node_ids())
    for group in result.groups:
        answered = [s.site_id for s in group.reports[0].sites if s.status == "answered"]
        assert len({owners[place(n, nodes)] for n in answered}) >= 3


def test_gate_quorum_holds_in_every_group_of_a_group_median(federation, rows):
    grid = federation(9, owners=NINE_OF_THREE)
    nodes = list(grid.get_node_ids())
    for seed in range(5):
        strategy = FedGroupMedian(
            n_groups=3, min_available_nodes=9, gates=("quorum",), group_seed=seed
        )
        for group in strategy.start(grid, rows).groups:
            assert len({NINE_OF_THREE[place(n, nodes)] for n in group}) >= 3


def test_gate_quorum_holds_in_every_coalition(federation):
    grid = federation(9, owners=ONE_OF_MANY)
    queries = np.random.default_rng(0).standard_normal((40, 4))
    strategy = FedCoalitions(
        rows_per_coalition=1, protection="plain", gates=("quorum",), min_available_nodes=9
    )
    found = strategy.start(grid, queries, np.zeros(40, dtype=int))
    for members in np.unique(found.sums.members_tk, axis=0):
        assert len({ONE_OF_MANY[int(k)] for k in np.flatnonzero(members)}) >= 3


def test_sites_cannot_foresee_the_coins(federation):
    queries = np.random.default_rng(0).standard_normal((12, 4))
    labels = np.zeros(12, dtype=int)
    grid, drawn = federation(6), set()
    for _ in range(2):
        strategy = FedCoalitions(rows_per_coalition=1, protection="plain", min_available_nodes=6)
        # The seed is public: whoever reads the default knows who is in which coalition.
        drawn.add(strategy.start(grid, queries, labels).sums.members_tk.tobytes())
    assert len(drawn) == 2


def test_coalition_of_many_sites_is_drawn_at_once():
    from math import comb

    class Coins:
        """Counts draws; honest numbers beside."""

        def __init__(self):
            self.rng, self.draws = np.random.default_rng(1), 0

        def random(self, size):
            self.draws += 1
            if self.draws > 1000:
                raise AssertionError("a thousand draws, and none will do")
            return self.rng.random(size)

        def __getattr__(self, name):
            return getattr(self.rng, name)

    strategy = FedCoalitions(protection="secagg")
    assert comb(300, 150)  # of 300 coins about half fall heads, and never 200
    drawn = strategy._draw(Coins(), 300)
    assert 3 <= drawn.sum() < 300


@pytest.mark.parametrize(
    "options",
    [{"fraction_query": 0.7}, {"selector": "random", "max_query_nodes": 5}],
    ids=["fraction", "random"],
)
def test_one_run_asks_the_same_rows_of_one_cohort(federation, rows, options):
    strategy = FedEnsemble(
        protection="secagg",
        rule="mean-probability",
        min_available_nodes=7,
        min_query_nodes=4,
        **options,
    )
    grid = federation(7)
    cohorts = {frozenset(strategy.start(grid, rows).combined.roster.key_ids) for _ in range(5)}
    assert len(cohorts) == 1


def test_planned_sites_are_asked(federation, rows):
    strategy = FedEnsemble(
        protection="secagg", selector="random", max_query_nodes=4, min_available_nodes=7
    )
    grid = federation(7)
    plan = strategy.plan(grid, n_queries=len(rows))
    asked = {int(site.site_id) for site in strategy.start(grid, rows).reports[0].sites}
    assert asked == {int(n) for n in plan.site_ids}


def test_site_with_a_home_refuses_its_rows_in_another_grouping(federation, rows, tmp_path):
    grid = federation(7, home=lambda context: tmp_path / str(context.node_config["partition-id"]))
    first = sequential(min_available_nodes=7, selector=make_selector("early-exit", {"tau": 1.0}))
    groups = {frozenset(g) for g in first.start(grid, rows).plan.groups}
    for _ in range(3):
        again = sequential(min_available_nodes=7)
        try:
            result = again.start(grid, rows)
        except QueryError:
            continue  # every group holds a site that was summed with others before
        opened = {frozenset(g) for g in result.plan.groups} - {frozenset(g) for g in result.failed}
        assert opened <= groups


def test_every_group_can_meet_the_quorum(federation, rows):
    result = sequential(
        min_available_nodes=10,
        selector=make_selector("early-exit", {"tau": 1.0}),
        deadline=Deadline(quorum=4),
    ).start(federation(10), rows)
    assert not result.failed
