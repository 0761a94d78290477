"""One point of cost and accuracy for each selector and setting."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Final

import numpy as np

from fedinfer_flower.errors import FedInferError
from fedinfer_flower.selection.base import Selection, Selector, make_selector
from fedinfer_flower.selection.cascade_learning import learn_cascade
from fedinfer_flower.selection.sequential_bound import group_shares
from fedinfer_flower.selection.sequential_selector import SequentialSelector
from fedinfer_flower.simulation.frontier import SiteScores, remembering

__all__ = ["FrontierPoint", "frontier", "sizes_between"]

_DRAWS: Final = 10
"""Random sets of one size whose accuracy is averaged."""
_EPOCHS: Final = 20
_EPOCH_AUDITS: Final = 50
_MAX_SIZES: Final = 6

_LEARNS_FROM_AUDITS: Final = ("competence",)
_BANDITS: Final = ("bandit-thompson", "bandit-ucb")
_EXITS: Final[tuple[Mapping[str, str | float], ...]] = (
    {"tau": 0.3},
    {"tau": 0.5},
    {"tau": 0.7},
    {"stop": "lossless"},
)


@dataclass(frozen=True, kw_only=True)
class FrontierPoint:
    """What asking by one selector in one setting comes to.

    Parameters
    ----------
    selector, setting : str
    accuracy : float
    sites_asked : float
        Mean over rows.
    credits_per_row : float
        At the sites' prices.
    """

    selector: str
    setting: str
    accuracy: float
    sites_asked: float
    credits_per_row: float


def sizes_between(least: int, most: int) -> tuple[int, ...]:
    """Return at most six numbers of sites to compare, the ends among them.

    Examples
    --------
    >>> sizes_between(3, 5), sizes_between(3, 20)
    ((3, 4, 5), (3, 4, 6, 9, 14, 20))
    """
    if most - least < _MAX_SIZES:
        return tuple(range(least, most + 1))
    steps = np.geomspace(least, most, _MAX_SIZES)
    return tuple(sorted({round(float(step)) for step in steps}))


def frontier(
    scores: SiteScores, names: tuple[str, ...], *, least: int, seed: int
) -> tuple[list[FrontierPoint], list[tuple[str, str]]]:
    """Return (points, selectors that could not be measured, each with the reason).

    Parameters
    ----------
    scores : SiteScores
    names : tuple of str
        Selectors.
    least : int
        Fewest sites in one sum.
    seed : int
        Of lots.
    """
    points: list[FrontierPoint] = []
    left_out: list[tuple[str, str]] = []
    for name in names:
        try:
            points += _points_of(scores, name, least=least, seed=seed)
        except FedInferError as exc:
            left_out.append((name, exc.message))
    return points, left_out


def _points_of(scores: SiteScores, name: str, *, least: int, seed: int) -> list[FrontierPoint]:
    limits: dict[str, Any] = {"at_least": least, "group_size": max(3, least), "seed": seed}
    if name == "early-exit":
        return list(_early_exits(scores, limits))
    if name == "cascade":
        return list(_cascades(scores, limits))
    if name == "all":
        return [_at_once(scores, name, make_selector(name).select, limits, scores.candidates)]
    found = []
    for m in sizes_between(least, len(scores.candidates)):
        here = limits | {"at_most": m}
        if name == "random":
            found.append(_random(scores, here))
        elif name in _BANDITS:
            found.append(_bandit(scores, name, here))
        else:
            known = scores.audited() if name in _LEARNS_FROM_AUDITS else scores.candidates
            found.append(_at_once(scores, name, make_selector(name).select, here, known))
    return found


def _at_once(
    scores: SiteScores,
    name: str,
    select: Callable[..., Selection],
    limits: Mapping[str, Any],
    candidates: Any,
) -> FrontierPoint:
    chosen = [int(k) for k in select(candidates, scores.need(**limits)).site_ids]
    return _point(scores, name, len(chosen), scores.right(chosen))


def _point(scores: SiteScores, name: str, m: int, right: float) -> FrontierPoint:
    price = scores.candidates[0].price
    return FrontierPoint(
        selector=name,
        setting=f"{m} sites",
        accuracy=right / len(scores.labels),
        sites_asked=float(m),
        credits_per_row=price * m,
    )


def _random(scores: SiteScores, limits: Mapping[str, Any]) -> FrontierPoint:
    selector, right = make_selector("random"), []
    for draw in range(_DRAWS):
        need = scores.need(**{**limits, "seed": limits["seed"] * _DRAWS + draw})
        chosen = selector.select(scores.candidates, need).site_ids
        right.append(scores.right([int(k) for k in chosen]))
    return _point(scores, "random", len(chosen), float(np.mean(right)))


def _bandit(scores: SiteScores, name: str, limits: Mapping[str, Any]) -> FrontierPoint:
    """Learn from nothing: only sites that it asks are audited."""
    rng = np.random.default_rng([int(limits["seed"]), int(limits["at_most"])])
    selector, candidates = make_selector(name), list(scores.candidates)
    n_rows = min(_EPOCH_AUDITS, scores.n_audits)
    for epoch in range(1, _EPOCHS + 1):
        chosen = selector.select(candidates, scores.need(**limits, epoch=epoch)).site_ids
        rows = rng.choice(scores.n_audits, n_rows, replace=False)
        for k in chosen:
            old = candidates[int(k)].record.tallies
            tally = scores.tally(int(k), rows, epoch=epoch)
            candidates[int(k)] = remembering(candidates[int(k)], (*old, tally))
    calm: Selector = make_selector(name, {"epsilon": 0.0})
    return _at_once(scores, name, calm.select, {**limits, "epoch": _EPOCHS + 1}, candidates)


def _early_exits(scores: SiteScores, limits: Mapping[str, Any]) -> Iterator[FrontierPoint]:
    for options in _EXITS:
        selector = make_selector("early-exit", dict(options))
        assert isinstance(selector, SequentialSelector)  # noqa: S101  by its registration
        setting = ", ".join(
            value if isinstance(value, str) else f"{key} {value:g}"
            for key, value in options.items()
        )
        yield _in_groups(scores, selector, setting, limits)


def _in_groups(
    scores: SiteScores, selector: SequentialSelector, setting: str, limits: Mapping[str, Any]
) -> FrontierPoint:
    need = scores.need(**limits)
    selection = selector.select(scores.candidates, need)
    among = [int(k) for k in selection.site_ids]
    totals, kind = scores.class_totals(among)
    answer = selector.begin(
        selection,
        scores.candidates,
        need,
        scores.rule,
        class_totals=totals,
        counts_kind=kind,
    )
    while answer.group is not None:
        group, rows = answer.group, answer.open_rows
        members = [int(k) for k in selection.groups[group]]
        answer.add(group, scores.totals(members, among=among)[rows], rows)
    asked = float(answer.n_sites_asked.mean())
    right = int((answer.decide().labels == scores.labels).sum())
    found = _point(scores, selector.name, 0, right)
    price = scores.candidates[0].price
    return dataclasses.replace(
        found, setting=setting, sites_asked=asked, credits_per_row=price * asked
    )


def _cascades(scores: SiteScores, limits: Mapping[str, Any]) -> Iterator[FrontierPoint]:
    """Learn policies on the audits, for two budgets in sites a row."""
    need = scores.need(**limits)
    groups = make_selector("early-exit").select(scores.candidates, need).groups
    members = [[int(k) for k in group] for group in groups]
    among = [k for group in members for k in group]
    totals, kind = scores.class_totals(among)
    shares = group_shares(
        scores.rule,
        [[scores.candidates[k] for k in group] for group in members],
        scores.classes,
        class_totals=totals,
        counts_kind=kind,
    )
    least = float(min(len(group) for group in members))
    budgets = {max(least, asked) for asked in (len(members[0]) + 1.0, len(among) / 2.0)}
    for budget in sorted({min(budget, float(len(among))) for budget in budgets}):
        policy = learn_cascade(
            np.stack([scores.totals(group, among=among, audits=True) for group in members]),
            scores.labels_b[: scores.n_audits],
            rule=scores.rule,
            classes=scores.classes,
            groups=tuple(
                tuple(scores.candidates[k].profile.name for k in group) for group in members
            ),
            costs_g=np.array([float(len(group)) for group in members]),
            budget=budget,
            shares_gc=shares,
        )
        selector = make_selector("cascade", {"policy": policy.to_json()})
        assert isinstance(selector, SequentialSelector)  # noqa: S101  by its registration
        yield _in_groups(scores, selector, f"budget {budget:g} sites", limits)
