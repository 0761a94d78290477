"""What a cheat is played on, and how it is settled.

Axes: K sites, N rows, T audits among them, C classes.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Final

import numpy as np
import numpy.typing as npt

from fedinfer_flower.errors import InvalidValueError, ShapeError
from fedinfer_flower.incentives.base import AuditedAnswers
from fedinfer_flower.incentives.payments.base import MICRO, PaymentRule
from fedinfer_flower.incentives.payments.proportional import Proportional

__all__ = ["Settling", "Stage"]

Array = npt.NDArray[np.float64]
IntArray = npt.NDArray[np.int64]

_FEE: Final = 1000 * MICRO
"""A fee so large that whole micro-credits do not matter."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Stage:
    """Honest sites and what is asked of them: what a cheat is played on.

    Parameters
    ----------
    answers : AuditedAnswers
        To all rows, with labels.
    audits_t : int array of shape (n_audits,)
        Rows that are audits.
    """

    answers: AuditedAnswers
    audits_t: IntArray

    def __post_init__(self) -> None:
        if self.answers.labels is None:
            raise InvalidValueError("a stage needs the labels of all rows")
        audits = np.asarray(self.audits_t)
        if audits.ndim != 1 or not len(audits):
            raise ShapeError("audits are a list of row numbers, not empty")
        if audits.min() < 0 or audits.max() >= self.answers.n_queries:
            raise ShapeError("audits are rows of the answers")

    @property
    def labels_n(self) -> IntArray:
        """Right classes of all rows."""
        return np.asarray(self.answers.labels, dtype=np.int64)


@dataclass(frozen=True, kw_only=True, eq=False)
class Settling:
    """A way to split a pot among sites.

    Parameters
    ----------
    label : str
    contributions : callable
        From answers to one score a site: `ContributionScheme.contributions`, or any
        function like it.
    payment : PaymentRule
    knows_owners : bool
        Whether it is known which sites are clones of one owner. Colluders have owners of
        their own.
    """

    label: str
    contributions: Callable[[AuditedAnswers], Array]
    payment: PaymentRule = field(default_factory=Proportional)
    knows_owners: bool = False

    def shares(
        self,
        answers_knc: Array,
        labels_t: IntArray,
        audits_t: IntArray,
        *,
        one_owner: tuple[int, ...],
    ) -> Array:
        """Return what each site is paid of a fee of 1, shape (n_sites,).

        Parameters
        ----------
        answers_knc : float array of shape (n_sites, n_rows, n_classes)
        labels_t, audits_t : int array of shape (n_audits,)
        one_owner : tuple of int
            Sites of one owner; every other site has its own. Used where owners are known.
        """
        owners = None
        if self.knows_owners:
            n_sites = len(answers_knc)
            owners = tuple("one" if k in one_owner else f"{k}" for k in range(n_sites))
        values = self.contributions(
            AuditedAnswers(
                probabilities_ktc=answers_knc[:, audits_t], labels=labels_t, owners=owners
            )
        )
        payout = self.payment.pay(np.asarray(values, dtype=float), fee=_FEE)
        return np.array(payout.paid, dtype=float) / _FEE
