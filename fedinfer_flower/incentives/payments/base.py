"""What a payment rule is: contribution scores in, integer micro-credits out.

A credit is a million micro-credits. Amounts are integers throughout, so that what is paid
in is what is paid out.
"""

from __future__ import annotations

import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Final

import numpy as np
import numpy.typing as npt

from fedinfer_flower.ensemble.options import Scalar, checked_options, require_known_options
from fedinfer_flower.errors import InvalidValueError
from fedinfer_flower.registry import Registry

__all__ = [
    "MICRO",
    "PAYMENTS",
    "PaymentRule",
    "Payout",
    "apportion",
    "make_payment",
]

Array = npt.NDArray[np.float64]

MICRO: Final = 1_000_000
"""Micro-credits in a credit."""


@dataclass(frozen=True, kw_only=True)
class Payout:
    """What each site gets, and what goes back.

    Parameters
    ----------
    paid : tuple of int
        Micro-credits for each site; negative where a stake is charged.
    refund : int
        Micro-credits back to the querier.
    fee : int
        What the querier put in: ``sum(paid) + refund == fee``.
    """

    paid: tuple[int, ...]
    refund: int
    fee: int

    def __post_init__(self) -> None:
        if sum(self.paid) + self.refund != self.fee:
            raise InvalidValueError("a payout pays out what was paid in")


@dataclass(frozen=True, kw_only=True)
class PaymentRule(ABC):
    """Base of all payment rules: a frozen dataclass whose fields are its options.

    Attributes
    ----------
    name : str
        Registered name.
    budget_balanced : bool
        Whether the sites together always get exactly the fee.
    individually_rational : bool
        Whether no site ever gets less than nothing.
    """

    name: ClassVar[str] = ""
    budget_balanced: ClassVar[bool] = False
    individually_rational: ClassVar[bool] = False

    def __post_init__(self) -> None:
        for name, value in checked_options(f"payment rule {self.name!r}", self).items():
            object.__setattr__(self, name, value)

    def options(self) -> dict[str, Scalar]:
        """Return the options that make the same rule elsewhere; see `make_payment`."""
        return dataclasses.asdict(self)

    def check(self, scores: Array, fee: int, stakes: tuple[int, ...] | None = None) -> None:
        """Refuse scores, a fee or stakes that nobody could be paid by.

        Raises
        ------
        InvalidValueError
            If scores are not finite, amounts negative or lengths different.
        """
        if scores.ndim != 1 or not len(scores) or not np.isfinite(scores).all():
            raise InvalidValueError(
                f"payment rule {self.name!r} takes one finite score a site",
                hint="leave out sites that were not scored",
            )
        if fee < 0 or any(stake < 0 for stake in stakes or ()):
            raise InvalidValueError("a fee and stakes are micro-credits, not negative")
        if stakes is not None and len(stakes) != len(scores):
            raise InvalidValueError(f"{len(stakes)} stakes for {len(scores)} sites")

    @abstractmethod
    def pay(self, scores: Array, *, fee: int, stakes: tuple[int, ...] | None = None) -> Payout:
        """Split a fee.

        Parameters
        ----------
        scores : float array of shape (n_sites,)
            Finite contribution scores.
        fee : int
            Micro-credits.
        stakes : tuple of int, optional
            Micro-credits that each site has put at risk.
        """


def apportion(weights: Array, amount: int) -> tuple[int, ...]:
    """Split an amount in proportion to weights, exactly, by largest remainder.

    All-zero weights split equally. Micro-credits that are left over go to the largest
    remainders, and between equal ones to the first. A larger weight never gets less.

    Examples
    --------
    >>> apportion(np.array([1.0, 1.0, 1.0]), 100)
    (34, 33, 33)
    """
    if weights.ndim != 1 or not len(weights):
        raise InvalidValueError("weights are one number for each site")
    if not (np.isfinite(weights).all() and (weights >= 0.0).all()) or amount < 0:
        raise InvalidValueError("weights and amount are finite and not negative")
    # Integers, not floats: a sum of money beyond 2^53 would lose its last digits, and sums
    # of very small or very large weights would vanish or overflow.
    ratios = [float(w).as_integer_ratio() for w in weights]
    common = max(denominator for _, denominator in ratios)  # all are powers of two
    parts = [numerator * (common // denominator) for numerator, denominator in ratios]
    parts = parts if any(parts) else [1] * len(parts)
    whole, remainders = zip(*(divmod(part * amount, sum(parts)) for part in parts), strict=True)
    paid = list(whole)
    order = sorted(range(len(parts)), key=lambda k: (-remainders[k], k))
    for k in order[: amount - sum(whole)]:
        paid[k] += 1
    return tuple(paid)


PAYMENTS: Registry[PaymentRule] = Registry(
    kind="payment rule",
    package="fedinfer_flower.incentives.payments",
    group="fedinfer_flower.payments",
)
"""All payment rules by name."""


def make_payment(name: str, options: Mapping[str, object] | None = None) -> PaymentRule:
    """Build a payment rule from its registered name and its options.

    Raises
    ------
    UnknownNameError
        If no payment rule has that name.
    InvalidValueError
        If an option does not exist, has the wrong type or lies outside its range.
    """
    cls = PAYMENTS.get(name)
    given: dict[str, Any] = dict(options or {})
    known = [f.name for f in dataclasses.fields(cls) if f.init]
    require_known_options(f"payment rule {name!r}", given, known)
    return cls(**given)
