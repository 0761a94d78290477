"""Exact bounds on a proportion, without SciPy: sums of binomial terms and a bisection."""

from __future__ import annotations

import math

import numpy as np

from fedinfer_flower.errors import InvalidValueError

__all__ = ["at_most_probability", "beta_lower_quantile", "upper_bound"]

_STEPS = 60
"""Halvings of [0, 1]: to the last bit of a double near 1."""


def at_most_probability(wrong: int, n: int, rate: float) -> float:
    """Return P(X <= wrong) for X of n draws that are each wrong with probability `rate`.

    Examples
    --------
    >>> at_most_probability(0, 2, 0.5)
    0.25
    """
    if wrong >= n or rate <= 0.0:
        return 1.0
    if wrong < 0 or rate >= 1.0:
        return 0.0
    counts = np.arange(wrong + 1)
    # log of n choose x, as running sums: n - x + 1 over x from one to the next.
    steps = np.log(n - counts[1:] + 1.0) - np.log(counts[1:])
    choose = np.concatenate([[0.0], np.cumsum(steps)])
    terms = choose + counts * math.log(rate) + (n - counts) * math.log1p(-rate)
    return float(min(np.exp(terms).sum(), 1.0))


def upper_bound(wrong: int, n: int, *, delta: float) -> float:
    """Return the Clopper-Pearson upper bound: above the true rate with probability 1 - delta.

    Parameters
    ----------
    wrong, n : int
        Errors seen, and independent trials; 1.0 for none.
    delta : float
        In (0, 1).

    Examples
    --------
    >>> round(upper_bound(0, 59, delta=0.05), 3)
    0.05
    """
    if not 0.0 < delta < 1.0:
        raise InvalidValueError("delta is in (0, 1)")
    if not 0 <= wrong <= n:
        raise InvalidValueError("errors are between none and all trials")
    low, high = 0.0, 1.0
    for _ in range(_STEPS):
        middle = (low + high) / 2.0
        # The tail falls as the rate grows; the bound is where it passes delta.
        too_low = at_most_probability(wrong, n, middle) > delta
        low, high = (middle, high) if too_low else (low, middle)
    return high


def beta_lower_quantile(k: int, n: int, *, delta: float) -> float:
    """Return the delta-quantile of a Beta(k, n + 1 - k), the k-th smallest of n uniforms.

    Examples
    --------
    >>> round(beta_lower_quantile(1, 1, delta=0.1), 3)
    0.1
    """
    if not 1 <= k <= n:
        raise InvalidValueError("k is between 1 and n")
    if not 0.0 < delta < 1.0:
        raise InvalidValueError("delta is in (0, 1)")
    low, high = 0.0, 1.0
    for _ in range(_STEPS):
        middle = (low + high) / 2.0
        # P(Beta <= x) = P(at least k of n uniforms lie below x).
        below = 1.0 - at_most_probability(k - 1, n, middle)
        low, high = (middle, high) if below < delta else (low, middle)
    return low
