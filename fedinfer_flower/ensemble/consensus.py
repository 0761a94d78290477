"""Consensus: a site counts by how near it is to the mean answer."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from fedinfer_flower.ensemble.base import RULES, Array
from fedinfer_flower.ensemble.options import option
from fedinfer_flower.ensemble.per_site import PerSiteRule, as_probabilities, weighted_mean

__all__ = ["Consensus", "exponential_weights", "half_jeffreys"]


def half_jeffreys(scores_kbc: Array) -> Array:
    """Return each site's divergence from the mean answer, shape (n_sites, n_queries).

    Examples
    --------
    >>> half_jeffreys(np.array([[[0.5, 0.5]], [[0.5, 0.5]]]))
    array([[0.],
           [0.]])
    """
    probabilities = as_probabilities(scores_kbc)
    mean = probabilities.mean(axis=0)
    # KL(p | m) + KL(m | p) in one sum of terms that are never negative.
    terms = (probabilities - mean) * (np.log(probabilities) - np.log(mean))
    return np.asarray(0.5 * terms.sum(axis=-1))


def exponential_weights(log_weights: Array) -> Array:
    """Return weights up to a factor: relative to the largest, so that not all can vanish.

    Examples
    --------
    >>> exponential_weights(np.array([[-2000.0], [-2000.0]]))
    array([[1.],
           [1.]])
    """
    return np.asarray(np.exp(log_weights - log_weights.max(axis=0)))


@RULES.register("consensus")
@dataclass(frozen=True, kw_only=True)
class Consensus(PerSiteRule):
    """Weight each site's probabilities by their nearness to the sites' mean.

    A baseline: whoever knows what the others do not is silenced. Prefer `class-share`
    where sites know different classes.

    Total: ``sum_k w_k p_k / sum_k w_k`` with ``w_k = exp(-beta d_k)``,
    ``d_k = (KL(p_k | m) + KL(m | p_k)) / 2`` and m the mean of the ``p_k``. FedSEI (arXiv
    2603.02214) calls d_k a Jensen-Shannon divergence; it is half of Jeffreys'.

    Parameters
    ----------
    beta : float
        How sharply distance is punished.

    Privacy
    -------
    Needs each site's own probabilities: the coordinator sees them, with noise under `dp`.

    Examples
    --------
    >>> scores = np.array([[[0.9, 0.1]], [[0.9, 0.1]], [[0.1, 0.9]]])
    >>> Consensus().combine(scores).round(2)
    array([[0.87, 0.13]])
    """

    beta: float = option(5.0, low=0.0, high=100.0)

    def combine(self, scores: Array) -> Array:
        """Return the mean with consensus weights."""
        return weighted_mean(exponential_weights(-self.beta * half_jeffreys(scores)), scores)
