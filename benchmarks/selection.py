"""Whom to ask: accuracy on digits with 20 sites, by selector, skew and number of sites asked.

python benchmarks/selection.py [--seeds 10] [--json FILE]

Sites hold logistic regressions on Dirichlet splits. The ensemble is the package's own rule
"class-share", worked out in this process. Selectors see counts; those that learn also see
audits, which are rows that are neither trained on nor tested on.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import logging
import time
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from fedinfer_flower.ensemble import SiteContext, make_rule
from fedinfer_flower.profile import CountsKind, SiteProfile
from fedinfer_flower.selection import (
    AuditTally,
    Candidate,
    Selection,
    SelectionNeed,
    SiteRecord,
    make_selector,
)
from fedinfer_flower.selection.cascade import Cascade
from fedinfer_flower.selection.cascade_learning import learn_cascade
from fedinfer_flower.selection.early_exit import EarlyExit
from fedinfer_flower.selection.sequential_bound import group_shares
from fedinfer_flower.selection.sequential_selector import SequentialSelector
from fedinfer_flower.simulation.data import load_dataset
from fedinfer_flower.simulation.institution import fit_kind
from fedinfer_flower.simulation.partition import partition_rows

ALPHAS = (0.1, 0.5, 1000.0)
SIZES = (3, 5, 10)
N_SITES, N_AUDITS, N_EPOCHS, EPOCH_AUDITS = 20, 200, 20, 50
RULE = make_rule("class-share")


@dataclass(frozen=True, kw_only=True, eq=False)
class World:
    """One split: who holds what, and what every site says."""

    candidates: list[Candidate]
    classes: tuple[str, ...]
    counts_kc: np.ndarray
    self_reported_k: np.ndarray
    logits_kbc: np.ndarray
    labels: np.ndarray
    audit_logits_ktc: np.ndarray
    audit_labels: np.ndarray
    seed: int

    def need(self, **limits: Any) -> SelectionNeed:
        """Return what is asked for: all test rows."""
        rows = len(self.labels)
        return SelectionNeed(
            classes=self.classes, rule="class-share", n_queries=rows, seed=self.seed, **limits
        )

    def totals(self, chosen: list[int], among: list[int], logits_kbc: np.ndarray) -> np.ndarray:
        """Return the rule's sum over `chosen`, its weights normalised over `among`."""
        class_totals = self.counts_kc[among].sum(axis=0)
        total = 0.0
        for k in chosen:
            site = SiteContext(
                present=self.counts_kc[k] > 0,
                class_counts=self.counts_kc[k],
                class_totals=class_totals,
            )
            total = total + RULE.score(logits_kbc[k], site)
        return np.asarray(total)

    def accuracy(self, selection: Selection) -> float:
        """Return the accuracy of sites that are asked at the same time."""
        chosen = [int(k) for k in selection.site_ids]
        total = self.totals(chosen, chosen, self.logits_kbc)
        return RULE.decide(total, len(chosen), self.classes).accuracy(self.labels)


def log_probabilities(model: Any, names: list[str], inputs: np.ndarray, n: int) -> np.ndarray:
    found = np.full((len(inputs), n), 1e-6)
    found[:, [int(name) for name in names]] = np.maximum(model.predict_proba(inputs), 1e-6)
    return np.log(found / found.sum(axis=1, keepdims=True))


def make_world(alpha: float, seed: int) -> World:
    data = load_dataset("digits", seed=seed)
    n_classes = len(data.classes)
    parts = partition_rows(data.train_labels, n_sites=N_SITES, alpha=alpha, min_size=4, seed=seed)
    candidates, counts, said, reported = [], [], [], []
    for number, rows in enumerate(parts):
        mixed = np.random.default_rng([seed, number]).permutation(rows)
        held, kept = (
            mixed[: max(1, len(mixed) * 15 // 100)],
            mixed[max(1, len(mixed) * 15 // 100) :],
        )
        model, names = fit_kind(
            "logistic regression", data.train_inputs[kept], data.train_labels[kept], seed=seed
        )
        said.append(log_probabilities(model, names, data.test_inputs, n_classes))
        own = log_probabilities(model, names, data.train_inputs[held], n_classes)
        reported.append(float((own.argmax(axis=1) == data.train_labels[held]).mean()))
        counts.append(np.bincount(data.train_labels[kept], minlength=n_classes).astype(float))
        profile = SiteProfile(
            name=f"site-{number}",
            classes=tuple(names),
            counts_kind=CountsKind.COUNTS,
            class_counts=tuple(float(counts[-1][int(name)]) for name in names),
            price_per_query=1.0,
        )
        candidates.append(Candidate(site_id=number, profile=profile))
    logits = np.stack(said)
    return World(
        candidates=candidates,
        classes=data.classes,
        counts_kc=np.stack(counts),
        self_reported_k=np.array(reported),
        logits_kbc=logits[:, N_AUDITS:],
        labels=data.test_labels[N_AUDITS:],
        audit_logits_ktc=logits[:, :N_AUDITS],
        audit_labels=data.test_labels[:N_AUDITS],
        seed=seed,
    )


def tally(world: World, k: int, rows: np.ndarray, epoch: int) -> AuditTally:
    labels = world.audit_labels[rows]
    hits = world.audit_logits_ktc[k, rows].argmax(axis=1) == labels
    right = np.bincount(labels[hits], minlength=len(world.classes))
    asked = np.bincount(labels, minlength=len(world.classes))
    return AuditTally(
        epoch=epoch,
        right=dict(zip(world.classes, right.astype(float).tolist(), strict=True)),
        asked=dict(zip(world.classes, asked.astype(float).tolist(), strict=True)),
    )


def with_tallies(candidate: Candidate, tallies: tuple[AuditTally, ...]) -> Candidate:
    return dataclasses.replace(candidate, record=SiteRecord(tallies=tallies))


def audited(world: World) -> list[Candidate]:
    rows = np.arange(N_AUDITS)
    return [with_tallies(c, (tally(world, k, rows, 1),)) for k, c in enumerate(world.candidates)]


def after_epochs(world: World, name: str, m: int) -> Selection:
    """Run a bandit from nothing: only sites that it asks are audited."""
    rng = np.random.default_rng([world.seed, m])
    selector, candidates = make_selector(name), list(world.candidates)
    for epoch in range(1, N_EPOCHS + 1):
        chosen = selector.select(candidates, world.need(at_most=m, epoch=epoch)).site_ids
        rows = rng.integers(0, N_AUDITS, EPOCH_AUDITS)
        for k in chosen:
            old = candidates[k].record.tallies
            candidates[k] = with_tallies(candidates[k], (*old, tally(world, k, rows, epoch)))
    calm = make_selector(name, {"epsilon": 0.0})
    return calm.select(candidates, world.need(at_most=m, epoch=N_EPOCHS + 1))


def answered(
    world: World, selector: SequentialSelector, selection: Selection, among: list[int]
) -> tuple[float, float]:
    """Return (accuracy, mean sites asked) of a selector that asks in groups."""
    answer = selector.begin(
        selection,
        world.candidates,
        world.need(),
        RULE,
        class_totals=world.counts_kc[among].sum(axis=0),
    )
    totals = [
        world.totals([int(k) for k in group], among, world.logits_kbc) for group in selection.groups
    ]
    while answer.group is not None:
        group, rows = answer.group, answer.open_rows
        answer.add(group, totals[group][rows], rows)
    return answer.decide().accuracy(world.labels), float(answer.n_sites_asked.mean())


def cascades(world: World, budgets: tuple[float, ...]) -> dict[str, tuple[float, float]]:
    everyone = list(range(N_SITES))
    groups = EarlyExit().select(world.candidates, world.need()).groups
    totals = np.stack(
        [world.totals([int(k) for k in g], everyone, world.audit_logits_ktc) for g in groups]
    )
    shares = group_shares(
        RULE,
        [[world.candidates[int(k)] for k in group] for group in groups],
        world.classes,
        class_totals=world.counts_kc.sum(axis=0),
    )
    found = {}
    for budget in budgets:
        policy = learn_cascade(
            totals,
            world.audit_labels,
            rule=RULE,
            classes=world.classes,
            groups=tuple(tuple(f"site-{k}" for k in group) for group in groups),
            costs_g=np.array([float(len(group)) for group in groups]),
            budget=budget,
            shares_gc=shares,
        )
        selector = Cascade(policy=policy.to_json())
        selection = selector.select(world.candidates, world.need())
        found[f"cascade, budget {budget:g}"] = answered(world, selector, selection, everyone)
    return found


def one_world(alpha: float, seed: int) -> dict[str, tuple[float, float]]:
    """Return (accuracy, mean sites asked) by strategy."""
    world = make_world(alpha, seed)
    known, everyone = audited(world), list(range(N_SITES))
    site = (world.logits_kbc.argmax(axis=2) == world.labels).mean(axis=1)
    found: dict[str, tuple[float, float]] = {
        "(mean site)": (float(site.mean()), 1.0),
        "(best site)": (float(site.max()), 1.0),
        "all": (world.accuracy(make_selector("all").select(world.candidates, world.need())), 20.0),
    }
    for m in SIZES:
        need = world.need(at_most=m)
        draws = [
            world.accuracy(
                make_selector("random").select(
                    world.candidates, dataclasses.replace(need, seed=1000 * seed + draw)
                )
            )
            for draw in range(10)
        ]
        found[f"random, {m}"] = float(np.mean(draws)), float(m)
        order = np.argsort(-world.self_reported_k, kind="stable")[:m]
        total = world.totals(order.tolist(), order.tolist(), world.logits_kbc)
        right = RULE.decide(total, m, world.classes).accuracy(world.labels)
        found[f"self-reported, {m}"] = right, float(m)
        for name in ("largest", "coverage-greedy", "diversity"):
            selection = make_selector(name).select(world.candidates, need)
            found[f"{name}, {m}"] = world.accuracy(selection), float(m)
        selection = make_selector("competence").select(known, need)
        found[f"competence (200 audits), {m}"] = world.accuracy(selection), float(m)
        for name in ("bandit-ucb", "bandit-thompson"):
            selection = after_epochs(world, name, m)
            found[f"{name} (20 epochs), {m}"] = world.accuracy(selection), float(m)
    for options in ({"tau": 0.3}, {"tau": 0.5}, {"tau": 0.7}, {"stop": "lossless"}):
        selector = EarlyExit(**options)
        selection = selector.select(world.candidates, world.need())
        label = "lossless" if "stop" in options else f"tau {options['tau']}"
        found[f"early-exit, {label}"] = answered(world, selector, selection, everyone)
    return found | cascades(world, (4.0, 6.0))


def interval(values: np.ndarray) -> tuple[float, float]:
    """Return mean and half width of the 95 % interval over seeds (Student)."""
    from scipy.stats import t

    n = len(values)
    if n < 2:
        return float(values.mean()), float("nan")
    return float(values.mean()), float(t.ppf(0.975, n - 1) * values.std(ddof=1) / np.sqrt(n))


Runs = list[dict[str, tuple[float, float]]]


def summary(runs: Runs) -> dict[str, dict[str, float]]:
    found = {}
    for name in runs[0]:
        accuracy, half = interval(100.0 * np.array([run[name][0] for run in runs]))
        asked = float(np.mean([run[name][1] for run in runs]))
        found[name] = {"accuracy": accuracy, "half_width_95": half, "sites_asked": asked}
    return found


def lead(runs: Runs, name: str, other: str) -> tuple[float, float]:
    """Return by how many points one is ahead of another, seed by seed: mean, half width."""
    return interval(100.0 * np.array([run[name][0] - run[other][0] for run in runs]))


def targets(runs: dict[str, Runs]) -> dict[str, bool]:
    """Return what was aimed for, and whether it was reached beyond doubt of the seeds."""
    half, same = runs["0.5"], runs["1000"]
    part = summary(half)
    share = part["coverage-greedy, 10"]["accuracy"] / part["all"]["accuracy"]
    reached = {
        f"alpha 0.5: coverage-greedy with 10 has {share:.3f} of the accuracy of all 20"
        " (aim 0.94)": share >= 0.94
    }
    for other in ("random", "largest"):
        for m in SIZES:
            mean, width = lead(half, f"coverage-greedy, {m}", f"{other}, {m}")
            text = f"alpha 0.5: coverage-greedy above {other}, {m} sites"
            reached[f"{text}: {mean:+.2f} ± {width:.2f} points, paired"] = mean > width
    mean, width = lead(same, "early-exit, tau 0.3", "all")
    asked = summary(same)["early-exit, tau 0.3"]["sites_asked"]
    reached[
        f"alpha 1000: early exit within 0.5 points of all: {mean:+.2f} ± {width:.2f} points,"
        f" paired; {asked:.1f} of 20 sites (aim 10)"
    ] = mean - width >= -0.5 and asked <= 10.0
    changed = sum(
        run["early-exit, lossless"][0] != run["all"][0] for part in runs.values() for run in part
    )
    total = sum(len(part) for part in runs.values())
    reached[
        f"lossless early exit has the accuracy of all 20 in {total - changed} of {total} runs"
    ] = changed == 0
    return reached


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=10)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    logging.disable(logging.WARNING)
    warnings.simplefilter("ignore")
    start = time.perf_counter()
    runs = {
        f"{alpha:g}": [one_world(alpha, seed) for seed in range(options.seeds)] for alpha in ALPHAS
    }
    found = {alpha: summary(part) for alpha, part in runs.items()}
    print(
        f"digits, {N_SITES} sites, {options.seeds} seeds, rule class-share: accuracy in %"
        " with 95 % interval, and mean sites asked a row"
    )
    print("| selector | " + " | ".join(f"α = {alpha:g} | sites" for alpha in ALPHAS) + " |")
    print("|---|" + "---|---|" * len(ALPHAS))
    for name in next(iter(found.values())):
        cells = [
            f"{part[name]['accuracy']:.1f} ± {part[name]['half_width_95']:.1f}"
            f" | {part[name]['sites_asked']:.1f}"
            for part in found.values()
        ]
        print(f"| {name} | " + " | ".join(cells) + " |")
    print()
    reached = targets(runs)
    for text, is_met in reached.items():
        print(f"- {'met' if is_met else 'NOT MET'}: {text}")
    print(f"\n{time.perf_counter() - start:.0f} s")
    if options.json:
        frontier = {
            alpha: [{"selector": name} | values for name, values in part.items()]
            for alpha, part in found.items()
        }
        plain = {"seeds": options.seeds, "frontier": frontier, "targets": reached}
        options.json.write_text(json.dumps(plain, indent=2))


if __name__ == "__main__":
    main()
