"""Individually rational: pay what was earned, and give the rest back."""

from __future__ import annotations

import math
from dataclasses import dataclass
from fractions import Fraction

import numpy as np

from fedinfer_flower.ensemble.options import option
from fedinfer_flower.incentives.payments.base import PAYMENTS, Array, PaymentRule, Payout

__all__ = ["IndividuallyRational"]


@PAYMENTS.register("individually-rational")
@dataclass(frozen=True, kw_only=True)
class IndividuallyRational(PaymentRule):
    """Pay ``fee / K * clip(u_k / full, 0, 1)``; refund what nobody earned.

    No site gets less than nothing, none more than a fair share, and the querier never pays
    more than the fee. A site's pay does not depend on the others' scores, so an ensemble of
    free riders costs nothing. Not proper below zero, where all scores earn the same.

    Parameters
    ----------
    full_score : float
        Score at which a site earns its whole fair share.

    Privacy
    -------
    A payment tells the site's clipped score to whoever reads the ledger.

    Examples
    --------
    >>> IndividuallyRational().pay(np.array([0.5, -0.5]), fee=100)
    Payout(paid=(25, 0), refund=75, fee=100)
    """

    individually_rational = True

    full_score: float = option(1.0, low=1e-6, high=1e6)

    def pay(self, scores: Array, *, fee: int, stakes: tuple[int, ...] | None = None) -> Payout:
        """Pay each site by its own score, and refund the rest."""
        self.check(scores, fee, stakes)
        full = Fraction(self.full_score)
        earned = [Fraction(float(u)) / full for u in np.clip(scores, 0.0, self.full_score)]
        paid = tuple(math.floor(fee * share / len(scores)) for share in earned)
        return Payout(paid=paid, refund=fee - sum(paid), fee=fee)
