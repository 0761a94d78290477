"""Margin-weighted: a site counts by how far its best class leads."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from fedinfer_flower.ensemble.base import RULES, Array, SiteContext, softmax
from fedinfer_flower.ensemble.weighted import WeightedRule

__all__ = ["MarginWeighted"]


@RULES.register("margin-weighted")
@dataclass(frozen=True, kw_only=True)
class MarginWeighted(WeightedRule):
    """Weight each site's probabilities by the lead of its best class over the second.

    Unlike `confidence-weighted` it silences a site that hesitates between two classes.
    A site sets its own weight, so calibrate first.

    Score: ``(w_k p_k, w_k)`` with ``w_k = p_(1) - p_(2)``, divided after the sum.

    Privacy
    -------
    Needs the sum only. Reveals the weighted mean and the sum of the weights to the
    querier.

    Examples
    --------
    >>> site = SiteContext(present=np.array([True, True]))
    >>> MarginWeighted().score(np.log(np.array([[0.75, 0.25]])), site)
    array([[0.375, 0.125, 0.5  ]])
    """

    def weight_bound(self, n_classes: int) -> float:  # noqa: ARG002
        """Return the lead of a class that has all probability."""
        return 1.0

    def answer(self, logits: Array, site: SiteContext) -> tuple[Array, Array]:  # noqa: ARG002
        """Return probabilities, weighted by the lead of the best class."""
        probabilities = softmax(logits)
        if logits.shape[-1] == 1:
            return probabilities, probabilities[:, 0]
        second, first = np.partition(probabilities, -2, axis=-1)[:, -2:].T
        return probabilities, first - second
