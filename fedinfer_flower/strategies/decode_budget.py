"""What noisy answers to the steps of a text cost a site, before they are asked for."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from fedinfer_flower.ensemble.base import EnsembleRule, make_rule
from fedinfer_flower.errors import ConfigError, InvalidValueError
from fedinfer_flower.privacy.accountant import Accountant
from fedinfer_flower.privacy.base import Protection, ScorePlan, make_protection
from fedinfer_flower.privacy.charge import Charge
from fedinfer_flower.wire.documents import CombinedAnswer

__all__ = ["DecodeBudget", "charge_of", "total_epsilon_delta"]


@dataclass(kw_only=True)
class DecodeBudget:
    """Cap on the epsilon that one site spends on all texts of a job.

    Every step of every text is a row that the site answers; rows compose. A step that would
    exceed the cap is not asked.

    Parameters
    ----------
    protection : Protection
    max_epsilon : float, optional
        At the protection's delta; None for no cap.

    Raises
    ------
    ConfigError
        If there is a cap, and no noise that could be counted against it.

    Examples
    --------
    >>> from fedinfer_flower.privacy.dp import DP
    >>> plan = ScorePlan(width=2, bound=1.0, sensitivity_l2=1.5, n_sites_max=3, n_classes=2)
    >>> budget = DecodeBudget(
    ...     protection=DP(mechanism="randomised-response", epsilon=1.0), max_epsilon=2.0)
    >>> [budget.admits(plan, 1) for step in range(3)]
    [True, True, False]
    """

    protection: Protection
    max_epsilon: float | None = None
    spent: Charge = field(default_factory=Charge)

    def __post_init__(self) -> None:
        if self.max_epsilon is None:
            return
        if not (math.isfinite(self.max_epsilon) and self.max_epsilon > 0.0):
            raise InvalidValueError("max_epsilon is a positive number")
        if "epsilon" not in self.protection.options():
            raise ConfigError(
                f"max_epsilon, and protection {self.protection.name!r} that adds no noise",
                hint="use protection 'dp' or 'secagg+dp', or drop max_epsilon",
            )

    def admits(self, plan: ScorePlan, n_rows: int) -> bool:
        """Charge a step if the cap covers it, and return whether it does."""
        cost = self.protection.charge(plan, n_rows)
        if cost is None:
            return True
        total = self.spent + cost
        if self.max_epsilon is not None and not Accountant(composition="fixed").fits(
            total, self.max_epsilon, _delta(self.protection)
        ):
            return False
        self.spent = total
        return True

    def admits_step(
        self, rule: EnsembleRule, n_rows: int, *, n_candidates: int, n_sites: int
    ) -> bool:
        """Return `admits` of the plan of a step."""
        plan = ScorePlan.for_rule(rule, n_classes=n_candidates, n_sites_max=n_sites)
        return self.admits(plan, n_rows)


def charge_of(answer: CombinedAnswer, n_rows: int) -> tuple[Protection, Charge | None]:
    """Return what `n_rows` rows of an answer cost one site; None without noise."""
    protection = make_protection(answer.protection, dict(answer.protection_options))
    plan = ScorePlan.for_rule(
        make_rule(answer.rule, dict(answer.rule_options)),
        n_classes=len(answer.classes),
        n_sites_max=answer.n_sites_asked,
    )
    return protection, protection.charge(plan, n_rows)


def total_epsilon_delta(
    answers: list[CombinedAnswer], n_rows: list[int]
) -> tuple[float, float] | None:
    """Return (epsilon, delta) that one site spent on so many rows of each answer.

    None without noise. As if every row had been drawn for this job: rows that a site
    remembers are free.
    """
    total: Charge | None = None
    delta = 0.0
    for answer, rows in zip(answers, n_rows, strict=True):
        protection, cost = charge_of(answer, rows)
        if cost is not None:
            total, delta = (cost if total is None else total + cost), _delta(protection)
    return None if total is None else Accountant(composition="fixed").epsilon_delta(total, delta)


def _delta(protection: Protection) -> float:
    return float(protection.options().get("delta", 1e-5))
