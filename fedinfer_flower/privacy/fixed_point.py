"""Fixed-point codec: scores as integers modulo m, so that sums are exact.

Private protections add integers, not floats: float addition depends on the order of the
sites, and the low bits of a noisy float can give away the number under the noise. An entry
x becomes ``round(x * 2**F)``; the sum of N entries decodes to within ``N * 2**-F / 2`` of
the sum of the x.

A sum that passes half the modulus changes its sign without any error. So capacity is
checked when a codec is made, before a round, for the worst sum that the cohort can send.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from fedinfer_flower.ensemble.base import Array
from fedinfer_flower.errors import CapacityError, InvalidValueError
from fedinfer_flower.privacy.checks import ROUNDING_SLACK, require_within

__all__ = ["FixedPoint", "IntArray"]

IntArray = npt.NDArray[np.int64]

_TAIL_STDS = 10.0
"""Noise beyond ten standard deviations has a probability below 2e-23 an entry."""

_MAX_FRAC_BITS = 16
_MIN_FRAC_BITS = 8


@dataclass(frozen=True, kw_only=True)
class FixedPoint:
    """Codec between bounded floats and integers modulo `modulus`.

    Parameters
    ----------
    clip : float
        Largest absolute value of an entry.
    frac_bits : int
        F, binary digits after the point.
    n_sites_max : int
        Most entries that are ever added.
    modulus : int
        Of the group in which they are added: 2**32, or a BFV plaintext modulus.
    noise_std_int : float
        Standard deviation, in grid steps, of all noise in the sum together.

    Raises
    ------
    CapacityError
        If a sum of `n_sites_max` entries and ten standard deviations of noise could wrap.
    InvalidValueError
        If a parameter is out of range.

    Examples
    --------
    >>> codec = FixedPoint(clip=1.0, frac_bits=12, n_sites_max=8191, modulus=67104769)
    >>> codec.decode(codec.encode(np.array([0.5, -0.25])))
    array([ 0.5 , -0.25])
    """

    clip: float
    frac_bits: int
    n_sites_max: int
    modulus: int
    noise_std_int: float = 0.0

    def __post_init__(self) -> None:
        if not (math.isfinite(self.clip) and self.clip > 0.0):
            raise InvalidValueError(f"clip is a positive number, got {self.clip!r}")
        if not 0 <= self.frac_bits <= 30:
            raise InvalidValueError(f"frac_bits is 0 to 30, got {self.frac_bits!r}")
        if not (math.isfinite(self.noise_std_int) and self.noise_std_int >= 0.0):
            raise InvalidValueError("noise_std_int is a number that is not negative")
        if self.n_sites_max < 1:
            raise InvalidValueError(f"n_sites_max is at least 1, got {self.n_sites_max!r}")
        if not 2 <= self.modulus <= 2**62:
            raise InvalidValueError("modulus is 2 to 2**62, so that sums fit 64 bits")
        if self.n_sites_max > self.largest_cohort:
            raise self._too_large()

    def _too_large(self) -> CapacityError:
        most = self.largest_cohort
        return CapacityError(
            f"a sum of {self.n_sites_max} sites, entries up to {self.clip:g} and"
            f" {self.frac_bits} fraction bits could wrap around the modulus {self.modulus}",
            hint=f"at most {most} sites fit; ask fewer, or pick a rule with a smaller bound"
            if most
            else "not even one site fits: the noise alone does not; use a larger epsilon",
        )

    @classmethod
    def fitted(cls, *, clip: float, n_sites_max: int, modulus: int) -> FixedPoint:
        """Return the finest codec, of at most 16 fraction bits, that holds `n_sites_max`.

        Deterministic in its arguments: every role works out the same codec from the plan.

        Raises
        ------
        CapacityError
            If fewer than 8 fraction bits would be left, with the largest cohort that fits.

        Examples
        --------
        >>> FixedPoint.fitted(clip=1.0, n_sites_max=1000, modulus=67104769).frac_bits
        15
        """
        for frac_bits in range(_MAX_FRAC_BITS, _MIN_FRAC_BITS, -1):
            try:
                return cls(clip=clip, frac_bits=frac_bits, n_sites_max=n_sites_max, modulus=modulus)
            except CapacityError:
                continue
        return cls(clip=clip, frac_bits=_MIN_FRAC_BITS, n_sites_max=n_sites_max, modulus=modulus)

    @property
    def step(self) -> float:
        """Distance between two neighbouring decoded values."""
        return 2.0**-self.frac_bits

    @property
    def entry_max(self) -> int:
        """Largest absolute value of an encoded entry."""
        return int(np.rint(self.clip * 2.0**self.frac_bits))

    @property
    def noise_max(self) -> int:
        """Room left for noise, in grid steps."""
        return math.ceil(_TAIL_STDS * self.noise_std_int)

    @property
    def largest_cohort(self) -> int:
        """Most sites whose sum, noise included, stays below half the modulus."""
        room = self.modulus // 2 - 1 - self.noise_max
        return max(room // max(self.entry_max, 1), 0)

    def encode(self, scores: Array) -> IntArray:
        """Turn bounded floats into centred integers of the same shape.

        Raises
        ------
        InvalidScoresError
            If an entry is not finite or beyond `clip` by more than rounding explains.
        """
        scores = np.asarray(scores, dtype=np.float64)
        require_within(scores, self.clip * (1.0 + ROUNDING_SLACK), what="the scores")
        # In place: fresh arrays of megabytes cost more in page faults than the arithmetic.
        grid = np.clip(scores, -self.clip, self.clip)
        grid *= 2.0**self.frac_bits
        np.rint(grid, out=grid)
        return grid.astype(np.int64)

    def decode(self, residues: npt.ArrayLike) -> Array:
        """Turn residues modulo `modulus`, centred or not, into floats of the same shape."""
        reduced = np.asarray(residues, dtype=np.int64) % self.modulus
        centred = np.where(reduced > self.modulus // 2, reduced - self.modulus, reduced)
        return np.asarray(centred * self.step, dtype=np.float64)
