"""Geometric median: the answer nearest to all sites' answers."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from fedinfer_flower.ensemble.base import RULES, Array
from fedinfer_flower.ensemble.options import option
from fedinfer_flower.ensemble.per_site import PerSiteRule, weighted_mean

__all__ = ["GeometricMedian"]

_STILL = 1e-9
"""A smaller step counts as none: the tolerance to which combined answers agree."""


@RULES.register("geometric-median")
@dataclass(frozen=True, kw_only=True)
class GeometricMedian(PerSiteRule):
    """Take the point whose distances to the sites' probabilities have the smallest sum.

    Withstands a minority of hostile sites like `median`, but treats an answer as a whole.
    Not for sites that know different classes: prefer `class-share` there.

    Total: ``argmin_y sum_k |p_k - y|``, by smoothed Weiszfeld steps from the mean (Pillutla
    et al., IEEE Trans. Signal Processing 70, 2022).

    Parameters
    ----------
    iterations : int
        Most Weiszfeld steps; they end early when no entry of the batch moves any more.
    smoothing : float
        Distance below which a site's pull grows no further; keeps the step finite at a
        site's own answer.
    allow_skew : bool
        Take the middle also where the sites know different classes; see `skew_check`.

    Privacy
    -------
    Needs each site's own probabilities: the coordinator sees them, with noise under `dp`.

    Examples
    --------
    >>> scores = np.array([[[1.0, 0.0]], [[1.0, 0.0]], [[0.0, 1.0]]])
    >>> GeometricMedian().combine(scores).round(3)
    array([[1., 0.]])
    """

    iterations: int = option(256, low=1, high=10_000)
    smoothing: float = option(1e-6, low=1e-12, high=1.0)
    allow_skew: bool = False

    def combine(self, scores: Array) -> Array:
        """Return the geometric median of each query's answers."""
        centre = scores.mean(axis=0)
        for _ in range(self.iterations):
            distances = np.linalg.norm(scores - centre, axis=-1)
            before = centre
            centre = weighted_mean(1.0 / np.maximum(distances, self.smoothing), scores)
            if np.abs(centre - before).max() < _STILL:
                break
        return np.asarray(centre)
