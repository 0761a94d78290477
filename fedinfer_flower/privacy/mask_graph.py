"""Which sites share a mask with which.

Up to 50 sites, all do. Beyond, every site shares masks with 50 others: they stand on a
circle, in an order that follows from the roster's digest, and each takes the 25 nearest on
both sides. Such a circulant graph has the largest connectivity that its degree allows: it
stays in one piece unless two runs of 25 neighbours are taken out of it. Whoever names the
dropouts may choose them so; `thinnest_window` is what sites look at before they believe it.

References
----------
.. [1] Harary, The maximum connectivity of a graph, PNAS 1962.
.. [2] Bell, Bonawitz, Gascon, Lepoint and Raykova, Secure Single-Server Aggregation with
   (Poly)Logarithmic Overhead, CCS 2020 (sparse graphs for pairwise masks).
"""

from __future__ import annotations

import functools
import hashlib
from typing import Final

__all__ = ["FULL_GRAPH_MAX", "LEAST_PRESENT", "neighbours", "thinnest_window"]

FULL_GRAPH_MAX: Final = 50
_HALF_DEGREE: Final = 25
LEAST_PRESENT: Final = 6
"""Survivors that any 25 sites side by side must have: a cut needs two such windows without
honest survivors, hence twelve colluding sites. Of random dropouts of a third, one batch in
two thousand fails this with 1000 sites, and none of 4000 with 300 or fewer."""


def neighbours(place: int, n_sites: int, roster: bytes) -> tuple[int, ...]:
    """Return the places that share a mask with `place`, in order.

    Parameters
    ----------
    place : int
        In [0, n_sites).
    n_sites : int
    roster : bytes
        `Roster.digest`; fixes the order on the circle. Nothing that the querier can choose
        afresh is in it, or it could try keys until a site stands among its friends.

    Examples
    --------
    >>> neighbours(1, 4, b"")
    (0, 2, 3)
    >>> len(neighbours(7, 1000, b""))
    50
    """
    if n_sites <= FULL_GRAPH_MAX + 1:
        return tuple(p for p in range(n_sites) if p != place)
    circle, position = _circle(n_sites, roster)
    here = position[place]
    steps = [*range(-_HALF_DEGREE, 0), *range(1, _HALF_DEGREE + 1)]
    return tuple(sorted(circle[(here + step) % n_sites] for step in steps))


@functools.lru_cache(maxsize=16)
def _circle(n_sites: int, roster: bytes) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Return (place at each position, position of each place)."""

    def key(place: int) -> bytes:
        return hashlib.sha256(b"fedinfer/v1/circle|" + roster + place.to_bytes(4, "big")).digest()

    circle = tuple(sorted(range(n_sites), key=key))
    position = [0] * n_sites
    for where, place in enumerate(circle):
        position[place] = where
    return circle, tuple(position)


def thinnest_window(present: frozenset[int], n_sites: int, roster: bytes) -> int:
    """Return the fewest of `present` among 25 sites side by side on the circle.

    In a full graph, which nothing cuts, the number of all of them.

    Examples
    --------
    >>> thinnest_window(frozenset({0, 2}), 4, b"")
    2
    """
    if n_sites <= FULL_GRAPH_MAX + 1:
        return len(present)
    circle, _ = _circle(n_sites, roster)
    here = [place in present for place in circle]
    ring = here + here[: _HALF_DEGREE - 1]
    return min(sum(ring[start : start + _HALF_DEGREE]) for start in range(n_sites))
