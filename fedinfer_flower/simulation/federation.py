"""A federation in a process of its own: reads jobs, writes combined answers.

The querier is the parent process. It leaves jobs in a folder and keeps its keys; this
process is the coordinator (and, through Flower's engine, the sites) and never has them.

Run as ``python -m fedinfer_flower.simulation.federation FOLDER``. The folder holds
``plan.json``, ``<label>.job`` for every step, and ``sites/``; it receives
``<label>.answer`` and ``<label>.report.json``. Progress goes to standard output, a JSON
object a line.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from flwr.app import Context
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp

from fedinfer_flower.clients import InferenceMod
from fedinfer_flower.privacy.base import make_protection
from fedinfer_flower.query import Deadline
from fedinfer_flower.simulation.engine import run_on_engine
from fedinfer_flower.simulation.institution import Institution
from fedinfer_flower.strategies import FedEnsemble
from fedinfer_flower.wire.documents import QueryJob

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
    """

    label: str
    rule: str
    protection: str = "plain"
    options: Mapping[str, str | int | float | bool] = field(default_factory=dict)


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
    """Ask every step's job on a grid and write what comes out."""
    for number, step in enumerate(plan.steps):
        strategy = FedEnsemble(
            rule=step.rule,
            protection=make_protection(step.protection, step.options),
            deadline=Deadline(timeout_s=plan.timeout_s),
            min_available_nodes=plan.n_sites,
        )
        job = QueryJob.from_bytes((folder / f"{step.label}.job").read_bytes())
        result = strategy.start(grid, job)
        (folder / f"{step.label}.answer").write_bytes(result.combined.to_bytes())
        report = json.dumps(result.to_dict())
        (folder / f"{step.label}.report.json").write_text(report)
        _tell({"done": number + 1, "of": len(plan.steps), "label": step.label})


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
