"""How a strategy chooses whom to ask: gates, then a selector, within the limits."""

from __future__ import annotations

import math
import secrets
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from fedinfer_flower.ensemble.base import EnsembleRule, make_rule
from fedinfer_flower.errors import ConfigError, FedInferError, InvalidValueError, SelectionError
from fedinfer_flower.planning.label_space import shared_classes
from fedinfer_flower.privacy.base import Protection, ScorePlan
from fedinfer_flower.query import SiteId
from fedinfer_flower.selection.base import Selection, SelectionNeed, Selector, make_selector
from fedinfer_flower.selection.candidate import Candidate
from fedinfer_flower.selection.gates import Gate, make_gate
from fedinfer_flower.selection.history import SiteHistory
from fedinfer_flower.selection.plan import QueryPlan, plan_query
from fedinfer_flower.strategies.cohort import choose_cohort
from fedinfer_flower.wire.directory import SiteCard

__all__ = ["Choosing", "Chosen", "check_numbers"]


@dataclass(frozen=True, kw_only=True, eq=False)
class Chosen:
    """A plan, with what it was made of.

    Parameters
    ----------
    plan : QueryPlan
    need : SelectionNeed
    candidates : tuple of Candidate
    """

    plan: QueryPlan
    need: SelectionNeed
    candidates: tuple[Candidate, ...]

    @property
    def selection(self) -> Selection:
        """Groups and reasons alone."""
        reasons = {site.site_id: site.reason for site in self.plan.sites}
        return Selection(groups=self.plan.groups, reasons=reasons)


@dataclass(frozen=True, kw_only=True, eq=False)
class Choosing:
    """Which of the onboarded sites are asked.

    Parameters
    ----------
    selector : Selector, optional
        None for a random part, `fraction`, of them.
    gates : tuple of Gate
    history : SiteHistory, optional
    budget : float, optional
        Most credits for all queries of a job.
    at_most : int, optional
    fraction : float
        Without a selector.
    """

    selector: Selector | None = None
    gates: tuple[Gate, ...] = ()
    history: SiteHistory | None = None
    budget: float | None = None
    at_most: int | None = None
    fraction: float = 1.0

    @classmethod
    def from_options(
        cls,
        *,
        selector: str | Selector | None,
        gates: Sequence[str | Gate],
        history: SiteHistory | None,
        budget: float | None,
        at_most: int | None,
        fraction: float,
        at_least: int = 1,
    ) -> Choosing:
        """Build from what `FedEnsemble` is given.

        Raises
        ------
        ConfigError
            If a part at random is asked of a selector, or a limit has nothing to act on.
        """
        if isinstance(gates, str):
            raise InvalidValueError("gates is a collection", hint="write ('quorum',), not 'quorum'")
        if isinstance(selector, str):
            selector = make_selector(selector)
        if not isinstance(selector, Selector | None) or not all(
            isinstance(gate, str | Gate) for gate in gates
        ):
            raise InvalidValueError("selector and gates are names, or objects of their kinds")
        if not isinstance(history, SiteHistory | None):
            raise InvalidValueError(
                "history is a SiteHistory", hint="SiteHistory.load(path, missing_ok=True)"
            )
        if budget is not None and not (_is_number(budget) and 0.0 <= budget < math.inf):
            raise InvalidValueError("budget is a number of credits that is not negative")
        if at_most is not None and not (type(at_most) is int and at_most >= at_least):
            raise InvalidValueError(
                f"max_query_nodes is a whole number, at least {at_least} here",
                hint="the protection, the quorum or min_query_nodes needs that many sites",
            )
        if selector is None and (gates or budget is not None or at_most is not None):
            selector = make_selector("all")
        if selector is not None and fraction < 1.0:
            raise ConfigError(
                "fraction_query is a random part of the sites; a selector picks them otherwise",
                hint="max_query_nodes=..., or selector='random'",
            )
        return cls(
            selector=selector,
            gates=tuple(make_gate(g) if isinstance(g, str) else g for g in gates),
            history=history,
            budget=budget,
            at_most=at_most,
            fraction=fraction,
        )

    def plan(
        self,
        cards: Mapping[int, SiteCard],
        *,
        rule: EnsembleRule | None,
        protection: Protection,
        classes: tuple[str, ...] | None,
        n_queries: int,
        at_least: int,
        timeout_s: float,
        quorum: int = 1,
        seed: int | None = None,
        request_bytes: int = 0,
    ) -> Chosen:
        """Return whom a selector would ask, why, and at what cost; nobody is asked.

        Raises
        ------
        SelectionError
            If fewer than `at_least` sites are left.
        """
        selector = self.selector or make_selector("all")
        profiles = {node_id: card.profile for node_id, card in cards.items()}
        space = classes or shared_classes(profiles)
        scores = ScorePlan.for_rule(
            rule or make_rule("mean-probability"), n_classes=len(space), n_sites_max=len(cards)
        )
        spent = protection.epsilon_delta(scores)
        # An empty history is falsy.
        history = SiteHistory() if self.history is None else self.history
        need = SelectionNeed(
            classes=space,
            n_queries=n_queries,
            rule="auto" if rule is None else rule.name,
            protection=protection.name,
            at_least=at_least,
            at_most=self.at_most,
            budget=self.budget,
            latency_s=timeout_s,
            epsilon_per_query=None if spent is None else spent[0],
            group_size=max(3, protection.min_cohort, quorum),
            reply_bytes=protection.payload_bytes(scores, n_queries),
            epoch=history.next_epoch,
            now_s=time.time(),
            # Sites must not be able to foresee lots.
            seed=secrets.randbits(63) if seed is None else seed,
        )
        candidates = history.candidates({SiteId(n): card for n, card in cards.items()})
        plan = plan_query(
            candidates, need, selector=selector, gates=self.gates, request_bytes=request_bytes
        )
        return Chosen(plan=plan, need=need, candidates=candidates)

    def choose(
        self,
        cards: Mapping[int, SiteCard],
        failures: Mapping[int, FedInferError],
        *,
        at_least: int,
        seed: int | None = None,
        **facts: Any,
    ) -> tuple[dict[int, SiteCard], Chosen | None]:
        """Return (the sites to ask, the plan behind it).

        `facts` are the arguments of `plan`. Once a run and not once a batch: see
        `choose_cohort`.

        Raises
        ------
        QuorumNotMetError, SelectionError
            If too few sites are there, or left.
        """
        fraction = self.fraction if self.selector is None else 1.0
        every = choose_cohort(cards, failures, fraction=fraction, at_least=at_least, seed=seed)
        if self.selector is None:
            return every, None
        chosen = self.plan(every, at_least=at_least, seed=seed, **facts)
        # In the order of node ids, as without a selector.
        return {n: every[n] for n in sorted(int(s) for s in chosen.plan.site_ids)}, chosen

    def require_affordable(self, cards: Mapping[int, SiteCard], n_queries: int) -> None:
        """Refuse a job that costs more than the budget.

        Raises
        ------
        SelectionError
        """
        price = n_queries * sum(card.profile.price_per_query for card in cards.values())
        if self.budget is not None and price > self.budget * (1.0 + 1e-9):
            raise SelectionError(
                f"{n_queries} queries cost {price:.6g} credits at {len(cards)} sites, the budget"
                f" is {self.budget:.6g}",
                hint="directory(grid, n_queries=...) and plan(grid, n_queries=...) with the"
                " number of rows that will be asked",
            )

    def require_together(self, node_ids: Iterable[int], chosen: Chosen | None) -> None:
        """Ask the gates again about the very sites whose sum is to be opened.

        Fewer sites than were chosen: those that answered, or one group of them.

        Raises
        ------
        SelectionError
            If a gate objects.
        """
        if chosen is None:
            return
        asked = set(node_ids)
        group = [c for c in chosen.candidates if int(c.site_id) in asked]
        for gate in self.gates:
            if objection := gate.objection(group, chosen.need):
                raise SelectionError(
                    f"gate {gate.name!r} objects to opening the sum of {len(group)} sites:"
                    f" {objection}",
                    hint="wait for the sites that dropped out, or ask larger groups",
                )

    def remember(self, cards: Mapping[int, SiteCard], seconds: Mapping[int, float]) -> None:
        """Add the latencies of sites that answered to the history, if one is kept."""
        if self.history is None:
            return
        now_s = time.time()
        for node_id, waited_s in seconds.items():
            if node_id in cards:
                self.history.record_answer(cards[node_id].key_id, waited_s, now_s)

    def summary(self) -> str:
        """Return the choice in a few words."""
        if self.selector is None:
            return f"fraction {self.fraction:g}"
        limits = [] if self.at_most is None else [f"at most {self.at_most}"]
        limits += [] if self.budget is None else [f"budget {self.budget:g} credits"]
        limits += [f"gate {gate.name}" for gate in self.gates]
        return ", ".join([f"selector {self.selector.name}", *limits])


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def check_numbers(
    *,
    fraction_query: float,
    min_query_nodes: int,
    min_available_nodes: int,
    batch_size: int,
    patience_s: float,
    classes: Sequence[str] | None,
) -> None:
    """Refuse numbers of a strategy that are out of range.

    Raises
    ------
    InvalidValueError
    """
    if not all(type(n) is int for n in (min_query_nodes, min_available_nodes, batch_size)):
        raise InvalidValueError(
            "min_query_nodes, min_available_nodes and batch_size are whole numbers"
        )
    # Compared with NaN, no wait would ever end.
    if not (_is_number(patience_s) and 0.0 <= patience_s < math.inf):
        raise InvalidValueError("patience_s is a number of seconds that is not negative")
    if isinstance(classes, str):
        raise InvalidValueError("classes is a collection", hint="write ('cat',), not 'cat'")
    if not 0.0 < fraction_query <= 1.0:
        raise InvalidValueError(f"fraction_query is in (0, 1], got {fraction_query}")
    if min(min_query_nodes, batch_size) < 1 or min_available_nodes < 0:
        raise InvalidValueError(
            "min_query_nodes and batch_size are at least 1, min_available_nodes at least 0"
        )
    if classes is not None and (not classes or len(set(classes)) != len(classes)):
        raise InvalidValueError("classes are at least one, and none twice")
