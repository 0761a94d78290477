"""`fedinfer demo --selector`: the querier's choice of sites, and what each choice costs."""

from __future__ import annotations

import math
import secrets
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

from fedinfer_flower.ensemble.base import RULES, Disclosure, make_rule
from fedinfer_flower.errors import ConfigError, IncompatibleProtection
from fedinfer_flower.privacy.base import PROTECTIONS, Protection
from fedinfer_flower.querier import Querier
from fedinfer_flower.querier.sequential_querier import SequentialQuerier
from fedinfer_flower.query import Prediction, SiteId
from fedinfer_flower.reporting.intervals import wilson_interval
from fedinfer_flower.selection.base import SELECTORS, Selection, SelectionNeed, make_selector
from fedinfer_flower.selection.candidate import Candidate
from fedinfer_flower.selection.plan import plan_query
from fedinfer_flower.simulation.data import Dataset
from fedinfer_flower.simulation.federation import Step
from fedinfer_flower.simulation.frontier import site_scores
from fedinfer_flower.simulation.frontier_points import frontier
from fedinfer_flower.simulation.rewards import PRICE
from fedinfer_flower.strategies.handover import write_whole
from fedinfer_flower.wire.directory import Directory
from fedinfer_flower.wire.documents import CombinedAnswer

__all__ = ["DemoSelection", "frontier_results", "require_selectors", "selectors_of"]

ALL: Final = "all"
_NEEDS_OPTIONS: Final = ("fixed",)
"""Selectors that nobody can build without being told which sites."""
_NEEDS_POLICY: Final = ("cascade",)
_FALLBACK_RULE: Final = "mean-probability"


def selectors_of(text: str) -> tuple[str, ...]:
    """Return the selectors that ``--selector`` names; ``all`` alone is every one.

    Raises
    ------
    UnknownNameError
        If there is no such selector.
    ConfigError
        If one cannot be compared, or is named twice.

    Examples
    --------
    >>> selectors_of("largest,random")
    ('largest', 'random')
    >>> selectors_of("all")[0]
    'all'
    """
    names = tuple(part.strip() for part in text.split(",")) if text else ()
    if names == (ALL,):
        others = [n for n in SELECTORS.names() if n not in (ALL, *_NEEDS_OPTIONS)]
        return (ALL, *others)
    for name in names:
        SELECTORS.get(name)
        if name in _NEEDS_OPTIONS:
            raise ConfigError(
                f"selector {name!r} needs a list of sites, which the demo does not take",
                hint="compare others, such as --selector coverage-greedy,random",
            )
    if len(set(names)) != len(names):
        raise ConfigError("--selector names a selector twice")
    return names


def require_selectors(names: tuple[str, ...], *, rule: str, hides_query: bool) -> None:
    """Refuse what could not run, before anything is started.

    Raises
    ------
    IncompatibleProtection
        If the sites compute together without reading the query.
    ConfigError
        If the first selector cannot choose for the main answer.
    """
    if not names:
        return
    if hides_query:
        raise IncompatibleProtection(
            "sites that answer without reading the query are all asked",
            hint="leave --selector out, or use --protect secagg",
        )
    if names[0] in _NEEDS_POLICY:
        raise ConfigError(
            f"selector {names[0]!r} needs a policy learned from audits before the main answer",
            hint=f"name another first: --selector early-exit,{names[0]}",
        )
    is_sequential = make_selector(names[0]).sequential
    if is_sequential and rule != "auto" and RULES.get(rule).discloses is not Disclosure.SUM:
        raise ConfigError(
            f"selector {names[0]!r} adds up sums of groups; rule {rule!r} compares all scores",
            hint="use --rule class-share",
        )


class DemoSelection:
    """The querier's choice of sites for the main answer; the coordinator is not asked.

    Parameters
    ----------
    name : str
        Selector.
    step : Step
        That asks the sites chosen.
    dataset : Dataset
    """

    def __init__(self, name: str, step: Step, dataset: Dataset) -> None:
        self.selector = make_selector(name)
        self.step = step
        self.plan: dict[str, Any] = {}
        self._dataset = dataset
        self._asked: SequentialQuerier | None = None
        self._n_groups = 0

    def choose(self, directory: Directory, protection: Protection) -> Directory:
        """Return the directory of the sites to ask; half of them, if the selector is free."""
        candidates = [
            Candidate(site_id=SiteId(n), profile=card.profile, key_id=card.key_id)
            for n, card in enumerate(directory.cards)
        ]
        half = max(protection.min_cohort, math.ceil(len(candidates) / 2))
        need = SelectionNeed(
            classes=self._dataset.classes,
            n_queries=len(self._dataset.test_labels),
            rule=self.step.rule,
            protection=protection.name,
            at_least=protection.min_cohort,
            at_most=None if self.selector.name == ALL else half,
            group_size=max(3, protection.min_cohort),
            now_s=time.time(),
            seed=secrets.randbits(63),
        )
        plan = plan_query(candidates, need, selector=self.selector)
        self.plan = {
            **_described(
                directory, plan.groups, {site.site_id: site.reason for site in plan.sites}
            ),
            "expected_accuracy": plan.accuracy.value,
            "accuracy_basis": plan.accuracy.basis,
        }
        cards = tuple(directory.cards[int(n)] for n in sorted(plan.site_ids))
        return Directory(run_id=directory.run_id, cards=cards)

    def begin(self, directory: Directory, querier: Querier) -> None:
        """Plan groups, for a selector that asks one after the other."""
        self._asked = SequentialQuerier(
            querier,
            directory=directory,
            inputs=self._dataset.test_inputs,
            selector=self.selector,
            rule=self.step.rule,
            classes=self._dataset.classes,
        )
        selection: Selection = self._asked.selection
        self.plan = {
            **_described(directory, selection.groups, selection.reasons),
            "expected_accuracy": None,
            "accuracy_basis": "unknown: no audits",
        }

    def next_group(self, folder: Path) -> None:
        """Take in the last group's answer, and write the next group's job, or the end."""
        asked = self._begun()
        if self._n_groups:
            path = folder / f"{self.step.label}-{self._n_groups - 1}.answer"
            asked.add(CombinedAnswer.from_bytes(path.read_bytes()))
        job = asked.next_job()
        if job is None:
            write_whole(folder / f"{self.step.label}.end", b"")
            return
        write_whole(folder / f"{self.step.label}-{self._n_groups}.job", job.to_bytes())
        self._n_groups += 1

    def decide(self) -> Prediction:
        """Return the answer of all groups that were asked."""
        return self._begun().decide()

    @property
    def mean_sites_asked(self) -> float:
        """Mean over the rows."""
        if self._asked is not None:
            return float(self._asked.n_sites_asked.mean())
        return float(len(self.plan.get("sites", ())))

    def _begun(self) -> SequentialQuerier:
        if self._asked is None:
            raise ConfigError("no groups were planned")
        return self._asked


def _described(
    directory: Directory, groups: tuple[tuple[SiteId, ...], ...], reasons: Mapping[SiteId, str]
) -> dict[str, Any]:
    names = [card.profile.name for card in directory.cards]
    return {
        "sites": [
            {"name": names[int(site)], "group": number, "reason": reasons[site]}
            for number, group in enumerate(groups)
            for site in group
        ],
        "n_groups": len(groups),
        "passed_over": [name for n, name in enumerate(names) if SiteId(n) not in reasons],
    }


def frontier_results(
    folder: Path,
    dataset: Dataset,
    n_sites: int,
    *,
    names: tuple[str, ...],
    rule: str,
    protect: str,
    seed: int,
) -> dict[str, Any]:
    """Return what each selector costs and gets right, worked out from the sites' own scores."""
    picked = make_rule(rule if RULES.get(rule).discloses is Disclosure.SUM else _FALLBACK_RULE)
    n_rows = len(dataset.test_labels)
    scores = site_scores(
        folder,
        dataset,
        n_sites,
        rule=picked,
        n_audits=min(200, n_rows // 2),
        price=PRICE,
    )
    least = min(PROTECTIONS.get(protect).min_cohort, n_sites)
    points, left_out = frontier(scores, names, least=least, seed=seed)
    n = len(scores.labels)
    return {
        "rule": picked.name,
        "n_queries": n,
        "n_audits": scores.n_audits,
        "price": PRICE,
        "points": [_point(vars(point), n) for point in points],
        "left_out": [{"selector": name, "reason": reason} for name, reason in left_out],
    }


def _point(point: Mapping[str, Any], n: int) -> dict[str, Any]:
    low, high = wilson_interval(round(point["accuracy"] * n), n)
    return {**point, "low": low, "high": high}
