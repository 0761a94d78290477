"""A refinement on real Flower: in process, simulated with Ray, and on a SuperLink."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from fedinfer_flower.kv.fuser import FuserSpec, make_fuser
from fedinfer_flower.kv.fuser_bank import FuserBank
from fedinfer_flower.kv.share import ShareSpec
from fedinfer_flower.simulation.facts.checkpoints import load

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

PYPROJECT = """\
[build-system]
requires = ["hatchling"]
build-backend = "hatchling.build"

[project]
name = "refine-app"
version = "1.0.0"
description = "Three sites with small language models."
license = "Apache-2.0"
dependencies = []

[tool.hatch.build.targets.wheel]
packages = ["."]

[tool.flwr.app]
publisher = "tests"

[tool.flwr.app.components]
serverapp = "refine_app.server_app:app"
clientapp = "refine_app.client_app:app"

[tool.flwr.app.config]
answer = ""
media = "own cache text"
"""

TASK = '''\
"""Sites 0 and 2 have the same model, site 1 another; site 0 has fusers for both."""

import torch

from fedinfer_flower.query import Deadline
from fedinfer_flower.simulation.facts.checkpoints import load
from fedinfer_flower.simulation.facts.world import FactWorld
from fedinfer_flower.strategies.fed_refine import FedRefine

torch.set_num_threads(1)
WORLD = FactWorld()
QUESTIONS = [fact.question() for fact in WORLD.facts(WORLD.private[1])[:4]]


def model(place):
    return load("llama" if place == 1 else "qwen3")


def strategy(medium):
    return FedRefine(
        receiver="site-0",
        medium=medium,
        allow=("text", "full-cache"),
        rephrase="none",
        decoding={"max_new_tokens": 4},
        deadline=Deadline(timeout_s=240.0),
        min_available_nodes=3,
    )


def answers(grid, media):
    """Return what every medium gives, as one JSON value."""
    found = {}
    for medium in media.split():
        result = strategy(medium).start(grid, QUESTIONS)
        found[medium] = {
            "answers": list(result.answers["site-0"]),
            "used": [dict(sorted(row.items())) for row in result.receivers[0].used],
            "pairings": [[*pair, *kinds] for pair, kinds in result.pairings.items()],
            "degraded": result.degraded,
        }
    return found
'''

CLIENT = """\
from flwr.clientapp import ClientApp

from fedinfer_flower.clients.language_mod import LanguageMod, LanguagePolicy
from refine_app.task import model

POLICY = LanguagePolicy(cache=True, full_cache=True, text=True, share_speeds=False)


def load_model(context):
    return model(int(context.node_config["partition-id"]))


app = LanguageMod(load_model, policy=POLICY, fusers="FUSERS").attach(ClientApp())
"""

SERVER = """\
import json
from pathlib import Path

from flwr.serverapp import ServerApp

from refine_app.task import answers

app = ServerApp()


@app.main()
def main(grid, context):
    found = answers(grid, context.run_config["media"])
    Path(context.run_config["answer"]).write_text(json.dumps(found))
"""


@pytest.fixture(scope="session")
def found_by(flwr_run) -> Callable[..., dict[str, object]]:
    """``found_by(app, home, *options, media=)``: what the app writes, run on 'here'."""

    def run(
        app: Path, home: Path, *options: str, media: str = "own cache text"
    ) -> dict[str, object]:
        answer = home / "answer.json"
        config = f'answer="{answer}" media="{media}"'
        output = flwr_run(app, home, "--run-config", config, *options, timeout_s=500.0)
        assert answer.exists(), output[-3000:]
        return dict(json.loads(answer.read_text()))

    return run


@pytest.fixture(scope="module")
def app(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder, fusers = (tmp_path_factory.mktemp(name) for name in ("refine-app", "fusers"))
    own, other = load("qwen3").layout, load("llama").layout
    whole = ShareSpec(last=0, decode=0)
    bank = FuserBank(fusers)
    for spec in (
        FuserSpec(kind="identity", sharer=own, receiver=own, share=whole),
        FuserSpec.for_pair("last-token", other, own, ShareSpec()),
    ):
        bank.add(make_fuser(spec, seed=5), {})
    package = folder / "refine_app"
    package.mkdir()
    (folder / "pyproject.toml").write_text(PYPROJECT)
    for name, text in {
        "__init__": "",
        "task": TASK,
        "client_app": CLIENT.replace("FUSERS", str(fusers)),
        "server_app": SERVER,
    }.items():
        (package / f"{name}.py").write_text(text)
    return folder


@pytest.fixture(scope="module")
def in_process(environment, app: Path) -> dict[str, object]:
    """The same app in another process of ours: LocalGrid, and no server at all."""
    code = (
        "import json, sys; sys.path.insert(0, '.')\n"
        "from fedinfer_flower.simulation.local_grid import LocalGrid\n"
        "from refine_app.client_app import app\n"
        "from refine_app.task import answers\n"
        "with LocalGrid(app, num_supernodes=3, workers=1) as grid:\n"
        "    sys.stdout.write(json.dumps(answers(grid, 'own cache text')))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=app,
        env=environment(app),
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return dict(json.loads(done.stdout.splitlines()[-1]))


def test_local_answers_come_from_every_medium(in_process: dict[str, object]) -> None:
    cache, text, own = (in_process[medium] for medium in ("cache", "text", "own"))

    assert cache["used"] == [{"site-1": "cache", "site-2": "cache"}] * 4  # type: ignore[index]
    assert cache["pairings"] == [  # type: ignore[index]
        ["site-0", "site-1", "heterogeneous-cache"],
        ["site-0", "site-2", "homogeneous-cache"],
    ]
    assert text["used"] == [{"site-1": "text", "site-2": "text"}] * 4  # type: ignore[index]
    assert own["used"] == [{}] * 4  # type: ignore[index]
    assert text["answers"] != own["answers"]  # type: ignore[index]


def test_simulation_gives_the_answers_of_one_process(
    found_by, superlink, app: Path, in_process: dict[str, object], tmp_path: Path
) -> None:
    with superlink(tmp_path, "--simulation"):
        simulated = found_by(app, tmp_path, "--federation-config", "num-supernodes=3")

    assert simulated == in_process


def test_supernodes_on_a_superlink_give_the_answers_of_one_process(
    found_by, superlink, supernodes, app: Path, in_process: dict[str, object], tmp_path: Path
) -> None:
    nodes = [f"partition-id={partition} num-partitions=3" for partition in range(3)]
    with superlink(tmp_path) as port, supernodes(port, *nodes, home=tmp_path):
        # One medium: a SuperNode starts a process for every message, which loads torch anew.
        deployed = found_by(app, tmp_path, media="cache")

    assert deployed == {"cache": in_process["cache"]}
