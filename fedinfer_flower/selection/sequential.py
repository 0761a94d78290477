"""Ask group after group: which rows go on, to whom, and what the answer is so far.

Axes: B rows of a batch, C classes, S width of a score, G groups.

A `SequentialAnswer` keeps the sums; a `Route` says after each group where a row goes next.
Nothing here asks anybody: whoever drives the queries does, group by group.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final, Protocol

import numpy as np
import numpy.typing as npt

from fedinfer_flower.ensemble.base import Array, EnsembleRule
from fedinfer_flower.errors import InvalidValueError, ShapeError
from fedinfer_flower.query import Prediction

__all__ = ["DONE", "Route", "SequentialAnswer", "Standing", "top_two_gap"]

IntArray = npt.NDArray[np.int64]
BoolArray = npt.NDArray[np.bool_]

DONE: Final = -1
"""Next group of a row that asks nobody any more."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Standing:
    """Where the rows stand that one group has just answered.

    Parameters
    ----------
    group : int
        The group that answered.
    n_groups_asked : int array of shape (n_rows,)
        Groups that each row has been to, this one included.
    totals_bs : float array of shape (n_rows, score_width)
        Over all groups that each row has been to, as they came.
    labels : int array of shape (n_rows,)
        The class in front.
    margins : float array of shape (n_rows,)
        Between the two most probable classes, in [0, 1]; 1.0 where there is one class.
    prediction_sets : bool array of shape (n_rows, n_classes), optional
        As given by the caller.
    """

    group: int
    n_groups_asked: IntArray
    totals_bs: Array
    labels: IntArray
    margins: Array
    prediction_sets: BoolArray | None


class Route(Protocol):
    """Where rows go next."""

    def next_groups(self, standing: Standing) -> IntArray:
        """Return the next group of each row, or `DONE`, shape (n_rows,)."""
        ...


class SequentialAnswer:
    """The answer to a batch whose rows go to several groups of sites, one after the other.

    Ask `group` about `open_rows`, give the group's combined scores to `add`, and repeat
    until `group` is None. `decide` may be called at any time.

    Parameters
    ----------
    rule : EnsembleRule
        Must declare ``Disclosure.SUM``: sums of groups are added up. Its weights must be
        normalised over all sites that may be asked, not over a group.
    classes : tuple of str
    group_sizes : sequence of int
        Sites of each group.
    n_queries : int
    route : Route
    shares_gc : float array of shape (n_groups, n_classes), optional
        Of `group_shares`: totals are divided by the share of the groups that a row has been
        to, so that a class that others know better does not look unlikely before they are
        asked. Not together with lossless stopping, whose answer is that of all groups.

    Raises
    ------
    InvalidValueError
        If the rule needs each site's own scores, or a number is below 1.

    Privacy
    -------
    Each group's sum is opened by itself, so the querier learns sums over single groups and
    not only the sum over all: a group is the anonymity set. Groups are disjoint, so no sum
    is the difference of two others by one site. Sites of later groups learn which rows
    earlier groups left undecided; so does the coordinator where it sees the rows that are
    asked. Rows that stop early are fewer answers, hence less privacy budget spent.

    Examples
    --------
    >>> from fedinfer_flower.ensemble import make_rule
    >>> from fedinfer_flower.selection.early_exit import MarginRoute
    >>> asked = SequentialAnswer(
    ...     make_rule("mean-probability"),
    ...     classes=("x", "y"),
    ...     group_sizes=(3, 3),
    ...     n_queries=2,
    ...     route=MarginRoute(n_groups=2, tau=0.3, least_groups=1),
    ... )
    >>> asked.add(asked.group, np.array([[2.7, 0.3], [1.5, 1.5]]), asked.open_rows)
    >>> asked.group, asked.open_rows
    (1, array([1]))
    >>> asked.add(1, np.array([[0.6, 2.4]]), asked.open_rows)
    >>> asked.decide().names, asked.n_sites_asked.tolist()
    (['x', 'y'], [3, 6])
    """

    def __init__(
        self,
        rule: EnsembleRule,
        *,
        classes: tuple[str, ...],
        group_sizes: Sequence[int],
        n_queries: int,
        route: Route,
        shares_gc: Array | None = None,
    ) -> None:
        if rule.discloses.name != "SUM":
            raise InvalidValueError(
                f"rule {rule.name!r} compares all sites' scores and cannot be asked in groups",
                hint="use a rule that needs the sum only, such as 'class-share'",
            )
        if n_queries < 1 or not group_sizes or min(group_sizes) < 1:
            raise InvalidValueError("a sequential answer has rows, and groups that have sites")
        self._rule, self._classes, self._route = rule, classes, route
        if shares_gc is not None and shares_gc.shape != (len(group_sizes), len(classes)):
            raise ShapeError("group shares have one entry a group and class")
        self._sizes, self._shares_gc = tuple(group_sizes), shares_gc
        self._totals = np.zeros((n_queries, rule.score_width(len(classes))))
        self._n_sites = np.zeros(n_queries, dtype=np.int64)
        self._n_asked = np.zeros(n_queries, dtype=np.int64)
        self._been = np.zeros((n_queries, len(group_sizes)), dtype=bool)
        self._next = np.zeros(n_queries, dtype=np.int64)

    @property
    def group(self) -> int | None:
        """The group to ask next; None when all rows are done."""
        waiting = self._next[self._next != DONE]
        return int(waiting.min()) if len(waiting) else None

    @property
    def open_rows(self) -> IntArray:
        """Numbers of the rows to ask `group` about, ascending; empty when all are done."""
        group = self.group
        return np.flatnonzero(self._next == (group if group is not None else DONE - 1))

    @property
    def n_sites_asked(self) -> IntArray:
        """Sites that were asked about each row, shape (n_queries,); what a row costs."""
        return self._n_asked.copy()

    def add(
        self,
        group: int | None,
        totals_bs: Array,
        rows: IntArray,
        *,
        n_sites: int | None = None,
        prediction_sets: BoolArray | None = None,
    ) -> None:
        """Take in the combined scores of one group.

        Parameters
        ----------
        group : int
            Must be `group`.
        totals_bs : float array of shape (n_rows, score_width)
            Opened sum over the group's sites.
        rows : int array of shape (n_rows,)
            Must be `open_rows`.
        n_sites : int, optional
            Sites that answered; default all of the group.
        prediction_sets : bool array of shape (n_rows, n_classes), optional
            Which classes the caller cannot rule out yet. The caller works it out from the
            totals; only routes that stop by sets read it.

        Raises
        ------
        InvalidValueError
            If another group or other rows are due.
        ShapeError
            If an array does not fit.
        """
        due = self.open_rows
        if group is None or group != self.group or not np.array_equal(rows, due):
            raise InvalidValueError("scores of a group or of rows that are not due")
        answered = self._sizes[group] if n_sites is None else n_sites
        if not 0 <= answered <= self._sizes[group]:
            raise InvalidValueError("more answers than the group has sites")
        expected = (len(due), self._totals.shape[1])
        if totals_bs.shape != expected or not np.isfinite(totals_bs).all():
            raise ShapeError(f"a group's totals are finite and have shape {expected}")
        if prediction_sets is not None and prediction_sets.shape != (len(due), len(self._classes)):
            raise ShapeError("prediction sets have one entry a row and class")
        self._totals[due] += totals_bs
        self._n_sites[due] += answered
        self._n_asked[due] += self._sizes[group]
        self._been[due, group] = True
        following = self._route.next_groups(self._standing(group, due, prediction_sets))
        self._check_route(following, due)
        self._next[due] = following

    def preview(self, totals_bs: Array, *, n_sites: int | None = None) -> Prediction:
        """Return what `open_rows` would be answered once these totals are added.

        For callers that work out prediction sets before `add`.
        """
        group, rows = self.group, self.open_rows
        if group is None or totals_bs.shape != (len(rows), self._totals.shape[1]):
            raise ShapeError("totals are of the rows that are open")
        trial = copy.deepcopy(self)
        # Whatever the route says of the sets, the rows' standing is the same.
        everything = np.ones((len(rows), len(self._classes)), dtype=bool)
        trial.add(group, totals_bs, rows, n_sites=n_sites, prediction_sets=everything)
        whole = trial.decide()
        return Prediction(
            classes=whole.classes,
            labels=whole.labels[rows],
            probabilities=whole.probabilities[rows],
            margin=whole.margin[rows],
            abstained=whole.abstained[rows],
        )

    def skip(self, group: int | None) -> None:
        """Go on without a group that did not answer: its rows get nothing from it."""
        rows = self.open_rows
        self.add(group, np.zeros((len(rows), self._totals.shape[1])), rows, n_sites=0)

    def decide(self, *, tie_seed: int = 0) -> Prediction:
        """Return labels, probabilities and margins from what has been added.

        Rows that no site answered are abstentions. Ties go by the same lots as if all sites
        had been asked at once, in one batch.
        """
        totals = self._shown(np.arange(len(self._totals)))
        parts = {
            int(n): self._rule.decide(totals, int(n), self._classes, tie_seed=tie_seed)
            for n in np.unique(self._n_sites)
        }
        picked = [(parts[int(n)], row) for row, n in enumerate(self._n_sites)]
        silent = self._n_sites == 0
        return Prediction(
            classes=self._classes,
            labels=np.array([part.labels[row] for part, row in picked], dtype=np.int64),
            probabilities=np.stack([part.probabilities[row] for part, row in picked]),
            margin=np.array([part.margin[row] for part, row in picked]),
            abstained=np.array([part.abstained[row] for part, row in picked], dtype=bool) | silent,
        )

    def _standing(self, group: int, rows: IntArray, sets: BoolArray | None) -> Standing:
        totals = self._shown(rows)
        probabilities = np.empty((len(rows), len(self._classes)))
        for n_sites in np.unique(self._n_sites[rows]):
            here = self._n_sites[rows] == n_sites
            found = self._rule.probabilities(totals[here], max(int(n_sites), 1))
            probabilities[here] = found
        return Standing(
            group=group,
            n_groups_asked=self._been[rows].sum(axis=1),
            totals_bs=self._totals[rows],
            labels=self._rule.class_totals(totals).argmax(axis=1),
            margins=top_two_gap(probabilities),
            prediction_sets=sets,
        )

    def _shown(self, rows: IntArray) -> Array:
        """Return the totals of rows, as if only the groups that were asked existed."""
        if self._shares_gc is None:
            return self._totals[rows]
        shares = self._been[rows] @ self._shares_gc
        return np.asarray(self._totals[rows] / np.where(shares > 0.0, shares, 1.0))

    def _check_route(self, following: IntArray, rows: IntArray) -> None:
        going = following != DONE
        inside = (following >= 0) & (following < len(self._sizes))
        if following.shape != rows.shape or not (inside | ~going).all():
            raise InvalidValueError("a route names groups that do not exist")
        if self._been[rows[going], following[going]].any():
            # Twice the same rows to the same sites is two samples of one answer.
            raise InvalidValueError("a route sends a row to the same group twice")


def top_two_gap(values_bc: Array) -> Array:
    """Return the distance of the two largest entries of each row; 1.0 for a single class.

    Examples
    --------
    >>> top_two_gap(np.array([[0.5, 0.25, 0.25]]))
    array([0.25])
    """
    if values_bc.shape[1] == 1:
        return np.ones(len(values_bc))
    top = np.partition(values_bc, -2, axis=1)
    return np.asarray(top[:, -1] - top[:, -2])
