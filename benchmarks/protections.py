"""Bytes and milliseconds of each protection's three sides for 256 x 1000 scores.

python benchmarks/protections.py
"""

from __future__ import annotations

import time
from collections.abc import Callable
from statistics import median

import numpy as np

from fedinfer_flower.ensemble.base import make_rule
from fedinfer_flower.privacy.base import ScorePlan, make_protection
from fedinfer_flower.privacy.cohort import Cohort
from fedinfer_flower.privacy.mask_recovery import MaskedSum
from fedinfer_flower.privacy.secagg import SecAgg
from fedinfer_flower.wire.identity import Identity
from fedinfer_flower.wire.roster import Roster, Seat

N_QUERIES, N_CLASSES, N_SITES, N_OPENED = 256, 1000, 10, 5
CASES = (
    ("plain", "mean-probability", {}),
    ("he", "mean-probability", {"scheme": "bfv"}),
    ("he", "mean-probability", {"scheme": "ckks"}),
    ("dp", "mean-probability", {"mechanism": "gaussian"}),
    ("dp", "majority-vote", {"mechanism": "randomised-response"}),
    ("secagg", "mean-probability", {}),
    ("secagg", "mean-probability", {"self_mask": True}),
    ("secagg+dp", "mean-probability", {}),
    ("he+dp", "mean-probability", {}),
)


def timed_ms(call: Callable[[], object]) -> float:
    start = time.perf_counter()
    call()
    return 1e3 * (time.perf_counter() - start)


def remove_self_masks(
    protection: SecAgg, coordinator: MaskedSum, cohort: Cohort, sites: list[Identity]
) -> None:
    of = {site.key_id: site for site in sites}
    while requests := coordinator.recovery_requests():
        for key_id, request in requests.items():
            reply = protection.recovery_reply(
                request, cohort=cohort, identity=of[key_id], admit=lambda dropped: None
            )
            coordinator.add_recovery(reply, sender=key_id)


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
        keys, sites = protection.make_keys(), [Identity.generate() for _ in range(N_SITES)]
        seats = tuple(Seat(identity=s.public, commitment="0" * 64) for s in sites)
        cohort = Cohort(query_id="q-0", roster=Roster(seats), public_key=keys.public_key)
        coordinator = protection.coordinator_side(
            plan, n_queries=N_QUERIES, rule=rule, public_key=keys.public_key, cohort=cohort
        )
        querier = protection.querier_side(plan, keys=keys, cohort=cohort)
        protect, add, payload = [], [], b""
        for identity in sites:  # masks cancel only if every site answers
            site = protection.site_side(
                plan, public_key=keys.public_key, cohort=cohort, identity=identity
            )
            start = time.perf_counter()
            payload = site.protect(scores)
            protected = time.perf_counter()
            coordinator.add(payload, sender=identity.key_id)
            add.append(1e3 * (time.perf_counter() - protected))
            protect.append(1e3 * (protected - start))
        if getattr(protection, "self_mask", False):
            remove_self_masks(protection, coordinator, cohort, sites)
        total = coordinator.total()
        opened = [
            timed_ms(lambda q=querier, t=total: q.open(t, n_queries=N_QUERIES, n_sites=N_SITES))
            for _ in range(N_OPENED)
        ]
        label = " ".join([name, *("self-mask" if v is True else str(v) for v in options.values())])
        ratio = len(payload) / (4 * N_QUERIES * N_CLASSES)
        print(
            f"| {label} | {len(payload):,} | {ratio:.4g}"
            f" | {median(protect):.1f} | {median(add):.1f} | {median(opened):.1f} |"
        )


if __name__ == "__main__":
    main()
