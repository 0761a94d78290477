"""Whom a strategy asks: selector, gates and limits in front of a real query."""

from __future__ import annotations

import numpy as np
import pytest
from flwr.clientapp import ClientApp

from fedinfer_flower import FedEnsemble, InferenceMod, LocalModel
from fedinfer_flower.errors import ConfigError, InvalidValueError, SelectionError
from fedinfer_flower.selection import make_selector
from fedinfer_flower.selection.gates import make_gate
from fedinfer_flower.selection.history import SiteHistory
from fedinfer_flower.simulation.local_grid import LocalGrid


def test_selector_asks_its_sites_and_says_why(federation, grid):
    strategy = FedEnsemble(
        rule="mean-probability", selector="coverage-greedy", max_query_nodes=3, classes=list("abcd")
    )
    result = strategy.start(grid, federation.queries)

    assert len(result.reports[0].sites) == 3
    assert result.plan is not None
    assert {s.name for s in result.plan.sites} == {s.name for s in result.reports[0].answered}
    assert all(site.reason for site in result.plan.sites)


def test_answer_is_that_of_the_chosen_sites_alone(federation, grid):
    by_name = make_selector("fixed", {"sites": "site-0,site-2,site-4"})
    strategy = FedEnsemble(rule="mean-probability", selector=by_name, protection="secagg")
    result = strategy.start(grid, federation.queries)

    expected = federation.scores(strategy.rule)[[0, 2, 4]].sum(axis=0)
    decided = strategy.rule.decide(expected, 3, result.combined.classes)
    np.testing.assert_array_equal(result.prediction.labels, decided.labels)


def test_plan_is_made_before_anyone_is_asked(federation, grid):
    strategy = FedEnsemble(selector="all", protection="secagg", rule="mean-probability")
    plan = strategy.plan(grid, n_queries=7)

    assert plan.n_queries == 7
    assert len(plan.sites) == federation.n_sites
    assert plan.reply_bytes > 0
    assert "all" in plan.summary()


def test_plan_without_a_selector_names_the_sites_too(federation, grid):
    assert len(FedEnsemble(protection="plain").plan(grid, n_queries=1).sites) == 5


def test_gate_that_refuses_everybody_names_itself(federation, grid):
    gate = make_gate("jurisdiction", {"allowed": "eu"})
    with pytest.raises(SelectionError, match="jurisdiction"):
        FedEnsemble(gates=[gate]).start(grid, federation.queries)


def test_registered_jurisdiction_opens_the_gate(federation, grid):
    strategy = FedEnsemble(protection="plain")
    directory = strategy.directory(grid)
    history = SiteHistory()
    for card in directory.cards[:2]:
        history.register(card.key_id, jurisdiction="eu")
    gate = make_gate("jurisdiction", {"allowed": "eu"})
    result = FedEnsemble(gates=[gate], history=history).start(grid, federation.queries)

    assert len(result.reports[0].sites) == 2


def test_latencies_of_answers_are_remembered(federation, grid):
    history = SiteHistory()
    result = FedEnsemble(selector="all", history=history).start(grid, federation.queries)

    assert len(history) == len(result.reports[0].answered)
    assert all(len(record.latencies_s) == 1 for record in history.records.values())


def priced(context) -> LocalModel:
    rng = np.random.default_rng(context.node_config["partition-id"])
    weights = rng.standard_normal((4, 2))
    return LocalModel(
        model=lambda rows: np.asarray(rows) @ weights,
        classes=("a", "b"),
        outputs="logits",
        price_per_query=1.0 + context.node_config["partition-id"],
    )


def test_budget_covers_all_rows_at_the_sites_prices(federation):
    app = InferenceMod(priced).attach(ClientApp())
    with LocalGrid(app, num_supernodes=5) as grid:
        # Twelve rows at 1 + 2 + 3 credits each; the fourth site would cost 48 more.
        strategy = FedEnsemble(selector="all", protection="secagg", budget=12 * 6.0)
        plan = strategy.start(grid, federation.queries).plan
        assert plan is not None
        assert plan.price == pytest.approx(72.0)
        assert [site.name for site in plan.sites] == ["site-0", "site-1", "site-2"]

        with pytest.raises(SelectionError, match="3 are needed"):
            FedEnsemble(protection="secagg", budget=12 * 5.9).start(grid, federation.queries)


@pytest.mark.parametrize(
    ("options", "error", "says"),
    [
        ({"selector": "early-exit"}, ConfigError, "FedSequential"),
        ({"selector": "all", "fraction_query": 0.5}, ConfigError, "fraction_query"),
        ({"gates": "quorum"}, InvalidValueError, "collection"),
        ({"selector": "nobody"}, ConfigError, "no selector"),
    ],
)
def test_wrong_combination_fails_when_built(options, error, says):
    with pytest.raises(error, match=says):
        FedEnsemble(**options)


def test_run_config_names_selector_gates_and_limits():
    strategy = FedEnsemble.from_run_config(
        {
            "fedinfer.selector": "coverage-greedy",
            "fedinfer.gates": "quorum, staleness",
            "fedinfer.max-query-nodes": 4,
            "fedinfer.budget": 2.5,
        }
    )
    said = strategy.choosing.summary()
    for part in ("coverage-greedy", "at most 4", "2.5 credits", "gate quorum", "gate staleness"):
        assert part in said
