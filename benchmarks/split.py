"""Split models on digits: what noise on the query's embedding costs, and what it hides.

python benchmarks/split.py

One public front, trained on a quarter of the training rows; five sites train a back each on
the rest, and answer by mean probability. The attacker knows the front, the noise and the
public rows, and sees the embeddings of the queries.
"""

from __future__ import annotations

import argparse
import json
import logging
import math

import numpy as np
import torch
from flwr.app import Context
from flwr.clientapp import ClientApp
from torch import nn

from fedinfer_flower import FedEnsemble, InferenceMod, LocalModel, Querier
from fedinfer_flower.simulation.data import Dataset, load_dataset
from fedinfer_flower.simulation.local_grid import LocalGrid
from fedinfer_flower.split import SplitFront, train_split

EPSILONS = (None, 64.0, 16.0, 8.0, 4.0, 1.0)
N_SITES, N_DIMENSIONS, CLIP_NORM, DELTA = 5, 8, 4.0, 1e-5


def halves(seed: int) -> tuple[nn.Module, nn.Module]:
    torch.manual_seed(seed)
    front = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, N_DIMENSIONS))
    back = nn.Sequential(nn.Linear(N_DIMENSIONS, 64), nn.ReLU(), nn.Linear(64, 10))
    return front, back


def joint_accuracy(dataset: Dataset, embeddings: np.ndarray, backs: list[nn.Module]) -> float:
    def load_model(context: Context) -> LocalModel:
        back = backs[int(context.node_config["partition-id"])]
        return LocalModel(model=back, classes=list(dataset.classes), outputs="logits")

    app = InferenceMod(load_model).attach(ClientApp())
    querier = Querier(protection="plain")
    strategy = FedEnsemble(rule="mean-probability", protection="plain", min_available_nodes=N_SITES)
    with LocalGrid(app, num_supernodes=N_SITES) as grid:
        result = strategy.start(grid, querier.ask(embeddings, clear=True))
    labels = querier.open(result.combined).labels
    return float((np.array(labels) == dataset.test_labels).mean())


def ridge(embeddings: np.ndarray, images: np.ndarray) -> np.ndarray:
    """Return weights from embeddings, with a constant, to images."""
    design = np.c_[embeddings, np.ones(len(embeddings))].astype(float)
    return np.linalg.solve(design.T @ design + 1e-3 * np.eye(design.shape[1]), design.T @ images)


def nearest(rows: np.ndarray, candidates: np.ndarray) -> np.ndarray:
    squared = (candidates**2).sum(axis=1) - 2.0 * rows @ candidates.T
    return squared.argmin(axis=1)


def one_run(epsilon: float | None, seed: int) -> dict[str, float]:
    dataset = load_dataset("digits", seed=seed)
    order = np.random.default_rng(seed).permutation(len(dataset.train_labels))
    public, rest = order[: len(order) // 4], order[len(order) // 4 :]
    settings = {"clip_norm": CLIP_NORM, "epsilon": epsilon, "delta": DELTA, "seed": seed}

    def rows(numbers: np.ndarray) -> tuple[torch.Tensor, torch.Tensor]:
        inputs = torch.tensor(dataset.train_inputs[numbers], dtype=torch.float32)
        return inputs, torch.tensor(dataset.train_labels[numbers])

    # More noise takes more steps to average out.
    epochs = 60 if epsilon is None else 150
    trained = train_split(*halves(seed), *rows(public), epochs=epochs, **settings)
    backs = [
        train_split(
            trained.front, trained.back, *rows(part), train_front=False, epochs=epochs, **settings
        ).back
        for part in np.array_split(rest, N_SITES)
    ]
    front = SplitFront(trained.front, clip_norm=CLIP_NORM, epsilon=epsilon, delta=DELTA)
    clean = SplitFront(trained.front, clip_norm=CLIP_NORM)
    sent = front.embed(dataset.test_inputs)

    # The attacker makes noisy embeddings of the public rows for the regression.
    copies = 1 if epsilon is None else 20
    images = np.tile(dataset.train_inputs[public], (copies, 1))
    weights = ridge(front.embed(images), images)
    rebuilt = np.c_[sent, np.ones(len(sent))] @ weights
    truth = np.arange(len(sent))
    centre = dataset.train_inputs[public].mean(axis=0)
    unexplained = ((rebuilt - dataset.test_inputs) ** 2).sum()
    everything = ((dataset.test_inputs - centre) ** 2).sum()
    n = len(sent)
    return {
        "accuracy": 100 * joint_accuracy(dataset, sent, backs),
        "noise_std": front.noise_std(N_DIMENSIONS) / CLIP_NORM,
        "explained": 100 * float(1.0 - unexplained / everything),
        "by_regression": 100 * float((nearest(rebuilt, dataset.test_inputs) == truth).mean()),
        "by_candidates": 100
        * float((nearest(sent, clean.embed(dataset.test_inputs)) == truth).mean()),
        "at_most": 100.0 if epsilon is None else 100 * min(1.0, math.exp(epsilon) / n + DELTA),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    logging.disable(logging.WARNING)
    torch.set_num_threads(1)
    results = []
    for epsilon in EPSILONS:
        runs = [one_run(epsilon, seed) for seed in range(options.seeds)]
        row = {name: float(np.mean([run[name] for run in runs])) for name in runs[0]}
        row["accuracy_std"] = float(np.std([run["accuracy"] for run in runs]))
        results.append({"epsilon": epsilon, **row})
    if options.json:
        print(json.dumps(results, indent=2))
        return
    print(
        f"digits, 540 queries, {N_DIMENSIONS} dimensions, {N_SITES} sites, epsilon per query row"
        f" at delta {DELTA:g}, {options.seeds} seeds; everything but the noise in %"
    )
    print(
        "| epsilon | noise / clipping norm | accuracy | pixel variance rebuilt by regression"
        " | query found by regression | query found by its embedding | most that DP allows |"
    )
    print("|---|---|---|---|---|---|---|")
    for row in results:
        name = "none" if row["epsilon"] is None else f"{row['epsilon']:g}"
        print(
            f"| {name} | {row['noise_std']:.2f} | {row['accuracy']:.1f} ± {row['accuracy_std']:.1f}"
            f" | {round(row['explained'])} | {row['by_regression']:.1f}"
            f" | {row['by_candidates']:.1f} | {row['at_most']:.1f} |"
        )


if __name__ == "__main__":
    main()
