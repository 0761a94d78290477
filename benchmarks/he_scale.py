"""Bytes and the coordinator's memory under `he`: K sites, 256 queries, 1000 classes.

python benchmarks/he_scale.py --sites 100

The sites' ciphertexts are real and distinct (re-encrypted for every site); the
coordinator is `FedEnsemble` itself on a grid that makes a reply when it is pulled.
"""

from __future__ import annotations

import argparse
import resource
import subprocess
import sys
import time

import numpy as np
from flwr.clientapp import ClientApp

from fedinfer_flower import Deadline, FedEnsemble, InferenceMod, LocalModel, Querier
from fedinfer_flower.privacy.key_presence import _held
from fedinfer_flower.simulation.local_grid import LocalGrid

N_QUERIES, N_CLASSES = 256, 1000


def load_model(context: object) -> LocalModel:
    site = int(context.node_config["partition-id"])  # type: ignore[attr-defined]

    def probabilities(rows: np.ndarray) -> np.ndarray:
        raw = np.random.default_rng(site).random((len(rows), N_CLASSES))
        return raw / raw.sum(axis=1, keepdims=True)

    return LocalModel(model=probabilities, classes=range(N_CLASSES))


def measure(n_sites: int) -> None:
    """Run one size in this process; memory is a peak, so one size a process."""
    app = InferenceMod(load_model, max_models=1).attach(ClientApp())
    querier = Querier(protection="he")
    job = querier.ask(np.zeros((N_QUERIES, 1)))
    _held.clear()  # one process on purpose here: this measures sizes, not secrecy
    with LocalGrid(app, num_supernodes=n_sites, workers=0) as grid:
        strategy = FedEnsemble(
            rule="mean-probability",
            protection="he",
            deadline=Deadline(timeout_s=3600),
            min_available_nodes=n_sites,
        )
        start = time.monotonic()
        result = strategy.start(grid, job)
        seconds = time.monotonic() - start
    per_site = result.reports[0].reply_bytes / n_sites
    peak_mb = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    exact = np.zeros((N_QUERIES, N_CLASSES))
    for site in range(n_sites):
        raw = np.random.default_rng(site).random((N_QUERIES, N_CLASSES))
        exact += raw / raw.sum(axis=1, keepdims=True)
    error = float(np.abs(querier.totals(result.combined) - exact).max())
    ratio = per_site / (4 * N_QUERIES * N_CLASSES)
    print(f"| {n_sites} | {ratio:.2f} | {peak_mb:.0f} | {seconds:.1f} | {error:.1e} |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--sites", type=int, nargs="+", default=[5, 20, 100])
    parser.add_argument("--one", type=int, help="measure this size in this process")
    options = parser.parse_args()
    if options.one:
        measure(options.one)
        return
    print("| sites | bytes / float32 | peak memory of the process, MB | seconds | max error |")
    print("|---|---|---|---|---|", flush=True)
    for n_sites in options.sites:
        subprocess.run([sys.executable, __file__, "--one", str(n_sites)], check=True)


if __name__ == "__main__":
    main()
