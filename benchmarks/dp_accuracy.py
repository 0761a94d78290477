"""Accuracy on digits under one epsilon a query, by where the noise is added.

python benchmarks/dp_accuracy.py [--seeds 10] [--draws 3] [--sites 10 50 100] [--json FILE]

Each site trains a small network on its share of the training rows. Scores, noise, codecs and
the opened sums are those of the library; masks, which change no sum, are left out, but for
one cell a seed in which the sum goes through the whole protocol and must be the same.
"""

from __future__ import annotations

import argparse
import functools
import json
import logging
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from fedinfer_flower.ensemble.auto import pick_rule
from fedinfer_flower.ensemble.base import EnsembleRule, SiteContext, make_rule
from fedinfer_flower.privacy import gaussian_dp, noise
from fedinfer_flower.privacy.base import KeyPair, ScorePlan
from fedinfer_flower.privacy.cohort import Cohort
from fedinfer_flower.privacy.dp import DP
from fedinfer_flower.privacy.secagg_dp import SecAggDP
from fedinfer_flower.simulation.data import Dataset, load_dataset
from fedinfer_flower.wire.identity import Identity
from fedinfer_flower.wire.roster import Roster, Seat

EPSILONS, DELTA, N_CLASSES = (0.5, 1.0, 2.0, 4.0), 1e-5, 10
HEADLINE_SITES, HEADLINE_EPSILON, TARGET_POINTS = 100, 2.0, 1.0
EPOCHS, LOGIT_NORM = 120, 4.0
RULES = {name: make_rule(name) for name in ("mean-probability", "majority-vote")}
# Dropouts and colluders that the noise of the others makes good for.
SHARES = {
    "default shares": {},
    "dropouts 10 %, colluders 10 %": {"dropout_share": 0.1, "collusion_share": 0.1},
    "dropouts 0, colluders 0": {"dropout_share": 0.0, "collusion_share": 0.0},
}


def site_logits(dataset: Dataset, n_sites: int, seed: int) -> np.ndarray:
    """Train all sites' networks at once; return logits of shape (n_sites, n_queries, classes).

    The loss is the sum over sites and Adam works entry by entry, so that no site's
    network depends on another's rows.
    """
    torch.manual_seed(seed)
    n_each = len(dataset.train_labels) // n_sites
    order = np.random.default_rng(seed).permutation(len(dataset.train_labels))
    rows = order[: n_sites * n_each].reshape(n_sites, n_each)
    inputs = torch.tensor(dataset.train_inputs[rows], dtype=torch.float32)
    labels = torch.tensor(dataset.train_labels[rows])
    layers = []
    for n_in, n_out in ((64, 32), (32, N_CLASSES)):  # as torch.nn.Linear starts
        reach = n_in**-0.5
        layers.append(torch.empty(n_sites, n_in, n_out).uniform_(-reach, reach))
        layers.append(torch.empty(n_sites, 1, n_out).uniform_(-reach, reach))
    for layer in layers:
        layer.requires_grad_()

    def forward(batch: torch.Tensor) -> torch.Tensor:
        hidden = torch.relu(batch @ layers[0] + layers[1])
        return hidden @ layers[2] + layers[3]

    optimizer = torch.optim.Adam(layers, 1e-2, weight_decay=1e-3)
    for _ in range(EPOCHS):
        optimizer.zero_grad()
        losses = torch.nn.functional.cross_entropy(
            forward(inputs).flatten(0, 1), labels.flatten(), reduction="sum"
        )
        (losses / n_each).backward()
        optimizer.step()
    with torch.inference_mode():
        asked = torch.tensor(dataset.test_inputs, dtype=torch.float32)
        return forward(asked.expand(n_sites, -1, -1)).double().numpy()


@dataclass(frozen=True, kw_only=True)
class Cohorts:
    """A roster with the keys of its sites, made once for a number of sites."""

    sites: list[Identity]
    cohort: Cohort
    keys: KeyPair

    @classmethod
    def make(cls, n_sites: int) -> Cohorts:
        """Return fresh keys."""
        sites, keys = [Identity.generate() for _ in range(n_sites)], SecAggDP().make_keys()
        seats = tuple(Seat(identity=s.public, commitment="0" * 64) for s in sites)
        cohort = Cohort(query_id="q-0", roster=Roster(seats), public_key=keys.public_key)
        return cls(sites=sites, cohort=cohort, keys=keys)


def summed(protection: SecAggDP, plan: ScorePlan, scores: np.ndarray, here: Cohorts) -> np.ndarray:
    """Return the noisy sum that the querier opens, without the masks that cancel in it."""
    side = protection.site_side(
        plan, public_key=here.keys.public_key, cohort=here.cohort, identity=here.sites[0]
    )
    total = sum(side.draw(one) for one in scores)
    return protection.codec(plan).decode(total)


def require_same_under_masks(plan: ScorePlan, scores: np.ndarray, here: Cohorts) -> None:
    """Put one batch's noisy integers through the whole protocol, and compare sums."""
    protection = SecAggDP(epsilon=HEADLINE_EPSILON, delta=DELTA)
    public_key, rule = here.keys.public_key, RULES["mean-probability"]
    n_queries = scores.shape[1]
    coordinator = protection.coordinator_side(
        plan, n_queries=n_queries, rule=rule, public_key=public_key, cohort=here.cohort
    )
    drawn = []
    for site, one in zip(here.sites, scores, strict=True):
        side = protection.site_side(plan, public_key=public_key, cohort=here.cohort, identity=site)
        drawn.append(side.draw(one))
        coordinator.add(side.finish(drawn[-1]), sender=site.key_id)
    querier = protection.querier_side(plan, keys=here.keys, cohort=here.cohort)
    opened = querier.open(coordinator.total(), n_queries=n_queries, n_sites=len(scores))
    if not np.array_equal(opened, protection.codec(plan).decode(sum(drawn))):
        raise AssertionError("the masks changed the sum")


def locally_noisy(
    protection: DP, rule: EnsembleRule, plan: ScorePlan, scores: np.ndarray
) -> np.ndarray:
    """Return what the querier opens when every site adds its own noise."""
    n_sites, n_queries = scores.shape[:2]
    site = protection.site_side(plan, public_key=b"")
    coordinator = protection.coordinator_side(plan, n_queries=n_queries, rule=rule, public_key=b"")
    for one in scores:
        coordinator.add(site.protect(one))
    querier = protection.querier_side(plan, keys=KeyPair())
    return querier.open(coordinator.total(), n_queries=n_queries, n_sites=n_sites)


def noisy_logits(logits: np.ndarray, epsilon: float) -> np.ndarray:
    """Return a sum of clipped logits with every site's own noise: what the library refuses.

    Centred, clipped to an L2 ball; replacing an answer moves it by the ball's diameter.
    """
    centred = logits - logits.mean(axis=-1, keepdims=True)
    norms = np.linalg.norm(centred, axis=-1, keepdims=True)
    clipped = centred * np.minimum(1.0, LOGIT_NORM / norms)
    steps = 2.0**12
    std = round(steps * 2.0 * LOGIT_NORM / gaussian_dp.mu_for(epsilon, DELTA))
    return (clipped + noise.gaussian_integers(clipped.shape, std) / steps).sum(axis=0)


def one_seed(n_sites: int, seed: int, n_draws: int) -> dict[tuple[str, float], float]:
    """Return accuracy in % by (method, epsilon), a mean over draws; epsilon 0 is no noise."""
    dataset = load_dataset("digits", seed=seed)
    logits = site_logits(dataset, n_sites, seed)
    here = Cohorts.make(n_sites)
    site = SiteContext(present=np.ones(N_CLASSES, dtype=bool))
    found: dict[tuple[str, float], float] = {}

    def note(method: str, epsilon: float, total: Callable[[], np.ndarray]) -> None:
        n = n_draws if epsilon > 0.0 else 1
        right = [total().argmax(axis=1) == dataset.test_labels for _ in range(n)]
        found[method, epsilon] = 100.0 * float(np.mean(right))

    alone = logits.argmax(axis=-1) == dataset.test_labels
    found["one site alone", 0.0] = 100.0 * float(alone.mean())
    for name, rule in RULES.items():
        plan = ScorePlan.for_rule(rule, n_classes=N_CLASSES, n_sites_max=n_sites)
        scores = np.stack([rule.score(one, site) for one in logits])
        note(f"no noise, {name}", 0.0, functools.partial(scores.sum, axis=0))
        if name == "mean-probability":
            require_same_under_masks(plan, scores[:, :32], here)
        for epsilon in EPSILONS:
            for shares, options in SHARES.items():
                protection = SecAggDP(epsilon=epsilon, delta=DELTA, **options)
                total = functools.partial(summed, protection, plan, scores, here)
                note(f"secagg+dp, {name}, {shares}", epsilon, total)
            local = DP(epsilon=epsilon, delta=DELTA)
            total = functools.partial(locally_noisy, local, rule, plan, scores)
            note(f"dp gaussian, {name}", epsilon, total)
            if name == "majority-vote":
                local = DP(mechanism="randomised-response", epsilon=epsilon, delta=DELTA)
                total = functools.partial(locally_noisy, local, rule, plan, scores)
                note(f"dp randomised response, {name}", epsilon, total)
    for epsilon in EPSILONS:
        total = functools.partial(noisy_logits, logits, epsilon)
        note("(refused) dp gaussian, clipped logits", epsilon, total)
    return found


def verdicts(table: dict[tuple[str, float], np.ndarray]) -> list[dict[str, object]]:
    """Compare every `secagg+dp` row at the headline epsilon with the same rule's no noise."""
    picked, _ = pick_rule([], "secagg+dp", None)
    rows = []
    for (method, epsilon), values in table.items():
        if epsilon != HEADLINE_EPSILON or not method.startswith("secagg+dp"):
            continue
        _, rule, shares = method.split(", ", 2)
        loss = table[f"no noise, {rule}", 0.0] - values
        rows.append(
            {
                "rule": rule + (" (auto)" if rule == picked.name else ""),
                "shares": shares,
                "loss": float(loss.mean()),
                "standard_error": float(loss.std(ddof=1) / len(loss) ** 0.5),
                "met": bool(loss.mean() <= TARGET_POINTS),
            }
        )
    return rows


def cell(values: np.ndarray | None) -> str:
    return "-" if values is None else f"{values.mean():.1f} ± {values.std():.1f}"


def print_sites(n_sites: int, table: dict[tuple[str, float], np.ndarray]) -> None:
    clear = ", ".join(f"{m} {cell(v)}" for (m, epsilon), v in table.items() if epsilon == 0.0)
    print(f"\n{n_sites} sites. {clear}\n")
    print("| method | " + " | ".join(f"ε = {e:g}" for e in EPSILONS) + " |")
    print("|---|" + "---|" * len(EPSILONS))
    for method in dict.fromkeys(m for m, epsilon in table if epsilon > 0.0):
        cells = [cell(table.get((method, e))) for e in EPSILONS]
        print(f"| {method} | " + " | ".join(cells) + " |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=10)
    parser.add_argument("--draws", type=int, default=3, help="of the noise, for each seed")
    parser.add_argument("--sites", type=int, nargs="+", default=[10, 50, 100])
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    logging.disable(logging.WARNING)
    torch.set_num_threads(1)
    start = time.perf_counter()
    results = {}
    print(
        f"digits, 540 queries, ε per query at δ = {DELTA:g}, {options.seeds} seeds,"
        f" {options.draws} draws of the noise for each: accuracy in %, mean ± standard"
        " deviation over seeds"
    )
    for n_sites in options.sites:
        runs = [one_seed(n_sites, seed, options.draws) for seed in range(options.seeds)]
        results[n_sites] = {key: np.array([run[key] for run in runs]) for key in runs[0]}
        print_sites(n_sites, results[n_sites])
    judged = verdicts(results[HEADLINE_SITES]) if HEADLINE_SITES in results else []
    if judged:
        print(
            f"\n{HEADLINE_SITES} sites, ε = {HEADLINE_EPSILON:g}: points lost against the same"
            f" rule without noise; target at most {TARGET_POINTS:g}\n"
        )
        print("| rule | shares | points lost | standard error | target |\n|---|---|---|---|---|")
        for row in judged:
            print(
                f"| {row['rule']} | {row['shares']} | {row['loss']:.2f}"
                f" | {row['standard_error']:.2f} | {'met' if row['met'] else 'MISSED'} |"
            )
    print(f"\n{time.perf_counter() - start:.0f} s")
    if options.json:
        rows = [
            {"sites": n, "method": m, "epsilon": e, "accuracy": list(map(float, values))}
            for n, table in results.items()
            for (m, e), values in table.items()
        ]
        options.json.write_text(json.dumps({"rows": rows, "verdicts": judged}, indent=2))


if __name__ == "__main__":
    main()
