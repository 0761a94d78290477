"""Staleness: sites that have not been heard of for long."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from fedinfer_flower.ensemble.options import option
from fedinfer_flower.query import SiteId
from fedinfer_flower.selection.base import SelectionNeed
from fedinfer_flower.selection.candidate import Candidate
from fedinfer_flower.selection.gates.base import GATES, Gate

__all__ = ["StalenessGate"]


@GATES.register("staleness")
@dataclass(frozen=True, kw_only=True)
class StalenessGate(Gate):
    """Leave out sites whose last answer is too old.

    Parameters
    ----------
    max_age_s : float
        Seconds since the last answer, at ``need.now_s``. One that lies further than this in
        the *future* is refused too: then clocks disagree, or nobody set ``now_s``.
    never_seen : bool
        Whether sites that never answered are asked. True by default, or no site ever would.

    Privacy
    -------
    Reads the coordinator's own record.

    Examples
    --------
    >>> from fedinfer_flower.profile import SiteProfile
    >>> from fedinfer_flower.selection.candidate import SiteRecord
    >>> profile = SiteProfile(name="a", classes=("x",))
    >>> site = Candidate(
    ...     site_id=SiteId(1), profile=profile, record=SiteRecord(last_seen_at=1_000.0)
    ... )
    >>> gate = StalenessGate(max_age_s=60.0)
    >>> gate.admit([site], SelectionNeed(classes=("x",), now_s=1_090.0))
    {1: 'last seen 90 s ago'}
    """

    max_age_s: float = option(86_400.0, low=1e-3, high=1e10)
    never_seen: bool = True

    def admit(self, candidates: Sequence[Candidate], need: SelectionNeed) -> Mapping[SiteId, str]:
        """Refuse by age."""
        refused: dict[SiteId, str] = {}
        for candidate in candidates:
            seen = candidate.record.last_seen_at
            if seen is None:
                if not self.never_seen:
                    refused[candidate.site_id] = "never seen"
            elif need.now_s - seen > self.max_age_s:
                refused[candidate.site_id] = f"last seen {need.now_s - seen:.4g} s ago"
            elif seen - need.now_s > self.max_age_s:
                refused[candidate.site_id] = "last seen in the future: clocks disagree"
        return refused
