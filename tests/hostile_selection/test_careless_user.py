"""Options that cannot work, and limits that are not kept."""

from __future__ import annotations

import math

import numpy as np
import pytest

from fedinfer_flower import FedEnsemble, Querier
from fedinfer_flower.errors import (
    ConfigError,
    FedInferError,
    KeyAtCoordinatorError,
    UnknownNameError,
)
from fedinfer_flower.query import Prediction
from fedinfer_flower.strategies.fed_group_median import FedGroupMedian
from fedinfer_flower.strategies.fed_sequential import FedSequential
from fedinfer_flower.uncertainty.abstention import margin_for_risk
from fedinfer_flower.uncertainty.confidence import JointTemperature
from fedinfer_flower.uncertainty.conformal import ConformalPredictor
from fedinfer_flower.uncertainty.federated_quantile import HistogramSpec, safe_threshold

PRICES = dict.fromkeys(range(4), 1.0)


def prediction(classes=("a", "b"), n_rows=40) -> Prediction:
    p = np.random.default_rng(0).dirichlet(np.ones(len(classes)), n_rows)
    top = np.sort(p, axis=1)
    return Prediction(
        classes=classes,
        labels=p.argmax(axis=1),
        probabilities=p,
        margin=top[:, -1] - top[:, -2],
        abstained=np.zeros(n_rows, dtype=bool),
    )


# -- a budget ------------------------------------------------------------------------------


def test_budget_holds_for_a_sealed_job(federation, rows):
    grid = federation(4, prices=PRICES)
    strategy = FedEnsemble(protection="secagg", budget=6.0, min_available_nodes=4)
    job = Querier(protection="secagg").ask(rows, directory=strategy.directory(grid))
    with pytest.raises(FedInferError, match="budget"):
        strategy.start(grid, job)


def test_budget_holds_after_a_plan_for_fewer_rows(federation, rows):
    grid = federation(4, prices=PRICES)
    strategy = FedEnsemble(protection="secagg", budget=6.0, min_available_nodes=4)
    strategy.plan(grid, n_queries=1)
    with pytest.raises(FedInferError, match="budget"):
        strategy.start(grid, rows)


# -- when built, not when run ----------------------------------------------------------------


@pytest.mark.parametrize(
    "options",
    [
        {"budget": -1.0},
        {"budget": math.nan},
        {"budget": "7"},
        {"max_query_nodes": 0},
        {"max_query_nodes": 2, "protection": "secagg"},
        {"max_query_nodes": 2.5},
        {"patience_s": math.nan},
        {"patience_s": -1.0},
        {"classes": "abc"},
        {"gates": [42]},
        {"selector": 42},
        {"history": {}},
        {"batch_size": 2.5},
        {"min_query_nodes": math.nan},
    ],
    ids=str,
)
def test_options_that_cannot_work_are_refused_when_built(options):
    with pytest.raises(ConfigError):
        FedEnsemble(**options)


@pytest.mark.parametrize(
    "config",
    [
        {"fedinfer.budget": math.nan},
        {"fedinfer.budget": -3.0},
        {"fedinfer.patience-s": math.nan},
        {"fedinfer.max-query-nodes": -1},
    ],
    ids=str,
)
def test_numbers_of_a_run_config_are_refused_when_built(config):
    with pytest.raises(ConfigError):
        FedEnsemble.from_run_config(config)


@pytest.mark.parametrize(
    "config",
    [
        {"fedinfer.gates": ["quorum"]},
        {"fedinfer.budget": "7"},
        {"fedinfer.timeout-s": math.nan},
        {"fedinfer.evidence": "clear"},
        {"fedinfer.gate": "quorum"},
        {"fedinfer.fraction-query": math.nan},
    ],
    ids=str,
)
def test_wrong_types_of_a_run_config_are_refused(config):
    with pytest.raises(ConfigError):
        FedEnsemble.from_run_config(config)


@pytest.mark.parametrize(
    ("config", "meant"),
    [({"fedinfer.gates": "quorom"}, "quorum"), ({"fedinfer.selector": "earlyexit"}, "early-exit")],
    ids=str,
)
def test_misspelt_name_is_put_right(config, meant):
    with pytest.raises(UnknownNameError) as caught:
        FedEnsemble.from_run_config(config)
    assert meant in str(caught.value)


@pytest.mark.parametrize(
    "options", [{"n_groups": 3.5}, {"n_groups": "3"}, {"group_seed": "x"}], ids=str
)
def test_group_median_refuses_when_built(options):
    with pytest.raises(ConfigError):
        FedGroupMedian(**options)


@pytest.mark.parametrize("strategy", [FedGroupMedian, FedSequential])
def test_key_at_the_coordinator_is_refused_when_built(strategy):
    with pytest.raises(KeyAtCoordinatorError):
        strategy(rule="mean-probability", protection="he")


def test_group_median_of_a_job_is_a_typed_error(federation, rows):
    job = Querier(protection="secagg").ask(rows, clear=True)
    with pytest.raises(FedInferError):
        FedGroupMedian(min_available_nodes=9).start(federation(9), job)


# -- how sure -----------------------------------------------------------------------------


def test_threshold_of_other_classes_is_refused():
    learnt = ConformalPredictor.from_audits(prediction(("a", "b", "c")), np.zeros(40, dtype=int))
    with pytest.raises(FedInferError):
        learnt.sets(prediction(("c", "q")))


@pytest.mark.parametrize(
    "wrong",
    [
        lambda: safe_threshold(np.full(11, np.nan), HistogramSpec(n_bins=10), n_sites=2, alpha=0.1),
        lambda: safe_threshold(
            np.ones(11), HistogramSpec(n_bins=10), n_sites=2, alpha=0.1, noise_std=math.nan
        ),
        lambda: ConformalPredictor.from_scores([0.1], alpha="0.1"),
        lambda: JointTemperature(tau=2.0).probabilities(np.array([[math.nan, 0.5]])),
    ],
    ids=["nan-counts", "nan-noise", "alpha-text", "nan-probability"],
)
def test_what_is_no_number_is_a_typed_error(wrong):
    with pytest.raises(FedInferError):
        wrong()


def test_target_that_no_audits_can_meet_answers_nothing():
    found = margin_for_risk(prediction(), np.zeros(40, dtype=int), target_risk=1e-320)
    assert found.coverage == 0.0


@pytest.mark.parametrize("alpha", [0.0, 1.0, math.nan, -0.1, 2])
def test_alpha_at_its_ends_is_refused(alpha):
    with pytest.raises(FedInferError):
        ConformalPredictor.from_scores([0.1, 0.2], alpha=alpha)


def test_no_audits_give_the_set_of_all_classes():
    learnt = ConformalPredictor.from_audits(prediction(n_rows=0), np.zeros(0, dtype=int))
    assert learnt.sets(prediction()).all()


# -- ties ---------------------------------------------------------------------------------
