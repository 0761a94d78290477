"""Early exit: ask a few sites, and more only about the rows that are still open.

Axes: B rows, C classes, G groups.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np

from fedinfer_flower.ensemble.base import EnsembleRule
from fedinfer_flower.ensemble.options import option
from fedinfer_flower.errors import InvalidValueError
from fedinfer_flower.profile import CountsKind
from fedinfer_flower.selection.base import (
    SELECTORS,
    Array,
    Selection,
    SelectionNeed,
)
from fedinfer_flower.selection.candidate import Candidate
from fedinfer_flower.selection.sequential import DONE, BoolArray, IntArray, Standing
from fedinfer_flower.selection.sequential_bound import remaining_bound
from fedinfer_flower.selection.sequential_groups import grouped, own_coverage
from fedinfer_flower.selection.sequential_selector import SequentialSelector

__all__ = ["STOPS", "EarlyExit", "MarginRoute"]

STOPS: Final = ("lossless", "margin", "set")
"""When a row may stop: when no further site can change its label; when its margin is
large enough; when the caller's prediction set has one class left."""


@dataclass(frozen=True, kw_only=True, eq=False)
class MarginRoute:
    """Send rows from group to group until they are decided.

    Parameters
    ----------
    n_groups : int
    tau : float
        Margin beyond which a row stops, with ``stop="margin"``.
    least_groups : int
        Groups that a row asks before its margin or its set may stop it.
    stop : {"lossless", "margin", "set"}
    remaining_gc : float array of shape (n_groups, n_classes), optional
        What all groups *after* each one can still add; None if nothing bounds it.
    slack : float
        What a lead must exceed the bound by.

    Examples
    --------
    >>> MarginRoute(n_groups=3).least_groups
    2
    """

    n_groups: int
    tau: float = 0.3
    least_groups: int = 2
    stop: str = "margin"
    remaining_gc: Array | None = None
    slack: float = 1e-6

    def next_groups(self, standing: Standing) -> IntArray:
        """Return the following group for rows that are open, `DONE` for the others.

        Raises
        ------
        InvalidValueError
            If rows stop by their prediction sets and the caller gave none.
        """
        rows = len(standing.labels)
        following = standing.group + 1
        if following >= self.n_groups:
            return np.full(rows, DONE)
        if self.stop == "margin":
            stop = standing.margins > self.tau
        elif self.stop == "set":
            if standing.prediction_sets is None:
                raise InvalidValueError("stopping by prediction sets needs prediction_sets")
            stop = standing.prediction_sets.sum(axis=1) <= 1
        else:
            stop = np.zeros(rows, dtype=bool)
        stop = stop & (standing.n_groups_asked >= self.least_groups)
        return np.where(stop | self._certain(standing), DONE, following)

    def _certain(self, standing: Standing) -> BoolArray:
        """Return which rows have a label that no further site can change."""
        rows = np.arange(len(standing.labels))
        if self.remaining_gc is None:
            return np.zeros(len(rows), dtype=bool)
        bound = self.remaining_gc[standing.group]
        reach = standing.totals_bs[:, : len(bound)]
        lead = reach[rows, standing.labels]
        rival = reach + bound
        rival[rows, standing.labels] = -np.inf
        return np.asarray(lead - rival.max(axis=1) > self.slack)


@SELECTORS.register("early-exit")
@dataclass(frozen=True, kw_only=True)
class EarlyExit(SequentialSelector):
    """Ask groups in coverage order until a row's answer is clear.

    Use where sites know much the same: about half of the calls are saved when their data
    are alike, next to none when every class sits with few sites. Prefer "coverage-greedy"
    where all rows must go to the same sites, and "cascade" where audits can tell for which
    classes a second opinion pays.

    A group has at least ``need.group_size`` sites of distinct owners, the first one at
    least ``need.at_least``; what is left over joins the last. All groups together keep to
    `at_most` and the budget, for some rows ask them all.

    Parameters
    ----------
    tau : float
        A row stops when its two most probable classes are further apart than this.
    least_groups : int
        Groups asked before a margin or a prediction set may stop a row.
    stop : {"margin", "lossless", "set"}
        "margin" is a heuristic: the accuracy it costs depends on `tau` and is not bounded.
        "lossless" stops a row only when no answer of the remaining sites can change its
        label. "set" goes on while the caller's prediction set has more than one class; the
        coverage that such a set was calibrated for is that of a fixed number of sites, and
        stopping on it can lower it. Under all three a row whose label is certain stops.

    Raises
    ------
    InvalidValueError
        If an option is out of range.

    Privacy
    -------
    Selection needs profiles only. What asking in groups tells whom is said at
    `SequentialAnswer`. Under protections that add noise "lossless" is no promise: the
    noise of further sites is not bounded.

    References
    ----------
    .. [1] Wald, Sequential Analysis, 1947, for stopping at a margin.

    Examples
    --------
    >>> from fedinfer_flower.profile import SiteProfile
    >>> sites = [
    ...     Candidate(site_id=k, profile=SiteProfile(name=f"s{k}", classes=("x", "y")))
    ...     for k in range(7)
    ... ]
    >>> found = EarlyExit().select(sites, SelectionNeed(classes=("x", "y")))
    >>> [len(group) for group in found.groups]
    [3, 4]
    """

    tau: float = option(0.3, low=0.0, high=1.0)
    least_groups: int = option(2, low=1, high=1000)
    stop: str = "margin"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.stop not in STOPS:
            raise InvalidValueError(
                f"early-exit has no way to stop called {self.stop[:32]!r}",
                hint=f"use {', '.join(STOPS)}",
            )

    def score(self, candidates: Sequence[Candidate], need: SelectionNeed) -> Array:
        """Return each site's own coverage, ``sum_c log(1 + n_kc)``."""
        return own_coverage(candidates, need.classes)

    def select(self, candidates: Sequence[Candidate], need: SelectionNeed) -> Selection:
        """Return groups in coverage order.

        Raises
        ------
        SelectionError
            If too few sites, or too few distinct owners, fit the limits.
        """
        return grouped(self, candidates, need)

    def route(
        self,
        selection: Selection,
        candidates: Sequence[Candidate],
        need: SelectionNeed,
        rule: EnsembleRule,
        *,
        class_totals: Array | None = None,
        counts_kind: CountsKind = CountsKind.COUNTS,
        slack: float = 1e-6,
    ) -> MarginRoute:
        """Return the route of this selection, with the bounds that the rule has.

        Raises
        ------
        InvalidValueError
            If "lossless" is asked for and the rule has no bound.
        """
        by_id = {candidate.site_id: candidate for candidate in candidates}
        bounds: list[Array] = []
        for number in range(len(selection.groups)):
            later = [by_id[k] for group in selection.groups[number + 1 :] for k in group]
            bound = remaining_bound(
                rule, later, need.classes, class_totals=class_totals, counts_kind=counts_kind
            )
            if bound is None:
                break
            bounds.append(bound)
        known = len(bounds) == len(selection.groups)
        if self.stop == "lossless" and not known:
            raise InvalidValueError(
                f"nothing bounds what further sites add under rule {rule.name!r}",
                hint="use stop='margin', or a rule such as 'mean-probability'; class-share rules"
                " need the class totals over all selected sites",
            )
        return MarginRoute(
            n_groups=len(selection.groups),
            tau=self.tau,
            least_groups=self.least_groups,
            stop=self.stop,
            remaining_gc=np.stack(bounds) if known else None,
            # Large weights are divided out before ties are looked for, and round more.
            slack=slack * max(1.0, rule.score_bound(len(need.classes))),
        )
