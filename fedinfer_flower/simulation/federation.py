"""A federation in a process of its own: reads jobs, writes combined answers.

The querier is the parent process. It leaves jobs in a folder and keeps its keys; this
process is the coordinator (and, through Flower's engine, the sites) and never has them.

Run as ``python -m fedinfer_flower.simulation.federation FOLDER``. The folder holds
``plan.json`` and ``sites/``. The child writes ``directory.fi``, and ``statement-<n>.fi`` of
each site that takes part in joint computations; the parent then leaves ``<label>.job`` for
every step, sealed to the sites of the directory, encrypted, as sealed shares, or in clear,
and ``jobs.ready``; the child answers with ``<label>.answer``, ``<label>.report.json`` and
``<label>.receipt.json``. Progress goes to standard output, a JSON object a line.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from flwr.app import Context
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp

from fedinfer_flower.clients import InferenceMod
from fedinfer_flower.clients.mpc_answering import MPC as JOINT_ACTION
from fedinfer_flower.encrypted_query.documents import EncryptedJob
from fedinfer_flower.ensemble.skew_check import regardless
from fedinfer_flower.errors import QueryError
from fedinfer_flower.mpc.documents import MpcJob
from fedinfer_flower.mpc.session import MpcSession
from fedinfer_flower.privacy.base import make_protection
from fedinfer_flower.query import Deadline
from fedinfer_flower.selection.base import make_selector
from fedinfer_flower.simulation.engine import run_on_engine
from fedinfer_flower.simulation.institution import Institution
from fedinfer_flower.simulation.joint_sites import JointSetUp, JointSites, joint_report
from fedinfer_flower.simulation.local_grid import LocalGrid
from fedinfer_flower.simulation.rewards import PricedSites, settle_by_files
from fedinfer_flower.strategies import FedEnsemble
from fedinfer_flower.strategies.fed_encrypted_query import FedEncryptedQuery
from fedinfer_flower.strategies.fed_mpc import FedMPC
from fedinfer_flower.strategies.handover import read_job, write_whole
from fedinfer_flower.strategies.result import InferenceResult
from fedinfer_flower.wire.identity import Identity
from fedinfer_flower.wire.sealed_job import SealedJob

__all__ = [
    "COORDINATOR_FILE",
    "ENCRYPTED_QUERY",
    "GROUPING",
    "MPC",
    "SEALING",
    "SETTLING",
    "FederationPlan",
    "Step",
    "main",
    "run_steps",
]

ENCRYPTED_QUERY: Final = "encrypted-query"
MPC: Final = "mpc"

SEALING: Final = "sealing queries"
GROUPING: Final = "choosing the next group"
SETTLING: Final = "settling rewards"
"""Events at which the parent process, the querier, has to write files."""

COORDINATOR_FILE: Final = "coordinator.pub"


@dataclass(frozen=True, kw_only=True)
class Step:
    """One query of the federation.

    Parameters
    ----------
    label : str
        Names the files.
    rule : str
    protection : str
        Of the registry, or `ENCRYPTED_QUERY` or `MPC`.
    options : mapping
        Of the protection.
    sealed : bool
        Whether only the sites can read the query.
    settled : bool
        Whether free riders are asked as well, and contributions are settled afterwards.
    grouped : bool
        Whether the querier asks one group of sites after the other.
    """

    label: str
    rule: str
    protection: str = "plain"
    options: Mapping[str, str | int | float | bool] = field(default_factory=dict)
    sealed: bool = False
    settled: bool = False
    grouped: bool = False


@dataclass(frozen=True, kw_only=True)
class FederationPlan:
    """What the child process does.

    Parameters
    ----------
    n_sites : int
    share_counts : str
    steps : tuple of Step
    timeout_s : float
        Of one query, the first of which waits for the sites' training.
    protections, querier_key_ids : tuple of str, optional
        What the sites consent to; default anything, for anyone.
    joint : JointSetUp, optional
        Of sites that compute together.
    in_process : bool
        Whether sites are threads of the child, over Flower's wire format, and not on
        Flower's engine.
    free_riders : int
        Further sites, after the others, that only settled steps ask.
    priced : bool
        Whether sites ask for money: see `simulation.rewards`.
    """

    n_sites: int
    share_counts: str
    steps: tuple[Step, ...]
    timeout_s: float = 180.0
    protections: tuple[str, ...] | None = None
    querier_key_ids: tuple[str, ...] | None = None
    joint: JointSetUp | None = None
    in_process: bool = False
    free_riders: int = 0
    priced: bool = False

    @property
    def n_nodes(self) -> int:
        """All sites, free riders included."""
        return self.n_sites + self.free_riders

    def write(self, folder: Path) -> None:
        """Write ``plan.json``."""
        plain = {
            "n_sites": self.n_sites,
            "share_counts": self.share_counts,
            "timeout_s": self.timeout_s,
            "protections": self.protections,
            "querier_key_ids": self.querier_key_ids,
            "in_process": self.in_process,
            "free_riders": self.free_riders,
            "priced": self.priced,
            "joint": None if self.joint is None else self.joint.to_dict(),
            "steps": [
                {
                    "label": s.label,
                    "rule": s.rule,
                    "protection": s.protection,
                    "options": dict(s.options),
                    "sealed": s.sealed,
                    "settled": s.settled,
                    "grouped": s.grouped,
                }
                for s in self.steps
            ],
        }
        (folder / "plan.json").write_text(json.dumps(plain, indent=2))

    @classmethod
    def read(cls, folder: Path) -> FederationPlan:
        """Read ``plan.json``."""
        plain = json.loads((folder / "plan.json").read_text())
        steps = tuple(Step(**step) for step in plain.pop("steps"))
        joint = plain.pop("joint")
        for name in ("protections", "querier_key_ids"):
            plain[name] = None if plain[name] is None else tuple(plain[name])
        return cls(
            steps=steps, joint=None if joint is None else JointSetUp.from_dict(joint), **plain
        )


def client_app(
    folder: Path,
    *,
    share_counts: str,
    protections: tuple[str, ...] | None = None,
    querier_key_ids: tuple[str, ...] | None = None,
    joint: JointSetUp | None = None,
    priced: bool = False,
    settles: bool = False,
) -> ClientApp:
    """Return the app of every simulated site."""
    mod = InferenceMod(
        PricedSites(folder=folder / "sites") if priced else Institution(folder / "sites"),
        share_counts=share_counts,
        protections=protections,
        querier_key_ids=querier_key_ids,
        agrees_to=("settlement",) if settles else (),
    )
    app = mod.attach(ClientApp())
    if joint is not None:
        app.query(JOINT_ACTION)(JointSites(folder / "sites", joint).handle)
    return app


def run_steps(grid: Grid, folder: Path, plan: FederationPlan) -> None:
    """Publish the directory, ask every step's job on a grid, write what comes out."""
    coordinator = Identity.generate()
    write_whole(folder / COORDINATOR_FILE, coordinator.public.to_bytes())
    directory = _strategy(plan, plan.steps[0], everyone=True).directory(grid)
    write_whole(folder / "directory.fi", directory.to_bytes())
    joint = FedMPC(deadline=Deadline(timeout_s=plan.timeout_s), min_available_nodes=plan.n_sites)
    if plan.joint is not None:
        for number, statement in enumerate(joint.collect(grid)):
            write_whole(folder / f"statement-{number}.fi", statement)
    _tell({"done": 0, "of": len(plan.steps), "label": SEALING})
    _wait_for(folder / "jobs.ready", timeout_s=plan.timeout_s)
    for number, step in enumerate(plan.steps):
        at = {"done": number, "of": len(plan.steps)}
        if step.protection == MPC:
            answer, report = _ask_jointly(grid, joint, (folder / f"{step.label}.job").read_bytes())
        elif step.grouped:
            answer, report = b"", _ask_groups(grid, folder, plan, step, coordinator, at)
        else:
            answer, result = _ask(grid, folder, plan, step, step.label, coordinator)
            report = result.to_dict()
            if step.settled:
                _settle(folder, plan, step, result, at)
        (folder / f"{step.label}.answer").write_bytes(answer)
        (folder / f"{step.label}.report.json").write_text(json.dumps(report))
        _tell({"done": number + 1, "of": len(plan.steps), "label": step.label})


def _ask(
    grid: Grid,
    folder: Path,
    plan: FederationPlan,
    step: Step,
    label: str,
    coordinator: Identity,
) -> tuple[bytes, InferenceResult]:
    data = (folder / f"{label}.job").read_bytes()
    result: InferenceResult
    if step.protection == ENCRYPTED_QUERY:
        strategy = FedEncryptedQuery(
            deadline=Deadline(timeout_s=plan.timeout_s), min_available_nodes=plan.n_nodes
        )
        result = strategy.start(grid, EncryptedJob.from_bytes(data))
    else:
        result = _strategy(plan, step).start(grid, read_job(data))
    if result.receipt is not None:
        # Whoever is to pay asks for the coordinator's signature too.
        receipt = result.receipt.signed_by(coordinator) if step.settled else result.receipt
        (folder / f"{label}.receipt.json").write_bytes(receipt.to_bytes())
    return result.combined.to_bytes(), result


def _ask_groups(
    grid: Grid,
    folder: Path,
    plan: FederationPlan,
    step: Step,
    coordinator: Identity,
    at: Mapping[str, int],
) -> dict[str, Any]:
    """Ask whichever group the querier names next, until it has enough."""
    reports: list[dict[str, Any]] = []
    end = folder / f"{step.label}.end"
    while True:
        label = f"{step.label}-{len(reports)}"
        _tell({**at, "label": GROUPING})
        _wait_for(folder / f"{label}.job", end, timeout_s=plan.timeout_s)
        if end.exists():
            break
        answer, result = _ask(grid, folder, plan, step, label, coordinator)
        write_whole(folder / f"{label}.answer", answer)
        reports.append(result.to_dict())
    # The first group is asked about every row, later ones about what is left.
    n_bytes = sum(r["reply_bytes_per_query"] * r["queries"] for r in reports)
    return reports[0] | {
        "seconds": sum(r["seconds"] for r in reports),
        "reply_bytes_per_query": n_bytes / reports[0]["queries"],
        "degraded": any(r["degraded"] for r in reports),
    }


def _settle(
    folder: Path, plan: FederationPlan, step: Step, result: InferenceResult, at: Mapping[str, int]
) -> None:
    job = read_job((folder / f"{step.label}.job").read_bytes())
    if result.evidence is None or not isinstance(job, SealedJob):
        raise QueryError(f"step {step.label!r} brought no evidence to settle")
    write_whole(folder / f"{step.label}.answer", result.combined.to_bytes())

    def wait_for(path: Path) -> None:
        _tell({**at, "label": SETTLING})
        _wait_for(path, timeout_s=plan.timeout_s)

    settle_by_files(folder, result.evidence, job.querier, wait_for=wait_for)


def _ask_jointly(grid: Grid, joint: FedMPC, data: bytes) -> tuple[bytes, dict[str, Any]]:
    job = MpcJob.from_bytes(data)
    answer = joint.start(grid, job)
    session = MpcSession.from_bytes(job.session)
    report = joint_report(job, answer, n_queries=session.n_queries * session.n_batches)
    return answer.to_bytes(), report


def _strategy(plan: FederationPlan, step: Step, *, everyone: bool = False) -> FedEnsemble:
    # A sealed job names its sites; of others, free riders are kept out here.
    names = ",".join(f"site-{number}" for number in range(plan.n_sites))
    only = plan.free_riders and not (step.sealed or everyone)
    return FedEnsemble(
        # The querier picks the rule of a sealed job.
        # All rules are compared, also those that this much skew speaks against.
        rule="auto" if step.sealed or step.rule == "auto" else regardless(step.rule),
        protection=make_protection(step.protection, step.options),
        deadline=Deadline(timeout_s=plan.timeout_s),
        min_available_nodes=plan.n_nodes,
        selector=make_selector("fixed", {"sites": names}) if only else None,
        evidence=step.settled,
    )


def _wait_for(*paths: Path, timeout_s: float) -> None:
    end = time.monotonic() + timeout_s
    while not any(path.exists() for path in paths):
        if time.monotonic() > end:
            raise QueryError(f"{paths[0].name} did not appear within {timeout_s:g} s")
        time.sleep(0.05)


def main(folder: Path) -> None:
    """Run the plan of a folder on Flower's engine, or in this process."""
    plan = FederationPlan.read(folder)
    sites = client_app(
        folder,
        share_counts=plan.share_counts,
        protections=plan.protections,
        querier_key_ids=plan.querier_key_ids,
        joint=plan.joint,
        priced=plan.priced,
        settles=any(step.settled for step in plan.steps),
    )
    # Sites that compute together wait for each other: each needs a worker.
    workers = 2 if plan.joint is None else len(plan.joint.parties)
    if plan.in_process:
        with LocalGrid(sites, num_supernodes=plan.n_nodes, workers=workers) as grid:
            run_steps(grid, folder, plan)
        return
    server_app = ServerApp()

    @server_app.main()
    def _(grid: Grid, context: Context) -> None:  # noqa: ARG001
        run_steps(grid, folder, plan)

    run_on_engine(server_app, sites, num_supernodes=plan.n_nodes, num_cpus=workers)


def _tell(event: Mapping[str, Any]) -> None:
    sys.stdout.write(json.dumps(event) + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
