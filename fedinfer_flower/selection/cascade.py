"""Cascade: one group answers, another is asked where audits say that it pays.

Axes: B rows, C classes.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from fedinfer_flower.ensemble.base import EnsembleRule
from fedinfer_flower.ensemble.options import option
from fedinfer_flower.errors import SelectionError
from fedinfer_flower.profile import CountsKind
from fedinfer_flower.query import SiteId
from fedinfer_flower.selection.base import SELECTORS, Array, Selection, SelectionNeed
from fedinfer_flower.selection.candidate import Candidate
from fedinfer_flower.selection.cascade_policy import NOBODY, CascadePolicy
from fedinfer_flower.selection.sequential import DONE, IntArray, Standing
from fedinfer_flower.selection.sequential_bound import group_shares
from fedinfer_flower.selection.sequential_groups import grouped, own_coverage, split_groups
from fedinfer_flower.selection.sequential_selector import SequentialSelector

__all__ = ["Cascade", "CascadeRoute"]


@dataclass(frozen=True, kw_only=True, eq=False)
class CascadeRoute:
    """Send a row from the base to the add-on of its label, where its margin is small.

    Parameters
    ----------
    thresholds_c : float array of shape (n_classes,)
    addons_c : int array of shape (n_classes,)
        Group, or `DONE`.

    Examples
    --------
    >>> CascadeRoute(thresholds_c=np.array([0.3]), addons_c=np.array([1])).addons_c
    array([1])
    """

    thresholds_c: Array
    addons_c: IntArray

    def next_groups(self, standing: Standing) -> IntArray:
        """Return the add-on of each row that goes on; `DONE` after the add-on."""
        goes_on = standing.margins < self.thresholds_c[standing.labels]
        goes_on &= standing.n_groups_asked == 1
        return np.where(goes_on, self.addons_c[standing.labels], DONE)


@SELECTORS.register("cascade")
@dataclass(frozen=True, kw_only=True)
class Cascade(SequentialSelector):
    """Ask a base group; for labels where it errs, ask the group that mends it.

    Use where audits are at hand and groups differ in price or in what they know. Without
    a policy it is a two-step "early-exit", which needs no audits and can go further.

    Parameters
    ----------
    policy : str
        The JSON text of a `CascadePolicy`, from `learn_cascade`: the text itself and not a
        path, so that the option means the same wherever it is read. Empty for the
        untrained starting point: the first two groups in coverage order, the second for
        rows whose margin is below `tau`.
    tau : float
        Threshold of the untrained policy; a trained one brings its own.

    Raises
    ------
    InvalidValueError
        If the policy cannot be read.

    Privacy
    -------
    As for `SequentialAnswer`. A row that goes to an add-on tells its sites, and a
    coordinator that sees the rows, which labels the base may have given it: those that the
    policy sends there. Sites that have keys are found by key id alone; one without a key by
    its name, which is its own claim.

    References
    ----------
    .. [1] Chen, Zaharia, Zou, FrugalML, NeurIPS 2020, arXiv 2006.07512.

    Examples
    --------
    >>> from fedinfer_flower.profile import SiteProfile
    >>> sites = [
    ...     Candidate(site_id=k, profile=SiteProfile(name=f"s{k}", classes=("x", "y")))
    ...     for k in range(9)
    ... ]
    >>> found = Cascade().select(sites, SelectionNeed(classes=("x", "y")))
    >>> [len(group) for group in found.groups]
    [3, 3]
    """

    policy: str = ""
    tau: float = option(0.3, low=0.0, high=1.0)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.policy:
            CascadePolicy.from_json(self.policy)

    def learnt(self) -> CascadePolicy | None:
        """Return the policy, or None if there is none."""
        return CascadePolicy.from_json(self.policy) if self.policy else None

    def score(self, candidates: Sequence[Candidate], need: SelectionNeed) -> Array:
        """Return 1.0 for sites of the policy, more for its base; untrained, the coverage."""
        policy = self.learnt()
        if policy is None:
            return own_coverage(candidates, need.classes)
        worth = {
            name: 2.0 if number == policy.base else 1.0
            for number, group in enumerate(policy.groups)
            for name in group
        }
        return np.array([worth.get(c.key_id) or worth.get(c.profile.name, 0.0) for c in candidates])

    def select(self, candidates: Sequence[Candidate], need: SelectionNeed) -> Selection:
        """Return the base group, then the add-ons that fit the limits.

        All groups together keep to `at_most` and the budget. An add-on that does not fit, or
        whose sites are too few by now, is left out: its rows stay with the base's answer.

        Raises
        ------
        SelectionError
            If the base is not there whole, or has too few owners, or does not fit; if the
            policy is for other classes.
        """
        policy = self.learnt()
        if policy is None:
            return self._untrained(grouped(self, candidates, need))
        scores = self.score(candidates, need)
        if set(policy.classes) != set(need.classes):
            raise SelectionError(
                "the cascade policy was learnt for other classes", hint="learn it anew"
            )
        by_name = _by_name(candidates)
        groups = [policy.groups[policy.base]]
        groups += [policy.groups[n] for n in sorted(set(policy.addons_c) - {NOBODY})]
        kept: list[Candidate] = []
        chosen: list[tuple[SiteId, ...]] = []
        refused: dict[SiteId, str] = {}
        for number, group in enumerate(groups):
            sites = [by_name[name] for name in group if name in by_name]
            why = self._misfit(sites, group, kept, need, is_base=number == 0)
            if why and number == 0:
                raise SelectionError(f"the base group of the cascade {why}")
            if why:
                refused |= {site.site_id: f"cascade: the add-on group {why}" for site in sites}
                continue
            kept += sites
            chosen.append(tuple(site.site_id for site in sites))
        reasons = {
            site_id: "cascade: " + ("base group" if number == 0 else f"add-on group {number}")
            for number, ids in enumerate(chosen)
            for site_id in ids
        }
        return Selection(
            groups=tuple(chosen),
            reasons=reasons,
            scores={c.site_id: float(s) for c, s in zip(candidates, scores, strict=True)},
            refused=refused,
            expected_accuracy=policy.accuracy if policy.n_audits else None,
        )

    def route(
        self,
        selection: Selection,
        candidates: Sequence[Candidate],
        need: SelectionNeed,
        rule: EnsembleRule,  # noqa: ARG002
        *,
        class_totals: Array | None = None,  # noqa: ARG002
        counts_kind: CountsKind = CountsKind.COUNTS,  # noqa: ARG002
        slack: float = 1e-6,  # noqa: ARG002
    ) -> CascadeRoute:
        """Return the route of this selection; see `SequentialSelector.begin`."""
        policy = self.learnt()
        n_classes = len(need.classes)
        if policy is None:
            addon = 1 if len(selection.groups) > 1 else DONE
            return CascadeRoute(
                thresholds_c=np.full(n_classes, self.tau), addons_c=np.full(n_classes, addon)
            )
        # Gates may have refused some: the selection says who is asked.
        asked = set(selection.site_ids)
        by_name = _by_name([c for c in candidates if c.site_id in asked])
        place = {frozenset(ids): number for number, ids in enumerate(selection.groups)}
        there = [
            place.get(frozenset(by_name[s].site_id for s in group if s in by_name), DONE)
            for group in policy.groups
        ]
        addons = [DONE if addon == NOBODY else there[addon] for addon in policy.addons_c]
        at = [policy.classes.index(name) for name in need.classes]
        return CascadeRoute(
            thresholds_c=np.array(policy.thresholds_c)[at],
            addons_c=np.array(addons, dtype=np.int64)[at],
        )

    def shares(
        self,
        selection: Selection,
        candidates: Sequence[Candidate],
        need: SelectionNeed,
        rule: EnsembleRule,
        *,
        class_totals: Array | None,
        counts_kind: CountsKind,
    ) -> Array | None:
        """Return the groups' shares: most rows ask one group, and it must speak for all classes.

        A policy learnt with shares belongs to a rule that has them; see `learn_cascade`.
        """
        by_id = {candidate.site_id: candidate for candidate in candidates}
        groups = [[by_id[site_id] for site_id in group] for group in selection.groups]
        return group_shares(
            rule, groups, need.classes, class_totals=class_totals, counts_kind=counts_kind
        )

    def _untrained(self, whole: Selection) -> Selection:
        groups = whole.groups[:2]
        ids = [site_id for group in groups for site_id in group]
        return dataclasses.replace(
            whole, groups=groups, reasons={site_id: whole.reasons[site_id] for site_id in ids}
        )

    def _misfit(
        self,
        sites: list[Candidate],
        names: tuple[str, ...],
        kept: list[Candidate],
        need: SelectionNeed,
        *,
        is_base: bool,
    ) -> str:
        """Return why a group cannot be asked; empty if it can."""
        fewest = max(need.group_size, need.at_least) if is_base else need.group_size
        if is_base and len(sites) < len(names):
            return f"lacks {len(names) - len(sites)} of its {len(names)} sites"
        try:
            split_groups(sites, group_size=fewest, first_size=fewest)
        except SelectionError:
            return f"has fewer than {fewest} distinct owners"
        together = kept + sites
        if need.at_most is not None and len(together) > need.at_most:
            return f"does not fit at_most {need.at_most}"
        price = sum(need.cost(site) for site in together)
        if need.budget is not None and price > need.budget * (1 + 1e-12):
            return "does not fit the budget"
        return ""


def _by_name(candidates: Sequence[Candidate]) -> Mapping[str, Candidate]:
    """Return candidates by key id; those without a key by a name that no other has.

    A site that has a key is never found by a name that it gave itself: it could take the
    name, or even the key id, of another.
    """
    names = [candidate.key_id or candidate.profile.name for candidate in candidates]
    pairs = zip(names, candidates, strict=True)
    return {name: candidate for name, candidate in pairs if names.count(name) == 1}
