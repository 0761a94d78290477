"""Accuracy of every rule over seeds and skews, beside sites and central bound.

python benchmarks/accuracy.py --seeds 10
"""

from __future__ import annotations

import argparse
import logging
import tempfile
from pathlib import Path

import numpy as np

from fedinfer_flower.cli.demo_results import FEDSEI_RULES
from fedinfer_flower.ensemble import RULES
from fedinfer_flower.ensemble.base import Evidence
from fedinfer_flower.simulation.data import load_dataset
from fedinfer_flower.simulation.evaluation import central_bound, rules_in_clear, solo_answers
from fedinfer_flower.simulation.institution import write_institutions
from fedinfer_flower.simulation.partition import partition_rows

ALPHAS = (0.1, 0.5, 1000.0)
# Fitted aggregators are compared in stacking.py, where they are trained.
TRAINING_FREE = tuple(name for name in RULES.names() if Evidence.STACK not in RULES.get(name).needs)


def one_run(name: str, alpha: float, seed: int, n_sites: int) -> dict[str, float]:
    dataset = load_dataset(name, seed=seed)
    n = len(dataset.test_labels)
    rows = partition_rows(dataset.train_labels, n_sites=n_sites, alpha=alpha, seed=seed)
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place) / "sites"
        write_institutions(folder, dataset, rows, seed=seed)
        solo = solo_answers(folder, dataset, n_sites).hits(dataset.test_labels)
        hits = rules_in_clear(folder, dataset, n_sites, ("auto", *TRAINING_FREE))
    found = {"(mean site)": float(solo.mean()), "(best site)": float(solo.max())}
    found |= {"(central bound)": float(central_bound(dataset, seed=seed)[1])}
    return {rule: right / n for rule, right in (found | hits).items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=10)
    parser.add_argument("--dataset", default="digits")
    parser.add_argument("--sites", type=int, default=5)
    options = parser.parse_args()
    logging.disable(logging.WARNING)
    table: dict[str, list[str]] = {}
    means: dict[float, dict[str, float]] = {}
    for alpha in ALPHAS:
        runs = [
            one_run(options.dataset, alpha, seed, options.sites) for seed in range(options.seeds)
        ]
        means[alpha] = {}
        for name in runs[0]:
            values = 100 * np.array([run[name] for run in runs])
            means[alpha][name] = float(values.mean())
            table.setdefault(name, []).append(f"{values.mean():.1f} ± {values.std():.1f}")
    print(
        f"{options.dataset}, {options.sites} sites, {options.seeds} seeds:"
        " accuracy in %, mean ± std"
    )
    print("| rule | " + " | ".join(f"α = {a:g}" for a in ALPHAS) + " |")
    print("|---|" + "---|" * len(ALPHAS))
    for name, cells in table.items():
        mark = " †" if name in FEDSEI_RULES else ""
        print(f"| {name}{mark} | " + " | ".join(cells) + " |")
    skewed = means[0.1]
    fedsei = max(skewed[name] for name in FEDSEI_RULES)
    print(
        f"\nα = 0.1: auto {skewed['auto']:.1f}, best FedSEI rule {fedsei:.1f},"
        f" best site {skewed['(best site)']:.1f}"
    )
    gap = means[0.5]["(central bound)"] - means[0.5]["auto"]
    print(f"α = 0.5: auto is {gap:.1f} points below the central bound")


if __name__ == "__main__":
    main()
