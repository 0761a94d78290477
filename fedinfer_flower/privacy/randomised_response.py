"""k-ary randomised response: the other mechanism of protection `dp`."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from fedinfer_flower.ensemble.base import Array, Disclosure, EnsembleRule
from fedinfer_flower.errors import InvalidScoresError, InvalidValueError
from fedinfer_flower.privacy import noise
from fedinfer_flower.privacy.base import (
    CoordinatorSide,
    Protection,
    QuerierSide,
    ScorePlan,
    SiteSide,
)
from fedinfer_flower.privacy.checks import check_scores, read_array, read_total
from fedinfer_flower.privacy.clear_sums import ClearSum
from fedinfer_flower.privacy.fixed_point import IntArray

__all__ = ["RandomisedResponse"]


@dataclass(frozen=True)
class RandomisedResponse:
    """Send the label of the best class, or by chance another one.

    The true label is kept with probability ``p = e^eps / (e^eps + C - 1)``, and each other
    one sent with ``q = 1 / (e^eps + C - 1)``. A count n of a class among N labels gives the
    unbiased estimate ``(n - N * q) / (p - q)`` of its true votes.

    Payload: one unsigned 16-bit label a row (32-bit beyond 65536 classes), little-endian.
    Total: int64 counts under rules that disclose SUM, else the float64 that the rule
    combined from the labels as votes.

    Parameters
    ----------
    n_classes : int
    epsilon : float
        Pure: there is no delta.

    Examples
    --------
    >>> response = RandomisedResponse(n_classes=3, epsilon=math.log(2))
    >>> round(response.keep, 6), round(response.other, 6)
    (0.5, 0.25)
    """

    n_classes: int
    epsilon: float

    name: ClassVar[str] = "randomised-response"

    @classmethod
    def of_plan(cls, plan: ScorePlan, *, epsilon: float) -> RandomisedResponse:
        """Return the mechanism for a plan of votes.

        Raises
        ------
        InvalidValueError
            If a score is not one vote a class, or there is only one class.
        """
        if plan.width != plan.n_classes or plan.n_classes < 2:
            raise InvalidValueError(
                "randomised response needs one score a class and at least two classes, got"
                f" {plan.width} scores and {plan.n_classes} classes"
            )
        return cls(plan.n_classes, epsilon)

    @property
    def other(self) -> float:
        """Chance of sending one given label that is not the true one."""
        return 1.0 / (math.exp(self.epsilon) + self.n_classes - 1)

    @property
    def keep(self) -> float:
        """Chance of sending the true label."""
        return math.exp(self.epsilon) * self.other

    @property
    def gap(self) -> float:
        """`keep` minus `other`, without cancellation at small epsilon."""
        return math.expm1(self.epsilon) * self.other

    @property
    def flip(self) -> float:
        """Chance of sending any label but the true one, accurate at large epsilon."""
        return (self.n_classes - 1) * self.other

    @property
    def dtype(self) -> str:
        """Type of a label in a payload."""
        return "<u2" if self.n_classes <= 2**16 else "<u4"

    @property
    def label_bytes(self) -> int:
        """Bytes of a label in a payload."""
        return np.dtype(self.dtype).itemsize

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


def _best_labels(scores: Array) -> IntArray:
    """Return each row's best class, by lot among equals.

    So a site that splits its vote, or says nothing, favours no class by its place.
    """
    tied = scores == scores.max(axis=1, keepdims=True)
    lots = (noise.random_words(scores.size) >> np.uint64(1)).astype(np.int64)
    drawn = np.where(tied, lots.reshape(scores.shape), -1)
    return np.asarray(drawn.argmax(axis=1), dtype=np.int64)


class _Site:
    def __init__(self, mechanism: RandomisedResponse, plan: ScorePlan) -> None:
        self._mechanism = mechanism
        self._plan = plan

    def protect(self, scores: Array) -> bytes:
        return self.finish(self.draw(scores))

    def draw(self, scores: Array) -> IntArray:
        check_scores(scores, self._plan)
        n_classes = self._mechanism.n_classes
        labels = _best_labels(scores)
        flipped = noise.coin_flips(len(labels), self._mechanism.flip)
        # 1 to C - 1 places on, so that a flipped label is never the true one.
        shift = 1 + noise.uniform_below(len(labels), n_classes - 1)
        return np.where(flipped, (labels + shift) % n_classes, labels).reshape(-1, 1)

    def finish(self, entries: IntArray) -> bytes:
        return entries.ravel().astype(self._mechanism.dtype).tobytes()


class _Coordinator(ClearSum):
    def __init__(
        self,
        mechanism: RandomisedResponse,
        protection: Protection,
        plan: ScorePlan,
        n_queries: int,
        rule: EnsembleRule,
    ) -> None:
        super().__init__(protection, plan, n_queries, rule, dtype="<i8")
        self._mechanism = mechanism

    def add(self, payload: bytes | memoryview, *, sender: str = "") -> None:  # noqa: ARG002
        self.plan.require_room(self.n_sites)
        column = (self.shape[0], 1)
        labels = read_array(payload, self._mechanism.dtype, column).astype(np.int64)
        if bool((labels >= self._mechanism.n_classes).any()):
            raise InvalidScoresError("a site's label is not one of the classes")
        votes = np.zeros(self.shape, dtype=np.int64)
        np.put_along_axis(votes, labels, 1, axis=1)
        self.fold(votes)


class _Querier:
    """Turns counts into unbiased estimates of the true votes; they may be negative.

    Under a rule that discloses SCORES the rule has combined the noisy votes as they came,
    and there is nothing left to de-bias.
    """

    def __init__(
        self, mechanism: RandomisedResponse, protection: Protection, plan: ScorePlan
    ) -> None:
        self._mechanism = mechanism
        self._protection = protection
        self._plan = plan

    def open(self, total: bytes | memoryview, *, n_queries: int, n_sites: int) -> Array:
        self._protection.check_cohort(n_sites, self._plan)
        if self._plan.discloses is Disclosure.SCORES:
            return read_total(total, self._plan, n_queries=n_queries, limit=math.inf)
        counts = read_array(total, "<i8", (n_queries, self._plan.width)).astype(np.int64)
        # The range first: entries of any size could wrap to the right sum.
        in_range = bool(((counts >= 0) & (counts <= n_sites)).all())
        if not in_range or bool((counts.sum(axis=1) != n_sites).any()):
            raise InvalidScoresError("the counts are not those of one label a site")
        return np.asarray((counts - n_sites * self._mechanism.other) / self._mechanism.gap)
