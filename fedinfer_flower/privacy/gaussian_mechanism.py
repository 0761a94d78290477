"""The Gaussian mechanism on the integer grid: one mechanism of protection `dp`."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from fedinfer_flower.ensemble.base import Array, Disclosure, EnsembleRule
from fedinfer_flower.errors import InvalidScoresError
from fedinfer_flower.privacy import gaussian_dp, noise
from fedinfer_flower.privacy.base import (
    CoordinatorSide,
    Protection,
    QuerierSide,
    ScorePlan,
    SiteSide,
)
from fedinfer_flower.privacy.checks import check_scores, read_array, read_total
from fedinfer_flower.privacy.clear_sums import ClearSum
from fedinfer_flower.privacy.fixed_point import FixedPoint, IntArray

__all__ = ["GaussianMechanism"]

_FRAC_BITS = 12
_PAYLOAD_MODULUS = 2**32


@dataclass(frozen=True)
class GaussianMechanism:
    """Codec and noise of one plan; every role works out the same ones.

    Payload: int32, little-endian. Total: int64 under rules that disclose SUM, else the
    float64 that the rule combined.

    Parameters
    ----------
    codec : FixedPoint
        For one site's entries; sums are kept in 64 bits and cannot wrap.
    std : int
        Standard deviation of the noise in grid steps.
    mu : float
        Sensitivity over `std`: the privacy really spent on a row, see `gaussian_dp`.

    Examples
    --------
    >>> plan = ScorePlan(
    ...     width=10, bound=1.0, sensitivity_l2=2**0.5, n_sites_max=9, n_classes=10
    ... )
    >>> GaussianMechanism.calibrated(plan, epsilon=1.0, delta=1e-5).std
    21622
    """

    codec: FixedPoint
    std: int
    mu: float

    name: ClassVar[str] = "gaussian"

    @classmethod
    def calibrated(cls, plan: ScorePlan, *, epsilon: float, delta: float) -> GaussianMechanism:
        """Return the mechanism that is (epsilon, delta)-private for one row.

        Raises
        ------
        CapacityError
            If so much noise does not fit 32-bit entries.
        """
        # Rounding to the grid moves each entry by up to half a step, at both neighbours.
        sensitivity = plan.sensitivity_l2 * 2.0**_FRAC_BITS + math.sqrt(plan.width)
        # Whole steps, rounded up: the promise holds, and all roles agree on the number.
        std = math.ceil(sensitivity / gaussian_dp.mu_for(epsilon, delta))
        codec = FixedPoint(
            clip=plan.bound,
            frac_bits=_FRAC_BITS,
            n_sites_max=1,
            modulus=_PAYLOAD_MODULUS,
            noise_std_int=std,
        )
        return cls(codec, std, sensitivity / std)

    @property
    def entry_max(self) -> int:
        """Largest absolute value of an entry that leaves a site."""
        return self.codec.entry_max + self.codec.noise_max

    def site_side(self, plan: ScorePlan) -> SiteSide:
        """Build the site's side."""
        return _Site(self, plan)

    def coordinator_side(
        self, protection: Protection, plan: ScorePlan, n_queries: int, rule: EnsembleRule
    ) -> CoordinatorSide:
        """Build the coordinator's side."""
        return _Coordinator(self, protection, plan, n_queries, rule)

    def querier_side(self, protection: Protection, plan: ScorePlan) -> QuerierSide:
        """Build the querier's side."""
        return _Querier(self, protection, plan)


class _Site:
    def __init__(self, mechanism: GaussianMechanism, plan: ScorePlan) -> None:
        self._mechanism = mechanism
        self._plan = plan

    def protect(self, scores: Array) -> bytes:
        return self.finish(self.draw(scores))

    def draw(self, scores: Array) -> IntArray:
        check_scores(scores, self._plan)
        exact = self._mechanism.codec.encode(scores)
        return exact + noise.gaussian_integers(exact.shape, self._mechanism.std)

    def finish(self, entries: IntArray) -> bytes:
        # To a public interval, after the noise: post-processing, which costs no privacy.
        limit = self._mechanism.entry_max
        return bytes(np.clip(entries, -limit, limit).astype("<i4").tobytes())


class _Coordinator(ClearSum):
    def __init__(
        self,
        mechanism: GaussianMechanism,
        protection: Protection,
        plan: ScorePlan,
        n_queries: int,
        rule: EnsembleRule,
    ) -> None:
        super().__init__(protection, plan, n_queries, rule, dtype="<i8")
        self._mechanism = mechanism

    def add(self, payload: bytes | memoryview, *, sender: str = "") -> None:  # noqa: ARG002
        self.plan.require_room(self.n_sites)
        entries = read_array(payload, "<i4", self.shape).astype(np.int64)
        if bool((np.abs(entries) > self._mechanism.entry_max).any()):
            raise InvalidScoresError("a site's noisy scores are beyond what it can send")
        self.fold(entries, step=self._mechanism.codec.step)


class _Querier:
    def __init__(
        self, mechanism: GaussianMechanism, protection: Protection, plan: ScorePlan
    ) -> None:
        self._mechanism = mechanism
        self._protection = protection
        self._plan = plan

    def open(self, total: bytes | memoryview, *, n_queries: int, n_sites: int) -> Array:
        self._protection.check_cohort(n_sites, self._plan)
        if self._plan.discloses is Disclosure.SCORES:
            return read_total(total, self._plan, n_queries=n_queries, limit=math.inf)
        entries = read_array(total, "<i8", (n_queries, self._plan.width)).astype(np.int64)
        limit = n_sites * self._mechanism.entry_max
        # Two comparisons: the absolute value of the smallest integer is itself.
        if bool(((entries > limit) | (entries < -limit)).any()):
            raise InvalidScoresError("the combined scores are beyond what the sites can send")
        return np.asarray(entries * self._mechanism.codec.step)
