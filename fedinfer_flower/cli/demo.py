"""The main job: five institutions answer together, under encryption, on Flower's engine."""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from fedinfer_flower.ensemble.base import RULES, Disclosure
from fedinfer_flower.errors import InvalidValueError, QueryError
from fedinfer_flower.privacy.base import PROTECTIONS, Protection, make_protection
from fedinfer_flower.privacy.legality import refusal, require_legal
from fedinfer_flower.querier import Querier
from fedinfer_flower.query import Prediction
from fedinfer_flower.simulation.data import Dataset, load_dataset
from fedinfer_flower.simulation.engine import QUIET_ENVIRONMENT
from fedinfer_flower.simulation.federation import FederationPlan, Step
from fedinfer_flower.simulation.institution import write_institutions
from fedinfer_flower.simulation.partition import partition_rows
from fedinfer_flower.strategies.handover import write_whole
from fedinfer_flower.wire.directory import Directory
from fedinfer_flower.wire.documents import CombinedAnswer, QueryJob
from fedinfer_flower.wire.sealed_job import SealedJob

__all__ = ["DemoOptions", "DemoRun", "StepOutcome", "run_federation"]

Options = dict[str, str | int | float | bool]

DP_EPSILON: Final = 8.0
"""Epsilon of one query row in the demo's `dp` round: loose, and shown as such."""


@dataclass(frozen=True, kw_only=True)
class DemoOptions:
    """What `fedinfer demo` was asked for."""

    dataset: str = "digits"
    n_sites: int = 5
    alpha: float = 0.1
    rule: str = "auto"
    protect: str = "secagg"
    seed: int = 0

    def command(self) -> str:
        """Return the command that gives the same run."""
        parts = ["fedinfer", "demo", "--dataset", self.dataset, "--sites", str(self.n_sites)]
        parts += ["--alpha", f"{self.alpha:g}", "--rule", self.rule, "--protect", self.protect]
        return shlex.join([*parts, "--seed", str(self.seed)])


@dataclass(frozen=True, kw_only=True, eq=False)
class StepOutcome:
    """One step's opened answer with its report."""

    step: Step
    prediction: Prediction
    report: dict[str, Any]

    @property
    def seconds(self) -> float:
        """Seconds of the query, without onboarding."""
        return float(self.report["seconds"])

    @property
    def bytes_per_query(self) -> float:
        """Reply bytes of all sites for one query."""
        return float(self.report["reply_bytes_per_query"])


@dataclass(kw_only=True, eq=False)
class DemoRun:
    """A federation that has answered: inputs of the report."""

    options: DemoOptions
    folder: Path
    dataset: Dataset
    outcomes: dict[str, StepOutcome] = field(default_factory=dict)
    seconds_total: float = 0.0


def run_federation(
    options: DemoOptions, folder: Path, *, progress: Callable[[int, int, str], None]
) -> DemoRun:
    """Prepare institutions, ask all steps in a process of its own, open the answers here.

    Raises
    ------
    QueryError
        If the federation's process fails; the end of its log is in the text.
    """
    start = time.monotonic()
    dataset = load_dataset(options.dataset, seed=options.seed)
    rows = partition_rows(
        dataset.train_labels, n_sites=options.n_sites, alpha=options.alpha, seed=options.seed
    )
    write_institutions(folder / "sites", dataset, rows, seed=options.seed)
    run = DemoRun(options=options, folder=folder, dataset=dataset)
    steps = demo_steps(options)
    # The keys are made here and stay here: the federation is another process.
    queriers = {step.label: Querier(protection=_protection(step)) for step in steps}
    FederationPlan(n_sites=options.n_sites, share_counts="counts", steps=steps).write(folder)

    def seal() -> None:
        directory = Directory.from_bytes((folder / "directory.fi").read_bytes())
        for step in steps:
            job = _job(queriers[step.label], step, dataset, directory)
            (folder / f"{step.label}.job").write_bytes(job.to_bytes())
        write_whole(folder / "jobs.ready", b"")

    _run_child(folder, progress, seal)
    for step in steps:
        combined = CombinedAnswer.from_bytes((folder / f"{step.label}.answer").read_bytes())
        run.outcomes[step.label] = StepOutcome(
            step=step,
            prediction=queriers[step.label].open(combined),
            report=json.loads((folder / f"{step.label}.report.json").read_text()),
        )
    run.seconds_total = time.monotonic() - start
    return run


def _job(
    querier: Querier, step: Step, dataset: Dataset, directory: Directory
) -> QueryJob | SealedJob:
    if not step.sealed:
        return querier.ask(dataset.test_inputs, clear=True, classes=dataset.classes)
    return querier.ask(
        dataset.test_inputs, directory=directory, classes=dataset.classes, rule=step.rule
    )


def demo_steps(options: DemoOptions) -> tuple[Step, ...]:
    """Return the steps: every rule in clear, then the chosen rule under each protection.

    Raises
    ------
    IncompatibleProtection
        If the chosen rule cannot work under the protection asked for.
    InvalidValueError
        If the protection needs more sites.
    """
    chosen = _protection(Step(label="", rule="", protection=options.protect))
    if options.rule != "auto":
        require_legal(RULES.get(options.rule)(), chosen)
    # A worker of the engine trains a site's model when it first serves that site: a few
    # queries that are not counted, so that the figures below are of resident models.
    steps = [Step(label=f"warm-up-{i}", rule="mean-probability") for i in range(3)]
    steps += [Step(label=f"rule-{name}", rule=name) for name in RULES.names()]
    if options.n_sites < chosen.min_cohort:
        raise InvalidValueError(
            f"{options.protect!r} needs at least {chosen.min_cohort} sites in a sum",
            hint=f"fedinfer demo --sites {chosen.min_cohort}",
        )
    wanted = [
        name
        for name in dict.fromkeys(["plain", "secagg", "he", "secagg+dp", "dp", options.protect])
        if PROTECTIONS.get(name).min_cohort <= options.n_sites
    ]
    for name in wanted:
        step = Step(
            label=f"protect-{name}",
            rule=options.rule,
            protection=name,
            options={"epsilon": DP_EPSILON} if name.endswith("+dp") else {},
            sealed=True,
        )
        if name == "dp":
            steps += _dp_steps(options)
        elif options.rule == "auto" or not refusal(RULES.get(options.rule)(), _protection(step)):
            steps.append(step)
    return tuple(steps)


def _dp_steps(options: DemoOptions) -> list[Step]:
    gaussian: Options = {"mechanism": "gaussian", "epsilon": DP_EPSILON}
    response: Options = {"mechanism": "randomised-response", "epsilon": DP_EPSILON}
    steps = [
        Step(label="protect-dp", rule=options.rule, protection="dp", options=gaussian, sealed=True),
        Step(
            label="protect-dp-votes",
            rule="majority-vote",
            protection="dp",
            options=response,
            sealed=True,
        ),
    ]
    rule = None if options.rule == "auto" else RULES.get(options.rule)()
    return [s for s in steps if rule is None or not refusal(rule, _protection(s))] or steps[1:]


def coordinator_sees(protection: str) -> str:
    """Return in words what the coordinator is shown of the sites' answers."""
    return {
        "plain": "sealed answers, which the querier opens one by one",
        "secagg": "masked vectors; only their sum can be opened, by the querier",
        "secagg+dp": "masked vectors; only their noisy sum can be opened, by the querier",
        "he": "ciphertexts; the querier's key opens only what it is given",
        "he+dp": "ciphertexts; the querier opens a noisy sum",
        "dp": "sealed answers; the querier opens them one by one, each with its site's noise",
    }.get(protection, "what its page in the docs says")


def is_sum_rule(name: str) -> bool:
    """Return whether the coordinator needs only the sum under this rule."""
    return RULES.get(name).discloses is Disclosure.SUM


def _protection(step: Step) -> Protection:
    return make_protection(step.protection, step.options)


def _run_child(
    folder: Path, progress: Callable[[int, int, str], None], seal: Callable[[], None]
) -> None:
    environment = os.environ | QUIET_ENVIRONMENT | {"FLWR_HOME": str(folder / "flwr-home")}
    with (folder / "federation.log").open("wb") as log:
        child = subprocess.Popen(  # noqa: S603  our own module, our own interpreter
            [sys.executable, "-m", "fedinfer_flower.simulation.federation", str(folder)],
            stdout=subprocess.PIPE,
            stderr=log,
            env=environment,
            text=True,
        )
        last = "starting Flower's simulation engine"
        progress(0, 1, last)
        try:
            for line in child.stdout or ():
                if line.startswith("{"):
                    event = json.loads(line)
                    if event["label"] == "sealing queries":
                        seal()
                    progress(event["done"], event["of"], event["label"])
            code = child.wait()
        finally:
            if child.poll() is None:
                child.terminate()
                child.wait(timeout=30)
    plan = FederationPlan.read(folder)
    missing = [s.label for s in plan.steps if not (folder / f"{s.label}.report.json").exists()]
    if code != 0 or missing:
        tail = (folder / "federation.log").read_text(errors="replace").splitlines()[-15:]
        raise QueryError(
            f"the federation's process ended with code {code}, {len(missing)} answers missing:\n"
            + "\n".join(tail),
            hint="run 'fedinfer doctor'; the whole log is federation.log in the report's folder",
        )
