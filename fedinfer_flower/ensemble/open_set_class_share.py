"""Open-set class share: who has seen this class, and anything like this query."""

from __future__ import annotations

import math
from dataclasses import dataclass

from fedinfer_flower.ensemble.base import (
    RULES,
    Array,
    EnsembleRule,
    Evidence,
    SiteContext,
    softmax,
)
from fedinfer_flower.ensemble.class_share import class_share
from fedinfer_flower.ensemble.open_set import familiarity

__all__ = ["OpenSetClassShare"]


@RULES.register("open-set-class-share")
@dataclass(frozen=True, kw_only=True)
class OpenSetClassShare(EnsembleRule):
    """Weight each site's probability by its class share and the query's familiarity.

    The best rule without training that the package has when sites' data are skewed by
    class; what `auto` picks where every site can serve it. Class share alone is misled
    by a specialist: a site that holds all examples of one class and sees that class in
    everything. Its own data tell it when not to.

    Score: ``phi_k,c = n_k,c / sum_j n_j,c * u_k(x) * p_k,c``.

    Privacy
    -------
    Needs the sum only. Class counts (or presence bits) are known to the coordinator
    from onboarding; familiarity never leaves the site except inside the score.

    Examples
    --------
    >>> import numpy as np
    >>> site = SiteContext(
    ...     present=np.array([True, True]),
    ...     class_counts=np.array([1.0, 1.0]),
    ...     class_totals=np.array([1.0, 2.0]),
    ...     familiarity=np.array([0.5]),
    ... )
    >>> OpenSetClassShare().score(np.log(np.array([[0.5, 0.5]])), site)
    array([[0.25 , 0.125]])
    """

    needs = frozenset({Evidence.CLASS_COUNTS, Evidence.FAMILIARITY})

    def sensitivity_l2(self, n_classes: int) -> float:  # noqa: ARG002
        """Return the diameter of the simplex and all it dominates."""
        return math.sqrt(2.0)

    def score(self, logits: Array, site: SiteContext) -> Array:
        """Return probabilities scaled by share and familiarity."""
        return class_share(site) * familiarity(site) * softmax(logits)
