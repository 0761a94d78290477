"""Run the federation of `fedinfer refine`: the querier is here, everybody else in a child."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from fedinfer_flower.cli.refine_steps import RefineOptions, plan_sites, plan_steps
from fedinfer_flower.errors import QueryError
from fedinfer_flower.querier.language_querier import LanguageQuerier, OpenedAnswers
from fedinfer_flower.simulation.engine import QUIET_ENVIRONMENT
from fedinfer_flower.simulation.facts.federation import READY, RefinePlan, RefineStep
from fedinfer_flower.simulation.facts.preparation import Prepared, prepare
from fedinfer_flower.simulation.facts.questions import TrialQuestion, trial_questions
from fedinfer_flower.simulation.facts.sites import SitePlan, write_documents
from fedinfer_flower.simulation.facts.world import FactWorld
from fedinfer_flower.strategies.handover import write_whole

__all__ = ["RefineOutcome", "RefineRun", "run_federation", "run_refine"]

Progress = Callable[[int, int, str], None]
_DECODING: Final = {"max_new_tokens": 8}
_BATCH: Final = 60
_WARM_UP: Final = 8
_LOG_LINES: Final = 15


@dataclass(frozen=True, kw_only=True, eq=False)
class RefineOutcome:
    """One step: opened answers, by receiver, and the coordinator's report."""

    step: RefineStep
    answers: Mapping[str, OpenedAnswers]
    report: Mapping[str, Any]


@dataclass(kw_only=True, eq=False)
class RefineRun:
    """A federation that has answered: inputs of table and report."""

    options: RefineOptions
    prepared: Prepared
    sites: tuple[SitePlan, ...]
    questions: list[TrialQuestion]
    outcomes: dict[str, RefineOutcome] = field(default_factory=dict)
    seconds_preparing: float = 0.0
    seconds_total: float = 0.0


def run_refine(
    options: RefineOptions, *, workdir: Path, folder: Path, progress: Progress
) -> RefineRun:
    """Train what is missing, and ask.

    Parameters
    ----------
    options : RefineOptions
    workdir : Path
        Where trained fusers and gates are kept.
    folder : Path
        For this run's files: of sites, sealed jobs, answers.
    progress : callable
        Called with (done, of, what).

    Raises
    ------
    QueryError
        If the federation's process fails; the end of its log is in the text.
    """
    start = time.monotonic()
    prepared = prepare(
        workdir.resolve(), receivers=options.receivers, recipe=options.recipe, progress=progress
    )
    run = RefineRun(
        options=options,
        prepared=prepared,
        sites=plan_sites(options, prepared.gates),
        questions=trial_questions(FactWorld(), options.each, seed=options.seed),
        seconds_preparing=time.monotonic() - start,
    )
    run_federation(run, plan_steps(options), folder, progress)
    run.seconds_total = time.monotonic() - start
    return run


def run_federation(
    run: RefineRun, steps: Sequence[RefineStep], folder: Path, progress: Progress
) -> None:
    """Start the federation in a process of its own, seal every step's questions, open answers."""
    folder.mkdir(parents=True, exist_ok=True)
    write_documents(folder / "sites", run.questions)
    plan = RefinePlan(
        sites=run.sites,
        steps=tuple(steps),
        fusers=str(run.prepared.fusers),
        in_process=run.options.in_process,
    )
    plan.write(folder)
    # The keys are made here and stay here, and so do the right answers.
    querier: list[LanguageQuerier] = []
    _run_child(plan, folder, progress, lambda: querier.append(_seal(run, plan, folder)))
    for step in steps:
        run.outcomes[step.label] = RefineOutcome(
            step=step,
            answers=querier[0].open((folder / f"{step.label}.answer").read_bytes()),
            report=json.loads((folder / f"{step.label}.report.json").read_text()),
        )


def _seal(run: RefineRun, plan: RefinePlan, folder: Path) -> LanguageQuerier:
    """Write the sealed job of every step, and then ``jobs.ready``."""
    cards = [path.read_bytes() for path in sorted(folder.glob("card-*.fi"))]
    querier = LanguageQuerier(cards)
    texts = [question.question for question in run.questions]
    for step in plan.steps:
        warm = step.label.startswith("warm-up")
        job = querier.ask(
            texts[:_WARM_UP] if warm else texts,
            receiver=step.receivers,
            sharers=step.sharers or None,
            allow=step.allow,
            rephrase=step.rephrase,
            decoding=_DECODING,
            batch_size=_BATCH,
        )
        (folder / f"{step.label}.job").write_bytes(job.to_bytes())
    write_whole(folder / "jobs.ready", b"")
    return querier


def _run_child(
    plan: RefinePlan, folder: Path, progress: Progress, seal: Callable[[], None]
) -> None:
    environment = os.environ | QUIET_ENVIRONMENT | {"FLWR_HOME": str(folder / "flwr-home")}
    with (
        (folder / "federation.log").open("wb") as log,
        subprocess.Popen(  # noqa: S603  our own module, our own interpreter
            [sys.executable, "-m", "fedinfer_flower.simulation.facts.federation", str(folder)],
            stdout=subprocess.PIPE,
            stderr=log,
            env=environment,
            text=True,
        ) as child,
    ):
        progress(0, len(plan.steps), "starting Flower's simulation engine")
        try:
            for line in child.stdout or ():
                if line.startswith("{"):
                    event = json.loads(line)
                    if event["label"] == READY:
                        seal()
                    progress(event["done"], event["of"], event["label"])
            code = child.wait()
        finally:
            if child.poll() is None:
                child.terminate()
                child.wait(timeout=30)
    missing = [s.label for s in plan.steps if not (folder / f"{s.label}.report.json").exists()]
    if code != 0 or missing:
        tail = (folder / "federation.log").read_text(errors="replace").splitlines()[-_LOG_LINES:]
        raise QueryError(
            f"the federation's process ended with code {code}, {len(missing)} answers missing:\n"
            + "\n".join(tail),
            hint="run 'fedinfer doctor'; the whole log is federation.log in the report's folder",
        )
