"""Prior-corrected class share: class share after taking out the site's own base rates."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from fedinfer_flower.ensemble.base import (
    RULES,
    Array,
    EnsembleRule,
    Evidence,
    SiteContext,
    softmax,
)
from fedinfer_flower.ensemble.class_share import class_share
from fedinfer_flower.ensemble.options import option

__all__ = ["PriorCorrectedClassShare"]


@RULES.register("prior-corrected-class-share")
@dataclass(frozen=True, kw_only=True)
class PriorCorrectedClassShare(EnsembleRule):
    """Divide a site's probabilities by its base rates, then weight by class share.

    May beat `class-share` when classes are many and well filled; unstable when a site
    has only a handful of examples of a class.

    Score: ``phi_k,c = share_k,c * norm_c(p_k,c / max(pi_k,c, prior_floor))`` with the
    site's own frequencies ``pi_k,c = n_k,c / sum_c n_k,c`` (Saerens et al., Neural
    Computation 14(1), 2002, with a uniform prior after the correction).

    Parameters
    ----------
    prior_floor : float
        Smallest base rate to divide by.

    Privacy
    -------
    Needs the sum only. Each site's class counts are known to the coordinator from
    onboarding, and their totals to every site.

    Examples
    --------
    >>> site = SiteContext(
    ...     present=np.array([True, True]),
    ...     class_counts=np.array([30.0, 10.0]),
    ...     class_totals=np.array([60.0, 10.0]),
    ... )
    >>> PriorCorrectedClassShare().score(np.log(np.array([[0.75, 0.25]])), site)
    array([[0.25, 0.5 ]])
    """

    prior_floor: float = option(0.02, low=1e-6, high=1.0)

    needs = frozenset({Evidence.CLASS_COUNTS})

    def sensitivity_l2(self, n_classes: int) -> float:  # noqa: ARG002
        """Return the diameter of the simplex and all it dominates (shares are at most 1)."""
        return math.sqrt(2.0)

    def score(self, logits: Array, site: SiteContext) -> Array:
        """Return corrected probabilities scaled by the site's share of each class."""
        share = class_share(site)
        counts = np.asarray(site.class_counts)
        prior = counts / max(float(counts.sum()), 1e-12)
        corrected = softmax(logits) / np.maximum(prior, self.prior_floor)
        return np.asarray(share * (corrected / corrected.sum(axis=-1, keepdims=True)))
