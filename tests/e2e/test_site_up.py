"""A federation from zero, as docs/how-to/deploy.md says: TLS, node keys, policies, a gateway."""

from __future__ import annotations

import hashlib
import json
import os
import re
import signal
import socket
import ssl
import subprocess
import sys
import time
import urllib.error
import urllib.request
from contextlib import ExitStack
from pathlib import Path

import pytest

from fedinfer_flower.cli.doctor_network import examine_superlink

pytestmark = [pytest.mark.deployment, pytest.mark.slow, pytest.mark.timeout(900)]

MOST_S = 240.0
BIN = Path(sys.executable).parent

MODEL = """
from pathlib import Path

import numpy as np
from fedinfer_flower import LocalModel

def load_model(context):
    with Path(__file__).with_name("loads").open("a") as file:
        file.write("x")
    return LocalModel(
        model=lambda x: np.tile([[0.9, 0.1]], (len(x), 1)), classes=["healthy", "ill"], digest="d1"
    )
"""

POLICY = """
[site]
name = "{name}"
home = "{name}-home"
[model]
loader = "ward_models:load_model"
[answers]
protections = ["plain"]
require-seal = false
anyone = true
"""

GATEWAY = """
[gateway]
state = "state"
port = {port}
certificate = "superlink.pem"
key = "superlink.key"
[limits]
drain-s = 5.0
[models.triage]
protection = "plain"
min-sites = 2
quorum = 2
"""

CERTIFICATES = """
openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes -days 3650 \
  -subj "/CN=federation" -addext "keyUsage=critical,keyCertSign,cRLSign" \
  -keyout ca.key -out ca.crt
openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes -days 365 \
  -CA ca.crt -CAkey ca.key -subj "/CN=superlink" \
  -addext "subjectAltName=DNS:localhost,IP:127.0.0.1" \
  -addext "basicConstraints=critical,CA:FALSE" -addext "extendedKeyUsage=serverAuth" \
  -keyout superlink.key -out superlink.pem
ssh-keygen -q -t ecdsa -b 384 -N "" -f north.key
ssh-keygen -q -t ecdsa -b 384 -N "" -f south.key
chmod 600 *.key
"""


def wait_for(condition, what, most_s=MOST_S):
    end = time.monotonic() + most_s
    while time.monotonic() < end:
        found = condition()
        if found:
            return found
        time.sleep(0.2)
    raise AssertionError(f"waited in vain for {what}")


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def is_alive(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


class Federation:
    """Commands in one folder, and what they started."""

    def __init__(self, folder, stack, *, scheme="https"):
        self.folder, self.stack, self.scheme = folder, stack, scheme
        self.superlink, self.gateway = free_port(), free_port()
        self.environment = os.environ | {
            "FLWR_HOME": str(folder / "flower"),
            "PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}",
            "PYTHONPATH": str(folder),
            "PYTHONUNBUFFERED": "1",
        }
        (folder / "flower").mkdir()
        (folder / "flower/config.toml").write_text(
            f'[superlink.dep]\naddress = "localhost:{self.superlink}"\n'
            f'root-certificates = "{folder}/ca.crt"\n'
        )

    def call(self, *command):
        done = subprocess.run(
            command, cwd=self.folder, env=self.environment, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    def begin(self, name, *command):
        log = self.stack.enter_context((self.folder / f"{name}.log").open("wb"))
        process = subprocess.Popen(
            command, cwd=self.folder, env=self.environment, stdout=log, stderr=log
        )
        self.stack.callback(self.end, process)
        return process

    def end(self, process):
        process.terminate()
        try:
            return process.wait(timeout=60)
        except subprocess.TimeoutExpired:
            process.kill()
            return process.wait()

    def up(self, name):
        (self.folder / f"{name}.toml").write_text(POLICY.format(name=name))
        (self.folder / f"{name}.toml").chmod(0o600)
        return self.begin(
            f"{name}-up",
            *fedinfer("site", "up", "--policy", f"{name}.toml"),
            *("--superlink", f"localhost:{self.superlink}"),
            *("--root-certificates", "ca.crt", "--node-key", f"{name}.key"),
        )

    def status(self, name):
        done = subprocess.run(
            fedinfer("site", "status", "--policy", f"{name}.toml", "--json"),
            cwd=self.folder,
            env=self.environment,
            capture_output=True,
            text=True,
        )
        facts = json.loads(done.stdout) if done.stdout else {}
        return {child["name"]: child for child in facts.get("children", ())}

    def request(self, method, path, *, key="", body=None):
        tls = self.scheme == "https"
        context = ssl.create_default_context(cafile=self.folder / "ca.crt") if tls else None
        request = urllib.request.Request(  # noqa: S310
            f"{self.scheme}://localhost:{self.gateway}{path}",
            method=method,
            data=None if body is None else json.dumps(body).encode(),
            headers={"Content-Type": "application/json"}
            | ({"Authorization": f"Bearer {key}"} if key else {}),
        )
        try:
            with urllib.request.urlopen(  # noqa: S310
                request, context=context, timeout=90
            ) as answer:
                return answer.status, json.loads(answer.read() or b"null")
        except urllib.error.HTTPError as exc:
            with exc:
                return exc.code, json.loads(exc.read() or b"null")
        except (urllib.error.URLError, OSError):
            return 0, None

    def key(self):
        text = self.call(
            *fedinfer("gateway", "key", "create", "ward", "--config", "gateway.toml"),
            *("--scope", "query", "--expires", "90d"),
        )
        return next(word for word in text.split() if word.startswith("fik_"))

    def ask(self, key):
        body = {"model": "triage", "inputs": [[0.0, 1.0]] * 3}
        return self.request("POST", "/v1/query?wait_s=45&timeout_s=30", key=key, body=body)

    def logs(self):
        files = [*self.folder.glob("*.log"), *self.folder.glob("*-home/logs/*.log")]
        return "\n".join(f"== {file}\n{file.read_text()[-4000:]}" for file in files)


def fedinfer(*arguments):
    return [str(BIN / "fedinfer"), *arguments]


def test_sites_and_gateway_from_zero_over_tls(tmp_path):
    with ExitStack() as stack:
        federation = Federation(tmp_path, stack)
        try:
            play(federation, tmp_path)
        except BaseException:
            sys.stderr.write(federation.logs())
            raise


def test_stock_supernode_answers_too_where_the_policy_allows_it(tmp_path):
    with ExitStack() as stack:
        federation = Federation(tmp_path, stack, scheme="http")
        try:
            play_stock(federation, tmp_path)
        except BaseException:
            sys.stderr.write(federation.logs())
            raise


def play_stock(federation, folder):
    (folder / "ward_models.py").write_text(MODEL)
    federation.begin(
        "superlink",
        *(str(BIN / "flower-superlink"), "--insecure", "--host", "127.0.0.1"),
        *("--port", str(federation.superlink), "--disable-runtime-dependency-installation"),
    )
    address = f"127.0.0.1:{federation.superlink}"
    wait_for(lambda: all(f.ok for f in examine_superlink(address)), "the SuperLink")
    app = Path(federation.call(*fedinfer("serve", "--write-app", "app")).strip())
    federation.call("flwr", "build", "--app", str(app))
    (fab,) = folder.glob("*.fab")
    digest = hashlib.sha256(fab.read_bytes()).hexdigest()
    policy = folder / "north.toml"
    policy.write_text(
        POLICY.format(name="north") + f'[code]\napp = "fab"\nfab-hashes = ["{digest}"]'
    )
    policy.chmod(0o600)
    command = fedinfer("site", "up", "--policy", "north.toml", "--superlink", address)
    site = federation.begin("north-up", *command, "--insecure", "--stock", "--any-code")
    wait_for(lambda: federation.status("north").get("supernode", {}).get("pid"), "the SuperNode")
    text = GATEWAY.format(port=federation.gateway).replace("sites = 2", "sites = 1")
    text = re.sub("(certificate|key) =.*\n", "", text).replace("quorum = 2", "quorum = 1")
    (folder / "gateway.toml").write_text(text)
    serve = federation.begin(
        "serve",
        *fedinfer("serve", "--config", "gateway.toml", "--superlink", address, "--insecure"),
    )
    wait_for(lambda: federation.request("GET", "/ready")[0] == 200, "the site")
    assert federation.ask(federation.key())[0] == 200
    assert federation.end(serve) == 0
    assert federation.end(site) == 0
    log = (folder / "north-up.log").read_text()
    assert "runs whatever code the SuperLink sends" in log


def play(federation, folder):
    # Certificates, keys, a model, a SuperLink that knows its sites.
    federation.call("sh", "-ec", CERTIFICATES)
    (folder / "ward_models.py").write_text(MODEL)
    federation.begin(
        "superlink",
        *(str(BIN / "flower-superlink"), "--host", "127.0.0.1"),
        *("--port", str(federation.superlink), "--database", "state.db"),
        *("--ssl-ca-certfile", "ca.crt", "--ssl-certfile", "superlink.pem"),
        *("--ssl-keyfile", "superlink.key", "--enable-supernode-auth"),
        "--disable-runtime-dependency-installation",
    )
    address = f"localhost:{federation.superlink}"
    wait_for(lambda: all(f.ok for f in examine_superlink(address)), "the SuperLink")
    found = {f.subject: f.status for f in examine_superlink(address)}
    # The gap that a proxy has to close is there, whatever TLS and node keys do.
    for routes in ("control", "runtime"):
        assert "reachable without credentials" in found[f"SuperLink {address}, {routes} routes"]
    for name in ("north", "south"):
        federation.call("flwr", "supernode", "register", f"{name}.key.pub", "dep", "--name", name)

    # Two sites and a gateway.
    sites = {name: federation.up(name) for name in ("north", "south")}
    for name in sites:
        wait_for(lambda name=name: "worker" in federation.status(name), f"{name} to run")
    (folder / "gateway.toml").write_text(GATEWAY.format(port=federation.gateway))
    serve = federation.begin(
        "serve",
        *fedinfer("serve", "--config", "gateway.toml", "--superlink", address),
        *("--root-certificates", "ca.crt"),
    )
    wait_for(lambda: federation.request("GET", "/health")[0] == 200, "the gateway")
    wait_for(lambda: federation.request("GET", "/ready")[0] == 200, "two sites")

    # A query, with a key.
    key = federation.key()
    assert federation.ask("")[0] == 401

    def ask():
        return federation.ask(key)

    status, answer = ask()
    assert status == 200, answer
    assert answer["answer"]["labels"] == ["healthy"] * 3
    # The models stay loaded from one query to the next.
    loads = (folder / "loads").read_text()
    assert ask()[0] == 200
    assert (folder / "loads").read_text() == loads

    # A worker that is killed is back, and queries are answered again.
    before = federation.status("north")
    os.kill(before["worker"]["pid"], signal.SIGKILL)

    def is_back():
        worker = federation.status("north")["worker"]
        return worker["restarts"] == 1 and worker["pid"]

    wait_for(is_back, "a second worker")
    assert federation.status("north")["supernode"]["pid"] == before["supernode"]["pid"]
    wait_for(lambda: ask()[0] == 200, "an answer of both sites again")

    # The run of the gateway is ended behind our back: another one is started.
    run = json.loads((folder / "state/serve/supervisor.json").read_text())["run_id"]
    note = json.loads((folder / "state/gateway.pid").read_text())
    assert int(note["run_id"]) == run
    os.kill(note["pid"], signal.SIGKILL)
    wait_for(lambda: federation.request("GET", "/health")[0] == 0, "the end of the gateway")
    wait_for(lambda: federation.request("GET", "/ready")[0] == 200, "another gateway")
    assert json.loads((folder / "state/serve/supervisor.json").read_text())["run_id"] != run
    wait_for(lambda: ask()[0] == 200, "an answer through the new gateway")

    # The end: the gateway drains, the sites finish, nothing is left.
    gateway = json.loads((folder / "state/gateway.pid").read_text())["pid"]
    pids = [child["pid"] for name in sites for child in federation.status(name).values()]
    assert federation.end(serve) == 0
    wait_for(lambda: not is_alive(gateway), "the end of the gateway's process")
    assert not (folder / "state/gateway.pid").exists()
    assert [federation.end(process) for process in sites.values()] == [0, 0]
    assert not any(map(is_alive, pids))
