"""Brier-Shapley: exact Shapley values of the Brier game, in closed form."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from fedinfer_flower.incentives.base import SCHEMES, Array, LinearScheme, PublicFacts

__all__ = ["BrierShapley"]


@SCHEMES.register("brier-shapley")
@dataclass(frozen=True, kw_only=True)
class BrierShapley(LinearScheme):
    """Shapley value of each site in the game ``v(S) = mean_t 2<s_S, e_y> - |s_S|^2``.

    With ``q_k = (p_k - 1/C) / K`` and ``s_S`` the sum of q over a coalition, the game has
    only singleton and pair interactions, and each pair's is split equally. So the Shapley
    value, which is also the Banzhaf value, is ``mean_t <q_k, 2 e_y - s_N>``: linear in q_k
    once the sum over all sites and the labels are known. Values sum to ``v(N)``; an absent
    site is replaced by the uniform answer, which earns 0. Not strictly proper: sharpening
    one's answer can pay a little, so blend it with a proper score.

    Without labels the joint answer takes their place.

    Privacy
    -------
    Needs one row sum a site and epoch, and the sum of all sites' answers to each audit query.

    Examples
    --------
    >>> from fedinfer_flower.incentives.base import AuditedAnswers
    >>> right, uniform = [[0.9, 0.1]], [[0.5, 0.5]]
    >>> answers = AuditedAnswers(
    ...     probabilities_ktc=np.array([right, uniform]), labels=np.array([0])
    ... )
    >>> BrierShapley().contributions(answers)
    array([0.32, 0.  ])
    """

    def weights(self, facts: PublicFacts) -> Array:
        """Return ``(2 e_y - s_N) / (K T)``."""
        n_queries, n_classes, n_sites = facts.n_queries, facts.n_classes, facts.n_sites
        onehot = np.eye(n_classes)[facts.reference()]
        joint = facts.total_tc / n_sites - 1.0 / n_classes
        return np.asarray((2.0 * onehot - joint) / (n_sites * n_queries))
