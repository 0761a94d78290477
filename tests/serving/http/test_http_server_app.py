"""The gateway as a ServerApp: how it starts, and each way in which it ends."""

from __future__ import annotations

import json
import logging
import os
import signal
import threading
from types import SimpleNamespace

import httpx
import pytest
from flwr.app import Context, RecordDict

from fedinfer_flower.errors import ConfigError, DeploymentError, UnavailableError
from fedinfer_flower.observability.audit_log import verify_audit_log
from fedinfer_flower.serving import core as core_module
from fedinfer_flower.serving import server_app
from fedinfer_flower.serving.key_store import KeyStore

TOML = '[gateway]\nport = 0\nstate = "state"\n[limits]\ndrain-s = 7.0\n[models.wine]\n'


@pytest.fixture
def world(board, monkeypatch, tmp_path):
    """Put a core in place that has the board in memory, and keeps what is done to it."""
    seen = SimpleNamespace(board=board, done=[], lost="", draining=False, during_drain=None)

    class Core:
        def __init__(self, config, grid, *, run_id, identity, audit, metrics):
            assert audit is not None
            assert metrics is not None
            seen.done.append(("made", grid, run_id))

        def __getattr__(self, name):
            return getattr(board, name)

        @property
        def lost(self):
            return seen.lost

        def start(self):
            seen.done.append("start")

        def ready(self):
            return not seen.draining, "closing" if seen.draining else ""

        def submit(self, request):
            if seen.draining:
                raise UnavailableError("the gateway is closing")
            return board.submit(request)

        def drain(self, timeout_s):
            seen.draining = True
            seen.done.append(("drain", timeout_s))
            if seen.during_drain is not None:
                seen.during_drain()
            return True

        def close(self):
            seen.done.append("close")

    monkeypatch.setattr(core_module, "GatewayCore", Core)
    monkeypatch.setattr(server_app, "configure_json_logs", lambda: None)
    seen.file = tmp_path / "gateway.toml"
    seen.file.write_text(TOML)
    return seen


def served(world, *, told, on_port):
    config = server_app.GatewayConfig.read(world.file)
    return server_app.serve(config, "grid", run_id=7, told_to_end=told.is_set, tell_port=on_port)


def test_gateway_answers_drains_and_writes_down_both_ends(world, tmp_path):
    told, found = threading.Event(), {}

    def on_port(port):
        found["url"] = f"http://127.0.0.1:{port}"
        keys = KeyStore(tmp_path / "state" / "keys.db")
        headers = {"Authorization": f"Bearer {keys.create('lab', scopes=['query'])}"}
        keys.close()
        found["headers"] = headers
        query = {"model": "wine", "inputs": [[1.0]]}
        found["before"] = httpx.post(f"{found['url']}/v1/query", json=query, headers=headers)
        told.set()

    def during_drain():
        query = {"model": "wine", "inputs": [[1.0]]}
        found["ready"] = httpx.get(f"{found['url']}/ready")
        found["new"] = httpx.post(f"{found['url']}/v1/query", json=query, headers=found["headers"])
        job_id = found["before"].json()["id"]
        found["old"] = httpx.get(f"{found['url']}/v1/queries/{job_id}", headers=found["headers"])

    world.during_drain = during_drain
    assert served(world, told=told, on_port=on_port) == "told to end"
    assert world.done == [("made", "grid", 7), "start", ("drain", 7.0), "close"]
    assert found["before"].status_code == 200
    assert (found["ready"].status_code, found["ready"].json()["why"]) == (503, "closing")
    assert (found["new"].status_code, found["new"].json()["error"]["code"]) == (503, "FI417")
    assert found["old"].json()["state"] == "done"
    with pytest.raises(httpx.TransportError):
        httpx.get(f"{found['url']}/health")
    audit = tmp_path / "state" / "audit.jsonl"
    assert verify_audit_log(audit).ok
    assert [e in audit.read_text() for e in ('"started"', '"stopped"')] == [True, True]
    assert (tmp_path / "state").stat().st_mode & 0o077 == 0


def test_gateway_whose_run_is_lost_ends_without_waiting(world):
    def on_port(_):
        world.lost = "the SuperLink has not answered for 21 s"

    assert served(world, told=threading.Event(), on_port=on_port) == "the run is lost"
    assert ("drain", 0.0) in world.done


def test_state_that_others_can_read_is_refused(world, tmp_path):
    (tmp_path / "state").mkdir()
    (tmp_path / "state").chmod(0o750)
    with pytest.raises(DeploymentError, match="chmod 700"):
        served(world, told=threading.Event(), on_port=lambda _: None)
    assert world.done == []


def context(**run_config):
    return Context(run_id=7, node_id=1, node_config={}, state=RecordDict(), run_config=run_config)


def test_main_needs_the_path_of_its_settings(world):
    with pytest.raises(ConfigError, match="gateway-config"):
        server_app.app("grid", context())


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT], ids=["term", "int"])
def test_signal_ends_the_main_in_good_order(world, monkeypatch, number):
    before = signal.getsignal(number)
    wait = server_app._wait

    def told(*arguments):
        os.kill(os.getpid(), number)
        return wait(*arguments)

    monkeypatch.setattr(server_app, "_wait", told)
    server_app.app("grid", context(**{"gateway-config": str(world.file)}))
    assert world.done[-2:] == [("drain", 7.0), "close"]
    assert signal.getsignal(number) is before


def test_second_signal_goes_where_flower_wants_it():
    taken = []
    before = signal.signal(signal.SIGTERM, lambda number, frame: taken.append(number))
    try:
        with server_app._told_to_end() as told:
            os.kill(os.getpid(), signal.SIGTERM)
            assert told.wait(5.0)
            assert not taken
            os.kill(os.getpid(), signal.SIGTERM)
            assert taken == [signal.SIGTERM]
    finally:
        signal.signal(signal.SIGTERM, before)


def test_missing_internals_are_one_warning(monkeypatch, caplog):
    import sys

    monkeypatch.setitem(sys.modules, "fedinfer_flower.flower_internals", None)
    with caplog.at_level(logging.WARNING):
        server_app._shorten_backoff()
    assert len(caplog.records) == 1


def test_access_log_goes_to_a_file_of_the_owner_and_not_to_the_run(tmp_path, caplog):
    log = logging.getLogger("fedinfer_flower.access")
    log.setLevel(logging.INFO)
    path = tmp_path / server_app.ACCESS_FILE
    with caplog.at_level(logging.INFO), server_app._access_log(path):
        log.info("request", extra={"status": 200})
    assert not caplog.records
    (line,) = path.read_text().splitlines()
    assert json.loads(line)["message"] == "request"
    assert log.propagate
    assert not log.handlers
