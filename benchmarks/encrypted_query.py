"""Encrypted queries on digits: time a query, bytes, accuracy, error, flooding.

OMP_NUM_THREADS=1 python benchmarks/encrypted_query.py [--json FILE] [--repeats 3]
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from sklearn.datasets import load_digits
from sklearn.linear_model import LogisticRegression
from sklearn.neural_network import MLPClassifier

from fedinfer_flower.encrypted_query.ckks_batch import PublicKeys, SecretKeys
from fedinfer_flower.encrypted_query.network import EncryptedNetwork

TRAIN, CALIBRATION, TEST = slice(0, 1000), slice(1000, 1300), slice(1300, 1797)
TOLERANCE_BITS = 10


def median_s(call: Callable[[], object], repeats: int) -> float:
    # Processor time: everything here has one thread, and others may be at work beside it.
    times = []
    for _ in range(repeats):
        start = time.process_time()
        call()
        times.append(time.process_time() - start)
    return statistics.median(times)


def square_network(inputs: np.ndarray, labels: np.ndarray) -> Any:
    import torch

    class Square(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x * x

    torch.set_num_threads(1)
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(64, 32), Square(), torch.nn.Linear(32, 10))
    rows, right = torch.from_numpy(inputs).float(), torch.from_numpy(labels).long()
    optimizer = torch.optim.Adam(model.parameters(), 5e-3, weight_decay=1e-4)
    for _ in range(60):
        for batch in torch.randperm(len(rows)).split(64):
            optimizer.zero_grad()
            torch.nn.functional.cross_entropy(model(rows[batch]), right[batch]).backward()
            optimizer.step()
    return model.eval()


def clear_probabilities(model: Any, inputs: np.ndarray) -> np.ndarray:
    if hasattr(model, "predict_proba"):
        return model.predict_proba(inputs)
    import torch

    with torch.inference_mode():
        return model(torch.from_numpy(inputs).float()).numpy()


def measured(name: str, model: Any, inputs: np.ndarray, labels: np.ndarray, repeats: int) -> dict:
    calibration = (inputs[CALIBRATION], labels[CALIBRATION])
    if hasattr(model, "predict_proba"):
        network = EncryptedNetwork.from_sklearn(model, *calibration)
    else:
        network = EncryptedNetwork.from_torch(model, *calibration, classes=range(10))
    rows, right, plan = inputs[TEST], labels[TEST], network.plan
    form = network.aligned(network.classes)
    flooding = network.flooding(form, plan, calibration[0], bits=TOLERANCE_BITS)
    keys = SecretKeys(plan)
    query = keys.encrypt(rows)
    shape = {"n_classes": form.n_classes, "n_queries": len(rows), "n_sites": 1}

    def site() -> bytes:
        return PublicKeys(plan, keys.public_key).evaluate(
            form, query, noise=flooding.draw(plan, **shape)
        )

    reply = site()
    opened = keys.decrypt(reply, n_classes=form.n_classes)[:, : len(rows)].real.T
    clear = clear_probabilities(model, rows)
    per_query = 1e3 / len(rows)
    encrypt_ms = per_query * median_s(lambda: keys.encrypt(rows), repeats)
    evaluate_ms = per_query * median_s(site, repeats)
    open_ms = per_query * median_s(lambda: keys.decrypt(reply, n_classes=form.n_classes), repeats)
    clear_ms = (
        per_query
        * median_s(lambda: [clear_probabilities(model, rows) for _ in range(200)], 5)
        / 200
    )
    total_ms = encrypt_ms + evaluate_ms + open_ms
    return {
        "model": name,
        "queries": len(rows),
        "encrypt_ms": encrypt_ms,
        "evaluate_ms": evaluate_ms,
        "open_ms": open_ms,
        "total_ms": total_ms,
        "clear_ms": clear_ms,
        "ratio": total_ms / clear_ms,
        "full_batch_evaluate_ms": evaluate_ms * len(rows) / plan.slots,
        "query_bytes": len(query),
        "reply_bytes": len(reply),
        "key_bytes": len(keys.public_key),
        "accuracy_clear": float((clear.argmax(axis=1) == right).mean()),
        "accuracy_polynomial": float((form(rows).argmax(axis=1) == right).mean()),
        "accuracy_encrypted": float((opened.argmax(axis=1) == right).mean()),
        "agreement_calibration": network.fidelity.agreement,
        "max_fit_error": network.fidelity.max_logit_error,
        "max_logit_error": float(np.abs(opened - form(rows)).max()),
        "logit_scale": network.fidelity.logit_rms,
        "flooding_std": flooding.std,
        "evaluation_error_rms": flooding.error_rms,
        "flooding_bits": flooding.margin_bits,
        "distance_log2": math.log2(flooding.distance(opened.size)),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    inputs, labels = load_digits(return_X_y=True)
    inputs = inputs / 16.0
    train = (inputs[TRAIN], labels[TRAIN])
    mlp = {"hidden_layer_sizes": (32,), "max_iter": 300, "random_state": 0, "alpha": 0.01}
    models = {
        "linear 64-10": LogisticRegression(max_iter=500).fit(*train),
        "square 64-32-10": square_network(*train),
        "relu 64-32-10": MLPClassifier(**mlp).fit(*train),
        "tanh 64-32-10": MLPClassifier(activation="tanh", **mlp).fit(*train),
    }
    rows = [measured(name, m, inputs, labels, options.repeats) for name, m in models.items()]
    n = rows[0]["queries"]
    print(f"{n} queries in one batch, one thread, one site; ms of processor time a query\n")
    print("| model | encrypt | evaluate | open | total | clear | ratio | full batch, evaluate |")
    print("|---|---|---|---|---|---|---|---|")
    for r in rows:
        print(
            f"| {r['model']} | {r['encrypt_ms']:.2f} | {r['evaluate_ms']:.2f}"
            f" | {r['open_ms']:.3f} | {r['total_ms']:.2f} | {r['clear_ms']:.4f}"
            f" | {r['ratio']:,.0f} | {r['full_batch_evaluate_ms']:.2f} |"
        )
    print(
        "\n| model | query MB | reply MB | key MB | accuracy clear / polynomial / encrypted"
        " | logit error | flooding bits | distance |"
    )
    print("|---|---|---|---|---|---|---|---|")
    for r in rows:
        print(
            f"| {r['model']} | {r['query_bytes'] / 1e6:.1f} | {r['reply_bytes'] / 1e6:.2f}"
            f" | {r['key_bytes'] / 1e6:.2f} | {r['accuracy_clear']:.4f} /"
            f" {r['accuracy_polynomial']:.4f} / {r['accuracy_encrypted']:.4f}"
            f" | {r['max_logit_error']:.1e} of {r['logit_scale']:.1f}"
            f" | {r['flooding_bits']:.1f} | 2^{r['distance_log2']:.1f} |"
        )
    if options.json is not None:
        options.json.write_text(json.dumps(rows, indent=1))


if __name__ == "__main__":
    main()
