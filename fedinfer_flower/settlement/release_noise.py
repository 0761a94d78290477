"""Noise on released row sums, as integers in the unit in which they add up."""

from __future__ import annotations

import math
from typing import Final

import numpy as np

from fedinfer_flower.errors import InvalidValueError
from fedinfer_flower.privacy.fixed_point import IntArray
from fedinfer_flower.privacy.noise import gaussian_integers

__all__ = ["gaussian_sums"]

_FINE: Final = 2.0**40
_GRID: Final = 2**20


def gaussian_sums(count: int, std: float) -> IntArray:
    """Draw rounded Gaussian noise of any size that the ring holds.

    Larger noise than the generator draws is the sum of a fine and a coarse draw. The fine
    one is 2**20 times as wide as the coarse one's grid, so that no low bits show.

    Parameters
    ----------
    count : int
    std : float
        In units of a weighted ring sum, at most 2**57; 0 for none.

    Raises
    ------
    InvalidValueError
        If `std` is out of range.
    MissingExtraError
        Without the extra ``dp``, unless `std` is 0.

    Examples
    --------
    >>> gaussian_sums(3, 0.0)
    array([0, 0, 0])
    """
    if not 0.0 <= std <= 2.0**57:
        raise InvalidValueError(
            "the noise on a row sum does not fit the ring",
            hint="noise_std is in the unit of contributions, which are far below 1",
        )
    if std == 0.0:
        return np.zeros(count, dtype=np.int64)
    if std <= _FINE:
        return gaussian_integers((count,), std)
    coarse = math.sqrt(std * std - _FINE * _FINE) / _GRID
    fine = gaussian_integers((count,), _FINE)
    return fine if coarse == 0.0 else fine + _GRID * gaussian_integers((count,), coarse)
