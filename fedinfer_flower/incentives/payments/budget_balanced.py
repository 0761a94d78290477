"""Budget-balanced: an affine payment, shifted so that all together is the fee."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from fedinfer_flower.ensemble.options import option
from fedinfer_flower.incentives.payments.base import (
    PAYMENTS,
    Array,
    PaymentRule,
    Payout,
    apportion,
)

__all__ = ["BudgetBalanced"]


@PAYMENTS.register("budget-balanced")
@dataclass(frozen=True, kw_only=True)
class BudgetBalanced(PaymentRule):
    """Pay ``fair * (1 + s * (u_k - mean u) / full)``, with ``fair = fee / K`` and u_k clipped.

    Affine in a site's own score, with the mean of all taken off: a proper score stays proper
    as long as a site cannot lower the others' scores. Exactly the fee is paid out, and with
    ``s <= 1/2`` nobody gets less than nothing, since ``|u_k| <= full``. The price of that is
    that a free rider still gets at least ``fee / K^2`` and, with small scores, nearly a fair
    share: for sites that are known and wanted, not for an open market.

    Parameters
    ----------
    spread : float
        s, how far pay moves with the score.
    full_score : float
        Scores are clipped to [-full_score, full_score].

    Privacy
    -------
    Payments tell the differences of clipped scores to whoever reads the ledger.

    Examples
    --------
    >>> BudgetBalanced().pay(np.array([1.0, 0.0, -1.0]), fee=300).paid
    (150, 100, 50)
    """

    budget_balanced = True
    individually_rational = True

    spread: float = option(0.5, low=0.0, high=0.5)
    full_score: float = option(1.0, low=1e-6, high=1e6)

    def pay(self, scores: Array, *, fee: int, stakes: tuple[int, ...] | None = None) -> Payout:
        """Split the fee; nothing is refunded, no stake is charged."""
        self.check(scores, fee, stakes)
        clipped = np.clip(scores, -self.full_score, self.full_score) / self.full_score
        part = 1.0 + self.spread * (clipped - clipped.mean())
        return Payout(paid=apportion(np.maximum(part, 0.0), fee), refund=0, fee=fee)
