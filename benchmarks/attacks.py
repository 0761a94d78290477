"""Membership inference (LiRA) on one site's shard, by what the attacker sees.

python benchmarks/attacks.py [--worlds 64] [--json FILE]
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

from fedinfer_flower.attacks.federation import digits
from fedinfer_flower.attacks.membership import Membership
from fedinfer_flower.attacks.shadow_worlds import (
    ShadowWorlds,
    distributed_dp_view,
    plain_view,
    protected_view,
    secure_sum_view,
)
from fedinfer_flower.ensemble.base import make_rule
from fedinfer_flower.privacy.base import ScorePlan
from fedinfer_flower.privacy.dp import DP

N_SITES, DELTA = 10, 1e-5


def cases(worlds: ShadowWorlds) -> dict[str, tuple[object, float | None]]:
    """Return evidence and target by case."""
    plan = ScorePlan.for_rule(make_rule("mean-probability"), n_classes=10, n_sites_max=N_SITES)
    found: dict[str, tuple[object, float | None]] = {
        "plain: one site's answer": (worlds.seen_through(plain_view), None),
        f"secure sum of {N_SITES}": (worlds.seen_through(secure_sum_view), 0.03),
    }
    for epsilon in (8.0, 1.0):
        target = 0.015 if epsilon == 1.0 else None
        local = protected_view(DP(epsilon=epsilon, delta=DELTA))
        summed = distributed_dp_view(plan, epsilon=epsilon, delta=DELTA)
        promise = {"epsilon_delta": (epsilon, DELTA)}
        for name, view, clear in (
            ("dp, one site's answer", local, plain_view),
            (f"secagg+dp, sum of {N_SITES}", summed, secure_sum_view),
        ):
            # Two attackers: the one of the literature, and one who knows the noise.
            found[f"{name}, epsilon {epsilon:g}, of the label's score"] = (
                worlds.seen_through(view, **promise),
                target,
            )
            found[f"{name}, epsilon {epsilon:g}, of all scores"] = (
                worlds.seen_through(view, noiseless=clear, logit=False, **promise),
                target,
            )
        response = DP(mechanism="randomised-response", epsilon=epsilon)
        found[f"dp randomised response, one site's label, epsilon {epsilon:g}"] = (
            worlds.as_votes().seen_through(
                protected_view(response, make_rule("majority-vote")),
                noiseless=plain_view,
                logit=False,
                epsilon_delta=(epsilon, 0.0),
            ),
            target,
        )
    return found


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--worlds", type=int, default=64)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    inputs, labels = digits()
    start = time.perf_counter()
    worlds = ShadowWorlds.train(
        inputs, labels, n_classes=10, n_worlds=options.worlds, n_sites=N_SITES, seed=options.seed
    )
    rows = []
    for name, (evidence, target) in cases(worlds).items():
        result = Membership().run(evidence, mode=name, seed=options.seed)
        rows.append(result.to_dict() | {"target": target})
    seconds = time.perf_counter() - start
    print(f"{options.worlds} worlds of {N_SITES} sites, {seconds:.0f} s, seed {options.seed}\n")
    print("| what the attacker sees | TPR at 1 % FPR | 95 % interval | AUC | bound | target |")
    print("|---|---|---|---|---|---|")
    for row in rows:
        low, high = row["interval"]
        bound = "-" if row["claim_limit"] is None else f"{row['claim_limit']:.4f}"
        target = "-"
        if row["target"] is not None:
            met = "met" if row["value"] <= row["target"] else "missed"
            target = f"{row['target']:g}: {met}"
        print(
            f"| {row['mode']} | {row['value']:.4f} | {low:.4f} to {high:.4f}"
            f" | {row['detail']['auc']:.3f} | {bound} | {target} |"
        )
    if options.json is not None:
        options.json.write_text(json.dumps({"seconds": seconds, "rows": rows}, indent=2))


if __name__ == "__main__":
    main()
