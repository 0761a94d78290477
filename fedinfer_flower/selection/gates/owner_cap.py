"""Owner cap: no owner has more than its share of sites in an answer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from fedinfer_flower.ensemble.options import option
from fedinfer_flower.query import SiteId
from fedinfer_flower.selection.base import SelectionNeed
from fedinfer_flower.selection.candidate import Candidate
from fedinfer_flower.selection.gates.base import GATES, Gate, Stage
from fedinfer_flower.selection.lots import lots
from fedinfer_flower.selection.parties import parties

__all__ = ["OwnerCap"]


@GATES.register("owner-cap")
@dataclass(frozen=True, kw_only=True)
class OwnerCap(Gate):
    """Keep at most so many sites of one owner, or of one cluster of duplicates.

    Of one party, sites with a registered owner stay before those that only claim one (a
    stranger may claim another's name), cheap ones before dear ones, and equals by lot. The
    gate knows no scores, so it may leave out the better of two.

    Parameters
    ----------
    most : int

    Privacy
    -------
    Reads owners and clusters; see `parties`. Copies of a site gain no weight as long as
    they are known to be copies: by owner, or by their answers.

    Examples
    --------
    >>> from fedinfer_flower.profile import SiteProfile
    >>> sites = [
    ...     Candidate(
    ...         site_id=SiteId(n),
    ...         profile=SiteProfile(
    ...             name=f"s{n}",
    ...             classes=("x",),
    ...             model_card={"owner": "ward"},
    ...             price_per_query=n,
    ...         ),
    ...     )
    ...     for n in (1, 2)
    ... ]
    >>> OwnerCap().admit(sites, SelectionNeed(classes=("x",)))
    {2: "1 of 2 sites of 'ward' may be asked"}
    """

    most: int = option(1, low=1, high=1_000_000)

    stage = Stage.PARTY

    def admit(self, candidates: Sequence[Candidate], need: SelectionNeed) -> Mapping[SiteId, str]:
        """Refuse all but the first few of each party."""
        lots_k = lots(candidates, need.seed)
        refused: dict[SiteId, str] = {}
        for party in parties(candidates):

            def rank(place: int) -> tuple[bool, float, float]:
                site = candidates[place]
                return not site.record.owner, site.price, float(lots_k[place])

            for place in sorted(party, key=rank)[self.most :]:
                site = candidates[place]
                refused[site.site_id] = (
                    f"{self.most} of {len(party)} sites of {site.owner[:64]!r} may be asked"
                )
        return refused
