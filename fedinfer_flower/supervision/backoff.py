"""How long to wait before something that failed is tried again."""

from __future__ import annotations

import random
from typing import Final

from fedinfer_flower.errors import InvalidValueError

__all__ = ["Backoff"]

_MOST_DOUBLINGS: Final = 32
"""Beyond any cap; keeps a power of two from growing with the number of failures."""


class Backoff:
    """Waits that double, with jitter, up to a cap; back to the start after a healthy time.

    Parameters
    ----------
    first_s : float
        Longest first wait.
    cap_s : float
        Longest wait of all.
    healthy_s : float
        What ran for so long before it failed starts again at `first_s`.
    rng : random.Random, optional
        For tests; default the operating system's.

    Notes
    -----
    A wait is drawn between half of its longest and all of it, so that sites which lost the
    same SuperLink do not come back in step.

    Examples
    --------
    >>> backoff = Backoff(first_s=1.0, cap_s=4.0)
    >>> waits = [backoff.next_s(ran_s=0.0) for _ in range(4)]
    >>> all(most / 2 <= wait <= most for wait, most in zip(waits, (1, 2, 4, 4)))
    True
    >>> backoff.next_s(ran_s=61.0) <= 1.0
    True
    """

    def __init__(
        self,
        *,
        first_s: float = 0.5,
        cap_s: float = 30.0,
        healthy_s: float = 60.0,
        rng: random.Random | None = None,
    ) -> None:
        if not 0.0 < first_s <= cap_s:
            raise InvalidValueError("first_s is positive and not above cap_s")
        self.first_s = first_s
        self.cap_s = cap_s
        self.healthy_s = healthy_s
        self.failures = 0
        self._rng = rng or random.SystemRandom()

    def next_s(self, *, ran_s: float) -> float:
        """Return the seconds to wait after something that ran for `ran_s` has failed."""
        if ran_s >= self.healthy_s:
            self.failures = 0
        most = min(self.cap_s, self.first_s * 2.0 ** min(self.failures, _MOST_DOUBLINGS))
        self.failures += 1
        return most * self._rng.uniform(0.5, 1.0)
