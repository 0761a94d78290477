"""Learn a cascade from audits, exactly.

Axes: G groups, T audit queries, C classes, S width of a score.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from fedinfer_flower.ensemble.base import Array, EnsembleRule
from fedinfer_flower.errors import InvalidValueError, SelectionError, ShapeError
from fedinfer_flower.selection.cascade_policy import ALWAYS, NOBODY, CascadePolicy
from fedinfer_flower.selection.sequential import top_two_gap

__all__ = ["learn_cascade"]

IntArray = npt.NDArray[np.int64]


def learn_cascade(
    totals_gts: Array,
    labels_t: IntArray,
    *,
    rule: EnsembleRule,
    classes: tuple[str, ...],
    groups: tuple[tuple[str, ...], ...],
    costs_g: Array,
    budget: float,
    shares_gc: Array | None = None,
) -> CascadePolicy:
    """Return the policy with the most right audits whose mean price a row fits a budget.

    Exact: the labels that a base predicts split the audits, so the choice of threshold and
    add-on for each label is a multiple-choice knapsack, solved over the number of right
    answers, for every base in turn. Differs from FrugalML, which it follows, in two points:
    the scores of base and add-on are added up instead of replaced, and nothing is
    randomised. For a label that a base never predicts on the audits, nobody else is asked.

    Parameters
    ----------
    totals_gts : float array of shape (n_groups, n_audits, score_width)
        Combined scores of each group on the audits: sums over groups are enough, single
        answers are not needed. Weights are normalised over the sites of all groups.
    labels_t : int array of shape (n_audits,)
    rule : EnsembleRule
    classes : tuple of str
    groups : tuple of tuple of str
        Key ids or names of the sites of each group.
    costs_g : float array of shape (n_groups,)
        Price of one row, in credits; or numbers of sites, if calls are what is scarce.
    budget : float
        Most to pay for a row on average, in the same unit.
    shares_gc : float array of shape (n_groups, n_classes), optional
        Of `group_shares`, for class-share rules; the cascade uses them where it is asked.

    Raises
    ------
    ShapeError
        If the arrays do not fit each other.
    InvalidValueError
        If a cost, a label or the budget is out of range.
    SelectionError
        If no group alone fits the budget.

    Privacy
    -------
    Whoever learns it sees the groups' sums on audit rows and their labels.

    References
    ----------
    .. [1] Chen, Zaharia, Zou, FrugalML, NeurIPS 2020, arXiv 2006.07512, section 3.

    Examples
    --------
    >>> from fedinfer_flower.ensemble import make_rule
    >>> totals = np.array([[[2.0, 1.0], [1.4, 1.6]], [[2.9, 0.1], [3.0, 0.0]]])
    >>> policy = learn_cascade(
    ...     totals,
    ...     np.array([0, 0]),
    ...     rule=make_rule("mean-probability"),
    ...     classes=("x", "y"),
    ...     groups=(("a", "b", "c"), ("d", "e", "f")),
    ...     costs_g=np.array([1.0, 2.0]),
    ...     budget=2.0,
    ... )
    >>> policy.base, policy.addons_c, policy.accuracy
    (0, (-1, 1), 1.0)
    """
    n_groups, n_audits, _ = _checked(totals_gts, labels_t, rule, classes, groups, costs_g, budget)
    if shares_gc is not None and shares_gc.shape != (n_groups, len(classes)):
        raise ShapeError("group shares have one entry a group and class")
    best: tuple[int, float, int, list[_Choice]] | None = None
    for base in range(n_groups):
        options = _options(base, totals_gts, labels_t, rule, groups, costs_g, shares_gc)
        room = budget * n_audits * (1.0 + 1e-12) - costs_g[base] * n_audits
        found = _knapsack(options, room, n_audits)
        if found is None:
            continue
        right, extra, choices = found
        cost = float(costs_g[base]) + extra / n_audits
        if best is None or (right, -cost) > (best[0], -best[1]):
            best = (right, cost, base, choices)
    if best is None:
        raise SelectionError(
            "no group alone fits the budget of the cascade", hint="raise the budget a row"
        )
    right, cost, base, choices = best
    return CascadePolicy(
        classes=classes,
        groups=groups,
        base=base,
        thresholds_c=tuple(choice.threshold for choice in choices),
        addons_c=tuple(choice.addon for choice in choices),
        accuracy=right / n_audits,
        cost=cost,
        n_audits=n_audits,
    )


@dataclass(frozen=True, kw_only=True)
class _Choice:
    """One way to treat the rows that the base gives one label."""

    right: int
    extra: float
    threshold: float
    addon: int


def _options(
    base: int,
    totals_gts: Array,
    labels_t: IntArray,
    rule: EnsembleRule,
    groups: tuple[tuple[str, ...], ...],
    costs_g: Array,
    shares_gc: Array | None,
) -> list[list[_Choice]]:
    """Return, for each label, all thresholds and add-ons that treat the audits differently."""

    def shown(*places: int) -> Array:
        total = totals_gts[list(places)].sum(axis=0)
        if shares_gc is None:
            return np.asarray(total)
        share = shares_gc[list(places)].sum(axis=0)
        return np.asarray(total / np.where(share > 0.0, share, 1.0))

    own = shown(base)
    n_classes = rule.class_totals(own).shape[1]
    said = rule.class_totals(own).argmax(axis=1)
    margins = top_two_gap(rule.probabilities(own, len(groups[base])))
    right = said == labels_t
    right_with = {
        addon: rule.class_totals(shown(base, addon)).argmax(axis=1) == labels_t
        for addon in range(len(groups))
        if addon != base
    }
    options = []
    for label in range(n_classes):
        rows = np.flatnonzero(said == label)
        rows = rows[np.argsort(margins[rows], kind="stable")]
        choices = [_Choice(right=int(right[rows].sum()), extra=0.0, threshold=0.0, addon=NOBODY)]
        ordered = margins[rows]
        # Rows of equal margin cannot be told apart by a threshold.
        cuts = [n for n in range(1, len(rows) + 1) if n == len(rows) or ordered[n - 1] < ordered[n]]
        for addon, hits in right_with.items():
            for n in cuts:
                count = int(hits[rows[:n]].sum() + right[rows[n:]].sum())
                end = n == len(rows)
                middle = ALWAYS if end else float((ordered[n - 1] + ordered[n]) / 2.0)
                extra = float(n * costs_g[addon])
                choices.append(_Choice(right=count, extra=extra, threshold=middle, addon=addon))
        options.append(choices)
    return options


def _knapsack(
    options: list[list[_Choice]], room: float, n_audits: int
) -> tuple[int, float, list[_Choice]] | None:
    """Return (most right, their least extra cost, choices) within `room`; None if none fits."""
    least = np.full(n_audits + 1, np.inf)
    least[0] = 0.0
    picked: list[IntArray] = []
    for choices in options:
        after = np.full(n_audits + 1, np.inf)
        which = np.full(n_audits + 1, -1, dtype=np.int64)
        for number, choice in enumerate(choices):
            reached = np.full(n_audits + 1, np.inf)
            reached[choice.right :] = least[: n_audits + 1 - choice.right] + choice.extra
            better = reached < after
            after[better], which[better] = reached[better], number
        least = after
        picked.append(which)
    fitting = np.flatnonzero(least <= room)
    if not len(fitting):
        return None
    right = at = int(fitting[-1])
    chosen: list[_Choice] = []
    for choices, which in zip(reversed(options), reversed(picked), strict=True):
        choice = choices[which[at]]
        chosen.append(choice)
        at -= choice.right
    return right, float(least[right]), chosen[::-1]


def _checked(
    totals_gts: Array,
    labels_t: IntArray,
    rule: EnsembleRule,
    classes: tuple[str, ...],
    groups: tuple[tuple[str, ...], ...],
    costs_g: Array,
    budget: float,
) -> tuple[int, int, int]:
    expected = (len(groups), len(labels_t), rule.score_width(len(classes)))
    if totals_gts.shape != expected or costs_g.shape != expected[:1] or not np.prod(expected):
        raise ShapeError(f"audit totals have shape (groups, audits, width), here {expected}")
    if labels_t.min() < 0 or labels_t.max() >= len(classes):
        raise InvalidValueError("an audit label is a place in the classes")
    if not (np.isfinite(costs_g).all() and (costs_g >= 0.0).all() and math.isfinite(budget)):
        raise InvalidValueError("costs and budget are finite numbers, no cost is negative")
    return expected
