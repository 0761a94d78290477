"""Settings of a strategy: from code, and from the run config of a Flower app."""

from __future__ import annotations

import math

import pytest

from fedinfer_flower import Deadline, FedEnsemble
from fedinfer_flower.errors import (
    InvalidValueError,
    UnknownConfigKeyError,
    UnknownNameError,
)
from fedinfer_flower.privacy.dp import DP

FULL = {
    "fedinfer.rule": "majority-vote",
    "fedinfer.protection": "dp",
    "fedinfer.epsilon": 2.0,
    "fedinfer.mechanism": "randomised-response",
    "fedinfer.timeout-s": 12.5,
    "fedinfer.quorum": 3,
    "fedinfer.fraction-query": 0.5,
    "fedinfer.min-query-nodes": 2,
    "fedinfer.min-available-nodes": 4,
    "fedinfer.patience-s": 7.0,
    "fedinfer.batch-size": 16,
    "fedinfer.allow-coordinator-key": True,
    "lr": 0.1,
    "num-server-rounds": 3,
}


def test_run_config_sets_every_option():
    ours = FedEnsemble.from_run_config(FULL)

    assert ours.rule is not None
    assert ours.rule.name == "majority-vote"
    assert ours.protection == DP(mechanism="randomised-response", epsilon=2.0)
    assert ours.deadline == Deadline(timeout_s=12.5, quorum=3)
    assert (ours.fraction_query, ours.min_query_nodes, ours.min_available_nodes) == (0.5, 2, 4)
    assert (ours.patience_s, ours.batch_size, ours.allow_coordinator_key) == (7.0, 16, True)


def test_run_config_without_keys_gives_the_defaults():
    assert FedEnsemble.from_run_config({"lr": 1}).summary() == FedEnsemble().summary()


def test_run_config_overrides_are_the_apps_own():
    ours = FedEnsemble.from_run_config({"fedinfer.rule": "median"}, rule="borda", classes=["x"])
    assert ours.rule is not None
    assert ours.rule.name == "borda"
    assert ours.classes == ("x",)


def test_run_config_takes_a_whole_number_for_a_float():
    ours = FedEnsemble.from_run_config({"fedinfer.timeout-s": 5})
    assert type(ours.deadline.timeout_s) is float


@pytest.mark.parametrize(
    ("key", "hint"),
    [
        ("fedinfer.rul", "did you mean 'fedinfer.rule'?"),
        ("fedinfer.batch_size", "did you mean 'fedinfer.batch-size'?"),
        ("fedinfer.timeout", "did you mean 'fedinfer.timeout-s'?"),
        ("fedinfer.zzzzz", "known: "),
        ("fedinfer.epsilon", "known: "),  # an option of dp, and the protection is plain
        ("fedinfer.", "known: "),
    ],
)
def test_run_config_with_an_unknown_key_is_refused_with_a_hint(key, hint):
    with pytest.raises(UnknownConfigKeyError) as caught:
        FedEnsemble.from_run_config({key: "x"})
    assert repr(key) in caught.value.message
    assert hint in caught.value.hint


WRONG_TYPES = {
    "fedinfer.rule": (1, True, 0.5),
    "fedinfer.protection": (1, True),
    "fedinfer.timeout-s": ("5", True),
    "fedinfer.quorum": (1.0, "1", True),
    "fedinfer.fraction-query": ("all", True),
    "fedinfer.batch-size": (1.5, "16", False),
    "fedinfer.min-available-nodes": (2.0, "2"),
    "fedinfer.allow-coordinator-key": (1, "true", 0.0),
}


@pytest.mark.parametrize(
    ("key", "value"), [(k, v) for k, values in WRONG_TYPES.items() for v in values]
)
def test_run_config_with_a_value_of_wrong_type_is_refused_naming_the_key(key, value):
    with pytest.raises(InvalidValueError, match=key):
        FedEnsemble.from_run_config({key: value})


@pytest.mark.parametrize(
    "config",
    [
        {"fedinfer.timeout-s": 0.0},
        {"fedinfer.timeout-s": math.inf},
        {"fedinfer.timeout-s": math.nan},
        {"fedinfer.quorum": 0},
        {"fedinfer.fraction-query": 0.0},
        {"fedinfer.fraction-query": 1.5},
        {"fedinfer.fraction-query": math.nan},
        {"fedinfer.batch-size": 0},
        {"fedinfer.min-query-nodes": 0},
        {"fedinfer.min-available-nodes": -1},
        {"fedinfer.protection": "dp", "fedinfer.epsilon": -1.0},
        {"fedinfer.protection": "dp", "fedinfer.epsilon": "2"},
        {"fedinfer.protection": "he", "fedinfer.scheme": "paillier"},
    ],
    ids=str,
)
def test_run_config_with_a_value_out_of_range_is_refused(config):
    with pytest.raises(InvalidValueError):
        FedEnsemble.from_run_config(config)


@pytest.mark.parametrize(
    ("config", "hint"),
    [
        ({"fedinfer.rule": "medium"}, "median"),
        ({"fedinfer.protection": "plan"}, "plain"),
        ({"fedinfer.rule": "zzz"}, "known"),
    ],
)
def test_run_config_with_an_unknown_name_is_refused_with_a_hint(config, hint):
    with pytest.raises(UnknownNameError) as caught:
        FedEnsemble.from_run_config(config)
    assert hint in caught.value.hint


@pytest.mark.parametrize(
    "options",
    [
        {"fraction_query": 0.0},
        {"fraction_query": 1.01},
        {"batch_size": 0},
        {"min_query_nodes": 0},
        {"min_available_nodes": -1},
        {"deadline": None, "rule": "mean-probability", "batch_size": -5},
    ],
    ids=str,
)
def test_strategy_with_an_option_out_of_range_is_refused(options):
    with pytest.raises(InvalidValueError):
        FedEnsemble(**options)


def test_summary_names_every_setting():
    text = FedEnsemble.from_run_config(FULL).summary()
    for part in ("majority-vote", "dp", "epsilon=2.0", "12.5 s", "quorum 3", "0.5", "16 queries"):
        assert part in text
