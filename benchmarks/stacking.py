"""Learned aggregation: accuracy beside rules without training, over seeds and skews.

python benchmarks/stacking.py [--json FILE] [--seeds 5] [--rounds 40] [--trainer FedAdam]

Everything goes over `LocalGrid`: sealed exchange of held-out answers, Flower's training
rounds, and the test queries under `secagg` (`mlp-stack` under `plain`, the one protection
without noise that it is legal under). Intervals are 95 % t-intervals over seeds; a seed is a
split of the data and a partition over sites.
"""

from __future__ import annotations

import argparse
import json
import logging
import math
import tempfile
import time
from pathlib import Path

import numpy as np
from flwr.clientapp import ClientApp

from fedinfer_flower import FedEnsemble, InferenceMod
from fedinfer_flower.clients.stack_mod import StackingMod
from fedinfer_flower.ensemble.base import EnsembleRule, make_rule
from fedinfer_flower.ensemble.stack_shapes import KINDS
from fedinfer_flower.errors import FedInferError
from fedinfer_flower.simulation.data import Dataset, load_dataset
from fedinfer_flower.simulation.institution import Institution, write_institutions
from fedinfer_flower.simulation.local_grid import LocalGrid
from fedinfer_flower.simulation.partition import partition_rows
from fedinfer_flower.strategies.fed_stack import FedStack

CASES = (("digits", 0.1), ("digits", 0.5), ("breast_cancer", 0.1))
UNTRAINED = ("mean-probability", "class-share")
N_SITES = 5
TARGET = 0.90  # linear stack and deep set on digits, alpha 0.1
T_95 = {1: 12.71, 2: 4.30, 3: 3.18, 4: 2.78, 5: 2.57, 6: 2.45, 7: 2.36, 8: 2.31, 9: 2.26}


def accuracy(grid: LocalGrid, dataset: Dataset, rule: EnsembleRule) -> float:
    strategy = FedEnsemble(
        rule=rule,
        protection="plain" if rule.name == "mlp-stack" else "secagg",
        min_available_nodes=N_SITES,
        classes=list(dataset.classes),
    )
    prediction = strategy.start(grid, dataset.test_inputs).prediction
    assert prediction is not None
    return float(prediction.accuracy(dataset.test_labels))


def one_run(
    name: str, alpha: float, seed: int, rounds: int, trainer: str
) -> dict[str, dict[str, object]]:
    dataset = load_dataset(name, seed=seed)
    rows = partition_rows(dataset.train_labels, n_sites=N_SITES, alpha=alpha, seed=seed)
    found: dict[str, dict[str, object]] = {}
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place) / "sites"
        write_institutions(folder, dataset, rows, seed=seed)
        mod = InferenceMod(Institution(folder), share_counts="counts")
        app = StackingMod(mod).attach(mod.attach(ClientApp()))
        with LocalGrid(app, num_supernodes=N_SITES) as grid:
            for rule in UNTRAINED:
                found[rule] = {"accuracy": accuracy(grid, dataset, make_rule(rule))}
            for kind in KINDS:
                start, before = time.perf_counter(), grid.wire_bytes
                fed = FedStack(
                    kind,
                    trainer=trainer,
                    rounds=rounds,
                    classes=dataset.classes,
                    min_available_nodes=N_SITES,
                )
                try:
                    trained = fed.start(grid)
                except FedInferError as error:
                    found[kind] = {"accuracy": None, "refused": error.code}
                    continue
                seconds, sent = time.perf_counter() - start, grid.wire_bytes - before
                part = trained.participation
                try:  # sites that refuse the stack do not answer: too few may be left
                    right = accuracy(grid, dataset, trained.rule)
                except FedInferError:
                    right = None
                found[kind] = {
                    "accuracy": right,
                    "seconds": seconds,
                    "megabytes": sent / 1e6,
                    "rows": trained.fitted.card["rows"],
                    "sites refusing": len(trained.refused),
                    "largest share": None if part is None else float(part.share_k.max()),
                    "largest direction": None if part is None else float(part.direction_k.max()),
                }
    return found


def interval(values: list[float]) -> tuple[float, float]:
    """Return mean and half-width of the 95 % t-interval."""
    half = math.nan
    if len(values) > 1:
        t = T_95.get(len(values) - 1, 2.0)
        half = t * float(np.std(values, ddof=1)) / math.sqrt(len(values))
    return float(np.mean(values)), half


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--rounds", type=int, default=40)
    parser.add_argument("--trainer", default="FedAdam")
    options = parser.parse_args()
    logging.disable(logging.WARNING)
    table: dict[str, list[str]] = {}
    report = []
    for name, alpha in CASES:
        runs = [
            one_run(name, alpha, seed, options.rounds, options.trainer)
            for seed in range(options.seeds)
        ]
        for rule in (*UNTRAINED, *KINDS):
            parts = [run[rule] for run in runs]
            hits = [float(p["accuracy"]) for p in parts if p["accuracy"] is not None]  # type: ignore[arg-type]
            mean, half = interval(hits) if hits else (math.nan, math.nan)
            left = f" ({len(parts) - len(hits)} refused)" if len(hits) < len(parts) else ""
            table.setdefault(rule, []).append(f"{100 * mean:.1f} ± {100 * half:.1f}{left}")
            report.append(
                {"data": name, "alpha": alpha, "rule": rule, "mean": mean, "half": half}
                | {"runs": parts}
            )
    print(
        f"{N_SITES} sites, {options.seeds} seeds, {options.trainer}, {options.rounds} rounds:"
        " accuracy in %, mean ± 95 % interval"
    )
    print("| rule | " + " | ".join(f"{n}, α = {a:g}" for n, a in CASES) + " |")
    print("|---|" + "---|" * len(CASES))
    for rule, cells in table.items():
        print(f"| {rule} | " + " | ".join(cells) + " |")
    print(f"\nTarget {TARGET:.0%} on digits, α = 0.1: linear-stack, deep-set")
    for entry in report:
        if (entry["data"], entry["alpha"]) == CASES[0] and entry["rule"] in KINDS:
            met = "met" if float(entry["mean"]) >= TARGET else "not met"  # type: ignore[arg-type]
            print(f"- {entry['rule']}: {met}")
    costs = [p for e in report for p in e["runs"] if p.get("seconds")]  # type: ignore[attr-defined]
    if costs:
        print(
            f"\nTraining took {np.median([c['seconds'] for c in costs]):.1f} s (median) and"
            f" {np.median([c['megabytes'] for c in costs]):.1f} MB on the wire;"
            f" {sum(c['sites refusing'] for c in costs)} refusals by sites;"
            f" largest part of a site {max(c['largest share'] or 0 for c in costs):.0%},"
            f" in a direction {max(c['largest direction'] or 0 for c in costs):.0%}"
        )
    if options.json is not None:
        options.json.write_text(json.dumps(report, indent=2))


if __name__ == "__main__":
    main()
