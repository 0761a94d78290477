"""Shapley: the exact value of each site over all coalitions."""

from __future__ import annotations

from dataclasses import dataclass
from math import factorial

import numpy as np

from fedinfer_flower.incentives.base import SCHEMES, Array, AuditedAnswers, ContributionScheme
from fedinfer_flower.incentives.games import all_coalition_values, as_utility, members_of

__all__ = ["Shapley", "shapley_of"]


def shapley_of(values: Array) -> Array:
    """Return the Shapley values of a game that is given by all its coalitions' values.

    Parameters
    ----------
    values : float array of shape (2 ** n_players,)
        Bit k of a place says whether player k is in.

    Examples
    --------
    Three players, worth 1 as soon as the first and another are in:

    >>> shapley_of(np.array([0.0, 0, 0, 1, 0, 1, 0, 1])).round(3)
    array([0.667, 0.167, 0.167])
    """
    n_players = len(values).bit_length() - 1
    members = members_of(n_players)
    weights = np.array(
        [
            factorial(size) * factorial(n_players - size - 1) / factorial(n_players)
            for size in range(n_players)
        ]
    )
    phi = np.empty(n_players)
    for k in range(n_players):
        without = np.flatnonzero(~members[:, k])
        gains = values[without | (1 << k)] - values[without]
        phi[k] = weights[members[without].sum(axis=1)] @ gains
    return phi


@SCHEMES.register("shapley")
@dataclass(frozen=True, kw_only=True)
class Shapley(ContributionScheme):
    """Score the mean marginal worth over all orders of joining.

    The only values that share out ``v(N) - v(nobody)`` without a rest, treat equal sites
    equally, give nothing to a site that changes nothing, and add up over games. An owner that
    copies its site earns more: pay clusters (`Quotient`). The yardstick for all others; 2^K
    coalitions, so for at most 15 sites.

    Parameters
    ----------
    utility : str
        ``accuracy`` or ``brier``; see `fedinfer_flower.incentives.games.Utility`. The Brier
        game's values are those of `BrierShapley`, at its cost times 2^K.

    Privacy
    -------
    Needs each site's answer to each audit query in clear.

    References
    ----------
    .. [1] Shapley, "A value for n-person games", 1953.

    Examples
    --------
    >>> p = np.array([[[0.9, 0.1]], [[0.4, 0.6]], [[0.4, 0.6]]])
    >>> answers = AuditedAnswers(probabilities_ktc=p, labels=np.array([0]))
    >>> Shapley().contributions(answers).round(3)
    array([ 0.833, -0.167, -0.167])
    """

    needs_labels = True
    max_sites = 15

    utility: str = "accuracy"

    def __post_init__(self) -> None:
        super().__post_init__()
        as_utility(self.utility)

    def contributions(self, answers: AuditedAnswers) -> Array:
        """Return the Shapley values."""
        self.check(answers)
        return shapley_of(all_coalition_values(answers, as_utility(self.utility)))
