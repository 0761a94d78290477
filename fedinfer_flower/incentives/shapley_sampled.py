"""Sampled Shapley: an estimate from random orders of joining, with its error bound."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Final

import numpy as np

from fedinfer_flower.ensemble.options import option
from fedinfer_flower.errors import InvalidValueError
from fedinfer_flower.incentives.base import (
    SCHEMES,
    Array,
    AuditedAnswers,
    ContributionScheme,
    IntArray,
)
from fedinfer_flower.incentives.games import (
    Utility,
    as_utility,
    coalition_values,
    marginal_bound,
    query_utilities,
)

__all__ = ["Estimate", "ShapleySampled"]

_BATCH_VALUES: Final = 2_000_000


@dataclass(frozen=True, kw_only=True, eq=False)
class Estimate:
    """Estimated values and how far off they may be.

    Parameters
    ----------
    values : float array of shape (n_sites,)
    half_width : float
        All true values lie within it, with the confidence asked for.
    n_permutations : int
        Orders that were walked through.
    """

    values: Array
    half_width: float
    n_permutations: int


@SCHEMES.register("shapley-sampled")
@dataclass(frozen=True, kw_only=True)
class ShapleySampled(ContributionScheme):
    """Score the mean marginal worth over random orders, each walked also backwards.

    An order and its reverse are one draw with less variance than two. With m draws and
    marginals within [-b, b], all K values are within ``b sqrt(2 ln(2K / delta) / m)`` of the
    truth with probability ``1 - delta`` (Hoeffding, union bound over sites). For more than
    15 sites; fewer are exact with `Shapley`.

    Parameters
    ----------
    n_permutations : int
        Even; reverses count.
    delta : float
        Chance that the bound may fail with.
    truncation : float
        Stop walking an order where the rest could not be far: ``|v(N) - v(prefix)|`` at or
        below this. Saves time and is a bias; what it can have cost, at worst, is added to
        the bound, which then is often of no use.
    utility : str
        ``accuracy`` or ``brier``; see `fedinfer_flower.incentives.games.Utility`.
    seed : int
        Of the orders. Public: sites answer before they could use it.

    Privacy
    -------
    Needs each site's answer to each audit query in clear.

    References
    ----------
    .. [1] Maleki, Tran-Thanh, Hines, Rahwan, Rogers, "Bounding the estimation error of
       sampling-based Shapley value approximation", 2013, theorem 1.
    .. [2] Ghorbani and Zou, "Data Shapley", 2019, algorithm 1 (truncation).

    Examples
    --------
    >>> p = np.array([[[0.9, 0.1]], [[0.4, 0.6]], [[0.4, 0.6]]])
    >>> answers = AuditedAnswers(probabilities_ktc=p, labels=np.array([0]))
    >>> estimate = ShapleySampled(n_permutations=4000).estimate(answers)
    >>> bool(abs(estimate.values[0] - 5 / 6) < estimate.half_width < 0.1)
    True
    """

    needs_labels = True

    n_permutations: int = option(2000, low=2, high=1_000_000)
    delta: float = option(0.05, low=1e-12, high=0.5)
    truncation: float = option(0.0, low=0.0, high=1.0)
    utility: str = "accuracy"
    seed: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        as_utility(self.utility)
        if self.n_permutations % 2:
            raise InvalidValueError(
                f"scheme {self.name!r} walks each order also backwards: n_permutations is even",
                hint=f"n_permutations={self.n_permutations + 1}",
            )

    def contributions(self, answers: AuditedAnswers) -> Array:
        """Return the estimated values."""
        return self.estimate(answers).values

    def estimate(self, answers: AuditedAnswers) -> Estimate:
        """Return the estimated values and their error bound."""
        self.check(answers)
        utility, n_sites = as_utility(self.utility), answers.n_sites
        rng = np.random.default_rng(self.seed)
        batch = max(1, _BATCH_VALUES // (answers.n_queries * answers.n_classes))
        left, sums, skipped = self.n_permutations // 2, np.zeros(n_sites), np.zeros(n_sites)
        while left:
            drawn = rng.permuted(
                np.tile(np.arange(n_sites, dtype=np.int64), (min(batch, left), 1)), axis=1
            )
            left -= len(drawn)
            for orders in (drawn, drawn[:, ::-1]):
                gains, cut = _walk(answers, orders, utility, self.truncation)
                sums, skipped = sums + gains, skipped + cut
        bound = marginal_bound(utility, n_sites)
        draws = self.n_permutations // 2
        sampling = bound * math.sqrt(2.0 * math.log(2.0 * n_sites / self.delta) / draws)
        # A skipped marginal counted as 0, and might have been anything within the bound.
        cutting = bound * float(skipped.max()) / self.n_permutations
        return Estimate(
            values=sums / self.n_permutations,
            half_width=sampling + cutting,
            n_permutations=self.n_permutations,
        )


def _walk(
    answers: AuditedAnswers,
    orders_mk: IntArray,
    utility: Utility,
    truncation: float,
) -> tuple[Array, Array]:
    """Return each site's summed marginals over some orders, and how many were skipped."""
    p, labels = answers.probabilities_ktc, answers.public().require_labels("shapley-sampled")
    n_sites = answers.n_sites
    ends = np.array([np.zeros(n_sites, dtype=bool), np.ones(n_sites, dtype=bool)])
    nobody, everybody = coalition_values(answers, ends, utility)
    walking = np.arange(len(orders_mk))
    sums_mtc = np.zeros((len(orders_mk), *p.shape[1:]))
    before = np.full(len(orders_mk), nobody)
    gains, skipped = np.zeros(n_sites), np.zeros(n_sites)
    for place in range(n_sites):
        if truncation > 0.0:
            near = np.abs(everybody - before) <= truncation
            rest = orders_mk[walking[near], place:]
            skipped += np.bincount(rest.ravel(), minlength=n_sites)
            walking, sums_mtc, before = walking[~near], sums_mtc[~near], before[~near]
        joins = orders_mk[walking, place]
        sums_mtc += p[joins]
        size = np.array([[float(place + 1)]])
        after = query_utilities(sums_mtc, size, labels, utility, n_sites).mean(axis=1)
        gains += np.bincount(joins, weights=after - before, minlength=n_sites)
        before = after
    return gains, skipped
