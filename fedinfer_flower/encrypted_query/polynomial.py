"""Degree-2 polynomials in place of activations, fitted for each hidden unit.

Ciphertexts can be added and multiplied, not compared: there is no ReLU. A polynomial of degree
2 costs one squaring. Each unit has a distribution of its own, so each gets its own polynomial,
by least squares over the values that it takes on calibration inputs and, with little weight,
over an even grid of a range somewhat wider, which keeps the fit in hand next to them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

import numpy as np

from fedinfer_flower.ensemble.base import Array

__all__ = ["Activation", "UnitPolynomials", "fit_units"]

Activation = Callable[[Array], Array]

_MARGIN: Final = 0.25
"""Part of a unit's range by which the fitted range is wider at either end."""
_GRID_POINTS: Final = 64
_GRID_WEIGHT: Final = 0.1
"""Weight of the whole grid beside that of all samples."""


@dataclass(frozen=True, kw_only=True, eq=False)
class UnitPolynomials:
    """``p_j(h) = constant_j + slope_j * h + curvature_j * h**2`` for each hidden unit j.

    Parameters
    ----------
    constant, slope, curvature : float array of shape (n_hidden,)
    low, high : float array of shape (n_hidden,)
        The range in which the polynomial stands for the activation.
    """

    constant: Array
    slope: Array
    curvature: Array
    low: Array
    high: Array

    def outside(self, samples: Array) -> float:
        """Return the share of values, shape (n, n_hidden), that lie outside the fitted range."""
        return float(((samples < self.low) | (samples > self.high)).mean())

    def __call__(self, samples: Array) -> Array:
        """Evaluate in clear, shape (n, n_hidden)."""
        return self.constant + self.slope * samples + self.curvature * samples**2


def fit_units(activation: Activation, samples: Array) -> UnitPolynomials:
    """Fit a polynomial of degree 2 for each hidden unit.

    Parameters
    ----------
    activation : callable
        Elementwise.
    samples : float array of shape (n, n_hidden)
        Values before the activation, on calibration inputs.

    Returns
    -------
    UnitPolynomials

    Examples
    --------
    >>> h = np.linspace(-1.0, 1.0, 50)[:, None]
    >>> fit = fit_units(lambda x: 3.0 * x**2 - x, h)
    >>> float(fit.curvature[0].round(6)), float(fit.slope[0].round(6))
    (3.0, -1.0)
    """
    low, high = samples.min(axis=0), samples.max(axis=0)
    margin = np.maximum(_MARGIN * (high - low), 1e-3)
    low, high = low - margin, high + margin
    middle, half = (high + low) / 2.0, (high - low) / 2.0
    weight = np.concatenate(
        [
            np.full(len(samples), 1.0 / len(samples)),
            np.full(_GRID_POINTS, _GRID_WEIGHT / _GRID_POINTS),
        ]
    )
    root = np.sqrt(weight)[:, None]
    grid = np.linspace(-1.0, 1.0, _GRID_POINTS)
    fitted = np.empty((3, samples.shape[1]))
    for unit in range(samples.shape[1]):
        # In coordinates of [-1, 1], where powers are of one size.
        place = np.concatenate([(samples[:, unit] - middle[unit]) / half[unit], grid])
        powers = np.stack([np.ones_like(place), place, place**2], axis=1)
        values = activation(middle[unit] + half[unit] * place)
        fitted[:, unit] = np.linalg.lstsq(root * powers, root[:, 0] * values, rcond=None)[0]
    c0, c1, c2 = fitted
    return UnitPolynomials(
        constant=c0 - c1 * middle / half + c2 * (middle / half) ** 2,
        slope=c1 / half - 2.0 * c2 * middle / half**2,
        curvature=c2 / half**2,
        low=low,
        high=high,
    )
