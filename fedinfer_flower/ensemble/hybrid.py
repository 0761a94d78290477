"""Hybrid: spectral weight of a site times consensus weight of its answer."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from fedinfer_flower.ensemble.base import RULES, Array
from fedinfer_flower.ensemble.consensus import exponential_weights, half_jeffreys
from fedinfer_flower.ensemble.options import option
from fedinfer_flower.ensemble.per_site import PerSiteRule, weighted_mean
from fedinfer_flower.ensemble.spectral import spectral_weights

__all__ = ["Hybrid"]


@RULES.register("hybrid")
@dataclass(frozen=True, kw_only=True)
class Hybrid(PerSiteRule):
    """Weight sites as `spectral` does and each answer as `consensus` does.

    A baseline that silences specialists twice; prefer `class-share`.

    Total: ``sum_k w_k p_k / sum_k w_k`` with ``w_k = a_k exp(-beta d_k)``; a from
    `spectral`, d from `consensus` (FedSEI, arXiv 2603.02214).

    Parameters
    ----------
    beta : float
        How sharply distance from the mean answer is punished.

    Privacy
    -------
    Needs each site's own probabilities: the coordinator sees them, with noise under
    `dp`. The answer to one query depends on the others in its batch.

    Examples
    --------
    >>> scores = np.array([[[0.9, 0.1]], [[0.9, 0.1]], [[0.1, 0.9]]])
    >>> Hybrid().combine(scores).round(2)
    array([[0.87, 0.13]])
    """

    beta: float = option(5.0, low=0.0, high=100.0)

    def combine(self, scores: Array) -> Array:
        """Return the mean with the products of both weights."""
        site_weights = np.maximum(spectral_weights(scores), np.finfo(np.float64).tiny)
        log_weights = np.log(site_weights)[:, np.newaxis] - self.beta * half_jeffreys(scores)
        return weighted_mean(exponential_weights(log_weights), scores)
