"""How fast bytes travel from a sharer to the receiver: stated, or estimated from transfers."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Final

from fedinfer_flower.errors import InvalidValueError
from fedinfer_flower.kv.media import require_numbers

__all__ = ["UNKNOWN_LINK", "Link", "LinkEstimate"]


@dataclass(frozen=True, kw_only=True)
class Link:
    """The way from a sharer through the coordinator to the receiver.

    Parameters
    ----------
    up_bytes_per_s, down_bytes_per_s : float
        Sharer to coordinator, coordinator to receiver.
    rtt_s : float
        Fixed cost of one request and its reply, seconds.
    """

    up_bytes_per_s: float
    down_bytes_per_s: float
    rtt_s: float = 0.1

    def __post_init__(self) -> None:
        require_numbers(self, positive=("up_bytes_per_s", "down_bytes_per_s"))


UNKNOWN_LINK: Final = Link(up_bytes_per_s=125_000.0, down_bytes_per_s=125_000.0, rtt_s=0.5)
"""1 Mbit/s with half a second a request, where nothing was measured yet."""


_TELLING_RATIO: Final = 3.0


class LinkEstimate:
    """Speed of a link from measured transfers: weighted least squares of seconds on bytes.

    Older transfers weigh less (an exponentially weighted moving average). With transfers of
    like sizes alone the fixed cost cannot be told from bandwidth: the bandwidth is then taken
    to be at least that of an unknown link, and the rest of the time to be fixed cost.

    Parameters
    ----------
    decay : float
        What a transfer weighs after the next one, in (0, 1).

    Examples
    --------
    >>> link = LinkEstimate()
    >>> for size in (1_000, 500_000, 1_000_000):
    ...     link.observe(size_bytes=size, seconds=0.2 + size / 1e6)
    >>> round(link.bytes_per_s), round(link.rtt_s, 3)
    (1000000, 0.2)
    """

    def __init__(self, *, decay: float = 0.8) -> None:
        if not 0.0 < decay < 1.0:
            raise InvalidValueError("decay of a link estimate is in (0, 1)")
        self._decay = decay
        self._n = self._x = self._y = self._xx = self._xy = 0.0
        self._least, self._largest = math.inf, 0.0

    def observe(self, *, size_bytes: int, seconds: float) -> None:
        """Add one transfer; bytes from 1, seconds above 0."""
        if size_bytes < 1 or not (math.isfinite(seconds) and seconds > 0.0):
            raise InvalidValueError("a transfer has at least a byte and takes some time")
        x, y, d = float(size_bytes), float(seconds), self._decay
        self._least, self._largest = min(x, self._least), max(x, self._largest)
        self._n, self._x, self._y = d * self._n + 1.0, d * self._x + x, d * self._y + y
        self._xx, self._xy = d * self._xx + x * x, d * self._xy + x * y

    @property
    def known(self) -> bool:
        """Whether anything was measured."""
        return self._n > 0.0

    @property
    def bytes_per_s(self) -> float:
        """Estimated bandwidth."""
        return self._fit()[0]

    @property
    def rtt_s(self) -> float:
        """Estimated fixed cost of a transfer, seconds."""
        return self._fit()[1]

    def _fit(self) -> tuple[float, float]:
        if not self.known:
            return UNKNOWN_LINK.up_bytes_per_s, UNKNOWN_LINK.rtt_s
        mean_x, mean_y = self._x / self._n, self._y / self._n
        spread = self._xx / self._n - mean_x**2
        slope = (self._xy / self._n - mean_x * mean_y) / spread if spread > 1e-6 * mean_x**2 else 0
        intercept = mean_y - slope * mean_x
        if self._largest < _TELLING_RATIO * self._least or slope <= 0.0:
            # Bodies of like size cannot tell bandwidth from fixed cost. Taken at their word,
            # small ones would keep larger ones from ever being tried; one of those settles it.
            bandwidth = max(self._x / self._y, UNKNOWN_LINK.up_bytes_per_s)
            return bandwidth, max(0.0, mean_y - mean_x / bandwidth)
        if intercept < 0.0:
            return self._x / self._y, 0.0
        return 1.0 / slope, intercept
