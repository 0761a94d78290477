"""No protection: scores in the clear, checked and added."""

from __future__ import annotations

from dataclasses import dataclass

from fedinfer_flower.ensemble.base import Array, Disclosure, EnsembleRule
from fedinfer_flower.privacy.base import PROTECTIONS, KeyPair, Protection, ScorePlan
from fedinfer_flower.privacy.checks import (
    ROUNDING_SLACK,
    check_scores,
    read_array,
    read_total,
    require_within,
)
from fedinfer_flower.privacy.clear_sums import ClearSum
from fedinfer_flower.privacy.cohort import Cohort
from fedinfer_flower.wire.identity import Identity

__all__ = ["Plain"]


@PROTECTIONS.register("plain")
@dataclass(frozen=True, kw_only=True)
class Plain(Protection):
    """Send scores in the clear.

    Use in simulation, or where all sites trust the coordinator with every answer; prefer
    `he` where only the querier may see the sum, `dp` where nobody may see an exact answer.

    Payload: float32, little-endian. Total: float64, little-endian, of shape
    (n_queries, width), under rules that disclose SCORES as well.

    Privacy
    -------
    The coordinator, alone, sees every site's scores; so does whoever it shows them to. The
    querier sees the combined answer. Scores let a curious coordinator test whether a record
    was in a site's training data.

    Examples
    --------
    >>> import numpy as np
    >>> from fedinfer_flower.ensemble import RULES
    >>> rule = RULES.get("mean-probability")()
    >>> plan = ScorePlan.for_rule(rule, n_classes=2, n_sites_max=2)
    >>> plain = Plain()
    >>> site = plain.site_side(plan, public_key=b"")
    >>> coordinator = plain.coordinator_side(plan, n_queries=1, rule=rule, public_key=b"")
    >>> coordinator.add(site.protect(np.array([[0.25, 0.75]])))
    >>> coordinator.add(site.protect(np.array([[0.5, 0.5]])))
    >>> querier = plain.querier_side(plan, keys=plain.make_keys())
    >>> querier.open(coordinator.total(), n_queries=1, n_sites=2)
    array([[0.75, 1.25]])
    """

    reveals = Disclosure.SCORES

    def payload_bytes(self, plan: ScorePlan, n_queries: int) -> int:
        """Return four bytes an entry."""
        return 4 * n_queries * plan.width

    def site_side(
        self,
        plan: ScorePlan,
        *,
        public_key: bytes,  # noqa: ARG002
        cohort: Cohort | None = None,  # noqa: ARG002
        identity: Identity | None = None,  # noqa: ARG002
    ) -> _PlainSite:
        """Build the site's side; there is no key."""
        return _PlainSite(plan)

    def coordinator_side(
        self,
        plan: ScorePlan,
        *,
        n_queries: int,
        rule: EnsembleRule,
        public_key: bytes,  # noqa: ARG002
        cohort: Cohort | None = None,  # noqa: ARG002
    ) -> _PlainCoordinator:
        """Build the coordinator's side; there is no key."""
        return _PlainCoordinator(self, plan, n_queries, rule, dtype="<f8")

    def querier_side(
        self,
        plan: ScorePlan,
        *,
        keys: KeyPair,  # noqa: ARG002
        cohort: Cohort | None = None,  # noqa: ARG002
    ) -> _PlainQuerier:
        """Build the querier's side; there is no key."""
        return _PlainQuerier(self, plan)


class _PlainSite:
    def __init__(self, plan: ScorePlan) -> None:
        self._plan = plan

    def protect(self, scores: Array) -> bytes:
        check_scores(scores, self._plan)
        return scores.astype("<f4").tobytes()


class _PlainCoordinator(ClearSum):
    def add(self, payload: bytes | memoryview, *, sender: str = "") -> None:  # noqa: ARG002
        self.plan.require_room(self.n_sites)
        scores = read_array(payload, "<f4", self.shape)
        require_within(scores, self.plan.bound * (1.0 + ROUNDING_SLACK), what="a site's scores")
        self.fold(scores)


class _PlainQuerier:
    def __init__(self, protection: Plain, plan: ScorePlan) -> None:
        self._protection = protection
        self._plan = plan

    def open(self, total: bytes | memoryview, *, n_queries: int, n_sites: int) -> Array:
        self._protection.check_cohort(n_sites, self._plan)
        limit = n_sites * self._plan.bound * (1.0 + 2.0 * ROUNDING_SLACK)
        return read_total(total, self._plan, n_queries=n_queries, limit=limit)
