"""Contribution schemes: exact or not, right or not, and what cheating pays under each.

python benchmarks/incentives.py [--seeds 30] [--quick] [--json FILE]
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import itertools
import json
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from fedinfer_flower.attacks.cheating import CHEATS, Settling, Stage, make_cheat
from fedinfer_flower.attacks.payment_table import (
    FREE_RIDER_SHARE,
    PaymentCell,
    explained,
    markdown_payment_table,
    mean_interval,
    payment_table,
)
from fedinfer_flower.incentives.base import (
    SCHEMES,
    AuditedAnswers,
    ContributionScheme,
    LinearScheme,
    make_scheme,
)
from fedinfer_flower.incentives.measures import chance_adjusted_f, fairness_f, spearman
from fedinfer_flower.incentives.quotient import Quotient, owner_clusters, split_within
from fedinfer_flower.incentives.shrinkage import posterior_mean, row_sum_variances
from fedinfer_flower.simulation.audited_federation import AuditedFederation, audited_federation

DEFAULT = "audited-blend"
BASELINES = ("equal", "final-agreement", "entropy")
"""The three of earlier work, which need no labels."""
AUDITS = {"digits": 200, "breast_cancer": 150}
GROUPED = f"{DEFAULT}, quotient"
HARDENED = f"{DEFAULT}, quotient, shrunk"
OWNERS = f"{DEFAULT}, quotient, shrunk, owners known"
PROTECTED = f"{DEFAULT}, row sums, owners known"
"""What is left where nobody sees a site's answers."""
USUAL_CLASS = (
    "constant on breast_cancer: 63 % of the rows are of one class; always saying so is right more"
    " often than several of the honest sites, and moves the joint answer towards the labels"
)
COPIES = (
    "copies and echoes: they are as right as what they copy. No scheme here can tell; sealed,"
    " masked or encrypted answers keep a site from having them before it answers"
)
DISGUISE = (
    "disguised clones: a clone that answers a fifth of the rows by chance no longer errs like its"
    " model, and the quotient by answers does not see it; where owners are known it gains nothing"
)
ATTACKED_SITES = 6
ATTACK_SEEDS = 12
ESTIMATORS = ("shapley-sampled", "banzhaf-coalitions")
"""Estimate others of the table, at a price in time: left out of it."""
SWEPT = (DEFAULT, "linear-ca", "brier-shapley")


def brute_shapley(value: Callable[[tuple[int, ...]], float], n_sites: int) -> np.ndarray:
    """Return Shapley values by their definition: all coalitions, no closed form."""
    coalitions = [
        c for size in range(n_sites + 1) for c in itertools.combinations(range(n_sites), size)
    ]
    worth = {frozenset(c): value(c) for c in coalitions}
    values = np.zeros(n_sites)
    for coalition, without in worth.items():
        for k in set(range(n_sites)) - coalition:
            before, after = len(coalition), n_sites - len(coalition) - 1
            weight = math.factorial(before) * math.factorial(after) / math.factorial(n_sites)
            values[k] += weight * (worth[coalition | {k}] - without)
    return values


def brier_worth(answers: AuditedAnswers, coalition: tuple[int, ...]) -> float:
    """Return ``mean_t 2<s_S, e_y> - |s_S|^2`` of centred answers over K."""
    p, labels = answers.probabilities_ktc, answers.labels
    total = (p[list(coalition)] - 1.0 / answers.n_classes).sum(axis=0) / answers.n_sites
    right = total[np.arange(len(labels)), labels]
    return float((2.0 * right - (total**2).sum(axis=1)).mean())


def accuracy_worth(answers: AuditedAnswers, coalition: tuple[int, ...]) -> float:
    """Return the accuracy of the coalition's mean probability; chance for nobody."""
    if not coalition:
        return 1.0 / answers.n_classes
    votes = answers.probabilities_ktc[list(coalition)].mean(axis=0).argmax(axis=1)
    return float((votes == answers.labels).mean())


def merit(answers: AuditedAnswers) -> np.ndarray:
    """Return labelled Shapley values of the accuracy game."""
    values = brute_shapley(functools.partial(accuracy_worth, answers), answers.n_sites)
    # Sites of equal worth differ by rounding, which must not rank them.
    return values.round(9)


def random_answers(n_sites: int, n_queries: int, n_classes: int) -> AuditedAnswers:
    rng = np.random.default_rng(1)
    return AuditedAnswers(
        probabilities_ktc=rng.dirichlet(np.ones(n_classes), size=(n_sites, n_queries)),
        labels=rng.integers(0, n_classes, n_queries),
    )


def seconds_of(call: Callable[[], object], repeats: int = 3) -> float:
    """Return the fastest of a few runs."""
    best = math.inf
    for _ in range(repeats):
        start = time.perf_counter()
        call()
        best = min(best, time.perf_counter() - start)
    return best


class Report:
    """What is printed, and the same for machines."""

    def __init__(self) -> None:
        self.parts: dict[str, object] = {}
        self.targets: list[dict[str, object]] = []

    def target(
        self, text: str, value: float, limit: float, *, at_least: bool = False, why: str = ""
    ) -> None:
        """Note a target, what was measured, and where a miss would come from."""
        met = value >= limit if at_least else value <= limit
        row = {"target": text, "value": value, "limit": limit, "met": bool(met), "why": why}
        self.targets.append(row)

    def print_targets(self) -> None:
        """Print which targets are met, and which are not."""
        print("\n## Targets\n\n| target | limit | measured | |\n|---|---|---|---|")
        for row in self.targets:
            verdict = "met" if row["met"] else "MISSED"
            print(f"| {row['target']} | {row['limit']:g} | {row['value']:.4g} | {verdict} |")
        print("\nWhere a target is missed:\n")
        for why in dict.fromkeys(row["why"] for row in self.targets if not row["met"]):
            print(f"- {why or 'no reason is known'}")


def exactness(report: Report, *, quick: bool) -> None:
    """Compare closed forms with the definition, and time them."""
    worst = worst_accuracy = 0.0
    for n_sites in (2, 3, 5, 7):
        answers = random_answers(n_sites, 50, 4)
        exact = brute_shapley(functools.partial(brier_worth, answers), n_sites)
        closed = make_scheme("brier-shapley").contributions(answers)
        worst = max(worst, float(np.abs(exact - closed).max()))
        shapley = make_scheme("shapley").contributions(answers)
        exact = brute_shapley(functools.partial(accuracy_worth, answers), n_sites)
        worst_accuracy = max(worst_accuracy, float(np.abs(shapley - exact).max()))
    ten, thousand = random_answers(10, 1000, 10), random_answers(1000, 1000, 10)
    times = {
        "shapley, K=10": seconds_of(lambda: make_scheme("shapley").contributions(ten), 1),
        "brier-shapley, K=10": seconds_of(lambda: make_scheme("brier-shapley").contributions(ten)),
        "brier-shapley, K=1000": seconds_of(
            lambda: make_scheme("brier-shapley").contributions(thousand), 1 if quick else 2
        ),
        f"{DEFAULT}, K=1000": seconds_of(
            lambda: make_scheme(DEFAULT).contributions(thousand), 1 if quick else 2
        ),
    }
    print("\n## Exactness and time (T = 1000 audits, C = 10)\n\n| what | value |\n|---|---|")
    print(f"| brier-shapley against all coalitions, largest error | {worst:.1e} |")
    print(f"| shapley against all coalitions, largest error | {worst_accuracy:.1e} |")
    for name, seconds in times.items():
        print(f"| {name} | {1000.0 * seconds:.1f} ms |")
    report.parts["exactness"] = {
        "brier": worst,
        "accuracy": worst_accuracy,
        "seconds": times,
    }
    report.target("brier-shapley is exact (largest error)", worst, 1e-9)
    report.target("exact shapley, K=10 (s)", times["shapley, K=10"], 2.0)
    report.target("brier-shapley, K=10 (s)", times["brier-shapley, K=10"], 0.02)
    report.target("brier-shapley, K=1000 (s)", times["brier-shapley, K=1000"], 2.0)


@functools.cache
def federation(dataset: str, n_sites: int, alpha: float, seed: int) -> AuditedFederation:
    return audited_federation(
        dataset, n_sites=n_sites, alpha=alpha, n_audits=AUDITS[dataset], seed=seed
    )


def settled(name: str, answers: AuditedAnswers, seed: int) -> np.ndarray:
    """Return a scheme's scores; those that draw get the seed."""
    options: dict[str, object] = {"seed": seed} if "seed" in make_scheme(name).options() else {}
    if name == "shapley-sampled":
        options["n_permutations"] = 200
    return make_scheme(name, options).contributions(answers)


def correlations(report: Report, dataset: str, alpha: float, seeds: range, n_sites: int) -> None:
    """Print how each scheme's split agrees with labelled Shapley values, and with accuracy."""
    figures: dict[str, dict[str, list[float]]] = {}
    splits = []
    for seed in seeds:
        here = federation(dataset, n_sites, alpha, seed)
        whole, unseen = merit(here.held_out), merit(here.unaudited)
        accuracy = (here.probabilities_knc.argmax(axis=-1) == here.labels_n).mean(axis=1)
        split = {"labelled Shapley": whole.tolist(), "accuracy": accuracy.tolist()}
        for name in SCHEMES.names():
            values = settled(name, here.audited, seed)
            split[name] = values.tolist()
            row = {
                "spearman": spearman(whole, values),
                "spearman on unaudited rows": spearman(unseen, values),
                "F of accuracy": fairness_f(accuracy, values),
                "F of Shapley": fairness_f(whole, values),
                "chance-adjusted F": chance_adjusted_f(accuracy, values, here.held_out.n_classes),
            }
            for figure, value in row.items():
                figures.setdefault(name, {}).setdefault(figure, []).append(value)
        splits.append({"seed": seed, "scores": split})
    columns = list(next(iter(figures.values())))
    print(
        f"\n## {dataset}, {n_sites} sites, alpha {alpha:g}, {AUDITS[dataset]} audits:"
        f" agreement with labelled Shapley values\n\n| scheme | {' | '.join(columns)} |"
    )
    print("|---" * (len(columns) + 1) + "|")
    order = sorted(figures, key=lambda name: -np.mean(figures[name]["spearman"]))
    for name in order:
        label = f"**{name}**" if name == DEFAULT else f"{name} †" if name in BASELINES else name
        print(f"| {label} | {' | '.join(shown(figures[name][c]) for c in columns)} |")
    report.parts[f"agreement, {dataset}, alpha {alpha:g}"] = {
        name: {
            c: dict(zip(("mean", "low", "high"), mean_interval(v), strict=True))
            for c, v in row.items()
        }
        for name, row in figures.items()
    }
    report.parts[f"splits, {dataset}, alpha {alpha:g}"] = splits
    if dataset == "digits":
        mean = float(np.mean(figures[DEFAULT]["spearman"]))
        where = f"{dataset}, alpha {alpha:g}"
        exact = float(np.mean(figures["shapley"]["spearman"]))
        why = (
            f"Spearman at alpha {alpha:g}: exact Shapley values from the same"
            f" {AUDITS[dataset]} audits reach {exact:.2f}. What lies above that is the luck of"
            " the audits (see the table by their number), what lies below the price of row sums"
        )
        text = f"{DEFAULT}: Spearman, {where}"
        report.target(text, mean, 0.9, at_least=True, why=why)
        text = f"{DEFAULT}: Spearman less than Shapley's from the same audits by, {where}"
        why = "row sums: exact Shapley values need each site's answers in clear, and rank better"
        report.target(text, exact - mean, 0.02, why=why)


def shown(values: Sequence[float], digits: int = 2) -> str:
    mean, _, high = mean_interval(values)
    return f"{mean:.{digits}f} ± {high - mean:.{digits}f}"


@dataclass(frozen=True, kw_only=True)
class Shrunk(ContributionScheme):
    """The default, drawn towards 0 by how far each site's sum varies with the audits."""

    needs_labels = True

    def contributions(self, answers: AuditedAnswers) -> np.ndarray:
        """Return posterior means."""
        scheme = make_scheme(DEFAULT)
        assert isinstance(scheme, LinearScheme)
        return posterior_mean(scheme.contributions(answers), row_sum_variances(answers, scheme))


def settlings() -> list[Settling]:
    """Return every scheme as it is, without labels where it can, and the default hardened."""

    def without_labels(scheme: ContributionScheme) -> Callable[[AuditedAnswers], np.ndarray]:
        return lambda answers: scheme.contributions(dataclasses.replace(answers, labels=None))

    found = []
    for name in SCHEMES.names():
        if name in ESTIMATORS:
            continue
        scheme = make_scheme(name)
        found.append(Settling(label=name, contributions=scheme.contributions))
        if name in ("linear-ca", "brier-shapley"):
            label = f"{name}, no labels"
            found.append(Settling(label=label, contributions=without_labels(scheme)))

    def by_owner(answers: AuditedAnswers) -> np.ndarray:
        clusters = owner_clusters(answers.owners or range(answers.n_sites))
        return split_within(make_scheme(DEFAULT).contributions(answers), clusters)

    hardened = Quotient(Shrunk()).contributions
    found += [
        Settling(label=GROUPED, contributions=Quotient(make_scheme(DEFAULT)).contributions),
        Settling(label=HARDENED, contributions=hardened),
        Settling(label=OWNERS, contributions=hardened, knows_owners=True),
        Settling(label=PROTECTED, contributions=by_owner, knows_owners=True),
    ]
    return found


def attackers(report: Report, dataset: str, alpha: float, seeds: range) -> list[PaymentCell]:
    """Print what every cheat pays under every scheme, and what it costs the ensemble."""
    stages = []
    for seed in seeds:
        here = federation(dataset, ATTACKED_SITES, alpha, seed)
        stages.append(Stage(answers=here.held_out, audits_t=here.audits_t))
    cells = payment_table(settlings(), [make_cheat(name) for name in CHEATS.names()], stages)
    where = f"{dataset}, {ATTACKED_SITES} sites, alpha {alpha:g}, {AUDITS[dataset]} audits"
    riders = [cell for cell in cells if not cell.has_model]
    print(f"\n## {where}: free riders' share of the pot (an equal share is 0.143)\n")
    print(markdown_payment_table(riders, figure="share"))
    print(f"\n## {where}: pay for cheating over pay for honest work\n")
    print(markdown_payment_table([cell for cell in cells if cell.has_model]))
    print(f"\n## {where}: accuracy that the ensemble loses\n")
    harms = [dataclasses.replace(c, settling="all") for c in cells if c.settling == "equal"]
    print(markdown_payment_table(harms, figure="harm"))
    print("\nWhere a cheat pays more than honest work (bold above), and why:\n")
    print("\n".join(f"- {line}" for line in explained(cells)))
    report.parts[f"attackers, {dataset}, alpha {alpha:g}"] = [cell.to_dict() for cell in cells]
    return cells


def judge_attackers(report: Report, where: str, cells: Sequence[PaymentCell]) -> None:
    """Hold the default against the targets."""
    mine = {c.cheat: c for c in cells if c.settling == HARDENED}
    outside = {n: c for n, c in mine.items() if not c.has_model and not make_cheat(n).within_round}
    inside = {n: c for n, c in mine.items() if not c.has_model and make_cheat(n).within_round}
    for kind, group, why in (
        ("free riders that see no answer of the round", outside, USUAL_CLASS),
        ("free riders that see answers of the round (stopped by sealing alone)", inside, COPIES),
    ):
        worst = max(float(np.mean(cell.share)) for cell in group.values())
        report.target(f"{where}: largest share, {kind}", worst, FREE_RIDER_SHARE, why=why)
    known, protected = (
        next(c for c in cells if c.settling == label and c.cheat == "clones")
        for label in (OWNERS, PROTECTED)
    )
    for text, cell in (
        ("clone gain, quotient by answers", mine["clones"]),
        ("clone gain, owners known", known),
        ("clone gain, row sums and owners known", protected),
        ("disguised clone gain, quotient by answers", mine["disguised-clones"]),
    ):
        report.target(f"{where}: {text}", float(np.mean(cell.gain)), 1.05, why=DISGUISE)
    paying = [
        n for n, c in mine.items() if c.verdict == "attack" and not make_cheat(n).within_round
    ]
    text = f"{where}: cheats that pay more than honest work ({', '.join(paying) or 'none'})"
    report.target(text, float(len(paying)), 0.0, why=DISGUISE)


def sweeps(report: Report, seeds: range) -> None:
    """Print the agreement of row sums by number of audits, and by noise on what is opened."""
    rows: dict[tuple[str, float, str, float], list[float]] = {}
    for alpha, seed in itertools.product((0.1, 0.5), seeds):
        here = federation("digits", 5, alpha, seed)
        whole = merit(here.held_out)
        rng = np.random.default_rng([seed, 7])
        order = rng.permutation(here.held_out.n_queries)
        for n_audits in (30, 50, 100, 200, 300, here.held_out.n_queries):
            some = np.sort(order[:n_audits])
            few = AuditedAnswers(
                probabilities_ktc=here.probabilities_knc[:, some], labels=here.labels_n[some]
            )
            for name in SWEPT:
                values = make_scheme(name).contributions(few)
                key = ("audits", float(n_audits), name, alpha)
                rows.setdefault(key, []).append(spearman(whole, values))
        for name, times in itertools.product(SWEPT, (0.0, 0.5, 1.0, 2.0, 4.0, 8.0)):
            scheme = make_scheme(name)
            weights = scheme.weights(here.audited.public())
            # The most that a site's sum moves when it answers one audit otherwise.
            reach = float(np.ptp(weights, axis=1).max())
            values = scheme.contributions(here.audited)
            for _ in range(20):
                noisy = values + rng.normal(0.0, times * reach, len(values))
                rows.setdefault(("noise", times, name, alpha), []).append(spearman(whole, noisy))
    for kind, title in (
        ("audits", "number of audits"),
        ("noise", "noise on each released sum, in the most that one answer can move it"),
    ):
        print(f"\n## Spearman with labelled Shapley by {title} (digits, 5 sites)\n")
        heads = [(name, alpha) for name in SWEPT for alpha in (0.1, 0.5)]
        print(f"| {kind} | " + " | ".join(f"{n}, alpha {a:g}" for n, a in heads) + " |")
        print("|---" * (len(heads) + 1) + "|")
        for level in dict.fromkeys(key[1] for key in rows if key[0] == kind):
            cells = []
            for name, alpha in heads:
                drawn = np.array(rows[kind, level, name, alpha]).reshape(len(seeds), -1)
                # Draws of the noise for one seed are one measurement: they share models.
                cells.append(shown(drawn.mean(axis=1).tolist()))
            print(f"| {level:g} | {' | '.join(cells)} |")
    report.parts["sweeps"] = [
        {"kind": k, "level": level, "scheme": name, "alpha": alpha, "spearman": float(np.mean(v))}
        for (k, level, name, alpha), v in rows.items()
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=30)
    parser.add_argument("--quick", action="store_true", help="three seeds, fewer repeats")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    start = time.perf_counter()
    seeds = range(3 if options.quick else options.seeds)
    few = seeds[:ATTACK_SEEDS]
    report = Report()
    print(
        f"Logistic regression a site; {len(seeds)} seeds, {len(few)} for attacks, each another"
        " split, partition and draw of audits; mean ± half of the 95 % interval over seeds"
        " (Student). The row of exact Shapley values from the same audits says what the luck of"
        " the audits costs even these."
    )
    exactness(report, quick=options.quick)
    for dataset, alpha in (("digits", 0.1), ("digits", 0.5), ("breast_cancer", 0.1)):
        correlations(report, dataset, alpha, seeds, n_sites=5)
    for dataset, alpha in (("digits", 0.5), ("digits", 0.1), ("breast_cancer", 0.1)):
        cells = attackers(report, dataset, alpha, few)
        judge_attackers(report, f"{dataset}, alpha {alpha:g}", cells)
    sweeps(report, seeds)
    report.print_targets()
    seconds = time.perf_counter() - start
    print(f"\n{seconds:.0f} s")
    if options.json:
        plain = {
            "seconds": seconds,
            "seeds": len(seeds),
            "attack_seeds": len(few),
            "targets": report.targets,
        }
        options.json.write_text(json.dumps(plain | report.parts, indent=2))


if __name__ == "__main__":
    main()
