"""A federation in a process of its own: reads jobs, writes combined answers.

The querier is the parent process. It leaves jobs in a folder and keeps its keys; this
process is the coordinator (and, through Flower's engine, the sites) and never has them.

Run as ``python -m fedinfer_flower.simulation.federation FOLDER``. The folder holds
``plan.json`` and ``sites/``. The child writes ``directory.fi``; the parent then leaves
``<label>.job`` for every step, sealed to the sites of the directory or in clear, and
``jobs.ready``; the child answers with ``<label>.answer``, ``<label>.report.json`` and
``<label>.receipt.json``. Progress goes to standard output, a JSON object a line.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from flwr.app import Context
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp

from fedinfer_flower.clients import InferenceMod
from fedinfer_flower.errors import QueryError
from fedinfer_flower.privacy.base import make_protection
from fedinfer_flower.query import Deadline
from fedinfer_flower.simulation.engine import run_on_engine
from fedinfer_flower.simulation.institution import Institution
from fedinfer_flower.strategies import FedEnsemble
from fedinfer_flower.strategies.handover import read_job, write_whole

__all__ = ["FederationPlan", "Step", "main", "run_steps"]


@dataclass(frozen=True, kw_only=True)
class Step:
    """One query of the federation.

    Parameters
    ----------
    label : str
        Names the files.
    rule : str
    protection : str
    options : mapping
        Of the protection.
    sealed : bool
        Whether only the sites can read the query.
    """

    label: str
    rule: str
    protection: str = "plain"
    options: Mapping[str, str | int | float | bool] = field(default_factory=dict)
    sealed: bool = False


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
    """

    n_sites: int
    share_counts: str
    steps: tuple[Step, ...]
    timeout_s: float = 180.0

    def write(self, folder: Path) -> None:
        """Write ``plan.json``."""
        plain = {
            "n_sites": self.n_sites,
            "share_counts": self.share_counts,
            "timeout_s": self.timeout_s,
            "steps": [
                {
                    "label": s.label,
                    "rule": s.rule,
                    "protection": s.protection,
                    "options": dict(s.options),
                    "sealed": s.sealed,
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
        return cls(steps=steps, **plain)


def client_app(folder: Path, *, share_counts: str) -> ClientApp:
    """Return the app of every simulated site."""
    load_model = Institution(folder / "sites")
    return InferenceMod(load_model, share_counts=share_counts).attach(ClientApp())


def run_steps(grid: Grid, folder: Path, plan: FederationPlan) -> None:
    """Publish the directory, ask every step's job on a grid, write what comes out."""
    directory = _strategy(plan, plan.steps[0]).directory(grid)
    write_whole(folder / "directory.fi", directory.to_bytes())
    _tell({"done": 0, "of": len(plan.steps), "label": "sealing queries"})
    _wait_for(folder / "jobs.ready", timeout_s=plan.timeout_s)
    for number, step in enumerate(plan.steps):
        job = read_job((folder / f"{step.label}.job").read_bytes())
        result = _strategy(plan, step).start(grid, job)
        (folder / f"{step.label}.answer").write_bytes(result.combined.to_bytes())
        if result.receipt is not None:
            (folder / f"{step.label}.receipt.json").write_bytes(result.receipt.to_bytes())
        report = json.dumps(result.to_dict())
        (folder / f"{step.label}.report.json").write_text(report)
        _tell({"done": number + 1, "of": len(plan.steps), "label": step.label})


def _strategy(plan: FederationPlan, step: Step) -> FedEnsemble:
    return FedEnsemble(
        # The querier picks the rule of a sealed job.
        rule="auto" if step.sealed else step.rule,
        protection=make_protection(step.protection, step.options),
        deadline=Deadline(timeout_s=plan.timeout_s),
        min_available_nodes=plan.n_sites,
    )


def _wait_for(path: Path, *, timeout_s: float) -> None:
    end = time.monotonic() + timeout_s
    while not path.exists():
        if time.monotonic() > end:
            raise QueryError(f"{path.name} did not appear within {timeout_s:g} s")
        time.sleep(0.05)


def main(folder: Path) -> None:
    """Run the plan of a folder on Flower's engine."""
    plan = FederationPlan.read(folder)
    server_app = ServerApp()

    @server_app.main()
    def _(grid: Grid, context: Context) -> None:  # noqa: ARG001
        run_steps(grid, folder, plan)

    run_on_engine(
        server_app,
        client_app(folder, share_counts=plan.share_counts),
        num_supernodes=plan.n_sites,
    )


def _tell(event: Mapping[str, Any]) -> None:
    sys.stdout.write(json.dumps(event) + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
