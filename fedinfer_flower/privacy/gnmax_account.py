"""An account of labels that GNMax releases: a cap that holds, and a report safe to publish.

The price on any data may be published; the price on the actual data tells of the votes, and
may not. `SpendingReport` keeps the two apart. Releasing a data-dependent price safely takes
further noise (smooth sensitivity [1]_), which is not offered here.

Axes: B rows of a batch, C classes.

References
----------
.. [1] Papernot, Song, Mironov, Raghunathan, Talwar and Erlingsson, Scalable Private Learning
   with PATE, ICLR 2018, arXiv 1802.08908.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Callable
from dataclasses import InitVar, dataclass
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from fedinfer_flower.errors import BudgetExceededError, InvalidValueError
from fedinfer_flower.privacy.fixed_point import IntArray
from fedinfer_flower.privacy.gnmax import ABSTAIN, GNMax, checked_counts
from fedinfer_flower.privacy.gnmax_accounting import ORDERS, epsilon_of_rdp, public_epsilon

__all__ = ["GNMaxAccount", "SpendingReport"]

_ROUND_UP: Final = 1.0 + 1e-12
"""Floats lose digits in sums; what is charged is never less than what was spent."""


@dataclass(frozen=True, kw_only=True)
class SpendingReport:
    """What was spent: one number for everybody, others for the voters' keeper alone.

    The fields, and so `to_dict`, ``repr``, ``dataclasses.asdict`` and a receipt made from
    them, hold what depends on the released labels only.

    Parameters
    ----------
    public_epsilon : float
        Holds on any data, at `delta`. The one to publish.
    delta : float
    epsilon_cap : float
        What `public_epsilon` can never exceed.
    n_rows : int
        Rows charged.
    n_answered : int
        Those of them with a label.
    mu_squared : float
        The same price for a ledger that adds up Gaussian noise.

    Examples
    --------
    >>> account = GNMaxAccount(GNMax(sigma=20.0), epsilon_cap=2.0, delta=1e-5)
    >>> _ = account.release(np.array([[90, 10], [80, 20]]))
    >>> sorted(account.report().to_dict())  # doctest: +NORMALIZE_WHITESPACE
    ['delta', 'epsilon_cap', 'mu_squared', 'n_answered', 'n_rows', 'public_epsilon']
    """

    public_epsilon: float
    delta: float
    epsilon_cap: float
    n_rows: int
    n_answered: int
    mu_squared: float
    private: InitVar[Callable[[bool], float]]

    def __post_init__(self, private: Callable[[bool], float]) -> None:
        # Neither a field nor a plain number: asdict, vars and json cannot write it.
        object.__setattr__(self, "_private", private)

    @property
    def private_epsilon(self) -> float:
        """Epsilon on these data, in both directions; never publish it.

        **Private.** It depends on how far the voters agreed, so it tells of the votes: no
        receipt, model card, metric or log may hold it. At most `public_epsilon`. For the
        keeper's own judgement of how loose the public number is; it buys no further answers.
        """
        return self._private_epsilon(any_neighbour=True)

    @property
    def private_epsilon_one_sided(self) -> float:
        """Epsilon on these data as in the paper, theorem 6; never publish it.

        **Private.** Bounds how much likelier the labels are on these data than on a
        neighbour's, and not the reverse. For comparison with published figures.
        """
        return self._private_epsilon(any_neighbour=False)

    def to_dict(self) -> dict[str, float]:
        """Return what may be published, safe to write as JSON."""
        return {
            "public_epsilon": self.public_epsilon,
            "delta": self.delta,
            "epsilon_cap": self.epsilon_cap,
            "n_rows": self.n_rows,
            "n_answered": self.n_answered,
            "mu_squared": self.mu_squared,
        }

    def _private_epsilon(self, *, any_neighbour: bool) -> float:
        private: Any = vars(self)["_private"]
        return min(float(private(any_neighbour)), self.public_epsilon)


class GNMaxAccount:
    """Releases labels and charges them; refuses what its cap does not cover.

    Safe to share between threads of one process. It forgets with the process: give
    `mu_squared_before` of the last report to the next account over the same data.

    Parameters
    ----------
    mechanism : GNMax
    epsilon_cap : float
        The most `public_epsilon` of all labels together.
    delta : float
        In (0, 1); below one over ten times the number of records.
    mu_squared_before : float
        Spent on the same data by earlier accounts.

    Raises
    ------
    InvalidValueError
        If a number is out of range.
    BudgetExceededError
        If earlier accounts have already spent more than the cap.

    Privacy
    -------
    The cap holds towards everyone who sees labels and abstentions, pooled, whatever rows they
    choose after seeing earlier answers: it bounds a sum of mu^2 (a filter), and refusals
    depend on what was released only. `public_epsilon` below the cap says how much of it is
    used; if the number of rows depends on answers, the cap is the promise.

    References
    ----------
    .. [1] Smith and Thakurta, Fully Adaptive Composition for Gaussian Differential Privacy,
       2022 (a cap on the sum of mu^2 under adaptive choice).

    Examples
    --------
    >>> account = GNMaxAccount(GNMax(sigma=20.0), epsilon_cap=2.0, delta=1e-5)
    >>> account.release(np.array([[100, 0]])).shape
    (1,)
    >>> account.release(np.full((100, 2), 50))  # doctest: +ELLIPSIS
    Traceback (most recent call last):
    ...
    fedinfer_flower.errors.BudgetExceededError: FI315 ...
    """

    def __init__(
        self,
        mechanism: GNMax,
        *,
        epsilon_cap: float,
        delta: float,
        mu_squared_before: float = 0.0,
    ) -> None:
        if not (math.isfinite(epsilon_cap) and epsilon_cap > 0.0 and 0.0 < delta < 1.0):
            raise InvalidValueError("epsilon_cap is a positive number and delta is in (0, 1)")
        if not (math.isfinite(mu_squared_before) and mu_squared_before >= 0.0):
            raise InvalidValueError("mu_squared_before is a number that is not negative")
        self.mechanism = mechanism
        self.epsilon_cap = epsilon_cap
        self.delta = delta
        self._before = mu_squared_before
        self._n_rows = self._n_answered = 0
        self._private_rdp = {both: np.zeros_like(ORDERS) for both in (True, False)}
        self._lock = threading.Lock()
        self.require_room(0)

    def release(self, counts_bc: npt.ArrayLike) -> IntArray:
        """Draw labels and charge them; see `GNMax.release`.

        Raises
        ------
        BudgetExceededError
            If the cap would not cover all rows being answered. Nothing is drawn or charged.
        """
        counts = checked_counts(counts_bc)
        with self._lock:
            self.require_room(len(counts))
            labels = self.mechanism.release(counts)
            self._n_rows += len(counts)
            self._n_answered += int((labels != ABSTAIN).sum())
            for both in self._private_rdp:
                cost = self.mechanism.private_rdp(counts, labels, any_neighbour=both)
                self._private_rdp[both] = self._private_rdp[both] + cost
        return labels

    def report(self) -> SpendingReport:
        """Return what was spent so far."""
        with self._lock:
            spent = self._mu_squared()
            # Earlier accounts are charged as on any data.
            rdp = {b: r + ORDERS * (self._before / 2.0) for b, r in self._private_rdp.items()}
            return SpendingReport(
                public_epsilon=public_epsilon(spent, delta=self.delta),
                delta=self.delta,
                epsilon_cap=self.epsilon_cap,
                n_rows=self._n_rows,
                n_answered=self._n_answered,
                mu_squared=spent,
                private=lambda both: epsilon_of_rdp(rdp[both], delta=self.delta),
            )

    def require_room(self, n_rows: int) -> None:
        """Refuse rows that the cap would not cover if all of them were answered.

        Raises
        ------
        BudgetExceededError
            Its text depends on public numbers only.
        """
        # Whether a row will be answered is not known yet: each could cost the most.
        most = self._mu_squared() + n_rows * self.mechanism.row_mu_squared
        if public_epsilon(most, delta=self.delta) > self.epsilon_cap:
            raise BudgetExceededError(
                f"{n_rows} new rows could bring this model's epsilon above its cap of"
                f" {self.epsilon_cap:g} (delta {self.delta:g})",
                hint="ask fewer rows, or rows that were answered before; a larger sigma costs"
                " less a row",
            )

    def _mu_squared(self) -> float:
        check = self.mechanism.check
        new = self._n_answered * self.mechanism.answer_mu_squared
        if check is not None:
            new += self._n_rows * check.mu_squared
        return (self._before + new) * _ROUND_UP
