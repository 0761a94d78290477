"""What one answer costs: the sums from which any of the usual accountants works out epsilon.

A charge keeps raw sums over rows, not an epsilon: epsilons do not add up, these do, and a
budget can be read again at another delta. Sums are rounded up, never down: many small
charges are not less than their exact total.
"""

from __future__ import annotations

import dataclasses
import math
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from fractions import Fraction
from statistics import NormalDist
from typing import Any, Final

from fedinfer_flower.errors import InvalidValueError

__all__ = ["Charge", "gaussian_equivalent_mu", "rounded_up"]

_SMALL_EPSILON_SLOPE: Final = math.nextafter(math.sqrt(math.pi / 2.0), math.inf)
_MAX_SUM: Final = sys.float_info.max
_INVERSE_IS_EXACT: Final = (1e-4, 500.0)
"""Epsilons between which the inverse normal has at least 11 digits."""


@dataclass(frozen=True, kw_only=True)
class Charge:
    """The privacy cost of one answer, or the sum of many; made by its constructors.

    Parameters
    ----------
    mu_squared : float
        Gaussian noise: sum over rows of (L2 sensitivity / standard deviation)^2.
    pure_epsilon : float
        Mechanisms without delta (randomised response): sum over rows of epsilon.
    pure_epsilon_squared : float
        The same rows: sum of epsilon^2.
    pure_mu_squared : float
        The same rows: sum of `gaussian_equivalent_mu` of epsilon, squared.
    rho : float
        Other mechanisms, by their zero-concentrated privacy: sum over rows.
    n_rows : int
        Rows that cost something.

    Raises
    ------
    InvalidValueError
        If a number is negative or not finite.

    Examples
    --------
    >>> total = Charge.gaussian(0.5, 8) + Charge.pure(1.0, 2)
    >>> total.mu_squared, total.pure_epsilon, total.n_rows
    (2.0, 2.0, 10)
    >>> Charge.from_dict(total.to_dict()) == total
    True
    """

    mu_squared: float = 0.0
    pure_epsilon: float = 0.0
    pure_epsilon_squared: float = 0.0
    pure_mu_squared: float = 0.0
    rho: float = 0.0
    n_rows: int = 0

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            kinds = (int,) if field.name == "n_rows" else (int, float)
            if isinstance(value, bool) or not isinstance(value, kinds):
                raise InvalidValueError(f"{field.name} of a charge is not a number of its type")
            # Compared, not converted: a whole number may be too large for any float.
            if not 0 <= value <= _MAX_SUM:
                raise InvalidValueError(f"{field.name} of a charge is finite and not negative")
        pure = (self.pure_epsilon, self.pure_epsilon_squared, self.pure_mu_squared)
        # One of them alone would let an accountant choose the sum that was left out.
        if any(pure) and not all(pure):
            raise InvalidValueError(
                "the three sums of pure mechanisms are all zero or all positive",
                hint="make charges with Charge.pure",
            )

    @classmethod
    def gaussian(cls, mu: float, n_rows: int) -> Charge:
        """Charge rows with Gaussian noise.

        Parameters
        ----------
        mu : float
            L2 sensitivity of one row over the standard deviation of the noise.
        n_rows : int

        Examples
        --------
        >>> Charge.gaussian(0.5, 16).mu_squared
        4.0
        """
        _require_not_negative(mu, n_rows)
        return cls(mu_squared=rounded_up(Fraction(mu) ** 2 * n_rows), n_rows=n_rows)

    @classmethod
    def pure(cls, epsilon: float, n_rows: int) -> Charge:
        """Charge rows of (epsilon, 0)-private mechanisms, such as randomised response.

        Examples
        --------
        >>> Charge.pure(0.5, 4).pure_epsilon
        2.0
        """
        _require_not_negative(epsilon, n_rows)
        exact = Fraction(epsilon)
        return cls(
            pure_epsilon=rounded_up(exact * n_rows),
            pure_epsilon_squared=rounded_up(exact**2 * n_rows),
            pure_mu_squared=rounded_up(Fraction(gaussian_equivalent_mu(epsilon)) ** 2 * n_rows),
            n_rows=n_rows,
        )

    @classmethod
    def zcdp(cls, rho: float, n_rows: int) -> Charge:
        """Charge rows of rho-zero-concentrated mechanisms, `rho` a row.

        Examples
        --------
        >>> Charge.zcdp(0.125, 4).rho
        0.5
        """
        _require_not_negative(rho, n_rows)
        return cls(rho=rounded_up(Fraction(rho) * n_rows), n_rows=n_rows)

    def __add__(self, other: Charge) -> Charge:
        sums: dict[str, Any] = {
            name: rounded_up(Fraction(value) + Fraction(getattr(other, name)))
            for name, value in self.to_dict().items()
            if name != "n_rows"
        }
        return Charge(n_rows=self.n_rows + other.n_rows, **sums)

    @property
    def is_free(self) -> bool:
        """Whether nothing is charged, as for rows that were answered before."""
        return not any(value for name, value in self.to_dict().items() if name != "n_rows")

    @property
    def is_pure(self) -> bool:
        """Whether only mechanisms without delta are in it."""
        return self.mu_squared == 0.0 and self.rho == 0.0

    def to_dict(self) -> dict[str, float]:
        """Return the sums by name, safe to write as JSON."""
        return {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Charge:
        """Read what `to_dict` wrote.

        Raises
        ------
        InvalidValueError
            If a sum is missing, unknown, or no number.
        """
        if not isinstance(data, Mapping) or set(data) != {
            field.name for field in dataclasses.fields(cls)
        }:
            raise InvalidValueError("a charge with missing or unknown sums")
        return cls(**data)


def gaussian_equivalent_mu(epsilon: float) -> float:
    """Return the mu of a Gaussian mechanism that is no more private than this epsilon.

    Every epsilon-private mechanism is mu-Gaussian private with
    ``mu = -2 * Phi^-1(1 / (1 + exp(epsilon)))``: the trade-off curve of randomised response
    consists of two lines that meet at the type I error ``1 / (1 + exp(epsilon))``, and a
    convex curve with the same ends lies below both if it does so there. So pure and Gaussian
    answers compose exactly as Gaussians do.

    Returns
    -------
    mu : float
        Rounded up, and at most ``epsilon * sqrt(pi / 2)``.

    References
    ----------
    .. [1] Dong, Roth and Su, Gaussian Differential Privacy, JRSS-B 2022, section 2 (the
       trade-off curves of both).

    Examples
    --------
    >>> round(gaussian_equivalent_mu(1.0), 3), round(gaussian_equivalent_mu(8.0), 3)
    (1.232, 6.803)
    """
    bound = epsilon * _SMALL_EPSILON_SLOPE
    low, high = _INVERSE_IS_EXACT
    if not low < epsilon < high:
        return math.nextafter(bound, math.inf) if bound else 0.0
    return min(bound, -2.0 * NormalDist().inv_cdf(1.0 / (1.0 + math.exp(epsilon))) * (1 + 1e-10))


def rounded_up(exact: Fraction) -> float:
    """Return the smallest float that is not below an exact number.

    Examples
    --------
    >>> rounded_up(Fraction(1, 10)) >= Fraction(1, 10)
    True
    """
    try:
        nearest = float(exact)
    except OverflowError:
        raise InvalidValueError("a charge beyond every number") from None
    return nearest if Fraction(nearest) >= exact else math.nextafter(nearest, math.inf)


def _require_not_negative(cost: float, n_rows: int) -> None:
    if not (math.isfinite(cost) and cost >= 0.0):
        raise InvalidValueError("the cost of a row is finite and not negative")
    if isinstance(n_rows, bool) or not isinstance(n_rows, int) or n_rows < 0:
        raise InvalidValueError("n_rows is a whole number, not negative")
