"""The frontier: what a selector costs and gets right, from the sites' own scores."""

from __future__ import annotations

import doctest
import importlib

import numpy as np
import pytest

from fedinfer_flower.ensemble.base import make_rule
from fedinfer_flower.selection import SELECTORS
from fedinfer_flower.simulation.data import load_dataset
from fedinfer_flower.simulation.frontier import site_scores
from fedinfer_flower.simulation.frontier_points import frontier
from fedinfer_flower.simulation.institution import write_institutions
from fedinfer_flower.simulation.local_grid import LocalGrid
from fedinfer_flower.simulation.partition import partition_rows
from fedinfer_flower.simulation.rewards import FreeRider, PricedSites, write_free_rider
from fedinfer_flower.strategies import FedEnsemble

KINDS = ("logistic regression", "k-NN")
N_SITES, N_AUDITS = 6, 27


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    folder = tmp_path_factory.mktemp("frontier")
    data = load_dataset("wine", seed=0)
    parts = partition_rows(data.train_labels, n_sites=N_SITES, alpha=0.5, min_size=8, seed=0)
    write_institutions(folder / "sites", data, parts, seed=0, kinds=KINDS)
    return folder, data


@pytest.mark.parametrize("rule", ["open-set-class-share", "class-share", "tta-soft"])
def test_sums_are_those_of_the_federation(world, rule):
    folder, data = world
    scores = site_scores(
        folder / "sites", data, N_SITES, rule=make_rule(rule), n_audits=N_AUDITS, price=0.5
    )
    from fedinfer_flower.simulation.federation import client_app

    with LocalGrid(client_app(folder, share_counts="counts"), num_supernodes=N_SITES) as grid:
        strategy = FedEnsemble(rule=rule, min_available_nodes=N_SITES, classes=data.classes)
        asked = strategy.start(grid, data.test_inputs[N_AUDITS:]).prediction
    # Scores travel as float32 under 'plain': a near tie may change.
    own = scores.rule.decide(scores.totals(range(N_SITES)), N_SITES, scores.classes)
    np.testing.assert_allclose(own.probabilities, asked.probabilities, atol=1e-5)
    assert scores.right(range(N_SITES)) == int((asked.labels == scores.labels).sum())


def test_every_selector_is_measured_or_left_out_with_a_reason(world):
    folder, data = world
    scores = site_scores(
        *(folder / "sites", data, N_SITES),
        rule=make_rule("class-share"),
        n_audits=N_AUDITS,
        price=0.5,
    )
    names = tuple(SELECTORS.names())

    points, left_out = frontier(scores, names, least=3, seed=1)

    assert {p.selector for p in points} | {name for name, _ in left_out} == set(names)
    reasons = dict(left_out)
    # No list of sites, and a rule that does not use familiarity.
    assert set(reasons) == {"fixed", "dynamic-competence"}
    assert "familiarity" in reasons["dynamic-competence"]
    assert all(3 <= p.sites_asked <= N_SITES for p in points)
    again, _ = frontier(scores, names, least=3, seed=1)
    assert again == points


def test_audits_are_never_among_the_rows_that_count(world):
    folder, data = world
    scores = site_scores(
        *(folder / "sites", data, N_SITES),
        rule=make_rule("class-share"),
        n_audits=N_AUDITS,
        price=0.5,
    )
    assert len(scores.labels) == len(data.test_labels) - N_AUDITS
    tally = scores.tally(0, np.arange(N_AUDITS), epoch=1)
    assert sum(tally.asked.values()) == N_AUDITS
    assert scores.totals([0], audits=True).shape[0] == N_AUDITS


def test_free_rider_answers_by_lot_and_the_same_to_the_same_row(world):
    folder, _ = world
    rider = FreeRider(n_classes=3, seed=7)
    rows = np.random.default_rng(0).normal(size=(3000, 13))

    drawn = rider(rows).argmax(axis=1)

    # Each class 1000 times, standard deviation 26.
    assert np.abs(np.bincount(drawn) - 1000).max() < 5 * 26
    assert (rider(rows[::-1]).argmax(axis=1) == drawn[::-1]).all()
    assert (FreeRider(n_classes=3, seed=8)(rows).argmax(axis=1) != drawn).any()
    write_free_rider(folder / "sites", N_SITES, rider)
    from types import SimpleNamespace

    load = PricedSites(folder=folder / "sites", price=0.25)
    loaded = load(SimpleNamespace(node_config={"partition-id": N_SITES}))
    assert loaded.model == rider
    honest = load(SimpleNamespace(node_config={"partition-id": 0}))
    assert honest.price_per_query == loaded.price_per_query == 0.25


def test_doctests():
    for name in ("frontier_points", "rewards"):
        result = doctest.testmod(importlib.import_module(f"fedinfer_flower.simulation.{name}"))
        assert result.attempted > 0
        assert result.failed == 0
