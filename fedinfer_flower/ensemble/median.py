"""Median: the middle probability of each class."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from fedinfer_flower.ensemble.base import RULES, Array
from fedinfer_flower.ensemble.per_site import PerSiteRule

__all__ = ["Median"]


@RULES.register("median")
@dataclass(frozen=True, kw_only=True)
class Median(PerSiteRule):
    """Take the median of the sites' probabilities, class by class.

    Withstands a minority of hostile sites when all sites know all classes. Where each
    class is known to a few sites only, the median is what the others guess: prefer
    `class-share` there.

    Total: ``median_k p_k,c`` (Yin et al., ICML 2018, for gradients).

    Parameters
    ----------
    allow_skew : bool
        Take the middle also where the sites know different classes; see `skew_check`.

    Privacy
    -------
    Needs each site's own probabilities: the coordinator sees them, with noise under `dp`.

    Examples
    --------
    >>> Median().combine(np.array([[[0.9, 0.1]], [[0.4, 0.6]], [[0.2, 0.8]]]))
    array([[0.4, 0.6]])
    """

    allow_skew: bool = False

    def combine(self, scores: Array) -> Array:
        """Return the coordinate-wise median."""
        return np.asarray(np.median(scores, axis=0))
