"""From a federation's answers to the figures of the refinement report."""

from __future__ import annotations

import platform
from collections import Counter
from collections.abc import Iterable, Mapping
from importlib.metadata import PackageNotFoundError, version
from typing import Any, Final

from fedinfer_flower.cli.refine_run import RefineOutcome, RefineRun
from fedinfer_flower.cli.refine_scores import HELPED, TASKS, Scores, share
from fedinfer_flower.cli.refine_steps import CODECS, MEDIA
from fedinfer_flower.cli.refine_words import (
    DEFAULT_CODEC,
    MEASURED,
    TITLE,
    WHO_LEARNS,
    title_of,
)
from fedinfer_flower.kv.share import ShareSpec
from fedinfer_flower.simulation.facts.checkpoints import NAMES
from fedinfer_flower.simulation.facts.families import FAMILIES

__all__ = ["results_of"]

_ANSWERABLE: Final = ("own", *HELPED)
_CHANCE: Final = 1 / 12
_KEPT: Final = ("alone", "text-both", "cache-both", "cache-gated")


def results_of(run: RefineRun) -> dict[str, Any]:
    """Return the JSON that table and report are made of.

    Parameters
    ----------
    run : RefineRun

    Returns
    -------
    results : dict
        Shares, intervals, seconds and bytes: no question, no answer.
    """
    options, scores = run.options, Scores(run)
    return {
        "title": TITLE,
        "command": options.command(),
        "seed": options.seed,
        "quick": options.quick,
        "questions_each": options.each,
        "n_questions": len(run.questions),
        "receivers": list(options.receivers),
        "media": list(options.media),
        "in_process": options.in_process,
        "seconds_preparing": run.seconds_preparing,
        "seconds_total": run.seconds_total,
        "trained": list(run.prepared.trained),
        "versions": _versions(),
        "models": [_model(run, place) for place in range(len(NAMES))],
        "fusers": _fusers(run),
        "gates": _gates(run),
        "steps": [_step(run, scores, label) for label in scores.labels],
        "by_sharers": _by_sharers(scores, options.media),
        "pairs": _pairs(run, scores),
        "kept": _kept(run, scores),
        "control": _control(scores),
        "codecs": _codecs(run, scores),
        "plans": _plans(run),
        "who_learns": [dict(line) for line in WHO_LEARNS],
        "measured": list(MEASURED),
        "warnings": _warnings(run),
    }


def _model(run: RefineRun, place: int) -> dict[str, Any]:
    family = FAMILIES[place]
    tokens = f"{family.piece_length}-letter pieces" if family.piece_length else "whole words"
    return {
        "name": family.name,
        "architecture": family.architecture,
        "layers": family.layers,
        "width": family.hidden_size,
        "kv_heads": family.kv_heads,
        "head_size": family.head_size,
        "tokens": tokens,
        "parameters": run.prepared.parameters[family.name],
    }


def _fusers(run: RefineRun) -> list[dict[str, Any]]:
    names = ("kind", "parameters", "steps", "seconds", "reading_seconds")
    return [
        {"sharer": sharer, "receiver": receiver, **{name: card[name] for name in names}}
        for (sharer, receiver), card in run.prepared.fuser_cards.items()
    ]


def _gates(run: RefineRun) -> list[dict[str, Any]]:
    return [
        {
            "receiver": receiver,
            "seconds": card["seconds"],
            "margin": card["margin"],
            "allowed_harm": card["options"]["allowed_harm"],
            "confidence": card["options"]["confidence"],
        }
        for receiver, card in run.prepared.gate_cards.items()
    ]


def _step(run: RefineRun, scores: Scores, label: str) -> dict[str, Any]:
    outcome = run.outcomes[label]
    helped = [answer.helped for answer in scores.of(label)]
    return {
        "label": label,
        "title": title_of(label),
        "medium": outcome.step.medium,
        "receivers": len(outcome.step.receivers),
        "sharers": _sharers_each(outcome),
        "answerable": share(scores.of(label, task=_ANSWERABLE)),
        "tasks": {task: share(scores.of(label, task=task)) for task in TASKS},
        "helped": sum(helped) / len(helped) if helped else None,
        **_cost(run, outcome),
    }


def _sharers_each(outcome: RefineOutcome) -> int:
    """Return how many sharers a receiver of a step has."""
    step = outcome.step
    return len([name for name in step.sharers if name != step.receivers[0]])


def _cost(run: RefineRun, outcome: RefineOutcome) -> dict[str, Any]:
    report, asked = outcome.report, len(run.questions)
    receivers = len(outcome.step.receivers)
    shared = [o for o in report["outcomes"] if o["sharer"] != o["receiver"] and o["payload_bytes"]]
    pairs = {(o["receiver"], o["sharer"]) for o in shared}
    body = sum(o["payload_bytes"] for o in shared) / (asked * len(pairs)) if pairs else None
    return {
        "seconds": report["seconds"],
        "seconds_per_question": report["seconds"] / (asked * receivers),
        # What a sharer sends to a receiver for one question, in its seal.
        "body_bytes": body,
        "wire_bytes": (report["request_bytes"] + report["reply_bytes"]) / (asked * receivers),
        "help_seconds": _median(o["seconds"] for o in shared),
        "failures": dict(Counter(o["error_code"] for o in report["outcomes"] if o["error_code"])),
    }


def _by_sharers(scores: Scores, media: Iterable[str]) -> list[dict[str, Any]]:
    """Return accuracy by number of sharers: none, one (each in turn), all others."""
    none = share(scores.of("alone", task=_ANSWERABLE))
    rows = [{"medium": "alone", "sharers": 0, **none}]
    for medium in media:
        singles = [f"{medium}-{name}" for name in NAMES]
        rows.append(
            {"medium": medium, "sharers": 1, **share(scores.of(*singles, task=_ANSWERABLE))}
        )
        both = scores.of(f"{medium}-both", task=_ANSWERABLE)
        rows.append({"medium": medium, "sharers": 2, **share(both)})
    if "cache-gated" in scores:
        gated = share(scores.of("cache-gated", task=_ANSWERABLE))
        rows.append({"medium": "cache, gated", "sharers": 2, **gated})
    return rows


def _pairs(run: RefineRun, scores: Scores) -> list[dict[str, Any]]:
    """Return what each sharer adds to each receiver, on what that sharer holds."""
    rows = []
    for receiver in run.options.receivers:
        for sharer in NAMES:
            if sharer == receiver:
                continue
            only: dict[str, Any] = {"receiver": receiver, "holder": sharer, "task": HELPED}
            ways = {"alone": share(scores.of("alone", **only))}
            for medium in run.options.media:
                ways[medium] = share(scores.of(f"{medium}-{sharer}", **only))
            rows.append({"sharer": sharer, "receiver": receiver, "ways": ways})
    return rows


def _kept(run: RefineRun, scores: Scores) -> list[dict[str, Any]]:
    """Return what each receiver keeps of what it knew, and of saying that it does not know."""
    return [
        {
            "receiver": receiver,
            "task": task,
            "ways": {
                label: share(scores.of(label, receiver=receiver, task=task))
                for label in _KEPT
                if label in scores
            },
        }
        for task in ("own", "nobody")
        for receiver in run.options.receivers
    ]


def _control(scores: Scores) -> list[dict[str, Any]]:
    if "control" not in scores:
        return []
    return [
        {
            "task": task,
            "chance": _CHANCE,
            "alone": share(scores.of("alone", task=task)),
            "cache": share(scores.of("cache-both", task=task)),
            "control": share(scores.of("control", task=task)),
        }
        for task in HELPED
    ]


def _codecs(run: RefineRun, scores: Scores) -> list[dict[str, Any]]:
    """Return size and accuracy by encoding, and for text."""
    if "codec-bf16" not in scores:
        return []
    travels = ShareSpec()
    tokens = travels.last + travels.decode
    wanted = {codec: f"codec-{codec}" for codec in CODECS} | {DEFAULT_CODEC: "cache-gated"}
    rows = [
        {"codec": codec, "tokens": tokens, **_sized(run, scores, label, tokens)}
        for codec, label in wanted.items()
    ]
    if "text-both" in scores:
        rows.append({"codec": "text", "tokens": None, **_sized(run, scores, "text-both", None)})
    return rows


def _sized(run: RefineRun, scores: Scores, label: str, tokens: int | None) -> dict[str, Any]:
    body = _cost(run, run.outcomes[label])["body_bytes"]
    per_token = None if tokens is None or body is None else body / tokens
    return {
        "body_bytes": body,
        "bytes_per_token": per_token,
        **share(scores.of(label, task=_ANSWERABLE)),
    }


def _plans(run: RefineRun) -> list[dict[str, Any]]:
    """Return how often the planner chose which medium, and a reason, with caches in it if any."""
    if "auto" not in run.outcomes:
        return []
    plans = run.outcomes["auto"].report["plans"]
    counts = Counter(plan["medium"] for plan in plans)
    # An institution that appears twice has no fuser for itself: there caches are no choice.
    plans = sorted(plans, key=lambda plan: "cache" in plan["reason"])
    last = {plan["medium"]: plan["reason"] for plan in plans}
    return [
        {"medium": medium, "count": count, "reason": last[medium]}
        for medium, count in counts.most_common()
    ]


def _median(values: Iterable[float]) -> float | None:
    ordered = sorted(values)
    return ordered[len(ordered) // 2] if ordered else None


def _warnings(run: RefineRun) -> list[str]:
    found = []
    for label, outcome in run.outcomes.items():
        codes = Counter(o["error_code"] for o in outcome.report["outcomes"] if o["error_code"])
        said = ", ".join(f"{code} ({count})" for code, count in sorted(codes.items()))
        if said or outcome.report["degraded"]:
            found.append(f"{title_of(label)}: not everybody helped or answered: {said}")
    found += [
        f"the gate of {receiver} gained nothing within its limit: it always answers alone"
        for receiver, card in run.prepared.gate_cards.items()
        if card["margin"] is None
    ]
    if run.options.quick:
        found.append("a quick run: few questions, short trainings, one receiver")
    if run.options.in_process:
        found.append("sites were threads of one process, not workers of Flower's engine")
    if run.options.media != MEDIA:
        found.append(f"only {', '.join(run.options.media)} was compared")
    return found


def _versions() -> Mapping[str, str]:
    found = {"python": platform.python_version()}
    for name in ("fedinfer-flower", "flwr", "numpy", "torch", "transformers", "ray"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "not installed"
    return found
