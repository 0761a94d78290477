"""Trimmed mean: the mean without the extremes of each class."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from fedinfer_flower.ensemble.base import RULES, Array
from fedinfer_flower.ensemble.options import option
from fedinfer_flower.ensemble.per_site import PerSiteRule

__all__ = ["TrimmedMean"]


@RULES.register("trimmed-mean")
@dataclass(frozen=True, kw_only=True)
class TrimmedMean(PerSiteRule):
    """Average the sites' probabilities class by class, dropping the highest and lowest.

    Withstands up to `trim` hostile sites when all sites know all classes; between
    `mean-probability` (trim 0) and `median` (the largest trim).

    Total: mean over sites of ``p_k,c`` without the `trim` smallest and largest values of
    each class (Yin et al., ICML 2018, for gradients).

    Parameters
    ----------
    trim : int
        Values dropped at each end. With few sites fewer are dropped, so that one or two
        remain.
    allow_skew : bool
        Take the middle also where the sites know different classes; see `skew_check`.

    Privacy
    -------
    Needs each site's own probabilities: the coordinator sees them, with noise under `dp`.

    Examples
    --------
    >>> TrimmedMean(trim=1).combine(np.array([[[0.9]], [[0.5]], [[0.3]], [[0.0]]]))
    array([[0.4]])
    """

    trim: int = option(1, low=0, high=1_000_000)
    allow_skew: bool = False

    def combine(self, scores: Array) -> Array:
        """Return the coordinate-wise trimmed mean."""
        n_sites = len(scores)
        cut = min(self.trim, (n_sites - 1) // 2)
        return np.asarray(np.sort(scores, axis=0)[cut : n_sites - cut].mean(axis=0))
