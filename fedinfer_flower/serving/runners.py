"""What runs jobs: one runner a strategy, on a bench with everything that it needs."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

from fedinfer_flower.observability.metrics import GatewayMetrics
from fedinfer_flower.serving.config import GatewayConfig, ModelConfig
from fedinfer_flower.serving.hub import GridHub
from fedinfer_flower.serving.hub_grid import HubGrid
from fedinfer_flower.serving.jobs import JobKind
from fedinfer_flower.serving.membership import Membership
from fedinfer_flower.serving.open_job import OpenJob
from fedinfer_flower.serving.status import Chronicle
from fedinfer_flower.wire.identity import Identity
from fedinfer_flower.wire.pins import Pins

__all__ = ["Bench", "JobRunner", "PartOfJob", "runner_of"]


@dataclass(frozen=True, kw_only=True, eq=False)
class Bench:
    """What runners work with.

    Parameters
    ----------
    hub : GridHub
    run_id : int
    membership : Membership
    config : GatewayConfig
    identity : Identity
        The gateway's, as a querier and as a coordinator.
    metrics : GatewayMetrics
    chronicle : Chronicle
        What the status page is told of.
    pins : Pins, optional
        Whom the gateway's operator knows; other sites are not asked.
    """

    hub: GridHub
    run_id: int
    membership: Membership
    config: GatewayConfig
    identity: Identity = field(repr=False)
    metrics: GatewayMetrics
    chronicle: Chronicle
    pins: Pins | None = None

    def grid(self) -> HubGrid:
        """Return a grid for one strategy; close it afterwards, or use it in ``with``."""
        return self.hub.grid()

    def model(self, name: str) -> ModelConfig:
        """Return the settings of a model."""
        return self.config.models[name]


@dataclass(frozen=True, kw_only=True, eq=False)
class PartOfJob:
    """Rows of a job that are asked in one batch.

    Parameters
    ----------
    job : OpenJob
    start, stop : int
    """

    job: OpenJob
    start: int
    stop: int

    @property
    def n_rows(self) -> int:
        """Rows in this part."""
        return self.stop - self.start


class JobRunner(Protocol):
    """Takes jobs to their ends: each is finished or failed when `run` returns."""

    kinds: frozenset[JobKind]

    def run(self, jobs: Sequence[OpenJob], bench: Bench) -> None:
        """Run jobs of one model in this thread; a job that it leaves open is failed."""
        ...


@functools.cache
def runner_of(strategy: str, kind: JobKind) -> JobRunner:
    """Return the runner of a strategy for one kind of job."""
    if strategy != "ensemble":
        from fedinfer_flower.serving.text_runner import text_runner

        return text_runner(strategy)
    if kind is JobKind.SEALED:
        from fedinfer_flower.serving.sealed_runner import SealedRunner

        return SealedRunner()
    from fedinfer_flower.serving.rows_runner import RowsRunner

    return RowsRunner()
