"""Base of rules in which a site weights its own answer; no rule of its own.

The site sends its weighted probabilities and, beside them, the weight: (w p, w). Both
add up under any protection, and whoever opens the sum divides. So weights that depend on
the answer, which nobody but the site may see, are normalised over sites all the same.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from dataclasses import dataclass

import numpy as np

from fedinfer_flower.ensemble.base import Array, EnsembleRule, SiteContext

__all__ = ["WEIGHT_FLOOR", "WeightedRule"]

WEIGHT_FLOOR = 1e-12
"""A smaller weight is zero: it would be rounding noise of the probabilities, and dividing
by it would make an answer of that noise."""


@dataclass(frozen=True, kw_only=True)
class WeightedRule(EnsembleRule):
    """Weighted mean of probabilities, ``sum_k w_k p_k / sum_k w_k``, weights from the site.

    A subclass writes `answer` and `weight_bound`. The last column of a score is the
    weight; if all weights are zero, nobody said anything and the rule abstains.
    """

    @abstractmethod
    def answer(self, logits: Array, site: SiteContext) -> tuple[Array, Array]:
        """Return probabilities, shape (n_queries, n_classes), and weights, shape (n_queries,)."""

    @abstractmethod
    def weight_bound(self, n_classes: int) -> float:
        """Return the largest weight that `answer` can give."""

    def score_width(self, n_classes: int) -> int:
        """Return one entry a class, and one for the weight."""
        return n_classes + 1

    def score_bound(self, n_classes: int) -> float:
        """Return the bound of the weight, which no weighted probability exceeds."""
        return self.weight_bound(n_classes)

    def sensitivity_l2(self, n_classes: int) -> float:
        """Return the farthest that (w p, w) can be from (v q, v).

        With orthogonal p and q the squared distance is ``w^2 + v^2 + (w - v)^2``. It is
        convex in the weights, so largest at a corner of their range, and there at most
        ``2 bound^2``.
        """
        return math.sqrt(2.0) * self.weight_bound(n_classes)

    def score(self, logits: Array, site: SiteContext) -> Array:
        """Return weighted probabilities and, in the last column, the weights."""
        probabilities, weights = self.answer(logits, site)
        # The minimum catches a last-digit difference between two exponentials.
        weights = np.minimum(weights, self.weight_bound(logits.shape[-1]))
        weights = np.where(weights > WEIGHT_FLOOR, weights, 0.0)[:, np.newaxis]
        return np.concatenate([weights * probabilities, weights], axis=1)

    def class_totals(self, total: Array) -> Array:
        """Return the weighted mean; the numerator where there is no weight to divide by."""
        weights = total[:, -1:]
        return total[:, :-1] / np.where(weights > WEIGHT_FLOOR, weights, 1.0)
