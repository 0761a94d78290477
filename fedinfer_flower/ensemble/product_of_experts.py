"""Product of experts: the sites' probabilities, multiplied."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from fedinfer_flower.ensemble.base import (
    PROBABILITY_FLOOR,
    RULES,
    Array,
    EnsembleRule,
    ScoreKind,
    SiteContext,
    log_softmax,
    softmax,
)
from fedinfer_flower.ensemble.options import option

__all__ = ["ProductOfExperts"]


@RULES.register("product-of-experts")
@dataclass(frozen=True, kw_only=True)
class ProductOfExperts(EnsembleRule):
    """Multiply the probabilities of all sites, as if their errors were independent.

    Use when every site knows every class; bad when classes are spread unevenly, because
    a site that never saw a class votes it down.

    Score: ``phi_k,c = log max(p_k,c, epsilon)`` (Hinton, Neural Computation 14(8), 2002,
    with the floor).

    Parameters
    ----------
    epsilon : float
        Smallest probability that counts. Below the default of 0.01 one site's veto
        outweighs several others' consent.

    Privacy
    -------
    Needs the sum only. `dp` noise grows with ``log(1 / epsilon)``.

    Examples
    --------
    >>> site = SiteContext(present=np.array([True, True]))
    >>> np.exp(ProductOfExperts(epsilon=0.1).score(np.log(np.array([[0.02, 0.98]])), site))
    array([[0.1 , 0.98]])
    """

    epsilon: float = option(1e-2, low=PROBABILITY_FLOOR, high=0.5)

    score_kind = ScoreKind.LOG_PROBABILITY

    def score_bound(self, n_classes: int) -> float:  # noqa: ARG002
        """Return ``log(1 / epsilon)``."""
        return -math.log(self.epsilon)

    def sensitivity_l2(self, n_classes: int) -> float:
        """Return the diameter of the box [log epsilon, 0]."""
        return self.score_bound(n_classes) * math.sqrt(n_classes)

    def score(self, logits: Array, site: SiteContext) -> Array:  # noqa: ARG002
        """Return floored log-probabilities."""
        return np.maximum(log_softmax(logits), -self.score_bound(logits.shape[-1]))

    def probabilities(self, total: Array, n_sites: int) -> Array:  # noqa: ARG002
        """Return the product, normalised."""
        return softmax(self.class_totals(total))
