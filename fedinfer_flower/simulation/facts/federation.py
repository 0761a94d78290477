"""A federation of small language models in a process of its own: reads sealed jobs, relays.

The querier is the parent process. It seals the questions, and keeps its keys and the right
answers; this process is the coordinator (and, through Flower's engine, the sites).

Run as ``python -m fedinfer_flower.simulation.facts.federation FOLDER``. The folder holds
``plan.json`` and ``sites/``. The child writes ``card-<n>.fi`` of every site; the parent then
leaves ``<label>.job`` for every step, and ``jobs.ready``; the child answers with
``<label>.answer`` and ``<label>.report.json``. Progress goes to standard output, a JSON object
a line.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final

from flwr.app import Context
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp

from fedinfer_flower.errors import QueryError
from fedinfer_flower.query import Deadline
from fedinfer_flower.simulation.engine import run_on_engine
from fedinfer_flower.simulation.facts.sites import SitePlan, client_app
from fedinfer_flower.simulation.local_grid import LocalGrid
from fedinfer_flower.strategies.fed_refine import FedRefine
from fedinfer_flower.strategies.handover import write_whole
from fedinfer_flower.strategies.refine_result import RefineResult

__all__ = ["READY", "RefinePlan", "RefineStep", "main", "run_steps", "server_app"]

READY: Final = "sealing questions"
_POLL_S: Final = 0.05


@dataclass(frozen=True, kw_only=True)
class RefineStep:
    """One way to answer all questions.

    Parameters
    ----------
    label : str
        Names the files.
    receivers, sharers : tuple of str
        Names of sites.
    medium : str
        Of `FedRefine`.
    rephrase : str

    Examples
    --------
    >>> RefineStep(label="a", receivers=("qwen3",), medium="auto").allow
    ('text', 'cache')
    """

    label: str
    receivers: tuple[str, ...]
    sharers: tuple[str, ...] = ()
    medium: str = "own"
    rephrase: str = "template"

    @property
    def allow(self) -> tuple[str, ...]:
        """What the querier consents to in this step."""
        return {"own": (), "auto": ("text", "cache")}.get(self.medium, (self.medium,))


@dataclass(frozen=True, kw_only=True)
class RefinePlan:
    """What the child process does.

    Parameters
    ----------
    sites : tuple of SitePlan
    steps : tuple of RefineStep
    fusers : str
        Folder of the fusers.
    timeout_s : float
        Of one exchange.
    in_process : bool
        Whether sites are threads of the child, over Flower's wire format, and not on
        Flower's engine.
    """

    sites: tuple[SitePlan, ...]
    steps: tuple[RefineStep, ...]
    fusers: str
    timeout_s: float = 120.0
    in_process: bool = False

    def write(self, folder: Path) -> None:
        """Write ``plan.json``."""
        (folder / "plan.json").write_text(json.dumps(asdict(self), indent=2))

    @classmethod
    def read(cls, folder: Path) -> RefinePlan:
        """Read ``plan.json``."""
        plain = json.loads((folder / "plan.json").read_text())
        sites = tuple(SitePlan.from_dict(site) for site in plain.pop("sites"))
        steps = tuple(
            RefineStep(
                **{
                    **step,
                    "receivers": tuple(step["receivers"]),
                    "sharers": tuple(step["sharers"]),
                }
            )
            for step in plain.pop("steps")
        )
        return cls(sites=sites, steps=steps, **plain)

    def client_app(self, folder: Path) -> ClientApp:
        """Return the app of all sites."""
        return client_app(self.sites, documents=folder / "sites", fusers=Path(self.fusers))

    def strategy(self, step: RefineStep) -> FedRefine:
        """Return the strategy of a step; what a sealed job says itself is left to the job."""
        return FedRefine(
            receiver=step.receivers,
            sharers=step.sharers or None,
            medium=step.medium,
            allow=step.allow,
            deadline=Deadline(timeout_s=self.timeout_s),
            min_available_nodes=len(self.sites),
        )


def run_steps(grid: Grid, folder: Path, plan: RefinePlan) -> None:
    """Publish the sites' cards, run every step's job on a grid, write what comes out."""
    for number, card in enumerate(plan.strategy(plan.steps[0]).collect(grid)):
        write_whole(folder / f"card-{number}.fi", card)
    _tell({"done": 0, "of": len(plan.steps), "label": READY})
    _wait_for(folder / "jobs.ready", timeout_s=plan.timeout_s)
    for number, step in enumerate(plan.steps):
        result = plan.strategy(step).start(grid, (folder / f"{step.label}.job").read_bytes())
        if result.answer is None:
            raise QueryError("a sealed job without a sealed answer")
        (folder / f"{step.label}.answer").write_bytes(result.answer.to_bytes())
        (folder / f"{step.label}.report.json").write_text(json.dumps(_report(result)))
        _tell({"done": number + 1, "of": len(plan.steps), "label": step.label})


def _report(result: RefineResult) -> dict[str, Any]:
    # Which sharer a receiver used is not known here, and what is, is a line a batch.
    return {**result.to_dict(), "receivers": [each.name for each in result.receivers]}


def server_app(folder: Path, plan: RefinePlan) -> ServerApp:
    """Return the coordinator's app."""
    app = ServerApp()

    @app.main()
    def _(grid: Grid, context: Context) -> None:  # noqa: ARG001
        run_steps(grid, folder, plan)

    return app


def main(folder: Path) -> None:
    """Run the plan of a folder on Flower's engine, or in this process."""
    plan = RefinePlan.read(folder)
    sites = plan.client_app(folder)
    if plan.in_process:
        with LocalGrid(sites, num_supernodes=len(plan.sites)) as grid:
            run_steps(grid, folder, plan)
        return
    run_on_engine(server_app(folder, plan), sites, num_supernodes=len(plan.sites))


def _wait_for(path: Path, *, timeout_s: float) -> None:
    end = time.monotonic() + timeout_s
    while not path.exists():
        if time.monotonic() > end:
            raise QueryError(f"{path.name} did not appear within {timeout_s:g} s")
        time.sleep(_POLL_S)


def _tell(event: Mapping[str, Any]) -> None:
    sys.stdout.write(json.dumps(event) + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
