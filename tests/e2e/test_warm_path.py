"""A SuperLink, a warm SuperNode and a resident worker, each a process of its own."""

from __future__ import annotations

import hashlib
import json
import sys
import time
from pathlib import Path

import pytest

from fedinfer_flower.clients.worker_status import read_status

pytestmark = [pytest.mark.deployment, pytest.mark.slow]

PYPROJECT = """\
[build-system]
requires = ["hatchling"]
build-backend = "hatchling.build"

[project]
name = "warm-test"
version = "1.0.0"
description = "Asks one site, in good ways and bad."
license = "Apache-2.0"
dependencies = []

[tool.hatch.build.targets.wheel]
packages = ["."]

[tool.flwr.app]
publisher = "tests"

[tool.flwr.app.components]
serverapp = "warm_test.server_app:app"
clientapp = "warm_test.client_app:app"

[tool.flwr.app.config]
answer = ""
steps = ""
"""

FAB_CLIENT_APP = """\
from pathlib import Path

import numpy as np
from flwr.clientapp import ClientApp

from fedinfer_flower import InferenceMod, LocalModel

Path({canary!r}).write_text("code of the bundle ran")
model = LocalModel(model=lambda x: np.tile([0.2, 0.8], (len(x), 1)), classes=["no", "yes"])
app = InferenceMod(lambda context: model).attach(ClientApp())
"""

SERVER_APP = """\
import json
from pathlib import Path

import numpy as np
from flwr.app import Message
from flwr.serverapp import ServerApp

from fedinfer_flower import Deadline, FedEnsemble
from fedinfer_flower.errors import FedInferError
from fedinfer_flower.flower_internals import shorten_pull_backoff
from fedinfer_flower.strategies.onboarding import read_arrival
from fedinfer_flower.strategies.pull_loop import stream_replies
from fedinfer_flower.wire.envelope import DEFAULT_LIMITS, Envelope, Kind
from fedinfer_flower.wire.records import pack

app = ServerApp()


def ask(grid):
    strategy = FedEnsemble(
        rule="mean-probability", min_available_nodes=1, deadline=Deadline(timeout_s=60)
    )
    try:
        result = strategy.start(grid, np.zeros((2, 3), np.float32))
        return list(map(str, result.prediction.labels))
    except FedInferError as exc:
        return [exc.code, *(error.code for error in strategy._failures.values())]


def send(grid, action):
    node_id, = grid.get_node_ids()
    content = pack(Envelope(kind=Kind.PING, run_id=grid.run.run_id))
    message = Message(content, node_id, f"query.{action}", ttl=60.0)
    for arrival in stream_replies(grid, [message], timeout_s=60.0):
        if arrival.reply.has_error():
            return [arrival.reply.error.code, arrival.reply.error.reason]
        try:
            return read_arrival(arrival, run_id=grid.run.run_id, limits=DEFAULT_LIMITS).kind.value
        except FedInferError as exc:
            return [exc.code, str(exc)]
    return "no reply"


@app.main()
def main(grid, context):
    shorten_pull_backoff()
    found = {}
    for step in str(context.run_config["steps"]).split():
        found[step] = ask(grid) if step.startswith("ask") else send(grid, step)
        Path(str(context.run_config["answer"])).write_text(json.dumps(found))
"""

WORKER = """\
import json, os, sys
from pathlib import Path

import numpy as np
from flwr.app import Message, RecordDict
from flwr.clientapp import ClientApp

from fedinfer_flower import InferenceMod, LocalModel
from fedinfer_flower.clients import model_cache
from fedinfer_flower.clients.app_source import ListedFabs, OwnApp
from fedinfer_flower.clients.worker import run_worker

address, status, key, listed = sys.argv[1:]
app = ClientApp()
model = LocalModel(model=lambda x: np.tile([0.9, 0.1], (len(x), 1)), classes=["no", "yes"])
InferenceMod(lambda context: model).attach(app)


@app.query("fi_none")
@app.query("none")
def none(message, context):
    return None


@app.query("raises")
def raises(message, context):
    raise RuntimeError("SECRET")


@app.query("exits")
def exits(message, context):
    sys.exit("SECRET")


@app.query("new")
def new(message, context):
    return Message(RecordDict(), dst_node_id=1, message_type="query.new")


@app.query("dies")
def dies(message, context):
    os._exit(7)


def source():
    if listed:
        return ListedFabs(listed.split(","))
    model_cache.keep_across_runs()
    return OwnApp(app)


sys.exit(run_worker(source, address=address, status_file=Path(status), key_file=Path(key)))
"""

KEEPER = """\
import signal, subprocess, sys

ended = []
child = None


def end(*_):
    ended.append(True)
    child.terminate()


signal.signal(signal.SIGTERM, end)
while not ended:
    child = subprocess.Popen([sys.executable, *sys.argv[1:]])
    child.wait()
"""


class Site:
    """One SuperLink with one warm SuperNode; workers come and go."""

    def __init__(self, home: Path, node_port: int, running, flwr_run) -> None:
        self.home = home
        self.app = home / "app"
        self.canary = home / "canary"
        self.status = home / "worker.json"
        self._node_port = node_port
        self._running, self._flwr_run = running, flwr_run
        package = self.app / "warm_test"
        package.mkdir(parents=True)
        (self.app / "pyproject.toml").write_text(PYPROJECT)
        (package / "__init__.py").touch()
        (package / "client_app.py").write_text(FAB_CLIENT_APP.format(canary=str(self.canary)))
        (package / "server_app.py").write_text(SERVER_APP)
        (home / "worker_main.py").write_text(WORKER)
        (home / "keeper.py").write_text(KEEPER)

    def worker(self, listed: str = ""):
        """A worker that is started again whenever it ends."""
        address, key = f"127.0.0.1:{self._node_port}", str(self.home / "key")
        command = [sys.executable, str(self.home / "keeper.py"), str(self.home / "worker_main.py")]
        command += [address, str(self.status), key, listed]
        return self._running(*command, home=self.home)

    def run(self, steps: str) -> dict:
        """Take these steps in one run, and return what came of each."""
        answer = self.home / "answer.json"
        config = f'answer="{answer}" steps="{steps}"'
        self._flwr_run(self.app, self.home, "--run-config", config)
        return json.loads(answer.read_text())


@pytest.fixture(scope="module")
def site(tmp_path_factory, superlink, running, flwr_run):
    import socket

    home = tmp_path_factory.mktemp("warm")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        node_port = probe.getsockname()[1]
    with superlink(home) as link:
        status = home / "node.json"
        command = [sys.executable, "-m", "fedinfer_flower.clients.warm_supernode"]
        command += ["--status", str(status), "--worker-key", str(home / "key"), "--"]
        command += ["--insecure", "--superlink", f"127.0.0.1:{link}", "--port", str(node_port)]
        with running(*command, "--isolation", "process", home=home):
            for _ in range(300):
                found = read_status(status)
                if found is not None and found.state == "idle":
                    break
                time.sleep(0.1)
            yield Site(home, node_port, running, flwr_run)


def test_own_app_answers_and_no_handler_blocks_the_site(site):
    with site.worker():
        steps = "ask fi_none none raises exits new unknown fi_unknown dies ask-again"
        found = site.run(steps)
        status = read_status(site.status)
    assert found["ask"] == found["ask-again"] == ["0", "0"]
    # Our own messages get a typed error, any other Flower's, both with fixed words.
    assert found["fi_none"][0] == "FI404"
    assert found["fi_unknown"][0] == "FI406"
    for step in ("none", "raises", "exits", "new"):
        assert found[step] == [2, "the site's app failed"]
    assert found["unknown"] == [2, "the site's ClientApp has no handler for this message"]
    # The process is gone without a reply: its successor's first request tells.
    assert found["dies"][0] == 8
    assert "SECRET" not in json.dumps(found)
    assert status is not None
    assert status.role == "worker"
    assert status.tasks_done >= 1
    assert not site.canary.exists(), "code of a bundle ran at a site with an app of its own"


def test_bundle_that_is_not_listed_is_refused_and_does_not_run(site):
    with site.worker(listed="0" * 64):
        found = site.run("ask fi_ping")
    assert "FI322" in found["ask"]
    assert found["fi_ping"][0] == "FI322"
    assert not site.canary.exists()


def test_listed_bundle_answers(site, output_of):
    output_of(str(Path(sys.executable).parent / "flwr"), "build", cwd=site.app, home=site.home)
    (bundle,) = site.app.glob("*.fab")
    fab_hash = hashlib.sha256(bundle.read_bytes()).hexdigest()
    bundle.unlink()
    with site.worker(listed=fab_hash):
        found = site.run("ask fi_ping")
    assert found == {"ask": ["1", "1"], "fi_ping": "ping"}
    assert site.canary.exists()
