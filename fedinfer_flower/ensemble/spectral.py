"""Spectral: one weight a site, from how its confidence moves with the others'."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from fedinfer_flower.ensemble.base import RULES, Array
from fedinfer_flower.ensemble.per_site import PerSiteRule, weighted_mean

__all__ = ["Spectral", "spectral_weights"]

_VARIANCE_FLOOR = 1e-18
"""Variance of confidences that differ by rounding alone."""


def spectral_weights(scores_kbc: Array) -> Array:
    """Return one weight a site, shape (n_sites,), from the top eigenvector; they sum to 1.

    Where several eigenvectors share the largest eigenvalue, each of them is as good as
    any of their rotations: a site then gets the length of its projection on all of them,
    so that the weights do not depend on the order of sites. Without any variance, as in a
    batch of one query, all weights are equal.

    Examples
    --------
    >>> spectral_weights(np.array([[[0.9, 0.1], [0.5, 0.5]], [[0.9, 0.1], [0.5, 0.5]]]))
    array([0.5, 0.5])
    """
    confidence = scores_kbc.max(axis=-1)
    centred = confidence - confidence.mean(axis=1, keepdims=True)
    covariance = centred @ centred.T / max(centred.shape[1] - 1, 1)
    values, vectors = np.linalg.eigh(covariance)
    top = values >= values[-1] * (1.0 - 1e-9) - _VARIANCE_FLOOR
    lengths = np.sqrt((vectors[:, top] ** 2).sum(axis=1))
    return np.asarray(lengths / lengths.sum())


@RULES.register("spectral")
@dataclass(frozen=True, kw_only=True)
class Spectral(PerSiteRule):
    """Weight sites by how much their confidence shares in what is common to all.

    A baseline: it looks for one common difficulty of queries and silences specialists.
    Prefer `class-share` or `entropy-weighted`. Needs a batch; for one query all weights
    are equal.

    Total: ``sum_k a_k p_k`` with ``a = |v| / sum |v|``, v the top eigenvector of the
    sites' covariance of ``max_c p_k,c`` over the batch (FedSEI, arXiv 2603.02214, after
    SUMMA).

    Privacy
    -------
    Needs each site's own probabilities: the coordinator sees them, with noise under
    `dp`. The answer to one query depends on the others in its batch.

    Examples
    --------
    >>> Spectral().combine(np.array([[[0.9, 0.1]], [[0.3, 0.7]]]))
    array([[0.6, 0.4]])
    """

    def combine(self, scores: Array) -> Array:
        """Return the mean with spectral weights."""
        weights = spectral_weights(scores)
        return weighted_mean(np.repeat(weights[:, np.newaxis], scores.shape[1], axis=1), scores)
