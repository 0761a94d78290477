"""Quorum: enough parties that a sum tells of none of them alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from fedinfer_flower.ensemble.options import option
from fedinfer_flower.query import SiteId
from fedinfer_flower.selection.base import SelectionNeed
from fedinfer_flower.selection.candidate import Candidate
from fedinfer_flower.selection.gates.base import GATES, Gate, Stage
from fedinfer_flower.selection.parties import parties

__all__ = ["QuorumGate"]


@GATES.register("quorum")
@dataclass(frozen=True, kw_only=True)
class QuorumGate(Gate):
    """Ask nobody unless enough distinct parties can be asked, and in every group.

    A secure sum over three sites of one owner is that owner's answer, in clear. So sites
    are counted by party: by owner, and by the cluster of duplicates that settlement found.
    Applied after the other gates; `plan_query` asks again about each group that a selector
    made. With gate `owner-cap` any choice of sites is a choice of parties.

    Parameters
    ----------
    min_parties : int
        Fewest parties in a released sum; 0 for ``need.group_size``.
    registered_only : bool
        Believe registered owners only; see `parties`.

    Privacy
    -------
    Holds against sites that *say* who owns them, or were registered. One owner behind
    several made-up ones is not seen, unless their answers were found to be copies. Parties
    that pool what they know can still subtract their own answers from a sum.

    Examples
    --------
    >>> from fedinfer_flower.profile import SiteProfile
    >>> profile = SiteProfile(name="a", classes=("x",), model_card={"owner": "ward"})
    >>> sites = [Candidate(site_id=SiteId(n), profile=profile) for n in range(3)]
    >>> sorted(QuorumGate().admit(sites, SelectionNeed(classes=("x",))).values())[0]
    '1 party, 3 are needed'
    """

    min_parties: int = option(0, low=0, high=1_000_000)
    registered_only: bool = False

    stage = Stage.WHOLE

    def admit(self, candidates: Sequence[Candidate], need: SelectionNeed) -> Mapping[SiteId, str]:
        """Refuse all, if they are too few parties."""
        said = self.objection(candidates, need)
        return {candidate.site_id: said for candidate in candidates} if said else {}

    def objection(self, group: Sequence[Candidate], need: SelectionNeed) -> str:
        """Return how many parties are missing."""
        wanted = self.min_parties or need.group_size
        found = len(parties(group, registered_only=self.registered_only))
        if found >= wanted:
            return ""
        return f"{found} {'party' if found == 1 else 'parties'}, {wanted} are needed"
