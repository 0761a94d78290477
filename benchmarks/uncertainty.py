"""How sure joint answers are, on digits: coverage of sets, confidence, abstention, robustness.

python benchmarks/uncertainty.py [--json FILE] [--seeds 10] [--part coverage ...]

Sites are logistic regressions over a Dirichlet split of the labels; rules and protections are
the package's, called in this process. A third of the rows are queries, of which some are audits.
"""

from __future__ import annotations

import argparse
import functools
import json
import math
import warnings
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from sklearn.datasets import load_digits
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import train_test_split
from sklearn.preprocessing import StandardScaler

from fedinfer_flower.clients.calibration import fit_temperature
from fedinfer_flower.clients.label_space import align_logits
from fedinfer_flower.ensemble import EnsembleRule, SiteContext, make_rule
from fedinfer_flower.ensemble.base import softmax
from fedinfer_flower.ensemble.deep_set_trimmed import DeepSetTrimmed
from fedinfer_flower.ensemble.deep_set_trimmed_training import train_deep_set_trimmed
from fedinfer_flower.ensemble.fitted import remember
from fedinfer_flower.ensemble.group_median import draw_groups, group_median
from fedinfer_flower.ensemble.skew_check import label_skew
from fedinfer_flower.privacy import make_protection
from fedinfer_flower.privacy.cohort import Cohort
from fedinfer_flower.query import Prediction
from fedinfer_flower.simulation.evaluation import reliability
from fedinfer_flower.uncertainty.abstention import margin_for_risk, risk_coverage
from fedinfer_flower.uncertainty.confidence import IsotonicConfidence, JointTemperature
from fedinfer_flower.uncertainty.conformal import JOINT, ConformalPredictor, conformal_rank
from fedinfer_flower.uncertainty.federated_quantile import (
    HistogramSpec,
    coordinator_sum,
    open_quantile,
    safe_threshold,
    site_histogram,
)
from fedinfer_flower.uncertainty.nonconformity import METHODS, label_scores
from fedinfer_flower.wire.identity import Identity
from fedinfer_flower.wire.roster import Roster, Seat

N_CLASSES, N_AUDITS, HELD_SHARE = 10, 200, 0.15
CLASSES = tuple(str(c) for c in range(N_CLASSES))
MISS = 0.1
Rows = list[dict[str, Any]]


@dataclass(frozen=True)
class World:
    """Trained sites and their calibrated answers; axes K sites, B queries, C classes."""

    logits_kbc: np.ndarray
    labels: np.ndarray
    counts_kc: np.ndarray
    held: list[tuple[np.ndarray, np.ndarray]]  # probabilities and labels of own held-out rows

    def joint(self, rule_name: str) -> Prediction:
        """Return the joint answer under a rule."""
        rule = make_rule(rule_name)
        totals = self.counts_kc.sum(axis=0)
        sites = [
            SiteContext(present=counts > 0, class_counts=counts, class_totals=totals)
            for counts in self.counts_kc
        ]
        scores = [rule.score(z, s) for z, s in zip(self.logits_kbc, sites, strict=True)]
        return rule.decide(rule.combine(np.stack(scores)), len(scores), CLASSES)


def split_rows(labels: np.ndarray, n_sites: int, skew: float, rng: np.random.Generator) -> list:
    """Deal each class to the sites by a Dirichlet draw; every site gets two classes at least."""
    while True:
        parts: list[list[int]] = [[] for _ in range(n_sites)]
        for c in range(N_CLASSES):
            rows = rng.permutation(np.flatnonzero(labels == c))
            cuts = (np.cumsum(rng.dirichlet([skew] * n_sites))[:-1] * len(rows)).astype(int)
            for part, piece in zip(parts, np.split(rows, cuts), strict=True):
                part.extend(piece.tolist())
        if all(len(p) >= 15 and len(set(labels[p])) > 1 for p in parts):
            return [rng.permutation(p) for p in parts]


@functools.lru_cache(maxsize=256)
def world(seed: int, skew: float, n_sites: int) -> World:
    inputs, labels = load_digits(return_X_y=True)
    split = train_test_split(inputs, labels, test_size=1 / 3, stratify=labels, random_state=seed)
    scaler = StandardScaler().fit(split[0])
    train, test, y_train, y_test = (
        scaler.transform(split[0]),
        scaler.transform(split[1]),
        *split[2:],
    )
    rng = np.random.default_rng(seed)
    logits, counts, held = [], [], []
    for rows in split_rows(y_train, n_sites, skew, rng):
        n_held = max(int(HELD_SHARE * len(rows)), 5)
        out, kept = rows[:n_held], rows[n_held:]
        if len(set(y_train[kept])) < 2:
            out, kept = rows[:0], rows
        model = LogisticRegression(max_iter=150, C=0.1).fit(train[kept], y_train[kept])
        names = tuple(str(c) for c in model.classes_)
        known = np.isin(y_train[out], model.classes_)

        def raw(x: np.ndarray, model: LogisticRegression = model) -> np.ndarray:
            return model.predict_log_proba(x) if len(x) else np.empty((0, len(model.classes_)))

        place = np.searchsorted(model.classes_, y_train[out][known])
        tau = fit_temperature(raw(train[out][known]), place)
        logits.append(align_logits(raw(test) / tau, names, CLASSES))
        counts.append(np.bincount(y_train[kept], minlength=N_CLASSES).astype(float))
        own = softmax(align_logits(raw(train[out]) / tau, names, CLASSES))
        held.append((own, y_train[out]))
    return World(np.stack(logits), y_test, np.stack(counts), held)


def rows_of(prediction: Prediction, places: np.ndarray) -> Prediction:
    return Prediction(
        classes=prediction.classes,
        labels=prediction.labels[places],
        probabilities=prediction.probabilities[places],
        margin=prediction.margin[places],
        abstained=prediction.abstained[places],
    )


def audits_and_rest(w: World, rule: str, seed: int) -> tuple[Prediction, Any, Prediction, Any]:
    mixed = np.random.default_rng(1000 + seed).permutation(len(w.labels))
    audits, rest = mixed[:N_AUDITS], mixed[N_AUDITS:]
    joint = w.joint(rule)
    return rows_of(joint, audits), w.labels[audits], rows_of(joint, rest), w.labels[rest]


def mean(values: Iterable[float]) -> float:
    return float(np.mean(list(values)))


def coverage(n_seeds: int) -> Rows:
    """Measure sets from audits at two skews: coverage and sizes."""
    found: Rows = []
    for skew in (0.1, 0.5):
        for rule in ("mean-probability", "class-share"):
            for method in METHODS:
                hits, sizes, single, right = [], [], [], []
                for seed in range(n_seeds):
                    a, ya, b, yb = audits_and_rest(world(seed, skew, 5), rule, seed)
                    sets = ConformalPredictor.from_audits(a, ya, alpha=MISS, method=method).sets(b)
                    hits.append(sets[np.arange(len(yb)), yb].mean())
                    sizes.append(sets.sum(axis=1).mean())
                    single.append((sets.sum(axis=1) == 1).mean())
                    right.append(b.accuracy(yb))
                error = float(np.std(hits, ddof=1) / math.sqrt(n_seeds))
                found.append(
                    {
                        "skew": skew,
                        "rule": rule,
                        "method": method,
                        "accuracy": mean(right),
                        "coverage": mean(hits),
                        "standard error": error,
                        "set size": mean(sizes),
                        "single": mean(single),
                        "target met": bool(mean(hits) >= 1 - MISS - 2 * error),
                    }
                )
    return found


def own_rows(n_seeds: int) -> Rows:
    """Use the threshold of sites' own answers on what it promises, and on joint answers."""
    found: Rows = []
    for skew in (0.1, 0.5):
        own, joint = [], []
        for seed in range(n_seeds):
            w = world(seed, skew, 5)
            halves = [(p[::2], y[::2], p[1::2], y[1::2]) for p, y in w.held]
            spec = HistogramSpec()
            counts = sum(site_histogram(label_scores(p, y), spec)[0] for p, y, _, _ in halves)
            threshold = safe_threshold(counts, spec, n_sites=5, alpha=MISS).predictor.threshold
            new = np.concatenate([label_scores(p, y) for _, _, p, y in halves])
            own.append((new <= threshold).mean())
            scores = label_scores(w.joint("mean-probability").probabilities, w.labels)
            joint.append((scores <= threshold).mean())
        found.append({"skew": skew, "own rows": mean(own), "joint answers": mean(joint)})
    return found


def opened(name: str, options: dict, scores: list, spec: HistogramSpec, alpha: float) -> Any:
    protection = make_protection(name, options)
    keys = protection.make_keys()
    sites = [Identity.generate() for _ in scores]
    seats = tuple(Seat(identity=s.public, commitment="0" * 64) for s in sites)
    cohort = Cohort(query_id="q", roster=Roster(seats), public_key=keys.public_key)
    shared = {"public_key": keys.public_key, "cohort": cohort}
    side = coordinator_sum(spec, protection, n_sites_max=len(sites), **shared)
    for site, values in zip(sites, scores, strict=True):
        own = protection.site_side(spec.plan(len(sites)), identity=site, **shared)
        side.add(own.protect(site_histogram(values, spec)), sender=site.key_id)
    n_sites = len(sites)
    return open_quantile(
        side.total(), spec, protection, n_sites=n_sites, n_sites_max=n_sites, keys=keys,
        cohort=cohort, alpha=alpha,
    )  # fmt: skip


def quantile(n_seeds: int) -> Rows:
    """Compare the threshold under each protection with the exact one of all scores."""
    found: Rows = []
    cases: list[tuple[str, dict]] = [
        ("plain", {}),
        ("secagg", {}),
        ("he", {}),
        ("secagg+dp", {"epsilon": 2.0}),
        ("dp", {"epsilon": 2.0}),
    ]
    for n_bins in (20, 200):
        spec = HistogramSpec(n_bins=n_bins, scope=JOINT)
        for name, options in cases:
            excess, share = [], []
            for seed in range(min(n_seeds, 5)):
                rng = np.random.default_rng(seed)
                scores = [rng.beta(1.0, 2.0 + k, size=400) for k in range(5)]
                got = opened(name, options, scores, spec, MISS)
                pooled = np.sort(np.concatenate(scores))
                exact = pooled[conformal_rank(len(pooled), MISS, n_groups=5) - 1]
                excess.append((pooled <= got.predictor.threshold).mean() - (pooled <= exact).mean())
                share.append(got.bin_share)
            label = f"{name} {options or ''}".strip()
            found.append(
                {
                    "bins": n_bins,
                    "protection": label,
                    "coverage added": mean(excess),
                    "share of the bin": mean(share),
                    "noise, rows": got.noise_std_rows,
                    "never below exact": bool(min(excess) >= 0.0),
                }
            )
    return found


def confidence(n_seeds: int) -> Rows:
    """Measure the calibration error of joint answers, before and after; fitted on 200 audits."""
    found: Rows = []
    for skew in (0.1, 0.5, 1000.0):
        before, after, steps, tau = [], [], [], []
        for seed in range(n_seeds):
            a, ya, b, yb = audits_and_rest(world(seed, skew, 5), "mean-probability", seed)
            right = b.labels == yb
            temperature = JointTemperature.from_audits(a, ya)
            sharper = temperature.calibrated(b).probabilities.max(axis=1)
            before.append(reliability(b.probabilities.max(axis=1), right)[1])
            after.append(reliability(sharper, right)[1])
            isotonic = IsotonicConfidence.from_audits(a, ya).confidence(b)
            steps.append(reliability(isotonic, right)[1])
            tau.append(temperature.tau)
        found.append(
            {
                "skew": skew,
                "ECE before": mean(before),
                "ECE, temperature": mean(after),
                "ECE, isotonic": mean(steps),
                "temperature": mean(tau),
            }
        )
    return found


def abstention(n_seeds: int) -> Rows:
    """Learn a margin for a target error at 90 % confidence, on 200 audits."""
    found: Rows = []
    for skew, target in ((0.1, 0.05), (0.1, 0.1), (0.5, 0.05), (0.5, 0.02)):
        kept, risk, broken, none, curve = [], [], 0, 0, []
        for seed in range(n_seeds):
            a, ya, b, yb = audits_and_rest(world(seed, skew, 5), "class-share", seed)
            chosen = margin_for_risk(a, ya, target_risk=target, delta=0.1)
            answered = ~chosen.apply(b).abstained
            none += int(not answered.any())
            wrong = float((b.labels != yb)[answered].mean()) if answered.any() else 0.0
            kept.append(answered.mean())
            risk.append(wrong)
            broken += int(wrong > target)
            points = risk_coverage(b, yb)
            curve.append([points.risk_at(c) for c in (0.5, 0.7, 0.9, 1.0)])
        found.append(
            {
                "skew": skew,
                "target": target,
                "answered": mean(kept),
                "error": mean(risk),
                "seeds above target": broken,
                "seeds without a margin": none,
                **{
                    f"error at {c:.0%}": float(v)
                    for c, v in zip((0.5, 0.7, 0.9, 1.0), np.mean(curve, axis=0), strict=True)
                },
            }
        )
    return found


def runner_up(probabilities_kbc: np.ndarray, n_hostile: int, rng: np.random.Generator) -> Any:
    """Colluders put all mass on the class that the honest mean puts second."""
    if n_hostile == 0:
        return probabilities_kbc
    hostile = rng.permutation(len(probabilities_kbc))[:n_hostile]
    second = np.argsort(np.delete(probabilities_kbc, hostile, axis=0).mean(axis=0), axis=1)[:, -2]
    attacked = probabilities_kbc.copy()
    attacked[hostile] = np.eye(N_CLASSES)[second]
    return attacked


def groups(n_seeds: int) -> Rows:
    """Set colluders on the mean, the median of five groups of three sites, and the median."""
    found: Rows = []
    for skew in (1000.0, 0.5):
        for n_hostile in (0, 1, 2, 3, 4):
            hits: dict[str, list[float]] = {"mean": [], "group median": [], "median": []}
            skews = []
            for seed in range(n_seeds):
                w = world(seed, skew, 15)
                rng = np.random.default_rng(seed)
                answers = runner_up(softmax(w.logits_kbc), n_hostile, rng)
                dealt = draw_groups(range(15), n_groups=5, seed=seed)
                means = np.stack([answers[list(group)].mean(axis=0) for group in dealt])
                labels = {
                    "mean": answers.mean(axis=0).argmax(axis=1),
                    "group median": group_median(means).argmax(axis=1),
                    "median": np.median(answers, axis=0).argmax(axis=1),
                }
                for name, said in labels.items():
                    hits[name].append((said == w.labels).mean())
                skews.append(label_skew(w.counts_kc))
            found.append(
                {"skew": skew, "measured skew": mean(skews), "hostile of 15": n_hostile}
                | {name: mean(values) for name, values in hits.items()}
            )
    return found


def skew_limits(n_seeds: int) -> Rows:
    """Measure what order statistics lose to the mean with nobody attacking, by skew."""
    found: Rows = []
    rules = ("median", "trimmed-mean", "geometric-median")
    for n_sites in (5, 10):
        for skew in (0.1, 0.3, 0.5, 0.7, 1.0, 2.0, 1000.0):
            lost: dict[str, list[float]] = {name: [] for name in rules}
            counts, bits = [], []
            for seed in range(min(n_seeds, 6)):
                w = world(seed, skew, n_sites)
                base = w.joint("mean-probability").accuracy(w.labels)
                for name in rules:
                    lost[name].append(100 * (base - w.joint(name).accuracy(w.labels)))
                counts.append(label_skew(w.counts_kc))
                bits.append(label_skew((w.counts_kc > 0).astype(float)))
            found.append(
                {"sites": n_sites, "Dirichlet": skew, "skew": mean(counts), "presence": mean(bits)}
                | {f"{name}, points lost": mean(values) for name, values in lost.items()}
            )
    return found


def said(rule: EnsembleRule, answers_kbc: np.ndarray, sites: list[SiteContext]) -> np.ndarray:
    logs = np.log(answers_kbc + 1e-9)
    scores = [rule.score(z, site) for z, site in zip(logs, sites, strict=True)]
    return rule.decide(rule.combine(np.stack(scores)), len(sites), CLASSES).labels


def claims(clear: np.ndarray, chosen: np.ndarray) -> Iterator[tuple[np.ndarray, int]]:
    """Yield what colluders may say: a class, with some mass on it or swapped with their top."""
    middle = np.delete(clear, chosen, axis=0).mean(axis=0)
    own = clear[chosen]
    top = own.argmax(axis=2)[:, :, np.newaxis]
    for claimed in range(N_CLASSES):
        swapped = own.copy()
        np.put_along_axis(swapped, top, own[:, :, claimed : claimed + 1], axis=2)
        swapped[:, :, claimed] = own.max(axis=2)
        onto = np.eye(N_CLASSES)[claimed]
        for lie in (swapped, *(m * onto + (1.0 - m) * middle for m in (0.5, 0.9, 1.0))):
            bent = clear.copy()
            bent[chosen] = lie
            yield bent, claimed


def hostile(n_seeds: int) -> Rows:
    """Set colluders on six sites; learned rules saw half of the queries, with labels, before."""
    found: Rows = []
    plain = {
        "mean": ("mean-probability", {}),
        "median": ("median", {}),
        "trimmed mean": ("trimmed-mean", {"trim": 2}),
        "dawid-skene": ("dawid-skene", {}),
    }
    for skew in (1000.0, 0.5):
        hits: dict[tuple[int, str], list[float]] = {}
        for seed in range(min(n_seeds, 5)):
            w = world(seed, skew, 6)
            mixed = np.random.default_rng(seed).permutation(len(w.labels))
            shown, asked = mixed[: len(mixed) // 2], mixed[len(mixed) // 2 :]
            truth, rules = w.labels[asked], {n: make_rule(*rule) for n, rule in plain.items()}
            for name, n_hostile in (("deep set, honest", 0), ("deep set, adversarial", 2)):
                fitted = train_deep_set_trimmed(
                    softmax(w.logits_kbc[:, shown]),
                    w.labels[shown],
                    classes=CLASSES,
                    sites=[f"{k:064x}" for k in range(6)],
                    n_hostile=n_hostile,
                    trim=2,
                    seed=seed,
                )
                rules[name] = DeepSetTrimmed(stack=remember(fitted), trim=2)
            sites = [SiteContext(present=counts > 0) for counts in w.counts_kc]
            clear = softmax(w.logits_kbc[:, asked])
            for n_hostile in (0, 1, 2):
                bent = runner_up(clear, n_hostile, np.random.default_rng(seed))
                for name, rule in rules.items():
                    hits.setdefault((n_hostile, name), []).append(
                        float((said(rule, bent, sites) == truth).mean())
                    )
                chosen = np.random.default_rng(seed).permutation(6)[:n_hostile]
                for name in ("mean", "trimmed mean", "deep set, adversarial"):
                    # Right whatever wrong class the colluders claim for this very row, and how.
                    right = np.ones(len(truth), dtype=bool)
                    for bent, claimed in claims(clear, chosen):
                        right &= (said(rules[name], bent, sites) == truth) | (truth == claimed)
                    hits.setdefault((n_hostile, f"worst case: {name}"), []).append(right.mean())
        for n_hostile in (0, 1, 2):
            row = {name: mean(v) for (f, name), v in hits.items() if f == n_hostile}
            found.append({"skew": skew, "hostile of 6": n_hostile} | row)
    return found


PARTS: dict[str, Callable[[int], Rows]] = {
    "coverage": coverage,
    "own-rows": own_rows,
    "quantile": quantile,
    "confidence": confidence,
    "abstention": abstention,
    "groups": groups,
    "skew": skew_limits,
    "hostile": hostile,
}


def show(value: object) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--seeds", type=int, default=10)
    parser.add_argument("--part", nargs="*", choices=PARTS, default=list(PARTS))
    options = parser.parse_args()
    warnings.filterwarnings("ignore", category=UserWarning)
    warnings.filterwarnings("ignore", category=FutureWarning)
    found = {}
    for name in options.part:
        rows = found[name] = PARTS[name](options.seeds)
        first_line = (PARTS[name].__doc__ or "").splitlines()[0]
        print(f"\n**{name}**: {first_line}\n", flush=True)
        print("| " + " | ".join(rows[0]) + " |\n|" + "---|" * len(rows[0]))
        for row in rows:
            print("| " + " | ".join(show(value) for value in row.values()) + " |")
    if options.json:
        options.json.write_text(json.dumps(found, indent=2))


if __name__ == "__main__":
    main()
