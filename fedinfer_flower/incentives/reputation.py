"""Reputation: how far a site's audits let it be trusted, as a Beta distribution.

A reputation is a pair (alpha, beta): one more than the faded counts of right and of wrong
audit answers. It is what `fedinfer_flower.selection.candidate.SiteRecord` holds.
"""

from __future__ import annotations

import math
from typing import Final

from fedinfer_flower.errors import InvalidValueError

__all__ = ["NEWCOMER", "Reputation", "lower_bound", "mean", "update"]

Reputation = tuple[float, float]

NEWCOMER: Final[Reputation] = (1.0, 1.0)
"""Of a site that was never audited: anything is as likely as anything else."""


def _checked(reputation: Reputation) -> Reputation:
    alpha, beta = reputation
    if not all(math.isfinite(x) and x > 0.0 for x in (alpha, beta)):
        raise InvalidValueError("a reputation is two positive numbers")
    return float(alpha), float(beta)


def update(reputation: Reputation, right: float, wrong: float, decay: float = 0.95) -> Reputation:
    """Return a reputation after one more epoch of audits.

    Parameters
    ----------
    reputation : (float, float)
    right, wrong : float
        Audit answers of the epoch; may be weighted.
    decay : float
        In [0, 1]: what is left of older evidence. 1 forgets nothing; 0.95 halves it in 14
        epochs, so that a site cannot live on its past, nor be damned for it. Bounds what a
        reputation can hold to ``counts of an epoch / (1 - decay)``.

    Notes
    -----
    A site that leaves and comes back under a new key is a newcomer: tie reputations to owners,
    or ask newcomers for a stake.

    References
    ----------
    .. [1] Josang and Ismail, "The Beta reputation system", 2002, section 3.

    Examples
    --------
    >>> update((1.0, 1.0), right=8, wrong=2)
    (9.0, 3.0)
    >>> update((9.0, 3.0), right=0, wrong=10, decay=0.5)
    (5.0, 12.0)
    """
    alpha, beta = _checked(reputation)
    if not all(math.isfinite(x) and x >= 0.0 for x in (right, wrong)):
        raise InvalidValueError("counts of right and wrong answers are finite, not negative")
    if not 0.0 <= decay <= 1.0:
        raise InvalidValueError("decay is in [0, 1]")
    # Fades towards the newcomer's (1, 1), not towards (0, 0), which is no distribution.
    return 1.0 + decay * (alpha - 1.0) + right, 1.0 + decay * (beta - 1.0) + wrong


def mean(reputation: Reputation) -> float:
    """Return the expected chance of a right answer.

    Examples
    --------
    >>> mean((9.0, 3.0))
    0.75
    """
    alpha, beta = _checked(reputation)
    return alpha / (alpha + beta)


def lower_bound(reputation: Reputation, confidence: float = 0.95) -> float:
    """Return what the chance of a right answer exceeds with this probability.

    Ranks a site with much evidence above one that was lucky once.

    Examples
    --------
    >>> round(lower_bound((9.0, 3.0)), 3)
    0.53
    >>> round(lower_bound((1.0, 1.0)), 3)
    0.05
    """
    alpha, beta = _checked(reputation)
    if not 0.0 < confidence < 1.0:
        raise InvalidValueError("confidence is between 0 and 1")
    low, high = 0.0, 1.0
    for _ in range(60):  # halves the interval each time, down to the last bit
        middle = (low + high) / 2.0
        if _beta_cdf(middle, alpha, beta) < 1.0 - confidence:
            low = middle
        else:
            high = middle
    return low


def _beta_cdf(x: float, alpha: float, beta: float) -> float:
    """Return the regularised incomplete beta function, by its continued fraction."""
    if x <= 0.0 or x >= 1.0:
        return float(x >= 1.0)
    # The fraction converges fast left of the mean; right of it, swap the two sides.
    if x > (alpha + 1.0) / (alpha + beta + 2.0):
        return 1.0 - _beta_cdf(1.0 - x, beta, alpha)
    log_front = (
        math.lgamma(alpha + beta)
        - math.lgamma(alpha)
        - math.lgamma(beta)
        + alpha * math.log(x)
        + beta * math.log1p(-x)
    )
    return math.exp(log_front) / alpha * _fraction(x, alpha, beta)


def _fraction(x: float, alpha: float, beta: float) -> float:
    # Lentz's method on DLMF 8.17.22; `tiny` keeps denominators from being zero.
    tiny = 1e-300
    c, d = 1.0, 1.0 / (1.0 - (alpha + beta) * x / (alpha + 1.0) or tiny)
    value = d
    for m in range(1, 10_000):
        even = m * (beta - m) * x / ((alpha + 2 * m - 1) * (alpha + 2 * m))
        odd = -(alpha + m) * (alpha + beta + m) * x / ((alpha + 2 * m) * (alpha + 2 * m + 1))
        for term in (even, odd):
            d = 1.0 / (1.0 + term * d or tiny)
            c = 1.0 + term / c or tiny
            value *= c * d
        if abs(c * d - 1.0) < 1e-15:
            break
    return value
