"""Random: draw sites by lot."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass

from fedinfer_flower.ensemble.options import option
from fedinfer_flower.errors import SelectionError
from fedinfer_flower.selection.base import SELECTORS, Array, Selection, SelectionNeed, Selector
from fedinfer_flower.selection.candidate import Candidate
from fedinfer_flower.selection.lots import lots

__all__ = ["RandomSites"]


@SELECTORS.register("random")
@dataclass(frozen=True, kw_only=True)
class RandomSites(Selector):
    """Draw sites by lot, each as likely as any other.

    The baseline that a selector must beat, and the way to spread queries evenly over sites
    that nothing is known of. Lots depend on `SelectionNeed.seed` and the node id.

    Parameters
    ----------
    m : int
        Sites to draw; 0 draws as many as the need allows (``at_most``), or without such a
        limit as many as it needs (``at_least``).

    Privacy
    -------
    Needs nothing of the sites but prices, where there is a budget.

    Examples
    --------
    >>> from fedinfer_flower.profile import SiteProfile
    >>> from fedinfer_flower.query import SiteId
    >>> sites = [
    ...     Candidate(site_id=SiteId(n), profile=SiteProfile(name=f"s{n}", classes=("x",)))
    ...     for n in range(9)
    ... ]
    >>> len(RandomSites(m=4).select(sites, SelectionNeed(classes=("x",))).site_ids)
    4
    """

    m: int = option(0, low=0, high=1_000_000)

    def score(self, candidates: Sequence[Candidate], need: SelectionNeed) -> Array:
        """Return each site's lot, in [0, 1)."""
        return lots(candidates, need.seed)

    def select(self, candidates: Sequence[Candidate], need: SelectionNeed) -> Selection:
        """Draw.

        Raises
        ------
        SelectionError
            If `m` is below ``need.at_least``, or fewer than that fit.
        """
        if 0 < self.m < need.at_least:
            raise SelectionError(
                f"selector 'random' draws {self.m} sites, {need.at_least} are needed",
                hint=f"m={need.at_least} or more; quorum and protection set what is needed",
            )
        wanted = self.m or need.at_most or need.at_least
        most = wanted if need.at_most is None else min(wanted, need.at_most)
        return super().select(candidates, dataclasses.replace(need, at_most=most))
