"""What a careless user does, and what it is told."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from fedinfer_flower import Querier
from fedinfer_flower.errors import (
    BindingError,
    ConfigError,
    EnvelopeError,
    FedInferError,
    InvalidValueError,
    QuorumNotMetError,
    UnknownNameError,
)
from fedinfer_flower.wire.directory import Directory
from fedinfer_flower.wire.sealed_job import SealedJob

from .conftest import PROTECTIONS, ROWS


@pytest.fixture
def asked(make_federation):
    """A federation, a strategy and its directory."""
    federation = make_federation()
    strategy = federation.strategy("secagg")
    return federation, strategy, strategy.directory(federation.grid)


def test_asking_without_a_directory_names_both_ways():
    with pytest.raises(ConfigError) as caught:
        Querier(protection="secagg").ask(ROWS)
    assert "directory=" in caught.value.hint
    assert "clear=True" in caught.value.hint


def test_asking_with_both_is_refused(asked):
    with pytest.raises(ConfigError, match="one of both"):
        Querier(protection="secagg").ask(ROWS, directory=asked[2], clear=True)


@pytest.mark.parametrize("ttl_s", [0.0, -1.0, float("nan"), float("inf")])
def test_time_to_live_that_is_none_is_refused(asked, ttl_s):
    with pytest.raises(InvalidValueError, match="ttl_s"):
        Querier(protection="secagg").ask(ROWS, directory=asked[2], ttl_s=ttl_s)


@pytest.mark.parametrize(
    ("rows", "error"),
    [
        (np.zeros((0, 4)), InvalidValueError),
        (np.zeros(4), InvalidValueError),
        (np.array([["a", "b"]]), FedInferError),
        (np.array([[object()]]), FedInferError),
        ([[1.0, 2.0], [3.0]], ValueError),
    ],
    ids=["no rows", "one row", "text", "objects", "ragged"],
)
def test_rows_that_cannot_travel_are_refused(asked, rows, error):
    with pytest.raises(error):
        Querier(protection="secagg").ask(rows, directory=asked[2])


def test_more_batches_than_a_job_can_hold_are_refused_when_asked(asked):
    rows = np.zeros((511, 4))
    with pytest.raises(InvalidValueError, match="511 batches") as caught:
        Querier(protection="secagg").ask(rows, directory=asked[2], batch_size=1)
    assert "batch_size" in caught.value.hint
    job = Querier(protection="secagg").ask(rows[:510], directory=asked[2], batch_size=1)
    assert SealedJob.from_bytes(job.to_bytes()).n_queries == 510


def test_unknown_rule_is_refused_when_asked(asked):
    with pytest.raises(UnknownNameError):
        Querier(protection="secagg").ask(ROWS, directory=asked[2], rule="mean-probabilty")


def test_rule_that_the_protection_cannot_carry_is_refused_when_asked(asked):
    with pytest.raises(FedInferError, match="FI203"):
        Querier(protection="secagg").ask(ROWS, directory=asked[2], rule="median")


def test_too_few_sites_are_refused_when_asked(asked):
    with pytest.raises(InvalidValueError, match="2 sites"):
        Querier(protection="secagg").ask(ROWS, directory=asked[2].only(["site-0", "site-1"]))


def test_unknown_site_is_refused_by_name(asked):
    with pytest.raises(InvalidValueError, match="site-9"):
        asked[2].only(["site-9"])


def test_job_for_another_run_is_refused_by_the_coordinator(asked, make_federation):
    federation, _, directory = asked
    job = Querier(protection="secagg").ask(ROWS, directory=directory)
    federation.grid.close()
    later = make_federation()
    with pytest.raises(BindingError, match="another run"):
        later.strategy("secagg").start(later.grid, job)


def test_job_of_another_protection_is_refused_by_the_strategy(asked):
    federation, _, directory = asked
    job = Querier(protection="plain").ask(ROWS, directory=directory)
    with pytest.raises(BindingError, match="asks for protection 'plain'"):
        federation.strategy("secagg").start(federation.grid, job)


def test_strategy_with_a_rule_of_its_own_is_told_that_the_querier_chose(asked):
    federation, _, directory = asked
    job = Querier(protection="secagg").ask(ROWS, directory=directory, rule="majority-vote")
    strategy = federation.strategy("secagg", rule="mean-probability")
    with pytest.raises(BindingError, match="sealed for rule 'majority-vote'"):
        strategy.start(federation.grid, job)


def test_the_same_job_started_twice_is_a_replay(asked):
    federation, strategy, directory = asked
    job = Querier(protection="secagg").ask(ROWS, directory=directory)
    strategy.start(federation.grid, job)
    with pytest.raises(QuorumNotMetError, match="FI313"):
        strategy.start(federation.grid, job)


@pytest.mark.parametrize("protection", PROTECTIONS)
def test_opening_with_another_querier_is_refused(make_federation, protection):
    federation = make_federation()
    querier, _, result = federation.ask(federation.strategy(protection))
    other = Querier(protection=querier.protection)
    with pytest.raises(BindingError, match="job of another querier"):
        other.open(result.combined)
    # Even if it takes over what the first one asked.
    other._asked = dict(querier._asked)
    with pytest.raises(FedInferError):
        other.open(result.combined)


@pytest.mark.parametrize("protection", PROTECTIONS)
def test_secret_file_written_between_asking_and_opening(make_federation, tmp_path, protection):
    federation = make_federation()
    strategy = federation.strategy(protection)
    directory = strategy.directory(federation.grid)
    querier = Querier(protection=strategy.protection)
    job = querier.ask(ROWS, directory=directory, rule="mean-probability", batch_size=4)
    querier.save_secret(tmp_path / "secret.json")
    result = strategy.start(federation.grid, job)

    later = Querier.load_secret(tmp_path / "secret.json")
    np.testing.assert_array_equal(later.totals(result.combined), querier.totals(result.combined))
    # The terms survive with it.
    combined = dataclasses.replace(result.combined, classes=result.combined.classes[::-1])
    with pytest.raises(BindingError, match="classes"):
        later.open(combined)
    assert later.identity.key_id == querier.identity.key_id


def test_secret_file_is_not_overwritten_nor_read_if_others_may(asked, tmp_path):
    path = tmp_path / "secret.json"
    querier = Querier(protection="secagg")
    querier.ask(ROWS, directory=asked[2])
    querier.save_secret(path)
    with pytest.raises(InvalidValueError, match="may hold the only key"):
        querier.save_secret(path)
    path.chmod(0o644)
    with pytest.raises(InvalidValueError, match="read by others"):
        Querier.load_secret(path)


@pytest.mark.parametrize(
    "damage",
    [
        lambda text: text[: len(text) // 2],
        lambda text: text.replace('"version": 2', '"version": 9'),
        lambda text: text.replace('"secagg"', '"nothing"'),
        lambda text: text.replace('"roster": "', '"roster": "AAAA'),
        lambda text: text.replace('"signing": "', '"signing": "zz'),
        lambda text: "[]",
        lambda text: "",
        lambda text: "[" * 100_000,
    ],
    ids=["half", "version", "protection", "roster", "key", "list", "empty", "deep"],
)
def test_damaged_secret_file_is_a_typed_error_that_does_not_quote_it(asked, tmp_path, damage):
    path = tmp_path / "secret.json"
    querier = Querier(protection="secagg")
    querier.ask(ROWS, directory=asked[2])
    querier.save_secret(path)
    path.write_text(damage(path.read_text()))
    with pytest.raises(EnvelopeError, match="not a querier's file") as caught:
        Querier.load_secret(path)
    for secret in querier.identity.to_secret().values():
        assert secret not in str(caught.value)


def test_two_nodes_with_one_home_are_left_out_and_told_why(make_federation, home, caplog):
    federation = make_federation(home=home)
    # What a copied configuration does: two nodes, one folder.
    federation.grid._contexts[1004].node_config["partition-id"] = 3
    strategy = federation.strategy("secagg")
    directory = strategy.directory(federation.grid)
    assert [card.profile.name for card in directory.cards] == ["site-0", "site-1", "site-2"]
    for node in (1003, 1004):
        assert f"[site {node}]: 2 nodes show the same key" in caplog.text
    assert "home folder of its own" in caplog.text


def test_directory_travels_as_bytes_and_a_cut_one_is_refused(asked):
    data = asked[2].to_bytes()
    assert Directory.from_bytes(data) == asked[2]
    with pytest.raises(EnvelopeError):
        Directory.from_bytes(data[:-1])


def test_sealed_job_in_a_file_gives_the_same_answer(asked, tmp_path):
    federation, strategy, directory = asked
    querier = Querier(protection="secagg")
    job = querier.ask(ROWS, directory=directory, rule="mean-probability")
    (tmp_path / "job").write_bytes(job.to_bytes())
    result = strategy.start(federation.grid, SealedJob.from_bytes((tmp_path / "job").read_bytes()))
    expected = federation.probabilities().sum(axis=0)
    np.testing.assert_allclose(querier.totals(result.combined), expected, atol=1e-3)


def test_querier_instead_of_its_job_is_refused(asked):
    federation, strategy, _ = asked
    with pytest.raises(FedInferError, match="FI205"):
        strategy.start(federation.grid, Querier(protection="secagg"))
