"""An operator who mistypes, forgets, and moves the clock."""

from __future__ import annotations

import dataclasses
import sqlite3
import threading
from contextlib import closing

import pytest
from typer.testing import CliRunner

from fedinfer_flower.cli.gateway import gateway_app
from fedinfer_flower.errors import (
    ConfigError,
    DeploymentError,
    KeyAtCoordinatorError,
    UnknownConfigKeyError,
)
from fedinfer_flower.serving.config import GatewayConfig
from fedinfer_flower.serving.jobs import JobState
from fedinfer_flower.serving.server_app import serve, state_folder

HE_IN_CLEAR = '[models.m]\nprotection = "he"\n'


def check(path) -> str:
    """Run ``fedinfer gateway check``; raise what it ends with."""
    result = CliRunner().invoke(gateway_app, ["check", str(path)])
    if result.exception is not None:
        raise result.exception
    return result.output


@pytest.fixture
def toml(tmp_path):
    path = tmp_path / "gateway.toml"

    def write(text: str):
        path.write_text(text)
        return path

    return write


NONSENSE = {
    "port": "[gateway]\nport = 70000\n[models.m]\n",
    "connections": "[limits]\nconnections = 0\n[models.m]\n",
    "headers": "[limits]\nheader-timeout-s = 0\n[models.m]\n",
    "body-time": "[limits]\nbody-timeout-s = 0.0\n[models.m]\n",
    "body": "[limits]\nbody-bytes = 0\n[models.m]\n",
    "queue": "[limits]\nqueued-rows = 0\n[models.m]\n",
    "batch": "[batching]\nmax-rows = 0\n[models.m]\n",
    "in-flight": "[batching]\nin-flight = 0\n[models.m]\n",
    "negative": "[limits]\ndrain-s = -1\n[models.m]\n",
    "text": '[limits]\nconnections = "8"\n[models.m]\n',
    "truth": "[limits]\nconnections = true\n[models.m]\n",
    "quorum": "[models.m]\nquorum = 0\n",
    "time": "[models.m]\ntimeout-s = 0\n",
    "endless": "[models.m]\ntimeout-s = inf\n",
    "rule": '[models.m]\nrule = "the-best"\n',
    "protection": '[models.m]\nprotection = "rot13"\n',
    "option": "[models.m.protection-options]\nbits = 3\n",
    "nobody": "[models.m]\nclear = false\nsealed = false\n",
    "name": "[models.'../m']\n",
    "no-models": "[gateway]\nport = 1\n",
    "language": '[models.m]\nkind = "language"\nstrategy = "refine"\n'
    '[models.m.strategy-options]\nreciever = "north"\n',
}


@pytest.mark.parametrize("name", NONSENSE)
def test_nonsense_in_the_file_is_refused_before_anything_starts(toml, name):
    with pytest.raises(ConfigError) as refused:
        check(toml(NONSENSE[name]))
    assert str(refused.value)


def test_typo_is_named_with_what_was_meant(toml):
    with pytest.raises(UnknownConfigKeyError, match="quorm") as refused:
        check(toml("[models.m]\nquorm = 2\n"))
    assert "quorum" in refused.value.hint


def test_check_refuses_a_model_whose_key_the_gateway_would_hold(toml):
    with pytest.raises(KeyAtCoordinatorError):
        check(toml(HE_IN_CLEAR))
    assert "m" in check(toml(HE_IN_CLEAR + "clear = false\n"))


def test_check_refuses_a_state_folder_that_others_can_read(toml, tmp_path):
    path = toml('[gateway]\nstate = "state"\n[models.m]\n')
    (tmp_path / "state").mkdir()
    (tmp_path / "state").chmod(0o750)
    with pytest.raises(DeploymentError, match="owner"):
        check(path)
    (tmp_path / "state").chmod(0o700)
    check(path)


def test_check_makes_no_folder(toml, tmp_path):
    check(toml('[gateway]\nstate = "state"\n[models.m]\n'))
    assert not (tmp_path / "state").exists()


@pytest.mark.parametrize(("days", "said"), [(-2, "ended"), (5, "ends in"), (200, "")])
def test_check_looks_at_the_end_of_the_certificate(toml, make_certificate, days, said):
    make_certificate(days)
    path = toml('[gateway]\ncertificate = "cert.pem"\nkey = "key.pem"\n[models.m]\n')
    if days < 0:
        with pytest.raises(DeploymentError, match=said):
            check(path)
    else:
        assert (said or "ends in") in check(path) or not said


def test_state_folder_that_is_a_file_is_refused(tmp_path):
    (tmp_path / "state").write_text("")
    with pytest.raises(DeploymentError, match="cannot be used"):
        state_folder(tmp_path / "state")


def test_without_a_certificate_only_loopback_is_served():
    with pytest.raises(ConfigError, match="loopback"):
        GatewayConfig.from_mapping({"gateway": {"host": "0.0.0.0"}, "models": {"m": {}}})  # noqa: S104


def test_clock_set_back_over_a_restart_gives_a_query_no_more_time(bed, rows):
    """A deadline is a time of day; after a restart the clock may say that it is far away."""
    sites = bed.sites(2)
    core = bed.core(sites, models={"m": {"quorum": 2, "timeout-s": 3.0}})
    job = core._written(bed.request(rows, timeout_s=3.0)).job
    core.close()
    with closing(sqlite3.connect(bed.folder / "outbox.db", isolation_level=None)) as db:
        db.execute("UPDATE jobs SET accepted_at = accepted_at + 86400")
        db.execute("UPDATE jobs SET deadline_at = deadline_at + 86400")
    second = bed.core(sites, start=False, models={"m": {"quorum": 2, "timeout-s": 3.0}})
    (stored,) = second._outbox.unfinished()
    assert stored.job.job_id == job.job_id
    assert second._opened(stored).left_s <= 3.0


def test_clock_that_jumps_while_a_query_runs_changes_nothing(bed, rows):
    now = [1_000_000.0]
    sites = bed.sites(2)
    core = bed.core(sites)
    core._clock = lambda: now[0]
    core._ends._clock = core._clock
    job = core.submit(bed.request(rows))
    now[0] -= 1e6
    ended = bed.ended(core, job)
    assert ended.state is JobState.DONE
    assert dataclasses.asdict(ended)["ended_at"] <= ended.accepted_at


def test_second_gateway_on_the_same_state_folder_is_refused(bed, tmp_path):
    sites = bed.sites(2)
    config = GatewayConfig.from_mapping(
        {"gateway": {"port": 0, "state": "state"}, "models": {"m": {}}}, folder=tmp_path
    )
    state_folder(tmp_path / "state")

    def run(told_to_end, tell_port=None):
        serve(config, sites.grid, run_id=1, told_to_end=told_to_end, tell_port=tell_port)

    ports, end = [], threading.Event()
    first = threading.Thread(target=run, args=(end.is_set, ports.append))
    first.start()
    try:
        bed.until(lambda: bool(ports))
        with pytest.raises(DeploymentError, match="another gateway"):
            run(lambda: True)
    finally:
        end.set()
        first.join()
    run(lambda: True)  # the folder is free again
