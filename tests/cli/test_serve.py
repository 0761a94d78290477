"""`fedinfer serve`, without a SuperLink: what is refused, what is said, what is stopped when."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from fedinfer_flower.cli import serve as command
from fedinfer_flower.cli.serve import GatewayRuns
from fedinfer_flower.errors import ConfigError, DeploymentError, GatewayError, InvalidValueError
from fedinfer_flower.serving.config import GatewayConfig
from fedinfer_flower.serving.fab import write_project
from fedinfer_flower.serving.flower_runs import Connection, FlowerRuns, RunState
from fedinfer_flower.serving.gateway_process import is_gone, noted, tell_to_end
from fedinfer_flower.supervision.run_folder import RunFolder

FLWR = Path(sys.executable).parent / "flwr"


def write_config(folder, text=""):
    path = folder / "gateway.toml"
    path.write_text(f'[gateway]\nstate = "state"\nport = 18443\n{text}\n[models.triage]\n')
    return path


class FakeRuns:
    """A SuperLink in a dictionary."""

    def __init__(self, states=None, *, reachable=True):
        self.states = dict(states or {})
        self.reachable = reachable
        self.stopped = []

    def start(self):
        self.states[7] = RunState(status="running")
        return 7

    def state(self, run_id):
        if not self.reachable or run_id not in self.states:
            raise GatewayError("the SuperLink cannot be reached")
        return self.states[run_id]

    def stop(self, run_id):
        self.stopped.append(run_id)


# -- the app -----------------------------------------------------------------------------


@pytest.fixture
def build(tmp_path, environment_of_flower):
    def hash_of(folder):
        project = write_project(folder)
        done = subprocess.run(
            [str(FLWR), "build", "--app", str(project)],
            cwd=folder,
            env=environment_of_flower,
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stdout + done.stderr
        (fab,) = folder.glob("*.fab")
        return fab.name, fab.read_bytes()

    return hash_of


@pytest.fixture
def environment_of_flower(tmp_path):
    return os.environ | {"FLWR_HOME": str(tmp_path / "flower"), "FLWR_TELEMETRY_ENABLED": "0"}


def test_app_is_accepted_by_flower_and_packs_to_the_same_bytes(tmp_path, build):
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    assert build(tmp_path / "a") == build(tmp_path / "b")


def test_code_of_the_app_is_imports_and_nothing_of_this_machine(tmp_path):
    import ast

    project = write_project(tmp_path)
    for path in project.rglob("*.py"):
        for node in ast.parse(path.read_text()).body:
            assert isinstance(node, ast.ImportFrom | ast.Expr | ast.Assign), path.name
    assert str(tmp_path) not in (project / "pyproject.toml").read_text()


# -- Flower's command --------------------------------------------------------------------


@pytest.fixture
def fake_flwr(tmp_path, monkeypatch):
    """Put a `flwr` beside a pretended Python that prints what the test wants."""
    folder = tmp_path / "bin"
    folder.mkdir()
    answer = folder / "answer"

    def say(text, *, status=0):
        answer.write_text(text)
        script = folder / "flwr"
        script.write_text(
            f'#!/bin/sh\necho "$@" >> {folder}/calls\necho $FLWR_HOME >> {folder}/homes\n'
            f"cat {answer}\nexit {status}\n"
        )
        script.chmod(0o755)
        return folder

    monkeypatch.setattr(sys, "executable", str(folder / "python"))
    return say


def runs_of(folder, **options):
    connection = Connection(superlink="127.0.0.1:8000", insecure=True)
    return FlowerRuns(
        connection, project=folder, home=folder / "home", run_config={"gateway-config": "/x.toml"}
    )


def test_run_is_started_with_its_own_flower_home(tmp_path, fake_flwr):
    folder = fake_flwr('Using SuperLink\n{"success": true, "run-id": "42"}')
    assert runs_of(tmp_path).start() == 42
    assert "--run-config gateway-config='/x.toml' --format json" in (folder / "calls").read_text()
    assert (folder / "homes").read_text().strip() == str(tmp_path / "home")
    assert (
        'address = "127.0.0.1:8000"\ninsecure = true' in (tmp_path / "home/config.toml").read_text()
    )


@pytest.mark.parametrize(
    ("status", "details", "expected"),
    [
        ("running", "", RunState(status="running")),
        (
            "finished:failed",
            "ServerApp failed with exception: FI209 DeploymentError: the port is taken",
            RunState(status="finished:failed", words="FI209 the port is taken"),
        ),
        (
            "finished:failed",
            "ServerApp failed with exception: secret of somebody",
            RunState(status="finished:failed"),
        ),
    ],
    ids=["running", "ours", "foreign"],
)
def test_state_repeats_typed_errors_only(tmp_path, fake_flwr, status, details, expected):
    run = {"status": status, "status-details": details}
    fake_flwr(json.dumps({"success": True, "runs": [run]}))
    assert runs_of(tmp_path).state(42) == expected


@pytest.mark.parametrize(
    "text", ["", "nonsense", "{", '{"success": false, "error-message": "no"}', "[]"], ids=len
)
def test_answer_without_sense_is_a_typed_error(tmp_path, fake_flwr, text):
    fake_flwr(text, status=1)
    with pytest.raises(GatewayError, match="flwr run failed"):
        runs_of(tmp_path).start()


@pytest.mark.parametrize(
    "options",
    [
        {"superlink": "a b"},
        {"superlink": "dep", "insecure": True},
        {"superlink": "h:1", "insecure": True, "root_certificates": Path("x")},
    ],
    ids=["space", "name-insecure", "both"],
)
def test_connection_without_sense_is_refused(options):
    with pytest.raises(ConfigError):
        Connection(**options)


def test_config_path_with_a_quote_is_refused(tmp_path):
    with pytest.raises(InvalidValueError, match="quote"):
        FlowerRuns(
            Connection(superlink="dep"),
            project=tmp_path,
            home=tmp_path,
            run_config={"gateway-config": "/o'hara"},
        )


# -- the runs of a gateway ---------------------------------------------------------------


def test_run_that_was_left_is_found_again_and_forgotten_once_stopped(tmp_path):
    folder, runs = RunFolder(tmp_path / "serve"), FakeRuns()
    assert GatewayRuns(runs, folder=folder).start() == "7"
    later = GatewayRuns(runs, folder=folder)
    assert later.left_running() == "7"
    later.stop("7")
    assert (runs.stopped, later.left_running()) == ([7], "")


@pytest.mark.parametrize(
    "runs",
    [FakeRuns({7: RunState(status="finished:failed")}), FakeRuns(reachable=False)],
    ids=["ended", "unreachable"],
)
def test_run_that_has_ended_is_not_found(tmp_path, runs):
    folder = RunFolder(tmp_path / "serve")
    folder.write({"run_id": 7})
    assert GatewayRuns(runs, folder=folder).left_running() == ""


def test_run_that_has_ended_is_not_stopped():
    runs = FakeRuns({7: RunState(status="finished:completed")})
    service = GatewayRuns(runs)
    assert service.ended("7").well
    service.stop("7")
    assert runs.stopped == []


def test_superlink_that_cannot_be_reached_knows_nothing_of_the_end():
    assert GatewayRuns(FakeRuns(reachable=False)).ended("7") is None


# -- telling the process -----------------------------------------------------------------


class FakeContext:
    def __init__(self, path, run_id):
        self.run_config, self.run_id = {"gateway-config": str(path)}, run_id


def test_process_is_noted_while_the_app_runs_and_only_then(tmp_path):
    from flwr.serverapp import ServerApp

    seen = []
    app = ServerApp()
    file = tmp_path / "state/gateway.pid"

    @app.main()
    def main(grid, context):
        seen.append((json.loads(file.read_text()), file.stat().st_mode & 0o077))

    noted(app)(None, FakeContext(write_config(tmp_path), 7))
    assert seen == [({"pid": os.getpid(), "run_id": "7"}, 0)]
    assert not file.exists()


def test_app_without_readable_settings_runs_all_the_same(tmp_path):
    from flwr.serverapp import ServerApp

    seen = []
    app = ServerApp()

    @app.main()
    def main(grid, context):
        seen.append(1)

    noted(app)(None, FakeContext(tmp_path / "none.toml", 7))
    assert seen == [1]


def test_signal_goes_to_the_process_of_the_run_and_to_no_other(tmp_path):
    code = "import time; print('up', flush=True); time.sleep(600)  # serverapp"
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE)
    other = subprocess.Popen([sys.executable, "-c", code[:-11]], stdout=subprocess.PIPE)
    try:
        for child in (process, other):
            child.stdout.readline()
        note = tmp_path / "gateway.pid"
        note.write_text(json.dumps({"pid": process.pid, "run_id": "7"}))
        assert not tell_to_end(tmp_path, run_id=8)
        note.write_text(json.dumps({"pid": other.pid, "run_id": "7"}))
        assert not tell_to_end(tmp_path, run_id=7)
        assert (process.poll(), other.poll()) == (None, None)
        note.write_text(json.dumps({"pid": process.pid, "run_id": "7"}))
        assert not is_gone(tmp_path, run_id=7)
        assert tell_to_end(tmp_path, run_id=7)
        assert process.wait(timeout=60) == -signal.SIGTERM
        assert is_gone(tmp_path, run_id=7)
        assert not is_gone(tmp_path, run_id=8)
    finally:
        for child in (process, other):
            child.kill()
            child.wait()
            child.stdout.close()


@pytest.mark.parametrize("text", ["", "{}", '{"pid": 1, "run_id": 7}', "[" * 9000], ids=len)
def test_note_without_sense_tells_nobody(tmp_path, text):
    (tmp_path / "gateway.pid").write_text(text)
    assert not tell_to_end(tmp_path, run_id=7)
    assert not tell_to_end(tmp_path / "none", run_id=7)
    assert not is_gone(tmp_path, run_id=7)


def test_run_whose_process_is_gone_has_ended_whatever_the_superlink_says(tmp_path):
    config = GatewayConfig.read(write_config(tmp_path))
    config.state.mkdir(mode=0o700)
    done = subprocess.Popen([sys.executable, "-c", ""])
    done.wait()
    (config.state / "gateway.pid").write_text(json.dumps({"pid": done.pid, "run_id": "7"}))
    runs = FakeRuns({7: RunState(status="running")})
    service = GatewayRuns(runs, config=config)
    assert service.ended("7").words == "its process is gone"
    service.stop("7")
    assert runs.stopped == [7]


# -- the command -------------------------------------------------------------------------


def test_health_is_asked_at_the_address_of_the_settings(tmp_path):
    config = GatewayConfig.read(write_config(tmp_path))
    assert command._probe(config, "", "/health").url == "http://127.0.0.1:18443/health"
    given = command._probe(config, "https://gateway.example/", "/ready")
    assert (given.url, given.pinned) == ("https://gateway.example/ready", None)


def test_settings_that_are_elsewhere_need_the_gateways_address(tmp_path):
    with pytest.raises(ConfigError, match="cannot be read on this machine"):
        command._probe(command._read_here(tmp_path / "none.toml"), "", "/health")


@pytest.mark.parametrize(
    "address", ["fleet.example:8000", "10.0.0.1:8000", "[2001:db8::1]:8000"], ids=str
)
def test_plain_http_beyond_this_machine_is_refused(tmp_path, address):
    with pytest.raises(DeploymentError, match="on this machine"):
        command._serve(
            write_config(tmp_path),
            superlink=address,
            root_certificates=None,
            insecure=True,
            url="",
            once=True,
        )


def test_second_keeper_of_a_gateway_is_refused(tmp_path):
    path = write_config(tmp_path)
    (tmp_path / "state").mkdir(mode=0o700)
    folder = RunFolder(tmp_path / "state/serve")
    folder.take()
    try:
        with pytest.raises(DeploymentError, match="another process"):
            command._serve(
                path,
                superlink="127.0.0.1:1",
                root_certificates=None,
                insecure=True,
                url="",
                once=True,
            )
    finally:
        folder.release()
