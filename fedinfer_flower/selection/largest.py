"""Largest: the sites that say they trained on most."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from fedinfer_flower.selection.base import (
    SELECTORS,
    Array,
    SelectionNeed,
    Selector,
    SiteEvidence,
)
from fedinfer_flower.selection.candidate import Candidate
from fedinfer_flower.selection.class_counts import comparable_counts

__all__ = ["LargestSites"]


@SELECTORS.register("largest")
@dataclass(frozen=True, kw_only=True)
class LargestSites(Selector):
    """Take the sites with the most training examples of the question's classes.

    A baseline: it takes several large sites that know the same classes. Prefer
    `coverage-greedy`. Sites that state less than counts stand at what can be expected of
    them; see `comparable_counts`.

    Privacy
    -------
    Needs the class counts of the profiles. Nothing bounds a claim: who claims most is
    asked first.

    Examples
    --------
    >>> from fedinfer_flower.profile import CountsKind, SiteProfile
    >>> from fedinfer_flower.query import SiteId
    >>> sites = [
    ...     Candidate(
    ...         site_id=SiteId(n),
    ...         profile=SiteProfile(
    ...             name=f"s{n}", classes=("x",), counts_kind=CountsKind.COUNTS,
    ...             class_counts=(float(n),),
    ...         ),
    ...     )
    ...     for n in range(3)
    ... ]
    >>> LargestSites().select(sites, SelectionNeed(classes=("x",), at_most=2)).site_ids
    (2, 1)
    """

    needs = frozenset({SiteEvidence.CLASS_COUNTS})

    def score(self, candidates: Sequence[Candidate], need: SelectionNeed) -> Array:
        """Return examples of the question's classes, stated or expected."""
        return np.asarray(comparable_counts(candidates, need.classes).sum(axis=1))
