"""Groups of sites that are asked one after the other, each large enough to be summed."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Final

import numpy as np

from fedinfer_flower.errors import SelectionError
from fedinfer_flower.selection.base import Array, Selection, SelectionNeed, Selector
from fedinfer_flower.selection.candidate import Candidate
from fedinfer_flower.selection.class_counts import comparable_counts
from fedinfer_flower.selection.coverage_greedy import CoverageGreedy

__all__ = ["COUNT_CAP", "grouped", "own_coverage", "split_groups"]


COUNT_CAP: Final = 10.0
"""Most that a stated class count is believed, in multiples of the median of its class."""


def own_coverage(candidates: Sequence[Candidate], classes: tuple[str, ...]) -> Array:
    """Return what each site covers alone, ``sum_c log(1 + n_kc)``, shape (n_candidates,)."""
    counts_kc = comparable_counts(candidates, classes, cap=COUNT_CAP)
    return np.asarray(np.log1p(counts_kc).sum(axis=1))


def split_groups(
    candidates: Sequence[Candidate], *, group_size: int, first_size: int
) -> list[list[int]]:
    """Split candidates, in the order given, into groups of sites of distinct owners.

    A group takes the next sites whose owner and whose duplicate cluster it does not have
    yet. Sites that are left when no further group fills up join the last one, so no group
    has fewer distinct owners than asked for.

    Parameters
    ----------
    candidates : sequence of Candidate
    group_size : int
        Fewest distinct owners of a group.
    first_size : int
        The same of the first group.

    Returns
    -------
    groups : list of list of int
        Places in `candidates`.

    Raises
    ------
    SelectionError
        If not even the first group fills up.

    Privacy
    -------
    Owners are as registered with the coordinator; an owner that registers under several
    names passes for several.
    """
    left = list(range(len(candidates)))
    groups: list[list[int]] = []
    size = max(first_size, group_size)
    while True:
        taken: list[int] = []
        seen: set[tuple[str, str]] = set()
        for place in left:
            marks = _marks(candidates[place])
            if not marks & seen:
                taken.append(place)
                seen |= marks
            if len(taken) == size:
                break
        if len(taken) < size:
            break
        groups.append(taken)
        left = [place for place in left if place not in set(taken)]
        size = group_size
    if not groups:
        raise SelectionError(
            f"{len(candidates)} sites have too few distinct owners for one group of {size}",
            hint="register the owners, raise at_most or the budget, or use a selector that"
            " asks all sites at once",
        )
    seen = {mark for place in groups[-1] for mark in _marks(candidates[place])}
    for place in left:
        # A second site of an owner would leave too few owners once another site drops out.
        marks = _marks(candidates[place])
        if not marks & seen:
            groups[-1].append(place)
            seen |= marks
    return groups


def _marks(candidate: Candidate) -> set[tuple[str, str]]:
    marks = {("owner", candidate.owner)}
    if candidate.record.cluster:
        marks.add(("cluster", candidate.record.cluster))
    return marks


def grouped(selector: Selector, candidates: Sequence[Candidate], need: SelectionNeed) -> Selection:
    """Return what "coverage-greedy" selects, in its order, split into groups.

    All groups together keep to the limits of `need`: every row may go to all of them. The
    first group has at least ``need.at_least`` sites, for a row may stop there.

    Raises
    ------
    SelectionError
        If too few sites, or too few owners, fit.
    """
    whole = CoverageGreedy(count_cap=COUNT_CAP).select(candidates, need)
    by_id = {candidate.site_id: candidate for candidate in candidates}
    chosen = [by_id[site_id] for site_id in whole.site_ids]
    places = split_groups(chosen, group_size=need.group_size, first_size=need.at_least)
    groups = tuple(tuple(chosen[k].site_id for k in group) for group in places)
    reasons = {
        site_id: f"{selector.name}: group {number + 1} of {len(groups)}, by coverage"
        for number, group in enumerate(groups)
        for site_id in group
    }
    scores = selector.score(candidates, need)
    return dataclasses.replace(
        whole,
        groups=groups,
        reasons=reasons,
        scores={c.site_id: float(s) for c, s in zip(candidates, scores, strict=True)},
    )
