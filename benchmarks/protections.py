"""Bytes and milliseconds of each protection's three sides for 256 x 1000 scores.

python benchmarks/protections.py
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import numpy as np

from fedinfer_flower.ensemble.base import make_rule
from fedinfer_flower.privacy.base import ScorePlan, make_protection

N_QUERIES, N_CLASSES, N_SITES, REPEATS = 256, 1000, 10, 5
CASES = (
    ("plain", "mean-probability", {}),
    ("he", "mean-probability", {"scheme": "bfv"}),
    ("he", "mean-probability", {"scheme": "ckks"}),
    ("dp", "mean-probability", {"mechanism": "gaussian"}),
    ("dp", "majority-vote", {"mechanism": "randomised-response"}),
)


def median_ms(call: Callable[[], object]) -> float:
    times = []
    for _ in range(REPEATS):
        start = time.perf_counter()
        call()
        times.append(1e3 * (time.perf_counter() - start))
    return statistics.median(times)


def main() -> None:
    rng = np.random.default_rng(0)
    print("| protection | bytes | x float32 | protect | add | open |\n|---|---|---|---|---|---|")
    for name, rule_name, options in CASES:
        rule, protection = make_rule(rule_name), make_protection(name, options)
        plan = ScorePlan.for_rule(rule, n_classes=N_CLASSES, n_sites_max=N_SITES)
        raw = rng.random((N_QUERIES, N_CLASSES))
        scores = raw / raw.sum(axis=1, keepdims=True)
        if rule_name == "majority-vote":
            scores = np.eye(N_CLASSES)[raw.argmax(axis=1)]
        keys = protection.make_keys()
        site = protection.site_side(plan, public_key=keys.public_key)
        coordinator = protection.coordinator_side(
            plan, n_queries=N_QUERIES, rule=rule, public_key=keys.public_key
        )
        querier = protection.querier_side(plan, keys=keys)
        payload = site.protect(scores)
        protect = median_ms(lambda site=site, scores=scores: site.protect(scores))
        add = median_ms(lambda side=coordinator, payload=payload: side.add(payload))
        total, n_sites = coordinator.total(), coordinator.n_sites
        opened = median_ms(
            lambda side=querier, total=total, n=n_sites: side.open(
                total, n_queries=N_QUERIES, n_sites=n
            )
        )
        label = " ".join([name, *map(str, options.values())])
        ratio = len(payload) / (4 * N_QUERIES * N_CLASSES)
        print(
            f"| {label} | {len(payload):,} | {ratio:.4g}"
            f" | {protect:.1f} | {add:.1f} | {opened:.1f} |"
        )


if __name__ == "__main__":
    main()
