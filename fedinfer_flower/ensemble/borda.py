"""Borda count: the sites rank the classes, the ranks are added up."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from fedinfer_flower.ensemble.base import RULES, Array, EnsembleRule, SiteContext

__all__ = ["Borda"]


@RULES.register("borda")
@dataclass(frozen=True, kw_only=True)
class Borda(EnsembleRule):
    """Let each site rank the classes; a class earns the share of classes it beats.

    Independent of calibration altogether, but the ranks of unlikely classes are noise
    and count like those of likely ones; prefer `mean-probability` for many classes.

    Score: rank of c in ``p_k``, from 0 for the least to 1 for the most probable. Tied
    classes share the mean of their ranks, and all classes that the site does not know
    tie for the last place.

    Privacy
    -------
    Needs the sum only. Reveals mean ranks to the querier. `dp` noise grows with the
    square root of the number of classes.

    Examples
    --------
    >>> site = SiteContext(present=np.array([True, True, True]))
    >>> Borda().score(np.array([[0.3, 0.1, 0.2], [0.5, 0.5, 0.1]]), site)
    array([[1.  , 0.  , 0.5 ],
           [0.75, 0.75, 0.  ]])
    """

    def sensitivity_l2(self, n_classes: int) -> float:
        """Return the distance between a ranking and its reverse.

        No two rankings are farther apart (rearrangement inequality), and shared ranks
        are means of rankings. It is the root of ``C (C + 1) / (3 (C - 1))``.
        """
        return math.sqrt(n_classes * (n_classes + 1) / (3.0 * max(n_classes - 1, 1)))

    def score(self, logits: Array, site: SiteContext) -> Array:
        """Return the normalised ranks."""
        known = np.where(site.present, logits, -np.inf)
        ranks = np.empty_like(logits)
        # Row by row: comparing all pairs of classes at once would need C times the memory.
        for row, values in enumerate(known):
            ordered = np.sort(values)
            below = np.searchsorted(ordered, values, side="left")
            not_above = np.searchsorted(ordered, values, side="right")
            ranks[row] = (below + not_above - 1) / 2.0
        return np.asarray(ranks / max(logits.shape[-1] - 1, 1))
