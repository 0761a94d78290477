"""When to look again: soon after traffic, then less and less often; and how long to wait."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Final

__all__ = ["Polling", "bounded_s"]


def bounded_s(ttl_s: float, *, most_s: float) -> float:
    """Return a message's time to live within bounds: it is what the SuperLink says.

    Examples
    --------
    >>> [bounded_s(ttl, most_s=9.0) for ttl in (5.0, 60.0, -1.0, float("nan"))]
    [5.0, 9.0, 0.0, 9.0]
    """
    if ttl_s < 0.0:
        return 0.0
    # Not `min`: a time that is no number would be longer than any.
    return ttl_s if ttl_s <= most_s else most_s


_LOOKS: Final = 3.0
"""Pauses are at least so many times as long as a look: all sites share one SuperLink."""


@dataclass(kw_only=True)
class Polling:
    """How long to wait before the next look for a message: short after traffic, then longer.

    Parameters
    ----------
    least_s, most_s : float
    calm_after_s : float
        Time without a message after which `most_s` is reached; the wait grows exponentially
        until then.
    clock : callable
        Monotonic seconds.

    Examples
    --------
    >>> now = 0.0
    >>> polling = Polling(clock=lambda: now)
    >>> polling.traffic(); polling.pause_s()
    0.02
    >>> now = 30.0
    >>> round(polling.pause_s(), 3)
    0.25
    >>> polling.traffic()
    >>> for _ in range(20): polling.looked(0.03)
    >>> round(polling.pause_s(), 2)
    0.09
    """

    least_s: float = 0.02
    most_s: float = 0.25
    calm_after_s: float = 30.0
    clock: Callable[[], float] = time.monotonic
    _last: float = field(default=-math.inf, init=False)
    _look_s: float = field(default=0.0, init=False)

    def traffic(self) -> None:
        """Note that a message came."""
        self._last = self.clock()

    def looked(self, seconds: float) -> None:
        """Note how long a look took: a busy SuperLink is asked less often."""
        self._look_s += 0.25 * (seconds - self._look_s)

    def pause_s(self) -> float:
        """Return the seconds until the next look."""
        share = (self.clock() - self._last) / self.calm_after_s
        if share >= 1.0:
            return self.most_s
        pause_s = float(self.least_s * (self.most_s / self.least_s) ** share)
        return min(max(pause_s, _LOOKS * self._look_s), self.most_s)
