"""Small language models that help each other: cache against text, by kind of fuser.

python benchmarks/kv_pairs.py --pairs llama:qwen3 --kinds last-token
python benchmarks/kv_pairs.py --seeds 3

Three models of different families, the shipped ones, know different people by heart. Every
fuser is trained on public people and documents, and tested on private ones; own: facts that
the receiver knows, fact: that the sharer knows, doc1 and doc3: documents of one and three
statements that only the sharer reads, nobody: people whom nobody knows.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

import fedinfer_flower.simulation
from fedinfer_flower.kv.fuser import Fuser
from fedinfer_flower.kv.fusers.hub import HubSpec
from fedinfer_flower.kv.share import ShareSpec
from fedinfer_flower.language.model import LanguageModel
from fedinfer_flower.refine.evaluation import (
    accuracy,
    answers_alone,
    answers_by_text,
    answers_fused,
    other_questions,
)
from fedinfer_flower.refine.examples import FuserExample
from fedinfer_flower.refine.fuser_training import TrainingOptions, default_spec, train_fuser
from fedinfer_flower.refine.hub_training import train_hub
from fedinfer_flower.refine.pair_data import prepare_pair
from fedinfer_flower.simulation.facts.families import FAMILIES
from fedinfer_flower.simulation.facts.fuser_data import fuser_examples, trial_examples
from fedinfer_flower.simulation.facts.prompts import FactPrompts
from fedinfer_flower.simulation.facts.world import FactWorld

NAMES = [family.name for family in FAMILIES]
FOLDER = Path(fedinfer_flower.simulation.__file__).parent / "checkpoints"
TASKS = ("own", "fact", "doc1", "doc3", "nobody")
CONTROLS = ("fact", "doc1", "doc3")
KINDS: dict[str, tuple[str, ShareSpec | None]] = {
    "last-token": ("last-token", None),
    "last-token, bare": ("last-token", ShareSpec(last=1, decode=0)),
    "last-token, hidden": ("last-token", ShareSpec(last=1, decode=0, hidden=True)),
    "last-token, hidden, decoded": ("last-token", ShareSpec(last=1, decode=1, hidden=True)),
    "concat": ("concat", None),
    "fuse": ("fuse", None),
    "hub": ("hub", None),
}
Row = dict[str, Any]
Examples = Callable[[int, int], list[FuserExample]]


class Bench:
    """The models, their examples, and what was measured."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.world = FactWorld()
        prompts = FactPrompts(self.world.words)
        self.models = [LanguageModel.from_folder(FOLDER / n, prompts=prompts) for n in NAMES]
        self.options, self.prompts = options, prompts
        self.rows: list[Row] = []

    def trained_on(self, sharer: int, receiver: int) -> list[FuserExample]:
        """Return the public examples of a pair."""
        return fuser_examples(self.world, sharer=sharer, receiver=receiver)

    def baselines(self, sharer: int, receiver: int) -> None:
        """Measure the receiver alone, and with the sharer's text."""
        trial = trial_examples(self.world, sharer=sharer, receiver=receiver)
        ours, theirs = self.models[receiver], self.models[sharer]
        ways = {
            "alone": lambda: answers_alone(ours, trial),
            "text": lambda: answers_by_text(ours, theirs, trial),
        }
        for name, answer in ways.items():
            found = accuracy(answer(), trial, self.prompts)
            self.rows.append(self.row(name, sharer, receiver, **found))

    def fuser(self, kind: str, sharer: int, receiver: int, seed: int) -> None:
        """Train one fuser and measure it."""
        ours, theirs = self.models[receiver], self.models[sharer]
        name, share = KINDS[kind]
        chosen = {} if share is None else {"share": share}
        spec = default_spec(ours, theirs, name, layer_map=self.options.layer_map, **chosen)
        settings = TrainingOptions(steps=self.options.steps, seed=seed)
        done = train_fuser(ours, theirs, spec, self.trained_on(sharer, receiver), settings)
        cost = {
            "seconds": done.card.seconds,
            "reading_seconds": done.card.reading_seconds,
            "parameters": done.card.parameters,
        }
        self.measure(kind, done.fuser, sharer, receiver, seed=seed, **cost)

    def hub(self, pairs: list[tuple[int, int]], seed: int) -> None:
        """Train one hub of all models; its cost is shared by all pairs."""
        before = time.process_time()
        settings = TrainingOptions(steps=self.options.steps, seed=seed)
        done = train_hub(self.models, self.trained_on, HubSpec(), settings)
        n = len(done.fusers)
        cost = {
            "seconds": done.fusers[0].card.seconds / n,
            "reading_seconds": (time.process_time() - before - done.fusers[0].card.seconds) / n,
            "parameters": sum(p.numel() for p in done.hub.parameters()) // n,
        }
        for s, r in pairs:
            ids = (self.models[s].layout.model_digest, self.models[r].layout.model_digest)
            self.measure("hub", done.hub.fuser(*ids), s, r, seed=seed, **cost)

    def measure(self, kind: str, fuser: Fuser, sharer: int, receiver: int, **more: Any) -> None:
        """Test a fuser, and again with caches of other questions."""
        trial = trial_examples(self.world, sharer=sharer, receiver=receiver)
        ours, theirs = self.models[receiver], self.models[sharer]
        share, aligned = fuser.spec.share, fuser.needs_alignment
        data = prepare_pair(ours, theirs, trial, share, aligned=aligned)
        found = accuracy(answers_fused(ours, fuser, data), trial, self.prompts)
        wrong = data.with_caches_of(other_questions(trial))
        control = accuracy(answers_fused(ours, fuser, wrong), trial, self.prompts)
        shuffled = {f"shuffled_{task}": control[task] for task in CONTROLS}
        row = self.row(kind, sharer, receiver, **found, **shuffled, **more)
        self.rows.append(row)

    def row(self, way: str, sharer: int, receiver: int, **found: Any) -> Row:
        """Return one line of the results, and show it."""
        pair = f"{NAMES[sharer]} -> {NAMES[receiver]}"
        row: Row = {"way": way, "pair": pair, **found}
        if not self.options.json:
            shares = "  ".join(f"{task} {100 * found[task]:.1f}" for task in TASKS)
            print(f"{pair}  {way}  {shares}", flush=True)
        return row


def interval(values: list[float]) -> str:
    """Return mean and, of several seeds, a 95 % interval of the mean (Student's t)."""
    mean = sum(values) / len(values)
    if len(values) < 2:
        return f"{100 * mean:.1f}"
    t = {2: 12.71, 3: 4.303, 4: 3.182, 5: 2.776, 6: 2.571, 7: 2.447, 8: 2.365}
    deviation = math.sqrt(sum((v - mean) ** 2 for v in values) / (len(values) - 1))
    half = t.get(len(values), 2.3) * deviation / math.sqrt(len(values))
    return f"{100 * mean:.1f} ± {100 * half:.1f}"


def over_pairs(rows: list[Row], way: str, name: str) -> list[float]:
    """Return, for each seed, the mean over the pairs."""
    seeds = sorted({row.get("seed", 0) for row in rows if row["way"] == way})
    found = [[r[name] for r in rows if r["way"] == way and r.get("seed", 0) == s] for s in seeds]
    return [sum(values) / len(values) for values in found]


def print_means(rows: list[Row], pairs: int) -> None:
    ways = list(dict.fromkeys(row["way"] for row in rows))
    columns = [*TASKS, *(f"shuffled_{task}" for task in CONTROLS)]
    print(f"\nMeans over {pairs} ordered pairs, right answers in %; shuffled: the cache of")
    print("another question, whose answer differs; chance is 8.3\n")
    names = [c.replace("_", " ") for c in columns]
    print(f"| | {' | '.join(names)} | training CPU s | thousand parameters |")
    print("|---" * (len(columns) + 3) + "|")
    for way in ways:
        having = [row for row in rows if row["way"] == way]
        cells = [interval(over_pairs(rows, way, c)) if c in having[0] else "" for c in columns]
        if "seconds" in having[0]:
            for name, scale in (("seconds", 1), ("parameters", 1000)):
                cells.append(f"{sum(row[name] for row in having) / len(having) / scale:.0f}")
        else:
            cells += ["", ""]
        print(f"| {way} | {' | '.join(cells)} |")


def print_pairs(rows: list[Row]) -> None:
    pairs = list(dict.fromkeys(row["pair"] for row in rows))
    print(f"\nEach pair: {' / '.join(TASKS)}, mean over seeds\n")
    print(f"| | {' | '.join(pairs)} |")
    print("|---" * (len(pairs) + 1) + "|")
    for way in dict.fromkeys(row["way"] for row in rows):
        cells = []
        for pair in pairs:
            group = [row for row in rows if (row["way"], row["pair"]) == (way, pair)]
            means = [sum(row[task] for row in group) / len(group) for task in TASKS]
            cells.append(" / ".join(f"{100 * mean:.0f}" for mean in means))
        print(f"| {way} | {' | '.join(cells)} |")


def chosen_pairs(text: str) -> list[tuple[int, int]]:
    every = [(s, r) for r in range(3) for s in range(3) if s != r]
    if not text:
        return every
    asked = [tuple(NAMES.index(n) for n in part.split(":")) for part in text.split(",")]
    return [pair for pair in every if pair in asked]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--pairs", default="", help="sharer:receiver, separated by commas")
    parser.add_argument("--kinds", default="", help=f"of {'; '.join(KINDS)}; separated by ;")
    parser.add_argument("--seeds", type=int, default=1, help="trainings of every fuser")
    parser.add_argument("--steps", type=int, default=TrainingOptions().steps)
    parser.add_argument("--layer-map", default="depth")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(1)
    from transformers.utils import logging

    logging.disable_progress_bar()
    pairs = chosen_pairs(options.pairs)
    kinds = [k.strip() for k in options.kinds.split(";") if k.strip()] or list(KINDS)
    unknown = [k for k in kinds if k not in KINDS]
    if unknown or not pairs:
        parser.error(f"unknown kinds {unknown} or no known pair")
    bench = Bench(options)
    for pair in pairs:
        bench.baselines(*pair)
    for kind in kinds:
        for seed in range(options.seeds):
            if kind == "hub":
                bench.hub(pairs, seed)
                continue
            for s, r in pairs:
                bench.fuser(kind, s, r, seed)
    if options.json:
        print(json.dumps(bench.rows, indent=2))
        return
    print_means(bench.rows, len(pairs))
    print_pairs(bench.rows)


if __name__ == "__main__":
    main()
