"""What the demo shows of privacy: accuracy by epsilon, the epsilon meter, who learns what."""

from __future__ import annotations

from typing import Any, Final

from fedinfer_flower.cli.demo import DP_EPSILON, DemoRun, StepOutcome
from fedinfer_flower.ensemble.base import Disclosure, make_rule
from fedinfer_flower.privacy.accountant import Accountant
from fedinfer_flower.privacy.base import PROTECTIONS, ScorePlan, make_protection
from fedinfer_flower.privacy.legality import refusal
from fedinfer_flower.receipts.disclosure import MODES, disclosures
from fedinfer_flower.reporting.intervals import wilson_interval
from fedinfer_flower.simulation.evaluation import protections_on_local_grid

__all__ = ["privacy_results"]

_EPSILONS: Final = (0.5, 1.0, 2.0, 4.0, 8.0, 16.0, 32.0)
_METER_POINTS: Final = (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000)
_METER_CAP: Final = 16.0
"""Drawn as an example of a site's cap; the demo's sites have no budget."""


def privacy_results(run: DemoRun, chosen: StepOutcome) -> dict[str, Any]:
    """Return the privacy part of a report's figures."""
    return {
        "by_epsilon": [] if run.options.quick else _by_epsilon(run, chosen),
        "epsilon_reference": _reference(run, chosen),
        "epsilon_meter": _meter(run, chosen),
        "who_learns": _who_learns(chosen),
        "sealed": chosen.step.sealed,
    }


def _sum_rule(chosen: StepOutcome) -> str:
    """Return the rule of the run, or one that noise can be added to the sum of."""
    rule = make_rule(chosen.report["rule"], {})
    noisy = make_protection("secagg+dp", {})
    if rule.discloses is Disclosure.SUM and not refusal(rule, noisy):
        return rule.name
    return "mean-probability"


def _by_epsilon(run: DemoRun, chosen: StepOutcome) -> list[dict[str, Any]]:
    rule = _sum_rule(chosen)
    n = len(run.dataset.test_labels)
    points: list[dict[str, Any]] = []
    for name in ("secagg+dp", "dp"):
        protections = [make_protection(name, {"epsilon": epsilon}) for epsilon in _EPSILONS]
        if run.options.n_sites < protections[0].min_cohort:
            continue
        hits = protections_on_local_grid(
            run.folder, run.dataset, run.options.n_sites, rule, protections
        )
        for epsilon, right in zip(_EPSILONS, hits, strict=True):
            low, high = wilson_interval(right, n)
            points.append(
                {
                    "protection": name,
                    "epsilon": epsilon,
                    "accuracy": right / n,
                    "low": low,
                    "high": high,
                }
            )
    return points


def _reference(run: DemoRun, chosen: StepOutcome) -> dict[str, Any] | None:
    outcome = run.outcomes.get(f"rule-{_sum_rule(chosen)}")
    if outcome is None:
        return None
    accuracy = outcome.prediction.accuracy(run.dataset.test_labels)
    return {"label": f"{outcome.step.rule} without noise", "accuracy": accuracy}


def _meter(run: DemoRun, chosen: StepOutcome) -> dict[str, Any]:
    """Return what one site has spent after so many rows, under the run's noise."""
    name = run.options.protect if run.options.protect.endswith("dp") else "secagg+dp"
    options = dict(chosen.step.options) if chosen.step.protection == name else {}
    protection = make_protection(name, options or {"epsilon": DP_EPSILON})
    plan = ScorePlan.for_rule(
        make_rule(_sum_rule(chosen), {}),
        n_classes=len(run.dataset.classes),
        n_sites_max=max(run.options.n_sites, protection.min_cohort),
    )
    given = protection.options()
    delta = float(given["delta"])
    accountant = Accountant(composition="gaussian")
    points = []
    for n_rows in sorted({*_METER_POINTS, len(run.dataset.test_labels)}):
        charge = protection.charge(plan, n_rows)
        if charge is not None:
            points.append({"queries": n_rows, "epsilon": accountant.epsilon(charge, delta)})
    return {
        "protection": name,
        "epsilon_per_query": float(given["epsilon"]),
        "delta": delta,
        "cap": _METER_CAP,
        "points": points,
    }


def _who_learns(chosen: StepOutcome) -> list[dict[str, str]]:
    step = chosen.step
    if step.protection not in MODES:
        return []
    known = step.protection in PROTECTIONS.names()
    options = make_protection(step.protection, step.options).options() if known else {}
    lines = disclosures(step.protection, sealed=step.sealed, options=options)
    return [{"about": line.about, "party": line.party, "learns": line.learns} for line in lines]
