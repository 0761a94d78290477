"""Base of rules that look at each site's own probabilities; no rule of its own."""

from __future__ import annotations

import math
from abc import abstractmethod
from dataclasses import dataclass

import numpy as np

from fedinfer_flower.ensemble.base import (
    PROBABILITY_FLOOR,
    Array,
    Disclosure,
    EnsembleRule,
    SiteContext,
    softmax,
)

__all__ = ["PerSiteRule", "as_probabilities", "weighted_mean"]


def as_probabilities(scores: Array) -> Array:
    """Return scores as probabilities again: what `dp` noise pushed out is floored.

    Examples
    --------
    >>> as_probabilities(np.array([-3.0, 1.0, 1.0])).round(3)
    array([0. , 0.5, 0.5])
    """
    floored = np.maximum(scores, PROBABILITY_FLOOR)
    return np.asarray(floored / floored.sum(axis=-1, keepdims=True))


def weighted_mean(weights_kb: Array, scores_kbc: Array) -> Array:
    """Return the mean over sites with weights that are normalised over sites.

    Examples
    --------
    >>> weighted_mean(np.array([[3.0], [1.0]]), np.array([[[1.0, 0.0]], [[0.0, 1.0]]]))
    array([[0.75, 0.25]])
    """
    normalised = weights_kb / weights_kb.sum(axis=0)
    return np.asarray((normalised[:, :, np.newaxis] * scores_kbc).sum(axis=0))


@dataclass(frozen=True, kw_only=True)
class PerSiteRule(EnsembleRule):
    """Sites send their probabilities; a subclass writes `combine`.

    The coordinator sees every site's answer, so such a rule works under `plain` and `dp`
    only. Most of them trust a site that agrees with the others, which silences
    specialists where sites know different classes.
    """

    discloses = Disclosure.SCORES

    def sensitivity_l2(self, n_classes: int) -> float:  # noqa: ARG002
        """Return the diameter of the probability simplex."""
        return math.sqrt(2.0)

    def score(self, logits: Array, site: SiteContext) -> Array:  # noqa: ARG002
        """Return the probabilities."""
        return softmax(logits)

    @abstractmethod
    def combine(self, scores: Array) -> Array:
        """Combine the sites' probabilities, shape (n_sites, n_queries, n_classes)."""
