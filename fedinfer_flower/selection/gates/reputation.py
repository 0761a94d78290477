"""Reputation: sites that audits have found wanting."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from fedinfer_flower.ensemble.options import option
from fedinfer_flower.query import SiteId
from fedinfer_flower.selection.base import SelectionNeed
from fedinfer_flower.selection.candidate import Candidate
from fedinfer_flower.selection.gates.base import GATES, Gate

__all__ = ["ReputationGate"]


@GATES.register("reputation")
@dataclass(frozen=True, kw_only=True)
class ReputationGate(Gate):
    """Leave out sites whose chance of honest work has a posterior mean below a floor.

    A site that nothing is known of stands at 0.5.

    Parameters
    ----------
    floor : float

    Privacy
    -------
    Reads the coordinator's own record. A site that is refused here can come back under a
    new key as one that nothing is known of: registration or a stake is what makes that
    dear.

    Examples
    --------
    >>> from fedinfer_flower.profile import SiteProfile
    >>> from fedinfer_flower.selection.candidate import SiteRecord
    >>> profile = SiteProfile(name="a", classes=("x",))
    >>> site = Candidate(
    ...     site_id=SiteId(1), profile=profile, record=SiteRecord(reputation=(1.0, 7.0))
    ... )
    >>> ReputationGate().admit([site], SelectionNeed(classes=("x",)))
    {1: 'reputation 0.125, at least 0.3 is asked for'}
    """

    floor: float = option(0.4, low=0.0, high=1.0)

    def admit(self, candidates: Sequence[Candidate], need: SelectionNeed) -> Mapping[SiteId, str]:  # noqa: ARG002
        """Refuse by the posterior mean."""
        refused: dict[SiteId, str] = {}
        for candidate in candidates:
            alpha, beta = candidate.record.reputation
            # Not alpha / (alpha + beta): that sum may become infinite.
            mean = 1.0 / (1.0 + beta / alpha)
            if mean < self.floor:
                refused[candidate.site_id] = (
                    f"reputation {mean:.3g}, at least {self.floor:.3g} is asked for"
                )
        return refused
