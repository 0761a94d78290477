"""Mean probability: the sites' probabilities, added up."""

from __future__ import annotations

import math
from dataclasses import dataclass

from fedinfer_flower.ensemble.base import RULES, Array, EnsembleRule, SiteContext, softmax

__all__ = ["MeanProbability"]


@RULES.register("mean-probability")
@dataclass(frozen=True, kw_only=True)
class MeanProbability(EnsembleRule):
    """Average the probabilities of all sites.

    Use when nothing is known about the sites; prefer `class-share` where they consent
    to share class counts or presence bits.

    Score: ``phi_k = p_k``. FedSEI calls it soft voting (arXiv 2603.02214).

    Privacy
    -------
    Needs the sum only. Reveals the mean probability to the querier, nothing to the
    coordinator under `he`.

    Examples
    --------
    >>> import numpy as np
    >>> rule = MeanProbability()
    >>> site = SiteContext(present=np.array([True, True]))
    >>> rule.score(np.log(np.array([[0.25, 0.75]])), site)
    array([[0.25, 0.75]])
    """

    def sensitivity_l2(self, n_classes: int) -> float:  # noqa: ARG002
        """Return the diameter of the probability simplex."""
        return math.sqrt(2.0)

    def score(self, logits: Array, site: SiteContext) -> Array:  # noqa: ARG002
        """Return the probabilities."""
        return softmax(logits)
