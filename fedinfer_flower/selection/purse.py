"""The limits of a selection as it grows: how many sites, and at what price."""

from __future__ import annotations

import bisect
import math
from collections.abc import Sequence

__all__ = ["Purse"]

_ROUNDING = 1e-12
"""Share of a budget by which a sum of prices may exceed it through rounding alone."""


class Purse:
    """Sites taken so far, and whether one more leaves room for the fewest that are needed.

    A dear site is not taken where the money left would not buy the rest of `at_least`, even
    at the cheapest. So a purse that starts feasible ends with `at_least` sites.

    Parameters
    ----------
    prices : sequence of float
        Of every candidate, for all rows; not negative.
    budget : float, optional
        In the same unit.
    at_least, at_most : int

    Examples
    --------
    >>> purse = Purse([9.0, 1.0, 1.0, 1.0], budget=10.0, at_least=3, at_most=4)
    >>> purse.fits(0), purse.fits(1)
    (False, True)
    """

    def __init__(
        self, prices: Sequence[float], *, budget: float | None, at_least: int, at_most: int
    ) -> None:
        self._prices = list(prices)
        self._limit = math.inf if budget is None else budget * (1.0 + _ROUNDING)
        self._at_least, self._at_most = at_least, at_most
        self._left = sorted(self._prices)
        self._spent = 0.0
        self._taken = 0

    @property
    def full(self) -> bool:
        """Whether no site more may be asked, at whatever price."""
        return self._taken >= self._at_most

    @property
    def short(self) -> bool:
        """Whether fewer sites are taken than are needed."""
        return self._taken < self._at_least

    def fits(self, place: int) -> bool:
        """Return whether a site that was not taken may be."""
        price = self._prices[place]
        if self.full or self._spent + price > self._limit:
            return False
        missing = self._at_least - self._taken - 1
        if missing <= 0 or math.isinf(self._limit):
            return True
        # The cheapest others: the site itself is one of those left, so step over it.
        others = self._left[: missing + 1]
        at = bisect.bisect_left(self._left, price)
        if at <= missing:
            del others[at]
        rest = others[:missing]
        # Too few candidates for at_least is not the price's fault, and said elsewhere.
        return self._spent + price + sum(rest) <= self._limit

    def take(self, place: int) -> None:
        """Take a site that fits."""
        price = self._prices[place]
        self._left.remove(price)
        self._spent += price
        self._taken += 1
