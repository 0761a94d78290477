"""Secure aggregation: bytes and milliseconds a role, exactness, seconds a batch on Flower.

python benchmarks/secagg.py [--json FILE] [--rounds 60] [--schedules 200]

Milliseconds are processor time of one process with one thread. The engine part runs in a
process of its own and counts wall time, batches under `secagg` and `plain` in turn.
"""

from __future__ import annotations

import argparse
import json
import logging
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from flwr.app import Context
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp

from fedinfer_flower import FedEnsemble, InferenceMod, LocalModel, Querier
from fedinfer_flower.ensemble.base import make_rule
from fedinfer_flower.privacy.base import KeyPair, ScorePlan, make_protection
from fedinfer_flower.privacy.cohort import Cohort
from fedinfer_flower.privacy.he import HomomorphicEncryption
from fedinfer_flower.privacy.mask_recovery import MaskedSum
from fedinfer_flower.privacy.secagg import SecAgg
from fedinfer_flower.simulation.engine import run_on_engine
from fedinfer_flower.simulation.local_grid import LocalGrid
from fedinfer_flower.wire.identity import Identity
from fedinfer_flower.wire.roster import Roster, Seat

RULE = make_rule("mean-probability")
N_QUERIES, N_CLASSES = 256, 1000
ENGINE_SITES, ENGINE_CLASSES, WARM_ROUNDS = 10, (10, 100), 3
TARGETS = {"bytes": 1.05, 10: 6.0, 100: 25.0, "he / secagg": 20.0, "engine": 1.1}
CASES = (
    (10, N_CLASSES, {}),
    (10, N_CLASSES, {"n_dropped": 2}),
    (10, N_CLASSES, {"self_mask": True}),
    (10, N_CLASSES, {"self_mask": True, "n_dropped": 2}),
    (100, N_CLASSES, {}),
    (100, N_CLASSES, {"n_dropped": 2}),
    (100, N_CLASSES, {"self_mask": True}),
    (1000, 10, {}),
    (1000, 10, {"n_dropped": 2}),
)


def cpu_ms(call: Callable[[], object], repeats: int) -> float:
    """Return the median of the processor time, which work beside it hardly changes."""
    call()  # imports
    times = []
    for _ in range(repeats):
        start = time.process_time()
        call()
        times.append(1e3 * (time.process_time() - start))
    return statistics.median(times)


@dataclass(frozen=True, kw_only=True)
class Federation:
    """Sites with real keys, and one batch of theirs."""

    protection: SecAgg
    plan: ScorePlan
    cohort: Cohort
    keys: KeyPair
    sites: dict[str, Identity]

    @classmethod
    def make(cls, protection: SecAgg, n_sites: int, n_classes: int) -> Federation:
        """Return a cohort of fresh keys."""
        identities = [Identity.generate() for _ in range(n_sites)]
        seats = tuple(Seat(identity=i.public, commitment="0" * 64) for i in identities)
        keys = protection.make_keys()
        return cls(
            protection=protection,
            plan=ScorePlan.for_rule(RULE, n_classes=n_classes, n_sites_max=n_sites),
            cohort=Cohort(query_id="q-0", roster=Roster(seats), public_key=keys.public_key),
            keys=keys,
            sites={i.key_id: i for i in identities},
        )

    def payload(self, site: Identity, scores: np.ndarray) -> bytes:
        """Return what a site sends; its keys are agreed on anew, as for every batch."""
        side = self.protection.site_side(
            self.plan, public_key=self.keys.public_key, cohort=self.cohort, identity=site
        )
        return side.protect(scores)

    def coordinator(self, n_queries: int) -> MaskedSum:
        """Return an empty sum."""
        return self.protection.coordinator_side(
            self.plan,
            n_queries=n_queries,
            rule=RULE,
            public_key=self.keys.public_key,
            cohort=self.cohort,
        )

    def opened(self, coordinator: MaskedSum, n_queries: int) -> np.ndarray:
        """Return the sum that the querier reads."""
        side = self.protection.querier_side(self.plan, keys=self.keys, cohort=self.cohort)
        total, n_sites = coordinator.total(), coordinator.n_sites
        return side.open(total, n_queries=n_queries, n_sites=n_sites)

    def reply(self, key_id: str, request: bytes) -> bytes:
        """Return a survivor's help; that it helps once only is the site memory's part."""
        return self.protection.recovery_reply(
            request, cohort=self.cohort, identity=self.sites[key_id], admit=lambda dropped: None
        )


def grow_heap() -> None:
    """Bring the allocator into the state of a process that has held a model.

    Until large arrays have been freed, glibc gives the pages of each array back to the
    system and faults them in again for the next one.
    """
    for megabytes in (8, 16, 31):
        np.ones(megabytes << 17)


def distributions(rng: np.random.Generator, n_queries: int, n_classes: int) -> np.ndarray:
    raw = rng.random((n_queries, n_classes))
    return raw / raw.sum(axis=1, keepdims=True)


def roles(
    n_sites: int, n_queries: int, n_classes: int, *, self_mask: bool = False, n_dropped: int = 0
) -> dict[str, object]:
    """Run one batch with real payloads; time each role."""
    here = Federation.make(SecAgg(self_mask=self_mask), n_sites, n_classes)
    rng = np.random.default_rng(0)
    first, *_ = here.sites.values()
    scores = distributions(rng, n_queries, n_classes)
    size = len(here.payload(first, scores))
    site_ms = cpu_ms(lambda: here.payload(first, scores), 15)
    coordinator, spent = here.coordinator(n_queries), 0.0
    clear = np.zeros_like(scores)
    for key_id, site in list(here.sites.items())[n_dropped:]:
        scores = distributions(rng, n_queries, n_classes)
        clear += scores
        payload = here.payload(site, scores)
        start = time.process_time()
        coordinator.add(payload, sender=key_id)
        spent += 1e3 * (time.process_time() - start)
    recovery = recovered(here, coordinator)
    start = time.process_time()
    coordinator.total()
    spent += 1e3 * (time.process_time() - start)
    error = np.abs(here.opened(coordinator, n_queries) - clear).max()
    n_answered = n_sites - n_dropped
    return {
        "sites": n_sites,
        "scores": f"{n_queries} x {n_classes}",
        "self_mask": self_mask,
        "dropped": n_dropped,
        "bytes": size,
        "over_float32": size / (4 * n_queries * n_classes),
        "site_ms": site_ms,
        "coordinator_ms": spent,
        "querier_ms": cpu_ms(lambda: here.opened(coordinator, n_queries), 5),
        "half_steps": float(error / (n_answered * here.protection.codec(here.plan).step / 2)),
        **recovery,
    }


def recovered(here: Federation, coordinator: MaskedSum) -> dict[str, float]:
    """Carry out the recovery rounds; return bytes and time of a survivor, and the total."""
    rounds, n_bytes = 0, 0
    site_ms: dict[str, float] = {}
    began = time.process_time()
    while requests := coordinator.recovery_requests():
        rounds += 1
        for key_id, request in requests.items():
            start = time.process_time()
            reply = here.reply(key_id, request)
            site_ms[key_id] = site_ms.get(key_id, 0.0) + 1e3 * (time.process_time() - start)
            coordinator.add_recovery(reply, sender=key_id)
            n_bytes += len(request) + len(reply)
    both_ms = 1e3 * (time.process_time() - began)
    return {
        "recovery_rounds": rounds,
        "recovery_site_bytes": n_bytes / max(len(site_ms), 1),
        "recovery_site_ms": statistics.median(site_ms.values()) if site_ms else 0.0,
        "recovery_coordinator_ms": both_ms - sum(site_ms.values()),
    }


def encryption_ms() -> float:
    """Return the site's milliseconds under `he` (BFV) at the full size."""
    he = HomomorphicEncryption(scheme="bfv")
    plan = ScorePlan.for_rule(RULE, n_classes=N_CLASSES, n_sites_max=10)
    scores = distributions(np.random.default_rng(0), N_QUERIES, N_CLASSES)
    site = he.site_side(plan, public_key=he.make_keys().public_key)
    site.protect(scores)
    return cpu_ms(lambda: site.protect(scores), 5)


def exactness(n_schedules: int) -> dict[str, float]:
    """Compare opened sums with clear ones over random cohorts, dropouts and orders.

    The largest difference, over the half grid step a site that rounding may cost.
    """
    rng = np.random.default_rng(1)
    worst = {"none dropped": 0.0, "some dropped": 0.0}
    counts = dict.fromkeys(worst, 0)
    for number in range(n_schedules):
        n_sites, n_queries = int(rng.integers(3, 13)), int(rng.integers(1, 9))
        n_classes = int(rng.integers(2, 12))
        here = Federation.make(SecAgg(self_mask=bool(rng.integers(2))), n_sites, n_classes)
        most = here.protection.dropouts_max(n_sites)
        n_dropped = int(rng.integers(1, most + 1)) if most and number % 2 else 0
        order = rng.permutation(list(here.sites))[n_dropped:]
        coordinator = here.coordinator(n_queries)
        clear = np.zeros((n_queries, n_classes))
        for key_id in map(str, order):
            scores = distributions(rng, n_queries, n_classes)
            coordinator.add(here.payload(here.sites[key_id], scores), sender=key_id)
            clear += scores
        recovered(here, coordinator)
        error = np.abs(here.opened(coordinator, n_queries) - clear).max()
        bound = len(order) * here.protection.codec(here.plan).step / 2.0
        kind = "some dropped" if n_dropped else "none dropped"
        counts[kind] += 1
        worst[kind] = max(worst[kind], float(error / bound))
    return {f"{kind} ({counts[kind]} schedules)": worst[kind] for kind in worst}


def engine_app(n_classes: int) -> ClientApp:
    def load_model(context: Context) -> LocalModel:
        def uniform(rows: np.ndarray) -> np.ndarray:
            return np.full((len(rows), n_classes), 1 / n_classes)

        return LocalModel(model=uniform, classes=range(n_classes))

    return InferenceMod(load_model).attach(ClientApp())


def in_turn(grid: Grid, n_rounds: int, clock: Callable[[], float]) -> dict[str, list[float]]:
    """Return seconds of each batch, by protection, one of each in turn."""
    rng = np.random.default_rng(0)
    seconds: dict[str, list[float]] = {"plain": [], "secagg": []}
    strategies = {}
    for name in seconds:
        strategy = FedEnsemble(
            rule=RULE, protection=make_protection(name), min_available_nodes=ENGINE_SITES
        )
        job = Querier(protection=strategy.protection).ask(rng.random((N_QUERIES, 8)), clear=True)
        strategy.start(grid, job)  # onboards, and loads every model
        strategies[name] = strategy
    for number in range(-WARM_ROUNDS, n_rounds):
        names = list(seconds) if number % 2 else list(seconds)[::-1]
        for name in names:
            rows = rng.random((N_QUERIES, 8))
            start = clock()
            batch, _ = strategies[name]._run_batch(grid, f"{name}-{number}", rows)
            if number >= 0:
                seconds[name].append(clock() - start)
            assert batch.n_sites == ENGINE_SITES
    return seconds


def on_engine(n_classes: int, n_rounds: int, out: Path) -> None:
    server_app = ServerApp()

    @server_app.main()
    def main(grid: Grid, context: Context) -> None:
        out.write_text(json.dumps(in_turn(grid, n_rounds, time.monotonic)))

    run_on_engine(server_app, engine_app(n_classes), num_supernodes=ENGINE_SITES)


def batches(n_classes: int, n_rounds: int) -> dict[str, dict[str, float]]:
    """Compare batches on Flower's engine (in a child process) and on an in-process grid."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "seconds.json"
        words = [sys.executable, __file__, "--engine", str(n_classes), str(n_rounds), str(out)]
        subprocess.run(words, check=True, capture_output=True)
        engine = json.loads(out.read_text())
    with LocalGrid(engine_app(n_classes), num_supernodes=ENGINE_SITES, workers=1) as grid:
        local = in_turn(grid, n_rounds, time.process_time)
    return {
        "engine, wall time": compared(engine),
        "in-process grid, processor time": compared(local),
    }


def compared(seconds: Mapping[str, list[float]]) -> dict[str, float]:
    plain, ours = np.array(seconds["plain"]), np.array(seconds["secagg"])
    low, high = np.percentile(ours / plain, [25, 75])
    return {
        "plain_ms": 1e3 * float(np.median(plain)),
        "secagg_ms": 1e3 * float(np.median(ours)),
        "ratio": float(np.median(ours) / np.median(plain)),
        "paired_ratio": float(np.median(ours / plain)),
        "paired_low": float(low),
        "paired_high": float(high),
    }


def verdict(value: float, target: float, *, at_least: bool = False) -> str:
    met = value >= target if at_least else value <= target
    return f"{'at least' if at_least else 'at most'} {target:g}: {'met' if met else 'MISSED'}"


def print_roles(rows: list[dict[str, object]], he_ms: float, fresh_ms: float) -> None:
    print(
        "| sites | scores | self-mask | dropped | bytes | x float32 | site, ms"
        " | coordinator, ms | querier, ms | recovery: rounds | bytes a survivor"
        " | ms a survivor | ms at the coordinator | error / bound |"
    )
    print("|---|---|---|---|---|---|---|---|---|---|---|---|---|---|")
    for row in rows:
        print(
            f"| {row['sites']} | {row['scores']} | {'yes' if row['self_mask'] else 'no'}"
            f" | {row['dropped']} | {row['bytes']:,} | {row['over_float32']:.4f}"
            f" | {row['site_ms']:.1f} | {row['coordinator_ms']:.1f} | {row['querier_ms']:.1f}"
            f" | {row['recovery_rounds']} | {row['recovery_site_bytes']:.0f}"
            f" | {row['recovery_site_ms']:.1f} | {row['recovery_coordinator_ms']:.1f}"
            f" | {row['half_steps']:.2f} |"
        )
    print("\n| figure | value | target |\n|---|---|---|")
    full = [r for r in rows if r["dropped"] == 0 and not r["self_mask"]]
    for row in full:
        if row["sites"] in TARGETS:
            value, n_sites = float(row["site_ms"]), row["sites"]
            print(
                f"| site, {n_sites} sites, ms | {value:.1f} | {verdict(value, TARGETS[n_sites])} |"
            )
    print(f"| site, 10 sites, in a process without a grown heap, ms | {fresh_ms:.1f} | - |")
    bytes_ratio = float(full[0]["over_float32"])
    print(f"| bytes over float32 | {bytes_ratio:.4f} | {verdict(bytes_ratio, TARGETS['bytes'])} |")
    ratio, least = he_ms / float(full[0]["site_ms"]), TARGETS["he / secagg"]
    target = verdict(ratio, least, at_least=True)
    print(f"| site, `he` (BFV) {he_ms:.0f} ms over `secagg`, 10 sites | {ratio:.0f} | {target} |")


def print_batches(found: Mapping[int, Mapping[str, Mapping[str, float]]]) -> None:
    print(
        "| on | scores | plain, ms | secagg, ms | ratio of medians"
        " | median of paired ratios (quartiles) | target |"
    )
    print("|---|---|---|---|---|---|---|")
    for n_classes, places in found.items():
        for place, row in places.items():
            target = verdict(row["ratio"], TARGETS["engine"]) if place.startswith("engine") else "-"
            print(
                f"| {place} | {N_QUERIES} x {n_classes} | {row['plain_ms']:.1f}"
                f" | {row['secagg_ms']:.1f} | {row['ratio']:.2f} | {row['paired_ratio']:.2f}"
                f" ({row['paired_low']:.2f} to {row['paired_high']:.2f}) | {target} |"
            )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--rounds", type=int, default=60)
    parser.add_argument("--schedules", type=int, default=200)
    parser.add_argument("--engine", nargs=3, help=argparse.SUPPRESS)
    options = parser.parse_args()
    logging.disable(logging.WARNING)
    if options.engine:
        n_classes, n_rounds, out = options.engine
        on_engine(int(n_classes), int(n_rounds), Path(out))
        return
    fresh_ms = float(roles(10, N_QUERIES, N_CLASSES)["site_ms"])
    grow_heap()
    cases = [roles(n, N_QUERIES, c, **how) for n, c, how in CASES]
    he_ms = encryption_ms()
    print_roles(cases, he_ms, fresh_ms)
    exact = exactness(options.schedules)
    print("\n| largest error of an opened sum | over half a grid step a site |\n|---|---|")
    for kind, worst in exact.items():
        print(f"| {kind} | {worst:.3f} |")
    flower = {n: batches(n, options.rounds) for n in ENGINE_CLASSES}
    print(f"\n{ENGINE_SITES} sites, {options.rounds} batches of each, in turn\n")
    print_batches(flower)
    if options.json:
        found = {
            "roles": cases,
            "he_site_ms": he_ms,
            "fresh_site_ms": fresh_ms,
            "exactness": exact,
            "flower": flower,
        }
        options.json.write_text(json.dumps(found, indent=2))


if __name__ == "__main__":
    main()
