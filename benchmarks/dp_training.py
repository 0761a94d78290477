"""Accuracy of an MLP on digits trained with DP-SGD, beside the same MLP trained in clear.

python benchmarks/dp_training.py
"""

from __future__ import annotations

import argparse
import json
import time

import numpy as np
import torch
from torch import nn

from fedinfer_flower.simulation.data import Dataset, load_dataset
from fedinfer_flower.training import train_privately

EPSILONS = (8.0, 3.0, 1.0)
EPOCHS, BATCH_SIZE, DELTA = 30, 128, 1e-5
LEARNING_RATES = {8.0: 1.0, 3.0: 1.0, 1.0: 0.3}
CLEAR_LEARNING_RATE = 1.0


def network(seed: int) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 10))


def accuracy(model: nn.Module, inputs: np.ndarray, labels: np.ndarray) -> float:
    with torch.inference_mode():
        votes = model(torch.tensor(inputs, dtype=torch.float32)).argmax(dim=1).numpy()
    return float((votes == labels).mean())


def fit_clear(model: nn.Module, inputs: torch.Tensor, labels: torch.Tensor) -> nn.Module:
    optimiser = torch.optim.SGD(model.parameters(), lr=CLEAR_LEARNING_RATE)
    for _ in range(EPOCHS):
        order = torch.randperm(len(inputs))
        for start in range(0, len(inputs), BATCH_SIZE):
            batch = order[start : start + BATCH_SIZE]
            optimiser.zero_grad()
            nn.functional.cross_entropy(model(inputs[batch]), labels[batch]).backward()
            optimiser.step()
    return model


def one_run(dataset: Dataset, epsilon: float | None, seed: int) -> dict[str, float]:
    inputs = torch.tensor(dataset.train_inputs, dtype=torch.float32)
    labels = torch.tensor(dataset.train_labels)
    start = time.perf_counter()
    found: dict[str, float] = {}
    if epsilon is None:
        model = fit_clear(network(seed), inputs, labels)
    else:
        trained = train_privately(
            network(seed),
            inputs,
            labels,
            epsilon=epsilon,
            delta=DELTA,
            epochs=EPOCHS,
            batch_size=BATCH_SIZE,
            learning_rate=LEARNING_RATES[epsilon],
        )
        model = trained.model
        claim = trained.statement
        found = {
            "spent": claim.epsilon,
            "noise_multiplier": claim.noise_multiplier,
            "sample_rate": claim.sample_rate,
            "steps": claim.steps,
        }
    return found | {
        "seconds": time.perf_counter() - start,
        "train": 100 * accuracy(model, dataset.train_inputs, dataset.train_labels),
        "test": 100 * accuracy(model, dataset.test_inputs, dataset.test_labels),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(1)
    results = []
    for epsilon in (None, *EPSILONS):
        runs = [one_run(load_dataset("digits", seed=s), epsilon, s) for s in range(options.seeds)]
        row = {name: float(np.mean([run[name] for run in runs])) for name in runs[0]}
        row["test_std"] = float(np.std([run["test"] for run in runs]))
        # The first run works out the noise, the others know it.
        row["seconds"] = float(np.median([run["seconds"] for run in runs]))
        results.append({"epsilon": epsilon, **row})
    if options.json:
        print(json.dumps(results, indent=2))
        return
    clear_s = results[0]["seconds"]
    print(
        f"digits, 1257 records, MLP 64-32-10, {EPOCHS} epochs of batches of {BATCH_SIZE},"
        f" delta {DELTA:g}, clipping norm 1, {options.seeds} seeds: accuracy in %"
    )
    print("| training | epsilon spent | noise multiplier | learning rate | train | test | time |")
    print("|---|---|---|---|---|---|---|")
    for row in results:
        test = f"{row['test']:.1f} ± {row['test_std']:.1f}"
        ratio = f"{row['seconds'] / clear_s:.1f}x"
        if row["epsilon"] is None:
            print(f"| clear | - | - | {CLEAR_LEARNING_RATE:g} | {row['train']:.1f} | {test} | 1x |")
            continue
        rate = LEARNING_RATES[row["epsilon"]]
        print(
            f"| epsilon {row['epsilon']:g} | {row['spent']:.3f} | {row['noise_multiplier']:.2f}"
            f" | {rate:g} | {row['train']:.1f} | {test} | {ratio} |"
        )


if __name__ == "__main__":
    main()
