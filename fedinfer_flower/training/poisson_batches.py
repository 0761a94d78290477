"""Batches in which every record is with the same chance, drawn from the system's generator."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from fedinfer_flower.errors import InvalidValueError, ModelError
from fedinfer_flower.privacy import noise

__all__ = ["BatchAudit", "PoissonBatches"]

_IMPLAUSIBLE_STDS = 6.0
"""Beyond six standard deviations, two in a billion, the sampler is at fault."""


@dataclass(frozen=True, kw_only=True)
class BatchAudit:
    """Batches as they were, beside what the accountant assumes.

    Stays at the site: the number of records is in it.

    Parameters
    ----------
    n_records : int
    sample_rate : float
        q: chance of a record to be in a batch.
    steps : int
    total : int
        Records in all batches together.
    smallest, largest : int
        Records in a batch.
    n_empty : int
        Batches without a record. They too made a noisy step.

    Examples
    --------
    >>> audit = BatchAudit(
    ...     n_records=100, sample_rate=0.1, steps=10, total=103, smallest=6, largest=15, n_empty=0
    ... )
    >>> audit.expected_size, audit.mean_size
    (10.0, 10.3)
    """

    n_records: int
    sample_rate: float
    steps: int
    total: int
    smallest: int
    largest: int
    n_empty: int

    @property
    def expected_size(self) -> float:
        """Records in a batch that the sample rate implies."""
        return self.n_records * self.sample_rate

    @property
    def mean_size(self) -> float:
        """Records in a batch as they were."""
        return self.total / self.steps

    def require_plausible(self) -> None:
        """Refuse batches that independent draws at this rate would not give.

        Raises
        ------
        ModelError
            If the records drawn are six standard deviations off.
        """
        expected = self.expected_size * self.steps
        std = math.sqrt(expected * (1.0 - self.sample_rate))
        if abs(self.total - expected) > _IMPLAUSIBLE_STDS * std + 1e-6:
            raise ModelError(
                f"{self.total} records were drawn in {self.steps} batches, {expected:.0f} were"
                " expected: the privacy claim would not hold",
                hint="report this; do not use the model as a private one",
            )


class PoissonBatches:
    """Draw batches for DP-SGD: each record independently, with the same chance.

    Shuffling and cutting, as training loops do, is not what the accountant assumes, and
    the epsilon that it would report does not hold.

    Parameters
    ----------
    n_records : int
    sample_rate : float
        In (0, 1].
    steps : int

    Examples
    --------
    >>> batches = PoissonBatches(n_records=50, sample_rate=1.0, steps=2)
    >>> [len(rows) for rows in batches]
    [50, 50]
    >>> batches.audit().total
    100
    """

    def __init__(self, *, n_records: int, sample_rate: float, steps: int) -> None:
        if n_records < 1 or steps < 1 or not 0.0 < sample_rate <= 1.0:
            raise InvalidValueError("batches need records, steps and a sample rate in (0, 1]")
        self._n_records = n_records
        self._sample_rate = sample_rate
        self._steps = steps
        self._sizes: list[int] = []

    def __iter__(self) -> Iterator[npt.NDArray[np.int64]]:
        self._sizes = []
        for _ in range(self._steps):
            rows = self._draw()
            self._sizes.append(len(rows))
            yield rows

    def audit(self) -> BatchAudit:
        """Return what was drawn since the last iteration began.

        Raises
        ------
        InvalidValueError
            If nothing was drawn.
        """
        if not self._sizes:
            raise InvalidValueError("no batch was drawn yet")
        return BatchAudit(
            n_records=self._n_records,
            sample_rate=self._sample_rate,
            steps=len(self._sizes),
            total=sum(self._sizes),
            smallest=min(self._sizes),
            largest=max(self._sizes),
            n_empty=self._sizes.count(0),
        )

    def _draw(self) -> npt.NDArray[np.int64]:
        if self._sample_rate == 1.0:
            return np.arange(self._n_records)
        return np.flatnonzero(noise.coin_flips(self._n_records, self._sample_rate))
