"""Lots: an order among equals that depends on the site and a seed, not on a place in a list."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from fedinfer_flower.selection.candidate import Candidate

__all__ = ["lots"]

_BITS = 53
"""A float64 holds every whole number up to 2^53."""


def lots(candidates: Sequence[Candidate], seed: int) -> npt.NDArray[np.float64]:
    """Return one number in [0, 1) a site, the same for the same site and seed.

    Fair over seeds. Not a secret: who knows the seed and a node id knows the lot, so take a
    seed that sites cannot foresee where a lot is worth something to them.

    Returns
    -------
    lots_k : float array of shape (n_candidates,)

    Examples
    --------
    >>> from fedinfer_flower.profile import SiteProfile
    >>> from fedinfer_flower.query import SiteId
    >>> a, b = (
    ...     Candidate(site_id=SiteId(n), profile=SiteProfile(name="s", classes=("x",)))
    ...     for n in (1, 2)
    ... )
    >>> bool((lots([a, b], 7) == lots([b, a], 7)[::-1]).all())
    True
    """
    drawn = []
    for candidate in candidates:
        digest = hashlib.sha256(f"lot {seed} {candidate.site_id}".encode()).digest()
        drawn.append((int.from_bytes(digest[:8], "big") >> (64 - _BITS)) / 2.0**_BITS)
    return np.array(drawn, dtype=float)
