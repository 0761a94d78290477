"""Open set: a site speaks up only for queries that resemble what it has seen."""

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
from fedinfer_flower.errors import InvalidValueError

__all__ = ["OpenSet", "familiarity"]


def familiarity(site: SiteContext) -> Array:
    """Return the familiarity of each query as a column, shape (n_queries, 1).

    Raises
    ------
    InvalidValueError
        If the site does not measure it.
    """
    if site.familiarity is None:
        raise InvalidValueError(
            "an open-set rule needs familiarity from every site",
            hint="give LocalModel(reference_inputs=...) at each site, or use 'class-share'",
        )
    return site.familiarity[:, None]


@RULES.register("open-set")
@dataclass(frozen=True, kw_only=True)
class OpenSet(EnsembleRule):
    """Weight each site's probabilities by how familiar the query is to that site.

    Use when sites know different classes and share neither counts nor presence bits: a
    model that never saw a class answers with confidence all the same, and only its own
    site can tell. Prefer `open-set-class-share` where counts or presence bits are shared.

    Score: ``phi_k = u_k(x) * p_k`` with u_k in [0, 1].

    Privacy
    -------
    Needs the sum only. Under `he` and `secagg` nobody learns which site was familiar with a
    query, but the querier sees in the length of the sum that some site was: whether a record
    that is strange to all others was in somebody's training data. Noise bounds that.

    Examples
    --------
    >>> import numpy as np
    >>> site = SiteContext(present=np.array([True, True]), familiarity=np.array([0.5]))
    >>> OpenSet().score(np.log(np.array([[0.5, 0.5]])), site)
    array([[0.25, 0.25]])
    """

    needs = frozenset({Evidence.FAMILIARITY})

    def sensitivity_l2(self, n_classes: int) -> float:  # noqa: ARG002
        """Return the diameter of the simplex and all it dominates."""
        return math.sqrt(2.0)

    def score(self, logits: Array, site: SiteContext) -> Array:
        """Return probabilities scaled by familiarity."""
        return familiarity(site) * softmax(logits)
