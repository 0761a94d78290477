"""From a federation's answers to the figures of the report."""

from __future__ import annotations

import platform
from importlib.metadata import PackageNotFoundError, version
from typing import Any, Final

import numpy as np

from fedinfer_flower.cli.demo import (
    DemoRun,
    StepOutcome,
    coordinator_sees,
    is_sum_rule,
)
from fedinfer_flower.cli.demo_privacy import privacy_results
from fedinfer_flower.cli.demo_rewards_results import rewards_results
from fedinfer_flower.cli.demo_selection import frontier_results, selectors_of
from fedinfer_flower.reporting.intervals import wilson_interval
from fedinfer_flower.simulation.data import Dataset
from fedinfer_flower.simulation.evaluation import (
    SoloAnswers,
    central_bound,
    reliability,
    rules_in_clear,
    solo_answers,
)
from fedinfer_flower.simulation.institution import write_institutions
from fedinfer_flower.simulation.joint_sites import clear_mean_logits

__all__ = ["FEDSEI_RULES", "results_of"]

FEDSEI_RULES: Final = (
    "consensus",
    "entropy-weighted",
    "hybrid",
    "majority-vote",
    "mean-logit",
    "mean-probability",
    "spectral",
    "tta-cosine",
    "tta-js",
    "tta-kl",
    "tta-l2",
    "tta-soft",
)
"""Rules that FedSEI (arXiv 2603.02214) names."""

_ALPHA_RULES: Final = (
    "open-set-class-share",
    "class-share",
    "entropy-weighted",
    "mean-probability",
    "majority-vote",
    "spectral",
)
_ALPHAS: Final = (0.1, 0.5, 1000.0)


def results_of(run: DemoRun) -> dict[str, Any]:
    """Return the JSON that table and report are made of."""
    options, dataset = run.options, run.dataset
    solo = solo_answers(run.folder / "sites", dataset, options.n_sites)
    truth = dataset.test_labels
    n = len(truth)
    kind, central_hits = central_bound(dataset, seed=options.seed)
    hits = solo.hits(truth)
    best = int(hits.argmax())
    chosen = run.outcomes.get(f"protect-{options.protect}") or next(
        run.outcomes[label] for label in run.outcomes if label.startswith("protect-")
    )
    confidence = chosen.prediction.probabilities.max(axis=1)
    bins, ece = reliability(confidence, chosen.prediction.labels == truth)
    return {
        "title": "Private ensemble of local models",
        "dataset": options.dataset,
        "seed": options.seed,
        "alpha": options.alpha,
        "n_sites": options.n_sites,
        "classes": list(dataset.classes),
        "n_queries": n,
        "command": options.command(),
        "versions": _versions(),
        "seconds_total": run.seconds_total,
        "rule": chosen.report["rule"],
        "rule_reason": ". ".join([chosen.report["rule_reason"], *_against_clear(run)]),
        "protection": options.protect,
        "sites": [_site(solo, i, hits, n) for i in range(options.n_sites)],
        "best_site": {"name": solo.names[best], **_accuracy(int(hits[best]), n)},
        "mean_site": _mean_site(hits, n),
        "central": {"kind": kind, **_accuracy(central_hits, n)},
        "rules": [
            _rule(outcome, truth)
            for label, outcome in run.outcomes.items()
            if label.startswith("rule-")
        ],
        "protections": [
            _protection(outcome, truth, detail=_detail(run, label, outcome))
            for label, outcome in run.outcomes.items()
            if label.startswith("protect-")
        ],
        "by_alpha": [] if options.quick else _by_alpha(run, central_hits / n),
        "reliability": {"bins": bins, "ece": ece},
        **privacy_results(run, chosen),
        "examples": _examples(chosen, solo, dataset),
        "warnings": _warnings(run),
        **_further(run, chosen, solo),
    }


def _further(run: DemoRun, chosen: StepOutcome, solo: SoloAnswers) -> dict[str, Any]:
    """Return what ``--rewards`` and ``--selector`` add."""
    options, found = run.options, dict[str, Any]()
    if run.paid is not None:
        found["rewards"] = rewards_results(run.paid, run.ledger, solo, run.dataset, rider=run.rider)
    if run.selection is not None:
        found["selection"] = frontier_results(
            run.folder / "sites",
            run.dataset,
            options.n_sites,
            names=selectors_of(options.selector),
            rule=str(chosen.report["rule"]),
            protect=options.protect,
            seed=options.seed,
        ) | {
            "selector": run.selection.selector.name,
            "sites_asked": run.selection.mean_sites_asked,
            "plan": run.selection.plan,
            "accuracy": chosen.prediction.accuracy(run.dataset.test_labels),
        }
    return found


def _accuracy(right: int, n: int) -> dict[str, float]:
    low, high = wilson_interval(right, n)
    return {"accuracy": right / n, "low": low, "high": high}


def _hits(outcome: StepOutcome, truth: Any) -> int:
    return round(outcome.prediction.accuracy(truth) * len(truth))


def _mean_site(hits: Any, n: int) -> dict[str, float]:
    # The interval of the mean over these sites, whose queries are the same.
    return _accuracy(round(float(hits.mean())), n)


def _site(solo: SoloAnswers, i: int, hits: Any, n: int) -> dict[str, Any]:
    return {
        "name": solo.names[i],
        "kind": solo.kinds[i],
        "n_train": solo.n_train[i],
        "class_counts": solo.class_counts[i].tolist(),
        **_accuracy(int(hits[i]), n),
    }


def _rule(outcome: StepOutcome, truth: Any) -> dict[str, Any]:
    name = outcome.step.rule
    return {
        "name": name,
        "fedsei": name in FEDSEI_RULES,
        "seconds": outcome.seconds,
        "bytes_per_query": outcome.bytes_per_query,
        "discloses": "sum" if is_sum_rule(name) else "scores",
        **_accuracy(_hits(outcome, truth), len(truth)),
    }


def _detail(run: DemoRun, label: str, outcome: StepOutcome) -> str:
    """Return what sets a protected answer apart from others under the same protection."""
    if run.selection is not None and label == run.options.main_label:
        chosen = run.selection
        return f"{chosen.selector.name}: {chosen.mean_sites_asked:.3g} of {run.options.n_sites}"
    # Seconds of sites in one process are not those of Flower's engine.
    in_process = "in one process" if run.options.mode.in_process else ""
    return str(outcome.step.options.get("mechanism", in_process))


def _protection(outcome: StepOutcome, truth: Any, *, detail: str) -> dict[str, Any]:
    first = outcome.report["reports"][0]
    name = outcome.step.protection
    return {
        "name": name,
        "label": f"{name} ({detail})" if detail else name,
        "rule": outcome.report["rule"],
        "seconds": outcome.seconds,
        "bytes_per_query": outcome.bytes_per_query,
        "request_bytes": first["request_bytes"],
        "epsilon_per_query": first["epsilon_per_query"],
        "epsilon_total": outcome.report["epsilon_total"],
        "delta": first["delta_per_query"],
        "key_at_coordinator": first["key_at_coordinator"],
        "coordinator_sees": coordinator_sees(name),
        **_accuracy(_hits(outcome, truth), len(truth)),
    }


def _against_clear(run: DemoRun) -> list[str]:
    """Say how far an answer that hides the query is from the same rule in clear."""
    options = run.options
    label = f"protect-{options.protect}"
    if not options.mode.hides_query or label not in run.outcomes:
        return []
    outcome = run.outcomes[label]
    prediction = outcome.prediction
    if outcome.totals is not None:
        clear = clear_mean_logits(
            run.folder / "sites", run.dataset.test_inputs, n_sites=options.n_sites
        )
        gap = np.abs(clear - outcome.totals).max()
        n_same = int((clear.argmax(axis=1) == prediction.labels).sum())
        how = f"Largest difference to the same mean logits in clear: {gap:.1e};"
    else:
        n_same = int((run.outcomes["protect-plain"].prediction.labels == prediction.labels).sum())
        how = "Against the same rule in clear:"
    return [f"{how} {n_same} of {len(prediction)} labels are the same."]


def _by_alpha(run: DemoRun, central: float) -> list[dict[str, Any]]:
    options, dataset = run.options, run.dataset
    n = len(dataset.test_labels)
    rows = []
    for alpha in sorted({*_ALPHAS, options.alpha}):
        folder = run.folder / f"alpha-{alpha:g}" / "sites"
        parts = options.mode.rows(
            dataset.train_labels, n_sites=options.n_sites, alpha=alpha, seed=options.seed
        )
        write_institutions(folder, dataset, parts, seed=options.seed, kinds=options.mode.kinds)
        solo = solo_answers(folder, dataset, options.n_sites).hits(dataset.test_labels)
        hits = rules_in_clear(folder, dataset, options.n_sites, _ALPHA_RULES)
        rows.append(
            {
                "alpha": alpha,
                "rules": {rule: right / n for rule, right in hits.items()},
                "best_site": float(solo.max()) / n,
                "mean_site": float(solo.mean()) / n,
                "central": central,
            }
        )
    return rows


def _examples(chosen: StepOutcome, solo: SoloAnswers, dataset: Dataset) -> list[dict[str, Any]]:
    # The queries on which the sites disagree most, half of them answered rightly.
    votes = solo.probabilities.argmax(axis=-1)
    right = chosen.prediction.labels == dataset.test_labels
    spread = np.array([len(set(column)) for column in votes.T])
    order = np.argsort(-spread, kind="stable")
    picked = [i for i in order if right[i]][:4] + [i for i in order if not right[i]][:2]
    examples = []
    for i in picked:
        label = int(chosen.prediction.labels[i])
        side = dataset.image_side
        examples.append(
            {
                "pixels": dataset.test_inputs[i].reshape(side, side).tolist() if side else None,
                "truth": dataset.classes[int(dataset.test_labels[i])],
                "joint": dataset.classes[label],
                "joint_probability": float(chosen.prediction.probabilities[i, label]),
                "sites": [
                    {
                        "name": name,
                        "label": dataset.classes[int(votes[k, i])],
                        "probability": float(solo.probabilities[k, i].max()),
                    }
                    for k, name in enumerate(solo.names)
                ],
            }
        )
    return examples


def _warnings(run: DemoRun) -> list[str]:
    found = []
    for label, outcome in run.outcomes.items():
        if outcome.report["degraded"]:
            found.append(f"{label}: a site that was asked is missing from the answer")
        if outcome.report["reports"][0]["key_at_coordinator"]:
            found.append(f"{label}: the coordinator held the key")
    return found


def _versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for name in ("fedinfer-flower", "flwr", "numpy", "scikit-learn", "torch", "tenseal", "ray"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "not installed"
    return found
