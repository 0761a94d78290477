"""All: ask everyone who may be asked."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from fedinfer_flower.selection.base import SELECTORS, Array, SelectionNeed, Selector
from fedinfer_flower.selection.candidate import Candidate

__all__ = ["AllSites"]


@SELECTORS.register("all")
@dataclass(frozen=True, kw_only=True)
class AllSites(Selector):
    """Ask every site, the cheapest first where a budget does not cover all.

    Privacy
    -------
    Needs nothing but prices, which are in the profiles.

    Examples
    --------
    >>> from fedinfer_flower.profile import SiteProfile
    >>> site = Candidate(site_id=1, profile=SiteProfile(name="a", classes=("x",)))
    >>> AllSites().select([site], SelectionNeed(classes=("x",))).site_ids
    (1,)
    """

    def score(
        self,
        candidates: Sequence[Candidate],
        need: SelectionNeed,  # noqa: ARG002
    ) -> Array:
        """Return minus the price."""
        return np.array([-candidate.price for candidate in candidates])
