"""Latency: sites that are seldom in time."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from fedinfer_flower.ensemble.options import option
from fedinfer_flower.query import SiteId
from fedinfer_flower.selection.base import SelectionNeed
from fedinfer_flower.selection.candidate import Candidate
from fedinfer_flower.selection.gates.base import GATES, Gate

__all__ = ["LatencyGate"]


@GATES.register("latency")
@dataclass(frozen=True, kw_only=True)
class LatencyGate(Gate):
    """Leave out sites whose latest answers would have come after ``need.latency_s``.

    A site that was never timed is asked, and so is every site where the need sets no time.

    Parameters
    ----------
    quantile : float
        Of the latest answers: 0.95 refuses a site of which more than one in twenty was late.
    min_answers : int
        Fewest timed answers to judge a site by: one slow answer is no habit.

    Privacy
    -------
    Reads the coordinator's own clock. A slow site gets no more chances to be faster unless
    its record is cleared or `min_answers` is raised.

    Examples
    --------
    >>> from fedinfer_flower.profile import SiteProfile
    >>> from fedinfer_flower.selection.candidate import SiteRecord
    >>> profile = SiteProfile(name="a", classes=("x",))
    >>> site = Candidate(
    ...     site_id=SiteId(1), profile=profile, record=SiteRecord(latencies_s=(4.0, 4.0, 4.0))
    ... )
    >>> LatencyGate().admit([site], SelectionNeed(classes=("x",), latency_s=2.0))
    {1: '95 % of answers within 4 s, 2 s are given'}
    """

    quantile: float = option(0.95, low=0.0, high=1.0)
    min_answers: int = option(3, low=1, high=100)

    def admit(self, candidates: Sequence[Candidate], need: SelectionNeed) -> Mapping[SiteId, str]:
        """Refuse by the quantile."""
        refused: dict[SiteId, str] = {}
        for candidate in candidates:
            seconds = candidate.latency_s(self.quantile)
            if need.latency_s is None or seconds is None or seconds <= need.latency_s:
                continue
            if len(candidate.record.latencies_s) >= self.min_answers:
                refused[candidate.site_id] = (
                    f"{100 * self.quantile:g} % of answers within {seconds:.3g} s,"
                    f" {need.latency_s:.3g} s are given"
                )
        return refused
