"""What the gateway's core adds to a round, and what batching gives back.

python benchmarks/gateway_core.py [--json FILE] [--repeats 40] [--sites 5]

Sites with small linear models in this process, over Flower's wire format (`LocalGrid`): no
SuperLink, so that what is measured is the core and not Flower. Core and strategy take turns;
"added" is the median of their differences. "strategy" is `FedEnsemble.ask_cohort` called
directly, sealing and opening included; "core" is from `submit` to the end of the job as a
listener hears it, with the outbox on disk and no window for batches.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from flwr.clientapp import ClientApp

from fedinfer_flower import FedEnsemble, InferenceMod, LocalModel, Querier
from fedinfer_flower.privacy.base import make_protection
from fedinfer_flower.serving.config import GatewayConfig
from fedinfer_flower.serving.core import GatewayCore
from fedinfer_flower.serving.jobs import Job, JobKind, JobRequest
from fedinfer_flower.simulation.local_grid import LocalGrid
from fedinfer_flower.strategies.onboarding import onboard
from fedinfer_flower.wire.arrays import array_to_bytes
from fedinfer_flower.wire.directory import Directory
from fedinfer_flower.wire.identity import Identity

N_FEATURES, N_CLASSES = 16, 10
RULE = "mean-probability"


def load_model(context: Any) -> LocalModel:
    rng = np.random.default_rng(int(context.node_config["partition-id"]))
    weights = rng.standard_normal((N_FEATURES, N_CLASSES))
    return LocalModel(
        model=lambda rows: np.asarray(rows, dtype=float) @ weights,
        classes=tuple(f"class-{i}" for i in range(N_CLASSES)),
        outputs="logits",
    )


def rows(n_rows: int, rng: np.random.Generator) -> np.ndarray:
    return rng.standard_normal((n_rows, N_FEATURES)).astype(np.float32)


def request(inputs: np.ndarray, owner: str = "bench") -> JobRequest:
    dtype, body = array_to_bytes(inputs)
    return JobRequest(
        owner=owner,
        model="m",
        kind=JobKind.ROWS,
        body=body,
        facts={"dtype": dtype, "shape": list(inputs.shape)},
        n_rows=len(inputs),
        timeout_s=60.0,
    )


def strategy_of(grid: LocalGrid, protection: str) -> Callable[[np.ndarray], None]:
    identity = Identity.generate()
    nodes = sorted(grid.get_node_ids())
    cards = onboard(grid, nodes, run_id=grid.run_id, timeout_s=30.0).cards
    directory = Directory(run_id=grid.run_id, cards=tuple(cards.values()))

    def ask(inputs: np.ndarray) -> None:
        strategy = FedEnsemble(rule=RULE, protection=make_protection(protection, {}))
        querier = Querier(protection=strategy.protection, identity=identity)
        job = querier.ask(inputs, directory=directory, rule=RULE)
        strategy.ask_cohort(grid, job, querier, cards=cards, all_cards=cards, run_id=grid.run_id)

    return ask


def in_turns(acts: Sequence[Callable[[np.ndarray], None]], n_rows: int, repeats: int) -> np.ndarray:
    """Return seconds of shape (repeats, acts): the acts take turns, on fresh rows each."""
    rng, found = np.random.default_rng(2), []
    for _ in range(repeats + 1):
        turn = []
        for act in acts:
            inputs = rows(n_rows, rng)
            start = time.perf_counter()
            act(inputs)
            turn.append(time.perf_counter() - start)
        found.append(turn)
    return np.array(found[1:])


def started(grid: LocalGrid, folder: Path, protection: str, window_s: float) -> GatewayCore:
    config = GatewayConfig.from_mapping(
        {
            "gateway": {"state": str(folder)},
            "batching": {"window-s": window_s},
            "models": {"m": {"protection": protection, "rule": RULE, "min-sites": 3}},
        }
    )
    core = GatewayCore(config, grid, run_id=grid.run_id, identity=Identity.generate())
    core.start()
    while not core.ready()[0]:
        time.sleep(0.01)
    time.sleep(0.3)  # all sites, not just enough
    return core


def ask_core(core: GatewayCore, inputs: np.ndarray, owner: str = "bench") -> None:
    done = threading.Event()
    ends: list[Job] = []

    def tell(job: Job) -> None:
        if job.state.ended:
            ends.append(job)
            done.set()

    job = core.submit(request(inputs, owner))
    core.listen(job.job_id, owner=owner, tell=tell)
    done.wait(60.0)
    assert ends, "a job did not end"
    assert ends[0].answer, ends[0].error


def by_callers(core: GatewayCore, n_callers: int, each: int) -> float:
    """Return jobs a second of callers that ask one row after another."""
    rng = [np.random.default_rng(100 + k) for k in range(n_callers)]

    def caller(k: int) -> None:
        for _ in range(each):
            ask_core(core, rows(1, rng[k]), owner=f"caller{k}")

    threads = [threading.Thread(target=caller, args=(k,)) for k in range(n_callers)]
    start = time.perf_counter()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return n_callers * each / (time.perf_counter() - start)


def measure(protection: str, *, n_sites: int, repeats: int) -> list[dict[str, Any]]:
    app = InferenceMod(load_model, share_counts="withheld").attach(ClientApp())
    table: list[dict[str, Any]] = []
    with (
        LocalGrid(app, num_supernodes=n_sites, workers=n_sites) as grid,
        tempfile.TemporaryDirectory() as folder,
    ):
        direct = strategy_of(grid, protection)
        core = started(grid, Path(folder), protection, 0.0)
        for n_rows in (1, 256):
            seconds = in_turns([direct, partial(ask_core, core)], n_rows, repeats)
            table.append(
                {
                    "protection": protection,
                    "rows": n_rows,
                    "strategy_s": float(np.median(seconds[:, 0])),
                    "core_s": float(np.median(seconds[:, 1])),
                    "added_s": float(np.median(seconds[:, 1] - seconds[:, 0])),
                    "added_p90_s": float(np.quantile(seconds[:, 1] - seconds[:, 0], 0.9)),
                }
            )
        core.close()
    return table


def throughput(protection: str, *, n_sites: int, each: int) -> list[dict[str, Any]]:
    app = InferenceMod(load_model, share_counts="withheld").attach(ClientApp())
    found = []
    for n_callers in (1, 8, 32):
        with (
            LocalGrid(app, num_supernodes=n_sites, workers=n_sites) as grid,
            tempfile.TemporaryDirectory() as folder,
        ):
            core = started(grid, Path(folder), protection, 0.01)
            rate = by_callers(core, n_callers, each)
            core.close()
        found.append({"protection": protection, "callers": n_callers, "jobs_a_second": rate})
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path)
    parser.add_argument("--repeats", type=int, default=40)
    parser.add_argument("--sites", type=int, default=5)
    args = parser.parse_args()
    rounds, rates = [], []
    for protection in ("plain", "secagg"):
        rounds += measure(protection, n_sites=args.sites, repeats=args.repeats)
        rates += throughput(protection, n_sites=args.sites, each=max(args.repeats // 4, 3))
    print("| protection | rows | strategy, ms | core, ms | added, ms | added p90, ms |")
    print("|---|---|---|---|---|---|")
    for e in rounds:
        ms = [1000 * e[k] for k in ("strategy_s", "core_s", "added_s", "added_p90_s")]
        print(f"| {e['protection']} | {e['rows']} | " + " | ".join(f"{v:.1f}" for v in ms) + " |")
    print("\n| protection | callers, a row each at a time | jobs a second |")
    print("|---|---|---|")
    for r in rates:
        print(f"| {r['protection']} | {r['callers']} | {r['jobs_a_second']:.1f} |")
    if args.json:
        args.json.write_text(json.dumps({"rounds": rounds, "throughput": rates}, indent=2))


if __name__ == "__main__":
    main()
