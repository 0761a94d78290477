"""GNMax with sub-teachers inside one site, on digits: accuracy, abstention, epsilon.

python benchmarks/gnmax.py --seeds 3 --json gnmax.json
"""

from __future__ import annotations

import argparse
import json
import logging
import math
import warnings
from pathlib import Path

import numpy as np
from sklearn.linear_model import LogisticRegression
from sklearn.neighbors import NearestCentroid
from sklearn.tree import DecisionTreeClassifier

from fedinfer_flower.clients.pate_model import PateModel
from fedinfer_flower.privacy.gnmax import ABSTAIN, ConfidenceCheck, GNMax
from fedinfer_flower.privacy.gnmax_account import GNMaxAccount
from fedinfer_flower.simulation.data import Dataset, load_dataset

DELTA, N_ROWS, NO_CAP = 1e-5, (100, 500), 1e6
TEACHERS = {
    "nearest centroid": NearestCentroid,
    "logistic regression": lambda: LogisticRegression(max_iter=200),
    "decision tree": lambda: DecisionTreeClassifier(random_state=0),
}


def votes(dataset: Dataset, kind: str, n_teachers: int) -> np.ndarray:
    """Return votes of shape (n_rows, n_classes) and train as PateModel does."""
    model = PateModel(
        dataset.train_inputs,
        dataset.train_labels,
        fit=lambda inputs, labels: TEACHERS[kind]().fit(inputs, labels),
        classes=dataset.classes,
        n_teachers=n_teachers,
        mechanism=GNMax(sigma=1.0),
        epsilon_cap=NO_CAP,
        delta=DELTA,
    )
    return model._counts(dataset.test_inputs)


def measure(counts: np.ndarray, truth: np.ndarray, mechanism: GNMax, n_rows: int) -> dict:
    account = GNMaxAccount(mechanism, epsilon_cap=NO_CAP, delta=DELTA)
    labels = account.release(counts[:n_rows])
    answered = labels != ABSTAIN
    report = account.report()
    right = labels[answered] == truth[:n_rows][answered]
    return {
        "answered": float(answered.mean()),
        "accuracy": float(right.mean()) if answered.any() else math.nan,
        "public": report.public_epsilon,
        "one_sided": report.private_epsilon_one_sided,
        "both": report.private_epsilon,
    }


def mechanisms(n_teachers: int) -> dict[str, GNMax]:
    found = {
        f"σ = {share:g} m": GNMax(sigma=share * n_teachers) for share in (0.04, 0.08, 0.15, 0.3)
    }
    check = ConfidenceCheck(threshold=0.6 * n_teachers, sigma=0.3 * n_teachers)
    return found | {"confident, σ = 0.08 m": GNMax(sigma=0.08 * n_teachers, check=check)}


def mean(runs: list[dict], key: str) -> float:
    values = [run[key] for run in runs]
    return float(np.nanmean(values))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--teachers", type=int, nargs="+", default=[10, 25, 50, 100, 250])
    parser.add_argument("--json", type=Path, help="also write the table here")
    options = parser.parse_args()
    logging.disable(logging.WARNING)
    warnings.simplefilter("ignore")  # centroids of shards with constant pixels
    datasets = [load_dataset("digits", seed=seed) for seed in range(options.seeds)]
    n_records = len(datasets[0].train_labels)
    alone = [
        float(
            (
                LogisticRegression(max_iter=2000)
                .fit(d.train_inputs, d.train_labels)
                .predict(d.test_inputs)
                == d.test_labels
            ).mean()
        )
        for d in datasets
    ]
    print(f"digits, {n_records} records at one site, {options.seeds} seeds, delta {DELTA:g}")
    print(f"one model on all records, without privacy: {100 * np.mean(alone):.1f} %")
    table = []
    for n_teachers in options.teachers:
        print(f"\nm = {n_teachers} sub-teachers, {n_records / n_teachers:.0f} records each")
        every = {k: [votes(d, k, n_teachers) for d in datasets] for k in TEACHERS}
        exact = {
            kind: float(
                np.mean(
                    [
                        (c.argmax(axis=1) == d.test_labels).mean()
                        for c, d in zip(counts, datasets, strict=True)
                    ]
                )
            )
            for kind, counts in every.items()
        }
        print("without noise: " + ", ".join(f"{k} {100 * v:.1f} %" for k, v in exact.items()))
        best = max(exact, key=exact.__getitem__)
        print(
            f"| {best} | rows | answered % | accuracy % | ε public"
            " | ε these data, paper | ε these data, both ways |"
        )
        print("|---|---|---|---|---|---|---|")
        for name, mechanism in mechanisms(n_teachers).items():
            for n_rows in N_ROWS:
                runs = [
                    measure(c, d.test_labels, mechanism, n_rows)
                    for c, d in zip(every[best], datasets, strict=True)
                ]
                row = {key: mean(runs, key) for key in runs[0]}
                print(
                    f"| {name} | {n_rows} | {100 * row['answered']:.0f}"
                    f" | {100 * row['accuracy']:.1f} | {row['public']:.2f}"
                    f" | {row['one_sided']:.2f} | {row['both']:.2f} |"
                )
                table.append(
                    row | {"teachers": n_teachers, "kind": best, "mechanism": name, "rows": n_rows}
                )
    if options.json:
        options.json.write_text(json.dumps({"alone": alone, "delta": DELTA, "table": table}))


if __name__ == "__main__":
    main()
