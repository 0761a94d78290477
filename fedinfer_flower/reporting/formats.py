"""Numbers as text, the same in the page and in the terminal."""

from __future__ import annotations

import math

__all__ = ["MISSING", "as_bytes", "as_epsilon", "as_interval", "as_percent", "as_seconds", "number"]

MISSING = "-"
_BYTE_STEP = 1000


def number(value: float | None) -> float:
    """Return a float; NaN stands for no value.

    Examples
    --------
    >>> number(None)
    nan
    """
    return math.nan if value is None else float(value)


def as_percent(share: float | None) -> str:
    """Write a share as percent.

    Examples
    --------
    >>> as_percent(0.9125), as_percent(None)
    ('91.2 %', '-')
    """
    value = number(share)
    return MISSING if math.isnan(value) else f"{100 * value:.1f} %"


def as_interval(low: float | None, high: float | None) -> str:
    """Write an interval of shares in percent.

    Examples
    --------
    >>> as_interval(0.5, 0.75)
    '50.0 to 75.0 %'
    """
    ends = number(low), number(high)
    if math.isnan(sum(ends)):
        return MISSING
    return f"{100 * ends[0]:.1f} to {100 * ends[1]:.1f} %"


def as_seconds(seconds: float | None) -> str:
    """Write a duration in seconds.

    Examples
    --------
    >>> as_seconds(0.04123), as_seconds(41.2), as_seconds(None)
    ('0.041', '41.2', '-')
    """
    value = number(seconds)
    if math.isnan(value):
        return MISSING
    return f"{value:.3f}" if value < 1 else f"{value:.1f}"


def as_bytes(size: float | None) -> str:
    """Write a size with a decimal unit.

    Examples
    --------
    >>> as_bytes(80), as_bytes(12_340.0), as_bytes(None)
    ('80 B', '12.3 kB', '-')
    """
    value = number(size)
    if math.isnan(value):
        return MISSING
    for unit in ("B", "kB", "MB", "GB"):
        if value < _BYTE_STEP or unit == "GB":
            break
        value /= _BYTE_STEP
    return f"{value:.0f} {unit}" if unit == "B" else f"{value:.1f} {unit}"


def as_epsilon(epsilon: float | None) -> str:
    """Write an epsilon or a delta; a dash where no noise gives none.

    Examples
    --------
    >>> as_epsilon(0.5), as_epsilon(271.8281), as_epsilon(1606.4), as_epsilon(None)
    ('0.5', '272', '1606', '-')
    """
    value = number(epsilon)
    if math.isnan(value):
        return MISSING
    if math.isinf(value):
        return "∞"
    return f"{value:.0f}" if value >= 1000 else f"{value:.3g}"
