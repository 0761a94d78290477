"""Proportional: the whole fee, shared by positive scores."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from fedinfer_flower.incentives.payments.base import (
    PAYMENTS,
    Array,
    PaymentRule,
    Payout,
    apportion,
)

__all__ = ["Proportional"]


@PAYMENTS.register("proportional")
@dataclass(frozen=True, kw_only=True)
class Proportional(PaymentRule):
    """Pay ``fee * max(u_k, 0) / sum_j max(u_j, 0)``.

    The sites together get exactly the fee and none gets less than nothing. Not proper: a
    site's pay depends on the scores of the others. Where no score is positive the fee is
    split equally, free riders included; use ``individually-rational`` where it should go
    back to the querier then. Stakes are not touched.

    Privacy
    -------
    Payments tell each site's share of the positive scores to whoever reads the ledger.

    Examples
    --------
    >>> Proportional().pay(np.array([3.0, 1.0, -2.0]), fee=100).paid
    (75, 25, 0)
    """

    budget_balanced = True
    individually_rational = True

    def pay(self, scores: Array, *, fee: int, stakes: tuple[int, ...] | None = None) -> Payout:
        """Split the fee; nothing is refunded."""
        self.check(scores, fee, stakes)
        return Payout(paid=apportion(np.maximum(scores, 0.0), fee), refund=0, fee=fee)
