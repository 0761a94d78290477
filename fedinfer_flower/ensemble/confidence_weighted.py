"""Confidence-weighted: a site counts by its best probability above chance."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from fedinfer_flower.ensemble.base import RULES, Array, SiteContext, softmax
from fedinfer_flower.ensemble.weighted import WeightedRule

__all__ = ["ConfidenceWeighted"]


@RULES.register("confidence-weighted")
@dataclass(frozen=True, kw_only=True)
class ConfidenceWeighted(WeightedRule):
    """Weight each site's probabilities by its highest one, less chance level.

    Cheaper to explain than `entropy-weighted`, with the same caveat: a site sets its own
    weight, so calibrate first. A site that knows nothing counts nothing.

    Score: ``(w_k p_k, w_k)`` with ``w_k = max_c p_k,c - 1/C``, divided after the sum.

    Privacy
    -------
    Needs the sum only. Reveals the weighted mean and the sum of the weights to the
    querier.

    Examples
    --------
    >>> site = SiteContext(present=np.array([True, True]))
    >>> ConfidenceWeighted().score(np.log(np.array([[0.75, 0.25]])), site)
    array([[0.1875, 0.0625, 0.25  ]])
    """

    def weight_bound(self, n_classes: int) -> float:
        """Return certainty less chance; 1.0 for a single class, where both are one."""
        return 1.0 - 1.0 / n_classes if n_classes > 1 else 1.0

    def answer(self, logits: Array, site: SiteContext) -> tuple[Array, Array]:  # noqa: ARG002
        """Return probabilities, weighted by the confidence above chance."""
        probabilities = softmax(logits)
        above_chance = probabilities.max(axis=-1) - 1.0 / logits.shape[-1]
        return probabilities, np.maximum(above_chance, 0.0)
