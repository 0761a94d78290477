"""`fedinfer site`, with stand-ins for SuperNode and worker: real processes, no Flower."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from typer.testing import CliRunner

from fedinfer_flower.cli import site
from fedinfer_flower.cli.site_children import (
    Link,
    Programs,
    RuntimeAddress,
    require_stock_allowed,
    site_children,
)
from fedinfer_flower.clients.policy import SitePolicy
from fedinfer_flower.errors import ConfigError, DeploymentError, InvalidValueError

MOST_S = 60.0

STAND_IN = """
import json, os, signal, sys, time
from pathlib import Path
name, arguments = sys.argv[1], sys.argv[2:]
status = Path(arguments[arguments.index("--status") + 1])
status.with_suffix(".argv").write_text(json.dumps(arguments))
print("up", flush=True)
told = []
signal.signal(signal.SIGTERM, lambda *_: told.append(1))
while not told:
    draft = status.with_suffix(".draft")
    draft.write_text(json.dumps(
        {"pid": os.getpid(), "beat_at": time.time(), "state": "idle", "tasks_done": 3}))
    draft.replace(status)
    time.sleep(0.1)
with open(status.parent / "order", "a") as file:
    file.write(name + "\\n")
"""


def programs():
    begin = (sys.executable, "-c", STAND_IN)
    return Programs(
        warm_node=(*begin, "supernode"), worker=(*begin, "worker"), stock_node=(*begin, "stock")
    )


def write_policy(folder, *, code='app = "own"', name="north"):
    path = folder / "site.toml"
    path.write_text(
        f"""
[site]
name = "{name}"
home = "home"
[model]
loader = "ward.models:load_model"
[answers]
protections = ["secagg"]
[queriers]
registry = "{"ab" * 32}"
[code]
{code}
"""
    )
    path.chmod(0o600)
    return path


def wait_for(condition, what):
    end = time.monotonic() + MOST_S
    while time.monotonic() < end:
        if condition():
            return
        time.sleep(0.05)
    raise AssertionError(f"waited in vain for {what}")


LINK = Link(address="127.0.0.1:8000", insecure=True)


def children_of(path, **options):
    policy = SitePolicy.read(path)
    specs = site_children(
        policy,
        policy_path=path,
        home=policy.site.home,
        link=options.pop("link", LINK),
        runtime=RuntimeAddress(9094),
        **options,
    )
    return {spec.name: list(spec.command()) for spec in specs}


# -- command lines -----------------------------------------------------------------------


def test_command_lines_are_those_of_supernode_and_worker(tmp_path):
    path = write_policy(tmp_path)
    home = tmp_path / "home"
    found = children_of(path)
    assert found["supernode"][1:] == [
        *("-m", "fedinfer_flower.clients.warm_supernode"),
        *("--status", str(home / "run/supernode.json")),
        *("--worker-key", str(home / "run/worker.key"), "--"),
        *("--host", "127.0.0.1", "--port", "9094"),
        *("--superlink", "127.0.0.1:8000", "--insecure", "--node-config"),
        f"name='north' fedinfer-policy='{path}' fedinfer-home='{home}'",
        *("--isolation", "process"),
    ]
    assert found["worker"][1:] == [
        *("-m", "fedinfer_flower.clients.worker", "--runtime-api-address", "127.0.0.1:9094"),
        *("--policy", str(path), "--status", str(home / "run/worker.json")),
        *("--worker-key", str(home / "run/worker.key")),
    ]


def test_node_config_is_read_back_by_flower(tmp_path):
    from flwr.common.config import parse_config_args

    path = write_policy(tmp_path, name="north ward")
    command = children_of(path)["supernode"]
    read = parse_config_args([command[command.index("--node-config") + 1]])
    assert (read["name"], read["fedinfer-policy"]) == ("north ward", str(path))


def test_keys_and_authorities_travel_as_paths(tmp_path):
    key = tmp_path / "node.key"
    link = Link(address="fleet.example:443", root_certificates=tmp_path / "ca.crt", node_key=key)
    entities = '\napp = "fab"\nfab-hashes = ["' + "0" * 64 + '"]\ntrusted-entities = "keys.yaml"'
    command = children_of(write_policy(tmp_path, code=entities), link=link)["supernode"]
    for option, value in (
        ("--root-certificates", tmp_path / "ca.crt"),
        ("--auth-supernode-private-key", key),
        ("--trusted-entities", tmp_path / "keys.yaml"),
    ):
        assert command[command.index(option) + 1] == str(value)
    assert "--insecure" not in command


def test_stock_supernode_has_no_worker_and_no_warm_options(tmp_path):
    found = children_of(write_policy(tmp_path), stock=True)
    assert list(found) == ["supernode"]
    assert Path(found["supernode"][0]).name == "flower-supernode"
    assert not {"--status", "--isolation"} & set(found["supernode"])


def test_exit_status_of_another_app_is_the_workers(tmp_path):
    from fedinfer_flower.clients.worker import EXIT_OTHER_FAB

    policy = SitePolicy.read(write_policy(tmp_path))
    specs = site_children(
        policy,
        policy_path=tmp_path / "site.toml",
        home=tmp_path / "home",
        link=LINK,
        runtime=RuntimeAddress(),
    )
    assert specs[-1].at_once == {EXIT_OTHER_FAB}


def test_flower_is_told_not_to_call_home(tmp_path, monkeypatch):
    monkeypatch.delenv("FLWR_TELEMETRY_ENABLED", raising=False)
    policy = SitePolicy.read(write_policy(tmp_path))
    for spec in site_children(
        policy,
        policy_path=tmp_path / "site.toml",
        home=tmp_path / "home",
        link=LINK,
        runtime=RuntimeAddress(),
    ):
        assert spec.environment["FLWR_TELEMETRY_ENABLED"] == "0"
        assert spec.environment["FLWR_HOME"] == str(tmp_path / "home/flower")
        assert spec.environment["NO_PROXY"].split(",")[-1] == "127.0.0.1"


def test_port_that_somebody_takes_is_left_for_another():
    import socket

    runtime = RuntimeAddress()
    before = runtime.port
    runtime.renew()
    assert runtime.port == before
    with socket.socket() as other:
        other.bind(("127.0.0.1", before))
        other.listen()
        runtime.renew()
    assert runtime.port != before


# -- refusals ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"address": "https://x:1"}, "HOST:PORT"),
        ({"address": "host"}, "HOST:PORT"),
        ({"address": "host:99999"}, "HOST:PORT"),
        ({"address": "fleet.example:443", "insecure": True}, "on this machine"),
        ({"address": "10.0.0.1:443", "insecure": True}, "on this machine"),
        (
            {"address": "127.0.0.1:1", "insecure": True, "root_certificates": Path("x")},
            "exclude",
        ),
    ],
    ids=["scheme", "no-port", "port", "plain-name", "plain-address", "both"],
)
def test_link_that_would_expose_the_site_is_refused(options, words):
    with pytest.raises(ConfigError, match=words):
        Link(**options)


def test_node_key_that_others_can_read_is_refused(tmp_path):
    key = tmp_path / "node.key"
    key.write_text("x")
    key.chmod(0o644)
    with pytest.raises(DeploymentError, match="the node key"):
        site.run_site(write_policy(tmp_path), link=Link(address="a.example:443", node_key=key))


def test_policy_that_others_can_write_is_refused(tmp_path):
    path = write_policy(tmp_path)
    path.chmod(0o666)
    with pytest.raises(DeploymentError, match="others may write to the policy"):
        site.run_site(path, link=LINK, programs=programs())


def test_home_that_others_can_read_is_refused(tmp_path):
    path = write_policy(tmp_path)
    (tmp_path / "home").mkdir(mode=0o755)
    with pytest.raises(DeploymentError, match="can be read by others"):
        site.run_site(path, link=LINK, programs=programs())


def test_path_with_a_quote_is_refused(tmp_path):
    folder = tmp_path / "o'hara"
    folder.mkdir()
    with pytest.raises(InvalidValueError, match="quote"):
        children_of(write_policy(folder))


@pytest.mark.parametrize(
    ("code", "any_code", "words"),
    [
        ('app = "own"', True, "cannot be kept"),
        ('app = "fab"\nfab-hashes = ["' + "0" * 64 + '"]', False, "could run code at this site"),
    ],
    ids=["own", "unsigned"],
)
def test_stock_supernode_is_refused_where_the_policy_could_not_be_kept(
    tmp_path, code, any_code, words
):
    policy = SitePolicy.read(write_policy(tmp_path, code=code))
    with pytest.raises(DeploymentError, match=words):
        require_stock_allowed(policy, any_code=any_code, why="--stock was asked for")


@pytest.mark.parametrize(
    ("more", "any_code"),
    [('trusted-entities = "keys.yaml"', False), ("", True)],
    ids=["signed", "any-code"],
)
def test_stock_supernode_is_allowed_for_signed_apps_or_by_word(tmp_path, more, any_code):
    code = 'app = "fab"\nfab-hashes = ["' + "0" * 64 + f'"]\n{more}'
    policy = SitePolicy.read(write_policy(tmp_path, code=code))
    require_stock_allowed(policy, any_code=any_code, why="--stock was asked for")


def test_other_flower_falls_back_to_stock_only_where_the_policy_allows(tmp_path, monkeypatch):
    from fedinfer_flower import flower_internals

    def refuse():
        raise DeploymentError("the warm path knows Flower 1.41, this is 1.42.0")

    monkeypatch.setattr(flower_internals, "require_flower", refuse)
    with pytest.raises(DeploymentError, match=r"1\.42\.0.*cannot be kept"):
        site.run_site(write_policy(tmp_path), link=LINK, programs=programs())


# -- it runs -----------------------------------------------------------------------------

RUN = """
import sys
from pathlib import Path
sys.path.insert(0, sys.argv[2])
from test_site import LINK, programs
from fedinfer_flower.cli.site import run_site
from fedinfer_flower.observability.json_logs import configure_json_logs
configure_json_logs(level="INFO")
raise SystemExit(run_site(Path(sys.argv[1]), link=LINK, programs=programs()))
"""


@pytest.fixture
def running(tmp_path):
    path = write_policy(tmp_path)
    command = [sys.executable, "-c", RUN, str(path), str(Path(__file__).parent)]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    lines = []
    reader = threading.Thread(target=lambda: lines.extend(process.stderr), daemon=True)
    reader.start()
    try:
        run = tmp_path / "home/run"
        wait_for((run / "worker.json").exists, "the worker")
        wait_for((run / "supernode.json").exists, "the SuperNode")
        yield path, process, lines
    finally:
        process.kill()
        process.wait()
        reader.join(timeout=10)
        process.stderr.close()


def test_site_runs_is_seen_restarts_and_ends_in_order(running):
    path, process, lines = running
    home = path.parent / "home"
    runner = CliRunner()

    def status():
        done = runner.invoke(site.site_app, ["status", "--policy", str(path), "--json"])
        return json.loads(done.output) if done.output else {}

    wait_for(lambda: status().get("well"), "both to run")
    with pytest.raises(DeploymentError, match="another process"):
        site.run_site(path, link=LINK, programs=programs())
    before = {child["name"]: child for child in status()["children"]}
    assert before["worker"]["tasks_done"] == 3
    os.kill(before["worker"]["pid"], signal.SIGKILL)

    def restarted():
        children = {child["name"]: child for child in status()["children"]}
        return children["worker"]["restarts"] == 1 and children["worker"]["pid"]

    wait_for(restarted, "a second worker")
    after = {child["name"]: child for child in status()["children"]}
    assert after["supernode"]["pid"] == before["supernode"]["pid"]
    assert after["worker"]["last_end"] == "was ended by SIGKILL"
    text = runner.invoke(site.site_app, ["status", "--policy", str(path)]).output
    assert "restarts: 1" in text
    assert "idle" in text
    wait_for((home / "run/worker.json").exists, "its heartbeat")

    process.terminate()
    assert process.wait(timeout=MOST_S) == 0
    assert (home / "run/order").read_text().split() == ["worker", "supernode"]
    done = runner.invoke(site.site_app, ["status", "--policy", str(path)])
    assert (done.exit_code, "no supervisor runs" in done.output) == (1, True)

    from fedinfer_flower.observability.audit_log import verify_audit_log

    log = home / "audit.jsonl"
    assert verify_audit_log(log).ok
    events = [json.loads(line)["event"] for line in log.read_text().splitlines()]
    assert events == ["started", "stopped"]
    wait_for(lambda: any("supernode ended" in line for line in lines), "the last line")
    assert all(json.loads(line)["message"] for line in lines)
    for name in ("logs/worker.log", "run/supervisor.json", "run/lock"):
        assert (home / name).stat().st_mode & 0o077 == 0
