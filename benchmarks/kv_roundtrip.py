"""A model's own cache, exported, sent through Flower and read again: what changes in its answers.

python benchmarks/kv_roundtrip.py [--json FILE] [--where process,engine,superlink]

A site reads prompts of different lengths, exports its cache position-free, and encodes it in
fp32. The coordinator has the same model: it decodes the cache, imports it, and compares with
what the model computes without any cache, logits and eight greedy tokens. The same three
models and prompts in one process, on Flower's simulation engine, and on a SuperLink with a
SuperNode.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from flwr.app import ConfigRecord, Context, Message, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp

from fedinfer_flower.kv.payload import PayloadLimits, decode_entries, encode_entries
from fedinfer_flower.language.decoding import Decoding
from fedinfer_flower.language.model import LanguageModel, Prefill
from fedinfer_flower.simulation.engine import QUIET_ENVIRONMENT, run_on_engine
from fedinfer_flower.simulation.facts.checkpoints import NAMES, load
from fedinfer_flower.simulation.facts.world import FactWorld
from fedinfer_flower.simulation.local_grid import LocalGrid

WHERE = ("process", "engine", "superlink")
EACH = 8
NEW_TOKENS = 8
TOLERANCE = 1e-4
"""Largest difference of a logit; the same sums in another order differ by some 1e-6."""
LIMITS = PayloadLimits(max_bytes=1 << 26, max_entries_bytes=1 << 28)
ACTION = "fi_roundtrip"
BIN = Path(sys.executable).parent
Row = dict[str, Any]

client_app = ClientApp()
server_app = ServerApp()


# -- both sides --------------------------------------------------------------------------


def prompts_of(model: LanguageModel, number: int) -> list[str]:
    """Return prompts of different lengths: questions alone, and with documents."""
    world = FactWorld()
    facts = world.facts(world.private[number])[:EACH]
    people = world.strangers_new
    read = world.documents(EACH, people=people, statements=3, seed=7)
    return [
        *(model.prompts.ask(fact.question()) for fact in facts),
        *(model.prompts.ask(fact.question(), documents=[text]) for fact, text in read),
    ]


@client_app.query(ACTION)
def share(message: Message, context: Context) -> Message:
    """Send the full cache of every model."""
    torch.set_num_threads(1)
    bodies = {}
    for number, name in enumerate(NAMES):
        model = load(name)
        read = model.prefill(prompts_of(model, number))
        bodies[name] = encode_entries(read.entries, codec="fp32")
    return Message(RecordDict({"caches": ConfigRecord(bodies)}), reply_to=message)


@torch.no_grad()
def without_cache(model: LanguageModel, read: Prefill) -> tuple[torch.Tensor, list[list[int]]]:
    """Return logits after each prompt and greedy tokens, all of it computed anew each step."""
    ids, mask = read.tokens.ids, read.tokens.mask
    first: torch.Tensor | None = None
    for _ in range(NEW_TOKENS):
        at = (mask.cumsum(1) - 1).clamp_min(0)
        out = model.model(input_ids=ids, attention_mask=mask, position_ids=at, use_cache=False)
        logits = out.logits[:, -1]
        first = logits if first is None else first
        token = logits.argmax(-1, keepdim=True)
        ids, mask = torch.cat([ids, token], 1), torch.cat([mask, torch.ones_like(token)], 1)
    assert first is not None
    return first, ids[:, -NEW_TOKENS:].tolist()


def text_of(model: LanguageModel, ids: list[int]) -> str:
    """Return the text before the end of a continuation."""
    end = model.tokenizer.eos_token_id
    kept = ids[: ids.index(end)] if end in ids else ids
    return str(model.tokenizer.decode(kept, skip_special_tokens=True)).strip()


@torch.no_grad()
def compare(bodies: dict[str, bytes]) -> list[Row]:
    """Import every cache and compare it with the model's own computation."""
    rows = []
    for number, name in enumerate(NAMES):
        model = load(name)
        read = model.prefill(prompts_of(model, number))
        truth, tokens = without_cache(model, read)
        there = replace(read, entries=decode_entries(bodies[name], limits=LIMITS))
        logits = model.logits_on(there.past())[:, -1]
        texts = model.decode_on(there.past(), Decoding(max_new_tokens=NEW_TOKENS))
        same = [text == text_of(model, ids) for text, ids in zip(texts, tokens, strict=True)]
        rows.append(
            {
                "model": name,
                "prompts": len(same),
                "bytes": len(bodies[name]),
                "largest_difference": float((logits - truth).abs().max()),
                "same_text": sum(same),
            }
        )
    return rows


def ask(grid: Grid) -> list[Row]:
    """Ask one site for its caches and compare them here."""
    nodes: list[int] = []
    for _ in range(600):
        nodes = list(grid.get_node_ids())
        if nodes:
            break
        time.sleep(0.1)
    message = Message(content=RecordDict(), dst_node_id=nodes[0], message_type=f"query.{ACTION}")
    (reply,) = grid.send_and_receive([message], timeout=300)
    found = reply.content["caches"]
    assert isinstance(found, ConfigRecord)
    return compare({name: bytes(found[name]) for name in NAMES})  # type: ignore[arg-type]


# -- the three places --------------------------------------------------------------------


@server_app.main()
def main_of_server(grid: Grid, context: Context) -> None:
    """Write what was found to the file that the run was given."""
    torch.set_num_threads(1)
    file = os.environ.get("FEDINFER_ROUNDTRIP") or str(context.run_config["answer"])
    Path(file).write_text(json.dumps(ask(grid)))


def in_process(folder: Path) -> list[Row]:
    """Return the rows over Flower's wire format, without a server."""
    with LocalGrid(client_app, num_supernodes=1, workers=1) as grid:
        return ask(grid)


def on_engine(folder: Path) -> list[Row]:
    """Return the rows from Flower's simulation engine, in a process of its own."""
    answer = folder / "engine.json"
    environment = os.environ | QUIET_ENVIRONMENT | {"FEDINFER_ROUNDTRIP": str(answer)}
    command = [sys.executable, __file__, "--engine"]
    run(command, cwd=folder, environment=environment)
    return list(json.loads(answer.read_text()))


PYPROJECT = """\
[build-system]
requires = ["hatchling"]
build-backend = "hatchling.build"

[project]
name = "roundtrip-app"
version = "1.0.0"
description = "One site sends its caches."
license = "Apache-2.0"
dependencies = []

[tool.hatch.build.targets.wheel]
packages = ["."]

[tool.flwr.app]
publisher = "benchmarks"

[tool.flwr.app.components]
serverapp = "roundtrip_app.task:server_app"
clientapp = "roundtrip_app.task:client_app"

[tool.flwr.app.config]
answer = ""
"""


def on_superlink(folder: Path) -> list[Row]:
    """Return the rows from a SuperLink with one SuperNode, each a process of its own."""
    package, answer = folder / "roundtrip_app", folder / "superlink.json"
    package.mkdir()
    (folder / "pyproject.toml").write_text(PYPROJECT)
    (package / "__init__.py").touch()
    shutil.copy(__file__, package / "task.py")
    home = folder / "home"
    home.mkdir()
    environment = os.environ | QUIET_ENVIRONMENT | {"FLWR_HOME": str(home)}
    environment["PATH"] = f"{BIN}{os.pathsep}{environment['PATH']}"
    link, node = free_port(), free_port()
    (home / "config.toml").write_text(
        f'[superlink]\ndefault = "here"\n[superlink.here]\naddress = "127.0.0.1:{link}"\n'
        "insecure = true\n"
    )
    server = ["flower-superlink", "--insecure", "--host", "127.0.0.1", "--port", str(link)]
    server += ["--disable-runtime-dependency-installation"]
    site = ["flower-supernode", "--insecure", "--superlink", f"127.0.0.1:{link}"]
    site += ["--port", str(node), "--node-config", "partition-id=0 num-partitions=1"]
    with (
        running(server, port=link, folder=folder, environment=environment),
        running(site, port=node, folder=folder, environment=environment),
    ):
        flwr = [str(BIN / "flwr"), "run", ".", "here", "--stream"]
        run([*flwr, "--run-config", f'answer="{answer}"'], cwd=folder, environment=environment)
    return list(json.loads(answer.read_text()))


def run(command: list[str], *, cwd: Path, environment: dict[str, str]) -> None:
    done = subprocess.run(
        command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=600, check=False
    )
    if done.returncode:
        sys.exit((done.stdout + done.stderr)[-3000:])


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@contextmanager
def running(
    command: list[str], *, port: int, folder: Path, environment: dict[str, str]
) -> Iterator[None]:
    """Run a Flower process until the block ends; it has to listen first."""
    with (folder / f"{command[0]}.log").open("wb") as log:
        process = subprocess.Popen(
            [str(BIN / command[0]), *command[1:]], stdout=log, stderr=log, env=environment
        )
        try:
            for _ in range(600):
                with socket.socket() as probe:
                    if probe.connect_ex(("127.0.0.1", port)) == 0:
                        break
                time.sleep(0.2)
            else:
                sys.exit(f"{command[0]} does not listen")
            yield
        finally:
            process.terminate()
            try:
                process.wait(timeout=20)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


# -- the table ---------------------------------------------------------------------------


def print_table(found: dict[str, list[Row]]) -> None:
    print("| where | model | prompts | bytes, fp32 | largest difference of a logit", end="")
    print(f" | same text of {NEW_TOKENS} tokens |")
    print("|---|---|---|---|---|---|")
    for where, rows in found.items():
        for row in rows:
            print(
                f"| {where} | {row['model']} | {row['prompts']} | {row['bytes']:,}"
                f" | {row['largest_difference']:.1e} | {row['same_text']} of {row['prompts']} |"
            )
    every = [row for rows in found.values() for row in rows]
    met = all(
        row["largest_difference"] <= TOLERANCE and row["same_text"] == row["prompts"]
        for row in every
    )
    print(f"\nlogits within {TOLERANCE:g} and all texts the same: {'met' if met else 'MISSED'}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path)
    parser.add_argument("--where", default=",".join(WHERE), help="some of these, with commas")
    parser.add_argument("--engine", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.engine:
        run_on_engine(server_app, client_app, num_supernodes=1, num_cpus=1)
        return
    torch.set_num_threads(1)
    ways = dict(zip(WHERE, (in_process, on_engine, on_superlink), strict=True))
    found = {}
    for where in options.where.split(","):
        with tempfile.TemporaryDirectory() as folder:
            found[where] = ways[where](Path(folder))
    print_table(found)
    if options.json:
        options.json.write_text(json.dumps(found, indent=2))


if __name__ == "__main__":
    main()
