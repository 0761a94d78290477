"""Smooth Shapley: the accuracy game's Shapley values, near enough, from row sums alone."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Final

import numpy as np

from fedinfer_flower.ensemble.options import option
from fedinfer_flower.incentives.base import SCHEMES, Array, LinearScheme, PublicFacts

__all__ = ["SmoothShapley", "diagonal_weights"]

_NODES: Final = 64
"""Of the quadrature. The weights' error is below 1e-6 for up to 20 sites at the default."""


def diagonal_weights(facts: PublicFacts, sharpness: float) -> Array:
    """Return ``integral_0^1 grad v(tau s_N) d tau / (K T)``; see `SmoothShapley`."""
    labels = facts.require_labels("smooth-shapley")
    onehot = np.eye(facts.n_classes)[labels]
    joint = facts.total_tc / facts.n_sites - 1.0 / facts.n_classes
    gain = sharpness * math.sqrt(facts.n_sites)
    gradient = np.zeros_like(joint)
    nodes, lengths = np.polynomial.legendre.leggauss(_NODES)
    for node, length in zip((nodes + 1.0) / 2.0, lengths / 2.0, strict=True):
        logits = gain * node * joint
        chances = np.exp(logits - logits.max(axis=1, keepdims=True))
        chances /= chances.sum(axis=1, keepdims=True)
        right = (chances * onehot).sum(axis=1, keepdims=True)
        gradient += length * gain * right * (onehot - chances)
    return np.asarray(gradient / (facts.n_sites * facts.n_queries))


@SCHEMES.register("smooth-shapley")
@dataclass(frozen=True, kw_only=True)
class SmoothShapley(LinearScheme):
    """Diagonal value of each site in the game ``v(S) = mean_t softmax(g s_S)_y``.

    s_S is the sum of ``q_k = (p_k - 1/C) / K`` over a coalition and g the sharpness times
    the root of K: a softened accuracy. The Shapley value averages a site's marginal worth
    over random coalitions of every size; here each random coalition is replaced by the same
    part tau of everybody, ``phi_k = integral_0^1 <q_k, grad v(tau s_N)> d tau``. The softening
    stands for the spread of random coalitions, which shrinks as the root of K. So the value
    is linear in q_k once the sum of all answers and the labels are known, and values still
    sum to ``v(N) - v(nobody)``. A uniform answer earns exactly 0.

    Against `BrierShapley` it weighs queries that are nearly tied, where one site can turn the
    answer, and so comes nearer to the accuracy game. Not strictly proper.

    Parameters
    ----------
    sharpness : float
        Larger is nearer to counting right answers, and noisier.

    Privacy
    -------
    Needs one row sum a site and epoch, and the sum of all sites' answers to each audit query.

    References
    ----------
    .. [1] Aumann and Shapley, "Values of non-atomic games", 1974, theorem B (the diagonal).
    .. [2] Owen, "Multilinear extensions of games", 1972, for the random coalitions.

    Examples
    --------
    >>> from fedinfer_flower.incentives.base import AuditedAnswers
    >>> p = np.array([[[0.9, 0.1]], [[0.5, 0.5]], [[0.4, 0.6]]])
    >>> answers = AuditedAnswers(probabilities_ktc=p, labels=np.array([0]))
    >>> SmoothShapley().contributions(answers).round(3)
    array([ 0.61 ,  0.   , -0.153])
    """

    needs_labels = True

    sharpness: float = option(9.0, low=0.1, high=100.0)

    def weights(self, facts: PublicFacts) -> Array:
        """Return the mean gradient along the diagonal, over ``K T``."""
        return diagonal_weights(facts, self.sharpness)
