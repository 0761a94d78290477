"""Folds what the coordinator may see: a running sum, or the scores of all sites."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from fedinfer_flower.ensemble.base import Array, Disclosure, EnsembleRule
from fedinfer_flower.errors import InvalidValueError
from fedinfer_flower.privacy.base import Protection, ScorePlan

__all__ = ["ClearSum"]


class ClearSum:
    """What coordinators share that read the entries they add.

    Under rules that disclose SUM it keeps one array, however many sites answer. Under
    rules that disclose SCORES it keeps every site's scores, for the rule to combine.

    Parameters
    ----------
    protection : Protection
    plan : ScorePlan
    n_queries : int
    rule : EnsembleRule
    dtype : str
        Little-endian type of the entries of a sum: ``"<f8"`` or ``"<i8"``.
    """

    def __init__(
        self,
        protection: Protection,
        plan: ScorePlan,
        n_queries: int,
        rule: EnsembleRule,
        *,
        dtype: str,
    ) -> None:
        self.n_sites = 0
        self.shape = (n_queries, plan.width)
        self.plan = plan
        self._protection = protection
        self._rule = rule
        self._dtype = dtype
        self._sum: npt.NDArray[np.generic] = np.zeros(self.shape, dtype=dtype)
        self._scores: list[Array] = []

    def __repr__(self) -> str:
        return f"<{self._protection.name} coordinator side, {self.n_sites} sites>"

    def fold(self, entries: npt.NDArray[np.generic], *, step: float = 1.0) -> None:
        """Take in one site's checked entries, which are scores in units of `step`."""
        if self.plan.discloses is Disclosure.SUM:
            self._sum = self._sum + entries.astype(self._dtype)
        else:
            self._scores.append(entries.astype(np.float64) * step)
        self.n_sites += 1

    def total(self) -> bytes:
        """Return the sum, or as 64-bit floats what the rule makes of the scores."""
        self._protection.require_cohort(self.n_sites, self.plan)
        if self.plan.discloses is Disclosure.SUM:
            return self._sum.tobytes()
        return self._combined().astype("<f8").tobytes()

    def _combined(self) -> Array:
        total = np.asarray(self._rule.combine(np.stack(self._scores)), dtype=np.float64)
        if total.shape != self.shape or not np.isfinite(total).all():
            raise InvalidValueError(
                f"combine of rule {self._rule.name!r} must return finite scores of shape"
                f" {self.shape}, got shape {total.shape}"
            )
        return total
