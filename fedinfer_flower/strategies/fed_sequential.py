"""`FedSequential`: ask a group of sites, and further groups only about what is still open."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from flwr.serverapp import Grid

from fedinfer_flower.errors import ConfigError, InvalidValueError, ProtocolError, QueryError
from fedinfer_flower.planning.label_space import class_totals, shared_classes
from fedinfer_flower.planning.question import choose_rule
from fedinfer_flower.planning.rounding import require_exact, require_sets, rounding
from fedinfer_flower.query import Prediction, SiteId
from fedinfer_flower.selection.base import Selector, make_selector
from fedinfer_flower.selection.plan import QueryPlan
from fedinfer_flower.selection.sequential import SequentialAnswer
from fedinfer_flower.selection.sequential_selector import SequentialSelector
from fedinfer_flower.strategies.choosing import Choosing
from fedinfer_flower.strategies.fed_ensemble import FedEnsemble
from fedinfer_flower.strategies.opening import job_for, require_local
from fedinfer_flower.strategies.result import InferenceResult
from fedinfer_flower.wire.directory import SiteCard

__all__ = ["FedSequential", "SequentialResult"]

log = logging.getLogger("fedinfer_flower.coordinator")

Sets = Callable[[Prediction], npt.NDArray[np.bool_]]


@dataclass(frozen=True, kw_only=True, eq=False)
class SequentialResult:
    """What asking group after group came to.

    Parameters
    ----------
    prediction : Prediction
        One answer for each query.
    n_sites_asked : int array of shape (n_queries,)
        Sites that were asked about each query.
    plan : QueryPlan
        Groups in the order of asking, and why.
    groups : tuple of InferenceResult
        One for each group that was asked about anything; each opened its own sum.
    failed : tuple of tuple of SiteId
        Groups that gave no answer.
    """

    prediction: Prediction
    n_sites_asked: npt.NDArray[np.int64]
    plan: QueryPlan
    groups: tuple[InferenceResult, ...]
    failed: tuple[tuple[SiteId, ...], ...] = ()

    @property
    def seconds(self) -> float:
        """Seconds of all groups together, without onboarding."""
        return sum(result.seconds for result in self.groups)

    @property
    def degraded(self) -> bool:
        """Whether a site or a whole group that was asked is missing."""
        return bool(self.failed) or any(result.degraded for result in self.groups)

    def summary(self) -> str:
        """Return a tree of what happened."""
        sizes = ", ".join(str(len(group)) for group in self.plan.groups)
        share = float(self.n_sites_asked.mean()) / max(len(self.plan.site_ids), 1)
        return "\n".join(
            [
                f"SequentialResult: {len(self.prediction)} queries in {self.seconds:.2f} s",
                f"├── groups of {sizes} sites, {len(self.groups)} of them asked",
                f"├── sites a query: {float(self.n_sites_asked.mean()):.1f},"
                f" {share:.0%} of asking all",
                f"└── degraded: {'yes' if self.degraded else 'no'}",
            ]
        )


class FedSequential:
    """Ask sites in groups, and stop for each query as soon as its answer is clear.

    Parameters
    ----------
    selector : str or Selector
        A sequential one: "early-exit" or "cascade".
    sets : callable, optional
        From a Prediction to a bool array of shape (n_queries, n_classes): classes that are
        not ruled out, such as `ConformalPredictor.sets`. For ``stop="set"``, which asks one
        more group while more than one is left.
    **options
        As for `FedEnsemble`, but `fraction_query` and `evidence`. The deadline is that of one
        group, and its quorum too.

    Raises
    ------
    ConfigError
        If the selector asks everybody at once, the rule needs each site's own scores, or
        noise leaves nothing lossless.

    Privacy
    -------
    What `FedEnsemble` says of one query under the same protection holds for each group: its
    sum is opened by itself, so the anonymity set is the group and not all sites. Groups are
    disjoint, so no two sums differ by one site. Sites of later groups learn which queries
    were not clear to earlier ones.

    Examples
    --------
    >>> FedSequential(selector="early-exit", protection="secagg").summary().splitlines()[0]
    'FedSequential: selector early-exit'
    """

    def __init__(
        self,
        *,
        selector: str | Selector = "early-exit",
        sets: Sets | None = None,
        **options: Any,
    ) -> None:
        picked = make_selector(selector) if isinstance(selector, str) else selector
        if not isinstance(picked, SequentialSelector):
            raise ConfigError(
                f"selector {picked.name!r} asks everybody at once",
                hint="FedEnsemble(selector=...), or selector='early-exit' here",
            )
        for refused in ("fraction_query", "evidence"):
            if refused in options:
                raise InvalidValueError(f"{refused} is not an option of FedSequential")
        choosing = {
            name: options.pop(name, default)
            for name, default in (("gates", ()), ("history", None), ("budget", None))
        }
        at_most = options.pop("max_query_nodes", None)
        self.selector = picked
        self.ensemble = FedEnsemble(**options)
        require_exact(picked, self.ensemble.protection)
        require_local(self.ensemble)
        require_sets(picked, given=sets is not None)
        self.sets = sets
        self.ensemble.choosing = Choosing.from_options(
            selector=picked, at_most=at_most, fraction=1.0, **choosing
        )

    def start(self, grid: Grid, queries: npt.NDArray[np.generic]) -> SequentialResult:
        """Ask all queries.

        Parameters
        ----------
        queries : array of shape (n_queries, ...)
            Opened here after each group, so under `he` only with
            ``allow_coordinator_key=True``. A querier elsewhere asks in groups with
            `querier.SequentialQuerier`.

        Raises
        ------
        QueryError
            If no group answers.
        """
        ensemble = self.ensemble
        if not isinstance(queries, np.ndarray) or not len(queries):
            raise InvalidValueError("queries are a non-empty array of shape (n_queries, ...)")
        plan = ensemble.plan(grid, n_queries=len(queries))
        cards = ensemble.cohort
        profiles = {node_id: card.profile for node_id, card in cards.items()}
        classes = ensemble.classes or shared_classes(profiles)
        rule, _ = choose_rule(ensemble.rule, ensemble.protection, profiles, classes=classes)
        totals, kind = class_totals(profiles, classes)
        chosen = ensemble.chosen
        assert chosen is not None  # noqa: S101  there is a selector
        answer = self.selector.begin(
            chosen.selection,
            chosen.candidates,
            # Sites that were not chosen may know classes that nobody is asked about.
            dataclasses.replace(chosen.need, classes=classes),
            rule,
            class_totals=totals,
            counts_kind=kind,
            slack=rounding(ensemble.protection, rule, len(classes), len(cards)),
        )
        groups: list[InferenceResult] = []
        failed: list[tuple[SiteId, ...]] = []
        fixed = (ensemble.rule, ensemble.classes)
        try:
            # One rule and one label space for all groups, or their sums would not add up.
            ensemble.rule, ensemble.classes = rule, classes
            while (group := answer.group) is not None:
                members = plan.groups[group]
                try:
                    groups.append(self._ask(grid, queries, answer, members, cards))
                except (QueryError, ProtocolError) as exc:
                    log.warning("group %d gave no answer: %s", group, exc)
                    failed.append(members)
                    answer.skip(group)
        finally:
            ensemble.rule, ensemble.classes = fixed
        if not groups:
            raise QueryError(
                "no group of sites answered", hint="see the log for each group's error"
            )
        return SequentialResult(
            prediction=answer.decide(),
            n_sites_asked=answer.n_sites_asked,
            plan=plan,
            groups=tuple(groups),
            failed=tuple(failed),
        )

    def _ask(
        self,
        grid: Grid,
        queries: npt.NDArray[np.generic],
        answer: SequentialAnswer,
        members: tuple[SiteId, ...],
        cards: dict[int, SiteCard],
    ) -> InferenceResult:
        ensemble, rows = self.ensemble, answer.open_rows
        job, querier = job_for(queries[rows], ensemble)
        here = {int(n): cards[int(n)] for n in members}
        result = ensemble.ask_cohort(grid, job, querier, cards=here, all_cards=here, weighed=cards)
        assert querier is not None  # noqa: S101  an array is asked and opened here
        n_sites = min(batch.n_sites for batch in result.combined.batches)
        totals = querier.totals(result.combined)
        sets = None if self.sets is None else self.sets(answer.preview(totals, n_sites=n_sites))
        answer.add(answer.group, totals, rows, n_sites=n_sites, prediction_sets=sets)
        return result

    def summary(self) -> str:
        """Return a tree of the strategy's settings."""
        _, *rest = self.ensemble.summary().splitlines()
        return "\n".join([f"FedSequential: selector {self.selector.name}", *rest])
