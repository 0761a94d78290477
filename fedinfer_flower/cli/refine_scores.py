"""Right and wrong answers of a refinement, counted by step, receiver, task and holder."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from fedinfer_flower.cli.refine_run import RefineOutcome, RefineRun
from fedinfer_flower.reporting.intervals import wilson_interval
from fedinfer_flower.simulation.facts.prompts import FactPrompts
from fedinfer_flower.simulation.facts.world import FactWorld

__all__ = ["HELPED", "TASKS", "Answered", "Scores", "share"]

HELPED = ("fact", "doc1", "doc3")
"""Tasks on which a receiver needs help."""

TASKS = ("own", *HELPED, "nobody")


@dataclass(frozen=True, kw_only=True)
class Answered:
    """One answer of one receiver, scored.

    Parameters
    ----------
    receiver : str
        The institution, whatever the settings of its site.
    task : str
    holder : str
        Institution that can answer; empty if none.
    right : bool
    helped : bool
        Whether the answer rests on a sharer.
    """

    receiver: str
    task: str
    holder: str
    right: bool
    helped: bool


class Scores:
    """All answers of a run.

    Parameters
    ----------
    run : RefineRun
    """

    def __init__(self, run: RefineRun) -> None:
        families = {site.name: site.family for site in run.sites}
        prompts = FactPrompts(FactWorld().words)
        self._found: dict[str, list[Answered]] = {}
        for label, outcome in run.outcomes.items():
            if not label.startswith("warm-up"):
                self._found[label] = list(_answered(run, outcome, families, prompts.answer_in))

    def __contains__(self, label: str) -> bool:
        return label in self._found

    @property
    def labels(self) -> list[str]:
        """Labels of the steps that count, in their order."""
        return list(self._found)

    def of(self, *labels: str, **only: str | tuple[str, ...]) -> list[Answered]:
        """Return answers of some steps whose fields are as asked for, or among them."""

        def fits(answered: Answered) -> bool:
            return all(
                getattr(answered, name) in (wanted if isinstance(wanted, tuple) else (wanted,))
                for name, wanted in only.items()
            )

        return [a for label in labels for a in self._found.get(label, []) if fits(a)]


def share(answers: Iterable[Answered]) -> dict[str, Any]:
    """Return the share of right answers with its 95 % interval; None where there are none."""
    given = list(answers)
    right, n = sum(a.right for a in given), len(given)
    low, high = wilson_interval(right, n)
    return {"n": n, "accuracy": right / n if n else None, "low": low, "high": high}


def _answered(
    run: RefineRun,
    outcome: RefineOutcome,
    families: dict[str, str],
    answer_in: Callable[[str], str],
) -> Iterable[Answered]:
    for site, opened in outcome.answers.items():
        family = families[site]
        for question, text, used in zip(run.questions, opened.texts, opened.used, strict=True):
            task = question.task(family)
            if task is None:
                continue
            yield Answered(
                receiver=family,
                task=task,
                holder=question.holder,
                # No answer is a wrong one.
                right=text is not None and answer_in(text) == question.answer,
                helped=bool(used),
            )
