"""Coverage greedy: the sites whose data together cover the classes best.

Axes: K candidates, C classes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from fedinfer_flower.ensemble.options import option
from fedinfer_flower.selection.base import (
    SELECTORS,
    Array,
    Selection,
    SelectionNeed,
    Selector,
    SiteEvidence,
)
from fedinfer_flower.selection.candidate import Candidate
from fedinfer_flower.selection.class_counts import comparable_counts
from fedinfer_flower.selection.lots import lots
from fedinfer_flower.selection.purse import Purse

__all__ = ["CoverageGreedy", "coverage", "coverage_order"]


def coverage(counts_kc: Array, chosen: Sequence[int]) -> float:
    """Return ``sum_c log(1 + sum_{k in chosen} n_kc)``, in nats.

    Monotone and submodular: what a site adds shrinks as others join.

    Parameters
    ----------
    counts_kc : float array of shape (n_candidates, n_classes)
        Not negative.
    chosen : sequence of int

    Examples
    --------
    >>> counts = np.array([[9.0, 0.0], [9.0, 0.0], [0.0, 9.0]])
    >>> round(coverage(counts, [0, 1]), 2), round(coverage(counts, [0, 2]), 2)
    (2.94, 4.61)
    """
    return float(np.log1p(counts_kc[list(chosen)].sum(axis=0)).sum())


def coverage_order(
    counts_kc: Array, most: int | None = None, *, lots_k: Array | None = None
) -> tuple[int, ...]:
    """Return places in the order in which greedy takes them, without prices or limits.

    Parameters
    ----------
    counts_kc : float array of shape (n_candidates, n_classes)
        See `comparable_counts`.
    most : int, optional
        Length of the order; all by default.
    lots_k : float array of shape (n_candidates,), optional
        Breaks ties, the lowest first; by place without.

    Examples
    --------
    >>> coverage_order(np.array([[9.0, 0.0], [8.0, 0.0], [0.0, 3.0]]))
    (0, 2, 1)
    """
    n_candidates = len(counts_kc)
    ties_k = np.zeros(n_candidates) if lots_k is None else lots_k
    room = n_candidates if most is None else min(most, n_candidates)
    return _greedy(
        counts_kc,
        purse=Purse([0.0] * n_candidates, budget=None, at_least=0, at_most=room),
        worth=lambda gains_k: gains_k,
        ties_k=ties_k,
    )


def _greedy(
    counts_kc: Array,
    *,
    purse: Purse,
    worth: Callable[[Array], Array],
    ties_k: Array,
    start: tuple[int, ...] = (),
) -> tuple[int, ...]:
    """Take the candidate of the highest worth that fits, until none does or is worth it."""
    chosen = list(start)
    for place in start:
        purse.take(place)
    total_c = counts_kc[chosen].sum(axis=0)
    left = [k for k in range(len(counts_kc)) if k not in start]
    while not purse.full:
        fitting = [k for k in left if purse.fits(k)]
        if not fitting:
            break
        before = np.log1p(total_c).sum()
        gains = np.log1p(total_c + counts_kc[fitting]).sum(axis=1) - before
        gains_k = np.zeros(len(counts_kc))
        gains_k[fitting] = gains
        values = worth(gains_k)[fitting]
        best = fitting[int(np.lexsort((ties_k[fitting], -values))[0])]
        # Worth less than nothing: stop, unless more sites are needed.
        if worth(gains_k)[best] < 0.0 and not purse.short:
            break
        purse.take(best)
        chosen.append(best)
        left.remove(best)
        total_c = total_c + counts_kc[best]
    return tuple(chosen)


@SELECTORS.register("coverage-greedy")
@dataclass(frozen=True, kw_only=True)
class CoverageGreedy(Selector):
    """Take sites one by one, each the one that adds most to the classes covered.

    Maximises ``sum_c log(1 + sum_k n_kc) - price_weight * sum_k c_k`` over the chosen sites.
    Use it where sites' data differ in their classes and not all can be asked; where classes
    are very unevenly spread (each site has one or two), every site counts and selection
    saves little.

    With a limit on the number of sites only and no `price_weight`, the coverage is at least
    1 - 1/e of the best set's. With a budget, the best of three is taken: greedy by gain a
    credit, greedy by gain, and the best affordable site filled up by gain; that is at least
    (1 - 1/e) / 2 of the best, where neither `at_least` nor `at_most` binds. With a
    `price_weight` there is no such bound.

    Sites are asked at the same time, so a limit on latency is a limit on each: one whose
    95 % quantile is above it is passed over, one that was never timed is not.

    Parameters
    ----------
    price_weight : float
        Nats of coverage that one credit a row must buy; 0 ignores prices within the budget.
        Above 0, sites that do not buy that much are not asked beyond `at_least`.
    count_cap : float
        Most that a stated count is believed, in multiples of the median of its class.

    Privacy
    -------
    Needs the class counts or presence bits of the profiles, which the coordinator holds by
    the sites' consent. They are claims: a site that overstates them is asked sooner, and
    `count_cap` bounds how much of the others' worth it takes away. Audits find it out.

    References
    ----------
    .. [1] Nemhauser, Wolsey, Fisher, "An analysis of approximations for maximizing
       submodular set functions", 1978, theorem 4.
    .. [2] Leskovec et al., "Cost-effective outbreak detection in networks", 2007,
       theorem 3, for the budget.

    Examples
    --------
    >>> from fedinfer_flower.profile import CountsKind, SiteProfile
    >>> from fedinfer_flower.query import SiteId
    >>> sites = [
    ...     Candidate(
    ...         site_id=SiteId(number),
    ...         profile=SiteProfile(
    ...             name=f"s{number}",
    ...             classes=("a", "b"),
    ...             counts_kind=CountsKind.COUNTS,
    ...             class_counts=counts,
    ...         ),
    ...     )
    ...     for number, counts in enumerate([(90.0, 0.0), (80.0, 0.0), (0.0, 9.0)])
    ... ]
    >>> CoverageGreedy().select(sites, SelectionNeed(classes=("a", "b"), at_most=2)).site_ids
    (0, 2)
    """

    price_weight: float = option(0.0, low=0.0, high=1e6)
    count_cap: float = option(10.0, low=1.0, high=1e12)

    needs = frozenset({SiteEvidence.CLASS_COUNTS})

    def score(self, candidates: Sequence[Candidate], need: SelectionNeed) -> Array:
        """Return what each site covers alone, less its price, in nats."""
        counts_kc = comparable_counts(candidates, need.classes, cap=self.count_cap)
        return np.asarray(np.log1p(counts_kc).sum(axis=1) - self._charges(candidates))

    def select(self, candidates: Sequence[Candidate], need: SelectionNeed) -> Selection:
        """Pick the set; see the class for what it guarantees.

        Raises
        ------
        SelectionError
            If fewer than ``need.at_least`` fit count, budget and latency.
        """
        quick = _in_time(candidates, need)
        counts_kc = comparable_counts(candidates, need.classes, cap=self.count_cap)
        found = self._best_set([candidates[k] for k in quick], need, counts_kc[quick])
        order = [quick[k] for k in found]
        return self.within_limits(
            candidates,
            need,
            order,
            np.log1p(counts_kc).sum(axis=1) - self._charges(candidates),
            reasons=_reasons(counts_kc, order, need.classes),
        )

    def _charges(self, candidates: Sequence[Candidate]) -> Array:
        return self.price_weight * np.array([candidate.price for candidate in candidates])

    def _best_set(
        self, candidates: Sequence[Candidate], need: SelectionNeed, counts_kc: Array
    ) -> tuple[int, ...]:
        costs_k = np.array([need.cost(candidate) for candidate in candidates])
        charges_k = self._charges(candidates)
        ties_k = lots(candidates, need.seed)
        # Relative to the dearest that the budget buys, so that no ratio overflows and no price
        # that nobody pays makes all others look free. A free site buys any gain at once; the
        # floor keeps the order among free ones.
        most = math.inf if need.budget is None else need.budget
        dearest = costs_k[costs_k <= most].max(initial=0.0)
        relative_k = np.maximum(costs_k / dearest if dearest > 0.0 else costs_k, 1e-9)

        def by_gain(gains_k: Array) -> Array:
            return gains_k - charges_k

        def by_gain_a_credit(gains_k: Array) -> Array:
            return np.asarray((gains_k - charges_k) / relative_k)

        def grown(worth: Callable[[Array], Array], start: tuple[int, ...] = ()) -> tuple[int, ...]:
            purse = self._purse(costs_k, need)
            return _greedy(counts_kc, purse=purse, worth=worth, ties_k=ties_k, start=start)

        sets = [grown(by_gain)]
        if need.budget is not None:
            sets.append(grown(by_gain_a_credit))
            purse = self._purse(costs_k, need)
            singles_k = np.log1p(counts_kc).sum(axis=1) - charges_k
            affordable = [k for k in range(len(candidates)) if purse.fits(k)]
            if affordable:
                best = max(affordable, key=lambda k: (singles_k[k], -ties_k[k]))
                sets.append(grown(by_gain, (best,)))
        # The first of equals: Python's max is stable.
        return max(sets, key=lambda s: coverage(counts_kc, s) - charges_k[list(s)].sum())

    @staticmethod
    def _purse(costs_k: Array, need: SelectionNeed) -> Purse:
        return Purse(
            costs_k.tolist(),
            budget=need.budget,
            at_least=need.at_least,
            at_most=need.room(len(costs_k)),
        )


def _in_time(candidates: Sequence[Candidate], need: SelectionNeed) -> list[int]:
    """Return the places of candidates that are not known to be too slow."""
    if need.latency_s is None:
        return list(range(len(candidates)))
    seconds = [candidate.latency_s() for candidate in candidates]
    return [k for k, s in enumerate(seconds) if s is None or s <= need.latency_s]


def _reasons(counts_kc: Array, order: Sequence[int], classes: tuple[str, ...]) -> dict[int, str]:
    """Return what each site added when it was taken, by place."""
    said: dict[int, str] = {}
    total_c = np.zeros(counts_kc.shape[1])
    for place in order:
        gains_c = np.log1p(total_c + counts_kc[place]) - np.log1p(total_c)
        total_c = total_c + counts_kc[place]
        most = f", most to {classes[int(gains_c.argmax())]!r}" if gains_c.any() else ""
        said[place] = f"coverage-greedy: adds {gains_c.sum():.3g} nats of coverage{most}"
    return said
