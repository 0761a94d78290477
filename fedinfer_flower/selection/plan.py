"""The plan of a query: who is to be asked and why, and what that will cost."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from fedinfer_flower.errors import InvalidValueError, SelectionError
from fedinfer_flower.query import SiteId
from fedinfer_flower.selection.accuracy import AccuracyEstimate, audited_accuracy
from fedinfer_flower.selection.base import SelectionNeed, Selector
from fedinfer_flower.selection.candidate import Candidate
from fedinfer_flower.selection.gates.base import Gate, apply_gates
from fedinfer_flower.selection.plan_text import plan_lines

__all__ = ["PlannedSite", "QueryPlan", "plan_query"]


@dataclass(frozen=True, kw_only=True)
class PlannedSite:
    """One site of a plan.

    Parameters
    ----------
    site_id : int
    name, owner : str
        As the site claims them, unless the owner is registered.
    group : int
        Number of the group in which it is asked, from 0.
    reason : str
    price : float
        Credits for all rows.
    """

    site_id: SiteId
    name: str
    owner: str
    group: int
    reason: str
    price: float


@dataclass(frozen=True, kw_only=True)
class QueryPlan:
    """Whom a query would be asked, why, and what that would cost. Nothing is asked yet.

    Parameters
    ----------
    selector, rule, protection : str
    n_queries : int
        Rows.
    sites : tuple of PlannedSite
        In the order of asking. With several groups, later ones may never be asked: then
        prices and bytes of the plan are those of asking all.
    refused : mapping of SiteId to str
        Sites that a gate left out, and why.
    passed_over : tuple of SiteId
        Sites that might have been asked, and were not chosen.
    names : mapping of SiteId to str
        Of every candidate.
    accuracy : AccuracyEstimate
    request_bytes, reply_bytes : int
        Payload to and from each site; Flower's framing is on top.
    epsilon_per_site : float, optional
        Charge at each site for all rows by basic composition; None without noise.

    Privacy
    -------
    Made by whoever selects, from profiles and its own records; no site learns of it. It
    names sites and owners, no question.
    """

    selector: str
    rule: str
    protection: str
    n_queries: int
    sites: tuple[PlannedSite, ...]
    refused: Mapping[SiteId, str]
    passed_over: tuple[SiteId, ...]
    names: Mapping[SiteId, str]
    accuracy: AccuracyEstimate
    request_bytes: int
    reply_bytes: int
    epsilon_per_site: float | None

    @property
    def groups(self) -> tuple[tuple[SiteId, ...], ...]:
        """Sites that are asked together, in the order of asking."""
        n_groups = 1 + max((site.group for site in self.sites), default=-1)
        return tuple(
            tuple(s.site_id for s in self.sites if s.group == group) for group in range(n_groups)
        )

    @property
    def site_ids(self) -> tuple[SiteId, ...]:
        """All sites that may be asked, in the order of asking."""
        return tuple(site.site_id for site in self.sites)

    @property
    def price(self) -> float:
        """Credits for all rows at all sites."""
        return sum(site.price for site in self.sites)

    @property
    def price_per_group(self) -> tuple[float, ...]:
        """Credits for all rows at the sites of each group."""
        return tuple(
            sum(s.price for s in self.sites if s.group == group)
            for group in range(len(self.groups))
        )

    @property
    def total_bytes(self) -> int:
        """Payload bytes to and from all sites."""
        return len(self.sites) * (self.request_bytes + self.reply_bytes)

    def summary(self) -> str:
        """Return the plan as a tree; long lists are cut."""
        return "\n".join(plan_lines(self))

    def to_dict(self) -> dict[str, Any]:
        """Return plain values for JSON, with the derived ones."""
        return {
            "selector": self.selector,
            "rule": self.rule,
            "protection": self.protection,
            "n_queries": self.n_queries,
            "groups": [list(group) for group in self.groups],
            "sites": [
                {name: getattr(site, name) for name in PlannedSite.__dataclass_fields__}
                for site in self.sites
            ],
            "refused": [
                {"site_id": site, "name": self.names[site], "reason": reason}
                for site, reason in self.refused.items()
            ],
            "passed_over": list(self.passed_over),
            "expected_accuracy": self.accuracy.value,
            "accuracy_basis": self.accuracy.basis,
            "price": self.price,
            "price_per_group": list(self.price_per_group),
            "request_bytes": self.request_bytes,
            "reply_bytes": self.reply_bytes,
            "total_bytes": self.total_bytes,
            "epsilon_per_site": self.epsilon_per_site,
        }


def plan_query(
    candidates: Sequence[Candidate],
    need: SelectionNeed,
    *,
    selector: Selector,
    gates: Sequence[Gate] = (),
    request_bytes: int = 0,
) -> QueryPlan:
    """Apply gates, select, and work out what the query would cost.

    Parameters
    ----------
    candidates : sequence of Candidate
    need : SelectionNeed
    selector : Selector
    gates : sequence of Gate
    request_bytes : int
        Payload to one site.

    Returns
    -------
    QueryPlan

    Raises
    ------
    InvalidValueError
        If two candidates have one site id.
    SelectionError
        If too few sites pass the gates or fit the limits, or a gate objects to a group that
        the selector made.

    Examples
    --------
    >>> from fedinfer_flower.profile import SiteProfile
    >>> from fedinfer_flower.selection.base import make_selector
    >>> sites = [
    ...     Candidate(
    ...         site_id=SiteId(n),
    ...         profile=SiteProfile(name=f"s{n}", classes=("x",), price_per_query=0.5),
    ...     )
    ...     for n in range(3)
    ... ]
    >>> need = SelectionNeed(classes=("x",), n_queries=10, at_most=2)
    >>> plan_query(sites, need, selector=make_selector("all"), request_bytes=640).price
    10.0
    """
    by_id = {candidate.site_id: candidate for candidate in candidates}
    if len(by_id) != len(candidates) or request_bytes < 0:
        raise InvalidValueError("candidates have distinct site ids, and request_bytes >= 0")
    kept, refused = apply_gates(gates, candidates, need)
    if len(kept) < need.at_least:
        raise SelectionError(
            f"{len(kept)} of {len(candidates)} sites pass the gates, {need.at_least} are needed"
            + _most_common(refused),
            hint="loosen a gate, or wait for more sites",
        )
    selection = selector.select(kept, need)
    for group in selection.groups:
        for gate in gates:
            objection = gate.objection([by_id[site] for site in group], need)
            if objection:
                raise SelectionError(
                    f"gate {gate.name!r} objects to sites that selector {selector.name!r} would"
                    f" ask together: {objection}",
                    hint="add gate 'owner-cap', or raise at_most",
                )
    chosen = [by_id[site] for site in selection.site_ids]
    if selection.expected_accuracy is None:
        accuracy = audited_accuracy(chosen, need.classes)
    else:
        accuracy = AccuracyEstimate(selection.expected_accuracy, f"selector {selector.name!r}")
    return QueryPlan(
        selector=selector.name,
        rule=need.rule,
        protection=need.protection,
        n_queries=need.n_queries,
        sites=tuple(
            PlannedSite(
                site_id=site,
                name=by_id[site].profile.name,
                owner=by_id[site].owner,
                group=number,
                reason=selection.reasons[site],
                price=need.cost(by_id[site]),
            )
            for number, group in enumerate(selection.groups)
            for site in group
        ),
        refused={**refused, **selection.refused},
        passed_over=tuple(
            c.site_id
            for c in kept
            if c.site_id not in selection.reasons and c.site_id not in selection.refused
        ),
        names={site: candidate.profile.name for site, candidate in by_id.items()},
        accuracy=accuracy,
        request_bytes=request_bytes,
        reply_bytes=need.reply_bytes,
        epsilon_per_site=(
            None if need.epsilon_per_query is None else need.epsilon_per_query * need.n_queries
        ),
    )


def _most_common(refused: Mapping[SiteId, str]) -> str:
    """Return the gate that refused most, for an error text."""
    gates = [reason.partition(":")[0] for reason in refused.values()]
    if not gates:
        return ""
    most = max(sorted(set(gates)), key=gates.count)
    example = next(r for r in refused.values() if r.partition(":")[0] == most)
    return f"; {gates.count(most)} were refused by gate {most!r}, as in {example!r}"
