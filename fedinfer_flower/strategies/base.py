"""The face of a server-side strategy: Flower's verbs, for queries.

`flwr.serverapp.strategy.Strategy` has no hook for queries (its `start` runs train and
evaluate rounds), so strategies here mirror its verbs and do not subclass it.
"""

from __future__ import annotations

import logging
from abc import ABC, abstractmethod
from collections.abc import Callable

import numpy as np
import numpy.typing as npt
from flwr.app import Message
from flwr.serverapp import Grid

from fedinfer_flower.query import QueryReport
from fedinfer_flower.strategies.onboarding import Onboarding
from fedinfer_flower.strategies.pull_loop import Arrival
from fedinfer_flower.strategies.result import InferenceResult
from fedinfer_flower.wire.documents import CombinedBatch, QueryJob
from fedinfer_flower.wire.sealed_job import SealedBatch, SealedJob

__all__ = ["InferenceStrategy", "Progress"]

Progress = Callable[[int, int], None]
"""Called with (queries answered, queries asked) after every batch."""

log = logging.getLogger("fedinfer_flower.coordinator")


class InferenceStrategy(ABC):
    """Base of server-side strategies.

    A strategy asks sites (`configure_query`), folds what comes back (`aggregate_query`),
    and says what it is (`summary`). `start` drives it over a whole job.
    """

    @abstractmethod
    def configure_onboarding(self, grid: Grid, run_id: int) -> Onboarding:
        """Wait for nodes and collect their profiles."""

    @abstractmethod
    def configure_query(
        self, query_id: str, inputs: npt.NDArray[np.generic] | SealedBatch
    ) -> list[Message]:
        """Return the messages of one batch, one for each site that is asked."""

    @abstractmethod
    def accumulate(self, arrival: Arrival) -> None:
        """Fold one reply into the batch; a bad one is reported and leaves no trace."""

    @abstractmethod
    def aggregate_query(self, seconds: float) -> tuple[CombinedBatch, QueryReport]:
        """Close the batch. Raises `QuorumNotMetError` if too few sites answered."""

    @abstractmethod
    def summary(self) -> str:
        """Return a tree of the strategy's settings."""

    @abstractmethod
    def start(
        self,
        grid: Grid,
        queries: npt.NDArray[np.generic] | QueryJob | SealedJob,
        *,
        progress: Progress | None = None,
    ) -> InferenceResult:
        """Ask all queries and return the combined answers."""
