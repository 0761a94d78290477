"""Second-hand help: whether later rounds bring what a site knows that one cannot read.

python benchmarks/kv_rounds.py [--json FILE] [--workdir FOLDER] [--chains 6] [--questions 40]

A chain of three sites with models of different families: the first has a fuser from the
second alone, the second from the third alone; no text. What the third knows can reach the
first only if the second shares, in a later round, what it fused in the one before. The real
strategy and sites, on the in-process grid; every order of the three models.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from flwr.app import Context, Message
from flwr.clientapp import ClientApp

from fedinfer_flower.clients.language_mod import LanguageMod, LanguagePolicy
from fedinfer_flower.clients.language_state import LanguageSite
from fedinfer_flower.kv.fuser_bank import FuserBank
from fedinfer_flower.language.model import LanguageModel
from fedinfer_flower.query import Deadline
from fedinfer_flower.simulation.facts.checkpoints import NAMES, load
from fedinfer_flower.simulation.facts.preparation import Recipe, prepare
from fedinfer_flower.simulation.facts.world import Fact, FactWorld
from fedinfer_flower.simulation.local_grid import LocalGrid
from fedinfer_flower.strategies.fed_refine import FedRefine
from fedinfer_flower.wire.actions import LANGUAGE_ACTIONS

ROUNDS = (1, 2, 3)
SITES = ("first", "second", "third")
TASKS = ("fact of the third", "of the second", "of the first", "nobody")
BATCH = 40
Chain = tuple[int, ...]


def app_of(chain: Chain, models: list[LanguageModel], bank: FuserBank) -> ClientApp:
    """Return the three sites; each can fuse only what the next one sends."""
    mods = []
    for place, number in enumerate(chain):
        own = models[number]
        fusers = FuserBank()
        if place + 1 < len(chain):
            fusers.add(bank.get(models[chain[place + 1]].layout, own.layout))

        def load_model(context: Context, own: LanguageModel = own) -> LanguageSite:
            return LanguageSite(model=own)

        load_model.__qualname__ = f"load_{SITES[place]}"
        policy = LanguagePolicy(cache=True, max_rounds=max(ROUNDS))
        mods.append(LanguageMod(load_model, policy=policy, fusers=fusers, name=SITES[place]))

    def handle(message: Message, context: Context) -> Message:
        return mods[int(context.node_config["partition-id"])].handle(message, context)

    app = ClientApp()
    for action in LANGUAGE_ACTIONS:
        app.query(action)(handle)
    return app


def questions(world: FactWorld, chain: Chain, each: int) -> list[tuple[str, Fact]]:
    """Return private facts of every site, and questions about strangers."""
    first, second, third = (world.facts(world.private[number])[:each] for number in chain)
    nobody = world.unanswerable(world.strangers_new[210:270])[:each]
    groups = zip(TASKS, (third, second, first, nobody), strict=True)
    return [(task, fact) for task, facts in groups for fact in facts]


def measure(
    app: ClientApp, asked: list[tuple[str, Fact]], rounds: int
) -> dict[str, dict[str, list[int]]]:
    """Return right answers and questions by site and task."""
    strategy = FedRefine(
        receiver=SITES[:2],
        medium="cache",
        allow=("cache",),
        rephrase="none",
        rounds=rounds,
        decoding={"max_new_tokens": 6},
        batch_size=BATCH,
        deadline=Deadline(timeout_s=600.0),
        min_available_nodes=len(SITES),
    )
    with LocalGrid(app, num_supernodes=len(SITES)) as grid:
        result = strategy.start(grid, [fact.question() for _, fact in asked])
    found: dict[str, dict[str, list[int]]] = {}
    for each in result.receivers:
        counts = {task: [0, 0] for task in TASKS}
        for answer, (task, fact) in zip(each.answers, asked, strict=True):
            counts[task][0] += (answer or "").split(" ", maxsplit=1)[0] == fact.value
            counts[task][1] += 1
        found[each.name] = counts
    return found


def wilson(right: int, n: int) -> str:
    z = 1.96
    middle = (right + z * z / 2) / (n + z * z)
    half = z / (n + z * z) * math.sqrt(right * (n - right) / n + z * z / 4)
    return f"{100 * right / n:.1f} ({100 * max(0, middle - half):.0f}-{100 * (middle + half):.0f})"


def print_table(rows: list[dict[str, Any]]) -> None:
    chains = len({row["chain"] for row in rows})
    print(f"Right answers in % (95 % interval), {chains} chains together\n")
    print(f"| site | rounds | {' | '.join(TASKS)} | s a chain |")
    print("|---" * (3 + len(TASKS)) + "|")
    for site in SITES[:2]:
        for rounds in ROUNDS:
            having = [row for row in rows if row["rounds"] == rounds]
            cells = []
            for task in TASKS:
                counts = [row["right"][site][task] for row in having]
                cells.append(wilson(sum(c[0] for c in counts), sum(c[1] for c in counts)))
            seconds = sum(row["seconds"] for row in having) / len(having)
            print(f"| {site} | {rounds} | {' | '.join(cells)} | {seconds:.1f} |")
    print(f"\nThe first site, each chain: {' / '.join(TASKS)}\n")
    print(f"| first ← second ← third | {' | '.join(f'rounds {n}' for n in ROUNDS)} |")
    print("|---" * (1 + len(ROUNDS)) + "|")
    for chain in dict.fromkeys(row["chain"] for row in rows):
        cells = []
        for rounds in ROUNDS:
            (row,) = [r for r in rows if (r["chain"], r["rounds"]) == (chain, rounds)]
            counts = [row["right"]["first"][task] for task in TASKS]
            cells.append(" / ".join(f"{100 * right / n:.0f}" for right, n in counts))
        print(f"| {chain} | {' | '.join(cells)} |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path)
    parser.add_argument("--chains", type=int, default=6, help="orders of the models, at most 6")
    parser.add_argument("--questions", type=int, default=40, help="of each task")
    parser.add_argument(
        "--workdir", type=Path, default=Path(tempfile.gettempdir()) / "fedinfer-kv-benchmarks"
    )
    options = parser.parse_args()
    torch.set_num_threads(1)
    from transformers.utils import logging

    logging.disable_progress_bar()
    done = prepare(options.workdir, recipe=Recipe(gates=False))
    world, models, bank = FactWorld(), [load(name) for name in NAMES], FuserBank(done.fusers)
    rows: list[dict[str, Any]] = []
    for chain in list(itertools.permutations(range(len(NAMES))))[: options.chains]:
        asked = questions(world, chain, options.questions)
        app = app_of(chain, models, bank)
        for rounds in ROUNDS:
            start = time.perf_counter()
            right = measure(app, asked, rounds)
            rows.append(
                {
                    "chain": " ← ".join(NAMES[number] for number in chain),
                    "rounds": rounds,
                    "right": right,
                    "seconds": time.perf_counter() - start,
                }
            )
    print_table(rows)
    if options.json:
        options.json.write_text(json.dumps(rows, indent=2))


if __name__ == "__main__":
    main()
