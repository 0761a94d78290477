"""Intervals for shares of correct answers."""

from __future__ import annotations

import math

from fedinfer_flower.errors import InvalidValueError

__all__ = ["wilson_interval"]

_Z_95 = 1.959963984540054
"""0.975 quantile of the standard normal distribution."""


def wilson_interval(successes: int, n: int) -> tuple[float, float]:
    """Return the 95 % Wilson score interval of a share.

    Use for the accuracy on `n` queries. Prefer a paired test to compare two accuracies on
    the same queries: two intervals that overlap may still hide a real difference.

    Parameters
    ----------
    successes : int
        How many of the `n` answers are right, in [0, n].
    n : int
        How many answers there are. With none the interval is (0.0, 1.0).

    Returns
    -------
    interval : tuple of two floats
        Low and high end, within [0, 1]; the observed share lies between them.

    Raises
    ------
    InvalidValueError
        If `n` is negative or `successes` lies outside [0, n].

    References
    ----------
    .. [1] E. B. Wilson, Probable inference, the law of succession, and statistical
       inference, Journal of the American Statistical Association 22 (1927) 209-212.

    Examples
    --------
    >>> low, high = wilson_interval(8, 10)
    >>> round(low, 4), round(high, 4)
    (0.4902, 0.9433)
    >>> wilson_interval(0, 0)
    (0.0, 1.0)
    """
    if not 0 <= successes <= n:
        raise InvalidValueError(
            f"{successes} right answers of {n} is no share",
            hint="pass 0 <= successes <= n",
        )
    if n == 0:
        return 0.0, 1.0
    share = successes / n
    scale = 1 + _Z_95**2 / n
    centre = (share + _Z_95**2 / (2 * n)) / scale
    half = _Z_95 * math.sqrt(share * (1 - share) / n + _Z_95**2 / (4 * n**2)) / scale
    # Rounding must not push the observed share out of its own interval at 0 and at n.
    low = 0.0 if successes == 0 else centre - half
    high = 1.0 if successes == n else centre + half
    return low, high
