"""Base and bonus: a fixed part for taking part, a bonus or a charge by score."""

from __future__ import annotations

import math
from dataclasses import dataclass
from fractions import Fraction

import numpy as np

from fedinfer_flower.ensemble.options import option
from fedinfer_flower.incentives.payments.base import PAYMENTS, Array, PaymentRule, Payout

__all__ = ["BaseBonus"]


@PAYMENTS.register("base-bonus")
@dataclass(frozen=True, kw_only=True)
class BaseBonus(PaymentRule):
    """Pay ``fair * (b + (1 - b) * u_k / full)``, with ``fair = fee / K`` and u_k clipped.

    A site's pay is affine in its own score and does not depend on the others', so a proper
    score stays proper as long as neither the clipping at ``full`` nor the stake binds. Below
    zero the stake is charged, at most all of it; without stakes such a site gets 0. No site
    gets more than ``fee / K``, so the fee bounds what the querier may have to pay, whatever
    the scores; what is not earned goes back.

    Parameters
    ----------
    base_share : float
        b, the part of a fair share that taking part earns. A free rider gets it too.
    full_score : float
        Score at which a site earns its whole fair share.

    Privacy
    -------
    A payment tells the site's clipped score to whoever reads the ledger.

    Examples
    --------
    >>> rule = BaseBonus(base_share=0.5)
    >>> rule.pay(np.array([1.0, 0.0, -1.0]), fee=300)
    Payout(paid=(100, 50, 0), refund=150, fee=300)
    >>> BaseBonus(base_share=0.0).pay(np.array([0.5, -0.5]), fee=200, stakes=(80, 30)).paid
    (50, -30)
    """

    base_share: float = option(0.25, low=0.0, high=1.0)
    full_score: float = option(1.0, low=1e-6, high=1e6)

    def pay(self, scores: Array, *, fee: int, stakes: tuple[int, ...] | None = None) -> Payout:
        """Pay each site by its own score, and refund the rest."""
        self.check(scores, fee, stakes)
        charged = stakes if stakes is not None else (0,) * len(scores)
        base, full = Fraction(self.base_share), Fraction(self.full_score)
        clipped = np.clip(scores, -self.full_score, self.full_score)
        part = [base + (1 - base) * Fraction(float(u)) / full for u in clipped]
        paid = tuple(
            max(math.floor(fee * share / len(scores)), -stake)
            for share, stake in zip(part, charged, strict=True)
        )
        return Payout(paid=paid, refund=fee - sum(paid), fee=fee)
