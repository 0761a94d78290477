"""How close is a query to what a site has seen? Worked out at the site, folded into its score."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Final

import numpy as np
import numpy.typing as npt

from fedinfer_flower.ensemble.base import Array

__all__ = ["Familiarity"]

_MAX_REFERENCE: Final = 2000
_QUANTILE: Final = 0.9
_RATE: Final = 6.0
_CHUNK: Final = 256


def _nearest(queries: Array, reference: Array, *, skip_self: bool = False) -> Array:
    """Return the squared distance of each query to its nearest reference row.

    With `skip_self`, queries are the reference rows and none is its own neighbour.
    """
    nearest = np.empty(len(queries))
    norms = (reference**2).sum(axis=1)
    for start in range(0, len(queries), _CHUNK):
        rows = queries[start : start + _CHUNK]
        squared = (rows**2).sum(axis=1)[:, None] + norms - 2.0 * rows @ reference.T
        if skip_self:
            own = np.arange(len(rows))
            squared[own, start + own] = np.inf
        nearest[start : start + _CHUNK] = np.maximum(squared.min(axis=1), 0.0)
    return nearest


@dataclass(frozen=True, kw_only=True)
class Familiarity:
    """Score in (0, 1]: 1 for queries like the training data, near 0 for strange ones.

    A model trained on two classes answers a third as confidently as its own. The site
    alone can tell: a query further from all its examples than these are from each other
    is none of its business.

    ``exp(-6 * max(d / d0 - 1, 0))`` with d the distance to the nearest training example
    and d0 the 0.9 quantile of the same distance among the training examples themselves.

    Parameters
    ----------
    reference : float array of shape (n_examples, n_features)
    scale : float array of shape (n_features,)
        Features are divided by it.
    centre : float array of shape (n_features,)
        Then this is subtracted.
    typical_distance : float
        d0.

    Privacy
    -------
    Everything nearer than d0 scores exactly 1, a training example and its near
    neighbours alike. That does not hide an isolated example: a tenth of the training
    rows lie further than d0 from all others, and a query equal to one of them scores 1
    only because it is there. Whoever sees single scores can test membership of those.
    A sum does not hide it: a record that is strange to every site but one makes the sum as
    long as 1, though not by whom. Only `dp`, `secagg+dp` and `he+dp` bound it.
    """

    reference: npt.NDArray[np.float64]
    scale: npt.NDArray[np.float64]
    centre: npt.NDArray[np.float64]
    typical_distance: float

    @classmethod
    def fit(cls, inputs: npt.NDArray[np.generic]) -> Familiarity | None:
        """Fit on training inputs of shape (n_examples, ...); None for fewer than 5, or mere copies.

        At most 2000 evenly spaced examples are kept.
        """
        if len(inputs) < 5:
            return None
        rows = np.asarray(inputs, dtype=float).reshape(len(inputs), -1)
        step = math.ceil(len(rows) / _MAX_REFERENCE)
        rows = rows[::step]
        # One scale for all features unless their spreads differ by far: a pixel that is
        # constant here must not be blown up, a feature in the thousands must not decide.
        spread = rows.std(axis=0)
        uneven = spread.max() > 30.0 * max(float(np.median(spread)), 1e-12)
        scale = np.maximum(spread, 1e-3 * spread.max() + 1e-12) if uneven else np.ones_like(spread)
        rows = rows / scale
        # Around the origin, where the difference of squares loses least.
        centre = rows.mean(axis=0)
        rows = rows - centre
        own = _nearest(rows, rows, skip_self=True)
        typical = math.sqrt(float(np.quantile(own, _QUANTILE)))
        # Copies of each other tell nothing of what is near. Their distance is not exactly
        # zero: about 1e-8 of their length is lost in the difference of squares.
        if typical <= 1e-6 * math.sqrt(float((rows**2).sum(axis=1).max())):
            return None
        return cls(reference=rows, scale=scale, centre=centre, typical_distance=typical)

    def score(self, inputs: npt.NDArray[np.generic]) -> Array:
        """Return familiarity of shape (n_queries,) with inputs."""
        rows = np.asarray(inputs, dtype=float).reshape(len(inputs), -1) / self.scale - self.centre
        ratio = np.sqrt(_nearest(rows, self.reference)) / self.typical_distance
        return np.asarray(np.exp(-_RATE * np.maximum(ratio - 1.0, 0.0)))
