"""The main job: five institutions answer together, under protection, on Flower's engine."""

from __future__ import annotations

import importlib.util
import json
import os
import shlex
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from fedinfer_flower.cli.demo_modes import DemoMode, mode_of
from fedinfer_flower.cli.demo_queriers import DemoQueriers
from fedinfer_flower.cli.demo_rewards import REWARDS_STEP, DemoRewards, PaidOut, require_rewards
from fedinfer_flower.cli.demo_selection import DemoSelection, require_selectors, selectors_of
from fedinfer_flower.ensemble.base import RULES, Disclosure, Evidence
from fedinfer_flower.errors import QueryError
from fedinfer_flower.privacy.base import PROTECTIONS, Protection, make_protection
from fedinfer_flower.privacy.legality import refusal, require_legal
from fedinfer_flower.query import Prediction
from fedinfer_flower.selection.base import make_selector
from fedinfer_flower.simulation.data import Dataset
from fedinfer_flower.simulation.engine import QUIET_ENVIRONMENT
from fedinfer_flower.simulation.federation import (
    ENCRYPTED_QUERY,
    GROUPING,
    MPC,
    SEALING,
    SETTLING,
    FederationPlan,
    Step,
)
from fedinfer_flower.simulation.institution import write_institutions
from fedinfer_flower.simulation.joint_sites import JointSetUp
from fedinfer_flower.simulation.rewards import FreeRider, write_free_rider

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
    quick: bool = False
    rewards: bool = False
    free_rider: bool = True
    selector: str = ""

    @property
    def main_label(self) -> str:
        """Label of the step whose answer is the run's."""
        return f"protect-{self.protect}"

    @property
    def mode(self) -> DemoMode:
        """How the institutions are made under the protection asked for."""
        return mode_of(self.protect)

    def command(self) -> str:
        """Return the command that gives the same run."""
        parts = ["fedinfer", "demo", "--dataset", self.dataset, "--sites", str(self.n_sites)]
        parts += ["--alpha", f"{self.alpha:g}", "--rule", self.rule, "--protect", self.protect]
        parts += ["--seed", str(self.seed)] + ["--quick"] * self.quick
        parts += ["--rewards"] * self.rewards
        parts += ["--no-free-rider"] * (self.rewards and not self.free_rider)
        parts += ["--selector", self.selector] if self.selector else []
        return shlex.join(parts)


@dataclass(frozen=True, kw_only=True, eq=False)
class StepOutcome:
    """One step's opened answer with its report, and the totals where they can be checked."""

    step: Step
    prediction: Prediction
    report: dict[str, Any]
    totals: npt.NDArray[np.float64] | None = None

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
    paid: PaidOut | None = None
    ledger: Mapping[str, Any] = field(default_factory=dict)
    rider: FreeRider | None = None
    selection: DemoSelection | None = None


def run_federation(
    options: DemoOptions, folder: Path, *, progress: Callable[[int, int, str], None]
) -> DemoRun:
    """Prepare institutions, ask all steps in a process of its own, open the answers here.

    Raises
    ------
    ConfigError
        If what is asked for cannot run; nothing is started then.
    QueryError
        If the federation's process fails; the end of its log is in the text.
    """
    start = time.monotonic()
    mode = options.mode
    mode.require(options.n_sites)
    steps = demo_steps(options)
    dataset = mode.load(options.dataset, seed=options.seed)
    if options.rewards:
        require_rewards(
            protect=options.protect,
            hides_query=mode.hides_query,
            n_sites=options.n_sites + options.free_rider,
            n_rows=len(dataset.test_labels),
        )
    rows = mode.rows(
        dataset.train_labels, n_sites=options.n_sites, alpha=options.alpha, seed=options.seed
    )
    write_institutions(folder / "sites", dataset, rows, seed=options.seed, kinds=mode.kinds)
    run = DemoRun(options=options, folder=folder, dataset=dataset)
    # The keys are made here and stay here: the federation is another process.
    queriers = DemoQueriers(steps, dataset)
    events = _take_part(run, steps, queriers)
    plan = _plan(run, steps, queriers)
    plan.write(folder)
    events[SEALING] = lambda: queriers.seal(folder, plan.joint)
    _run_child(folder, progress, events)
    for step in steps:
        if step.settled:
            continue
        run.outcomes[step.label] = StepOutcome(
            step=step,
            prediction=queriers.open(step, folder),
            totals=queriers.totals(step, folder),
            report=json.loads((folder / f"{step.label}.report.json").read_text()),
        )
    if queriers.rewards is not None:
        run.paid = queriers.rewards.pay()
        run.ledger = queriers.rewards.book()
    run.seconds_total = time.monotonic() - start
    return run


def _take_part(
    run: DemoRun, steps: tuple[Step, ...], queriers: DemoQueriers
) -> dict[str, Callable[[], None]]:
    """Set up who is paid and who is asked; return what the querier does at which event."""
    options, events = run.options, dict[str, Callable[[], None]]()
    if options.rewards:
        if options.free_rider:
            run.rider = FreeRider(n_classes=len(run.dataset.classes), seed=options.seed)
            write_free_rider(run.folder / "sites", options.n_sites, run.rider)
            queriers.riders = (f"site-{options.n_sites}",)
        querier = queriers.of(REWARDS_STEP)
        queriers.rewards = DemoRewards(run.dataset, querier, run.folder)
        events[SETTLING] = queriers.rewards.settle
    if options.selector:
        first = selectors_of(options.selector)[0]
        main = next(step for step in steps if step.label == options.main_label)
        run.selection = queriers.selection = DemoSelection(first, main, run.dataset)
        chosen = run.selection
        events[GROUPING] = lambda: chosen.next_group(run.folder)
    return events


def _plan(run: DemoRun, steps: tuple[Step, ...], queriers: DemoQueriers) -> FederationPlan:
    options, folder = run.options, run.folder
    joint = consent = pinned = None
    if options.protect == MPC:
        joint = JointSetUp.make(
            folder / "sites", n_sites=options.n_sites, querier=queriers.identity.key_id
        )
    if queriers.encrypted_key_id:
        # Sites answer encrypted queries only if they name and pin whom they answer.
        consent = tuple(sorted({step.protection for step in steps}))
        pinned = (queriers.identity.key_id, queriers.encrypted_key_id)
    return FederationPlan(
        n_sites=options.n_sites,
        share_counts="counts",
        steps=steps,
        protections=consent,
        querier_key_ids=pinned,
        joint=joint,
        in_process=options.mode.in_process,
        free_riders=len(queriers.riders),
        priced=bool(options.rewards or options.selector),
    )


def demo_steps(options: DemoOptions) -> tuple[Step, ...]:
    """Return the steps: every rule in clear, then the chosen rule under each protection.

    Raises
    ------
    UnknownNameError
        If the demo has no such protection.
    IncompatibleProtection
        If the chosen rule cannot work under the protection asked for.
    """
    mode, rule = options.mode, options.mode.rule(options.rule)
    if not mode.hides_query and rule != "auto":
        require_legal(RULES.get(rule)(), make_protection(options.protect))
    # Sites that pin their queriers answer no query in clear: nobody has signed it.
    sealed = options.protect == ENCRYPTED_QUERY
    # A worker of the engine trains a site's model when it first serves that site: a few
    # queries that are not counted, so that the figures below are of resident models.
    steps = [Step(label=f"warm-up-{i}", rule="mean-probability", sealed=sealed) for i in range(3)]
    compared = [
        name for name in compared_rules() if not options.quick or name == "mean-probability"
    ]
    steps += [Step(label=f"rule-{name}", rule=name, sealed=sealed) for name in compared]
    for name in _compared_protections(options):
        step = Step(
            label=f"protect-{name}",
            rule=rule,
            protection=name,
            options={"epsilon": DP_EPSILON} if name.endswith("+dp") else {},
            sealed=True,
        )
        if name == "dp":
            steps += _dp_steps(rule)
        elif (
            name not in PROTECTIONS.names()
            or rule == "auto"
            or not refusal(RULES.get(rule)(), _protection(step))
        ):
            steps.append(step)
    return tuple(_with_options(options, steps))


def _with_options(options: DemoOptions, steps: list[Step]) -> Iterator[Step]:
    """Yield the steps with what ``--selector`` and ``--rewards`` ask for."""
    selectors = selectors_of(options.selector)
    require_selectors(selectors, rule=options.rule, hides_query=options.mode.hides_query)
    is_grouped = bool(selectors) and make_selector(selectors[0]).sequential
    for step in steps:
        yield replace(step, grouped=is_grouped and step.label == options.main_label)
    if options.rewards:
        yield REWARDS_STEP


def compared_rules() -> tuple[str, ...]:
    """Return the rules that need no training of their own."""
    return tuple(n for n in RULES.names() if Evidence.STACK not in RULES.get(n).needs)


def _compared_protections(options: DemoOptions) -> list[str]:
    names = ["plain"] if options.quick else ["plain", "secagg", "he", "secagg+dp", "dp"]
    if importlib.util.find_spec("tenseal") is None:
        names = [name for name in names if name != "he"]
    wanted = dict.fromkeys([*names, options.protect])
    return [name for name in wanted if mode_of(name).min_sites <= options.n_sites]


def _dp_steps(asked: str) -> list[Step]:
    gaussian: Options = {"mechanism": "gaussian", "epsilon": DP_EPSILON}
    response: Options = {"mechanism": "randomised-response", "epsilon": DP_EPSILON}
    steps = [
        Step(label="protect-dp", rule=asked, protection="dp", options=gaussian, sealed=True),
        Step(
            label="protect-dp-votes",
            rule="majority-vote",
            protection="dp",
            options=response,
            sealed=True,
        ),
    ]
    rule = None if asked == "auto" else RULES.get(asked)()
    return [s for s in steps if rule is None or not refusal(rule, _protection(s))] or steps[1:]


def coordinator_sees(protection: str) -> str:
    """Return in words what the coordinator is shown of the sites' answers."""
    return {
        "plain": "sealed answers, which the querier opens one by one",
        "secagg": "masked vectors; only their sum can be opened, by the querier",
        "secagg+dp": "masked vectors; only their noisy sum can be opened, by the querier",
        "he": "ciphertexts; the querier's key opens only what it is given",
        "he+dp": "ciphertexts; the querier opens a noisy sum",
        ENCRYPTED_QUERY: "encrypted queries and encrypted logits; it can open neither",
        MPC: "sealed shares of queries, weights and results; it can open none",
        "dp": "sealed answers; the querier opens them one by one, each with its site's noise",
    }.get(protection, "what its page in the docs says")


def is_sum_rule(name: str) -> bool:
    """Return whether the coordinator needs only the sum under this rule."""
    return RULES.get(name).discloses is Disclosure.SUM


def _protection(step: Step) -> Protection:
    return make_protection(step.protection, step.options)


def _run_child(
    folder: Path,
    progress: Callable[[int, int, str], None],
    events: Mapping[str, Callable[[], None]],
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
                    events.get(event["label"], _nothing)()
                    progress(event["done"], event["of"], event["label"])
            code = child.wait()
        finally:
            if child.poll() is None:
                child.terminate()
                child.wait(timeout=30)
            if child.stdout is not None:
                child.stdout.close()
    plan = FederationPlan.read(folder)
    missing = [s.label for s in plan.steps if not (folder / f"{s.label}.report.json").exists()]
    if code != 0 or missing:
        tail = (folder / "federation.log").read_text(errors="replace").splitlines()[-15:]
        raise QueryError(
            f"the federation's process ended with code {code}, {len(missing)} answers missing:\n"
            + "\n".join(tail),
            hint="run 'fedinfer doctor'; the whole log is federation.log in the report's folder",
        )


def _nothing() -> None:
    """At events that need no file of the querier's."""
