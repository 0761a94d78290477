"""Noise that covers what an encrypted evaluation leaves in a reply beside the logits.

Whoever holds the secret key decrypts a reply to the logits plus an error, and that error
depends on the weights; so does the reply's second polynomial. CKKS does not hide either (it has
no circuit privacy). The site therefore adds a *fresh* encryption, under the querier's public
key, of Gaussian noise:

- the fresh encryption makes the second polynomial one that anybody could have drawn;
- in slots that hold a query, the real part gets noise of `Flooding.std`: far above the
  evaluation's error, far below what changes a decision;
- imaginary parts and slots without a query get, besides, as much noise as the parameters
  hold, so a batch of B rows cannot carry more than B questions.

Method: Gentry, "Fully homomorphic encryption using ideal lattices" (2009), section 5.4 of the
thesis ("circuit privacy"), with Gaussian noise. Why decrypted CKKS values leak: Li, Micciancio,
"On the Security of Homomorphic Encryption on Approximate Numbers" (2021).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Final

import numpy as np
import numpy.typing as npt

from fedinfer_flower.encrypted_query.plans import Plan
from fedinfer_flower.errors import CapacityError, InvalidValueError
from fedinfer_flower.privacy.noise import gaussian_integers

__all__ = ["MIN_MARGIN_BITS", "Flooding"]

MIN_MARGIN_BITS: Final = 12.0
"""Fewest bits by which the flooding must exceed the evaluation's error."""
_GRID: Final = 2.0**39
"""Grid steps in one standard deviation. Of the noise on a logit a step is finer than a unit of
the encoded polynomial."""
_MAX_TOLERANCE_BITS: Final = 20


@dataclass(frozen=True, kw_only=True)
class Flooding:
    """How much noise covers how much error.

    Parameters
    ----------
    std : float
        Standard deviation of the noise on a logit.
    error_rms : float
        Root mean square of the evaluation's error on a logit.

    Raises
    ------
    CapacityError
        If the noise is not `MIN_MARGIN_BITS` above the error.

    Examples
    --------
    >>> round(Flooding(std=2.0**-7, error_rms=2.0**-27).margin_bits)
    20
    """

    std: float
    error_rms: float

    def __post_init__(self) -> None:
        if not (self.std > 0.0 and self.error_rms > 0.0):
            raise InvalidValueError("noise and error are positive")
        if self.margin_bits < MIN_MARGIN_BITS:
            raise CapacityError(
                f"flooding is {self.margin_bits:.1f} bits above the evaluation's error,"
                f" {MIN_MARGIN_BITS:g} are needed",
                hint="scale the inputs to about 1, or allow more noise (smaller tolerance_bits)",
            )

    @classmethod
    def of_scale(cls, logit_rms: float, *, error_rms: float, tolerance_bits: int) -> Flooding:
        """Return noise of ``2**-tolerance_bits`` of the logits' own scale, or of 1 if larger.

        Logits are log-odds: a thousandth is nothing, however small they are.
        """
        if not 1 <= tolerance_bits <= _MAX_TOLERANCE_BITS:
            raise InvalidValueError(
                f"tolerance_bits is in [1, {_MAX_TOLERANCE_BITS}], got {tolerance_bits}"
            )
        return cls(std=max(logit_rms, 1.0) * 2.0**-tolerance_bits, error_rms=error_rms)

    @property
    def margin_bits(self) -> float:
        """k: the noise is ``2**k`` times the error."""
        return math.log2(self.std / self.error_rms)

    def distance(self, n_logits: int) -> float:
        """Bound how far a reply's distribution moves when the error is replaced.

        The total variation distance between a Gaussian of deviation s in m dimensions and
        itself shifted by v is ``2 Phi(|v| / 2s) - 1 <= |v| / (s sqrt(2 pi))``. Here m is
        `n_logits`, and |v| is taken as ``sqrt(m)`` times `error_rms`. Rounding to the grid of
        the encoding comes after the sum, and cannot enlarge the distance.

        Examples
        --------
        >>> flooding = Flooding(std=2.0**-7, error_rms=2.0**-27)
        >>> round(math.log2(flooding.distance(4970)), 1)
        -15.2
        """
        return min(1.0, math.sqrt(n_logits / (2.0 * math.pi)) * self.error_rms / self.std)

    def draw(
        self, plan: Plan, *, n_classes: int, n_queries: int, n_sites: int
    ) -> npt.NDArray[np.complex128]:
        """Draw the noise of one reply, shape (n_classes, plan.slots)."""
        fine, coarse = gaussian_integers((2, 2, n_classes, plan.slots), _GRID) / _GRID
        coarse[0, :, :n_queries] = 0.0
        # Both: the grid of the coarse noise is wider than the error, which would show in its
        # remainder; the fine noise, far wider than that grid, covers the remainder too.
        real, imaginary = self.std * fine + plan.spill_std(n_sites) * coarse
        return np.asarray(real + 1j * imaginary)
