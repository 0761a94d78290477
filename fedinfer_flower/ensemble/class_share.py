"""Class share: each site speaks for a class as far as it has seen that class."""

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
from fedinfer_flower.errors import InvalidValueError

__all__ = ["ClassShare", "class_share"]


def class_share(site: SiteContext) -> Array:
    """Return this site's share of all training examples of each class, shape (n_classes,).

    Raises
    ------
    InvalidValueError
        If the site has no committed counts or was not told the totals.
    """
    if site.class_counts is None or site.class_totals is None:
        raise InvalidValueError(
            "a class-share rule needs class counts of every site",
            hint="share counts or presence bits at each site, or use 'entropy-weighted'",
        )
    # A site's own count is part of the total; the minimum bounds it at 1 all the same.
    return np.minimum(site.class_counts / np.maximum(site.class_totals, 1e-12), 1.0)


@RULES.register("class-share")
@dataclass(frozen=True, kw_only=True)
class ClassShare(EnsembleRule):
    """Weight each site's probability of a class by its share of that class's examples.

    The best rule that needs no training when the sites' data differ in their classes.
    With equal shares it is the mean probability. Under strong `dp` noise prefer
    `majority-vote`: a share weights the noise of every site alike.

    Score: ``phi_k,c = n_k,c / sum_j n_j,c * p_k,c``; with presence bits instead of counts,
    the weight is one over the number of sites that know the class.

    Privacy
    -------
    Needs the sum only. Each site's class counts (or presence bits) are known to the
    coordinator from onboarding, and their totals to every site.

    Examples
    --------
    >>> import numpy as np
    >>> site = SiteContext(
    ...     present=np.array([True, True]),
    ...     class_counts=np.array([30.0, 5.0]),
    ...     class_totals=np.array([40.0, 50.0]),
    ... )
    >>> ClassShare().score(np.log(np.array([[0.5, 0.5]])), site)
    array([[0.375, 0.05 ]])
    """

    needs = frozenset({Evidence.CLASS_COUNTS})

    def sensitivity_l2(self, n_classes: int) -> float:  # noqa: ARG002
        """Return the diameter of the simplex and all it dominates (shares are at most 1)."""
        return math.sqrt(2.0)

    def score(self, logits: Array, site: SiteContext) -> Array:
        """Return probabilities scaled by the site's share of each class."""
        return class_share(site) * softmax(logits)
