"""`FedGroupMedian`: secure sums of random groups, and the median of their means."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Final

import numpy as np
import numpy.typing as npt
from flwr.serverapp import Grid

from fedinfer_flower.ensemble.base import Array, Disclosure
from fedinfer_flower.ensemble.group_median import MIN_GROUPS, draw_groups, group_median, withstands
from fedinfer_flower.ensemble.mean_probability import MeanProbability
from fedinfer_flower.ensemble.skew_check import require_low_skew
from fedinfer_flower.errors import (
    InvalidValueError,
    ProtocolError,
    QueryError,
    QuorumNotMetError,
    SelectionError,
)
from fedinfer_flower.planning.label_space import shared_classes
from fedinfer_flower.query import Prediction
from fedinfer_flower.strategies.fed_ensemble import FedEnsemble
from fedinfer_flower.strategies.opening import job_for, require_local, secret_is_here
from fedinfer_flower.strategies.result import InferenceResult
from fedinfer_flower.wire.directory import SiteCard

__all__ = ["FedGroupMedian", "GroupMedianResult"]

_MAX_DEALS: Final = 100

log = logging.getLogger("fedinfer_flower.coordinator")


@dataclass(frozen=True, kw_only=True, eq=False)
class GroupMedianResult:
    """The median of the groups' answers, and each group's run.

    Parameters
    ----------
    prediction : Prediction
        Its margin is the distance of the two highest medians.
    groups : tuple of tuple of int
        Node ids of each group that answered.
    results : tuple of InferenceResult
        One a group, each with the group's own joint answer.
    agreement : float array of shape (n_queries,)
        Share of groups whose own label is the median's.
    missing : tuple of str
        Codes of the errors of groups that did not answer.
    warning : str
        What the skew check said; empty if nothing.
    """

    prediction: Prediction
    groups: tuple[tuple[int, ...], ...]
    results: tuple[InferenceResult, ...]
    agreement: Array = field(repr=False)
    missing: tuple[str, ...] = ()
    warning: str = ""

    @property
    def withstands(self) -> int:
        """Groups that could be wholly hostile."""
        return withstands(len(self.groups))

    def summary(self) -> str:
        """Return a tree of what happened."""
        sizes = ", ".join(str(len(group)) for group in self.groups)
        lines = [
            f"GroupMedianResult: {len(self.prediction)} queries, {len(self.groups)} groups"
            f" ({sizes} sites)",
            f"├── withstands {self.withstands} hostile groups, {len(self.missing)} missing",
            *([f"├── {self.warning}"] if self.warning else []),
            f"└── mean agreement of groups: {self.agreement.mean():.2f}",
        ]
        return "\n".join(lines)


class FedGroupMedian:
    """Ask disjoint random groups, each as a secure sum, and take the median of their means.

    Use against a minority of hostile sites where the sites' data are alike and nobody may
    see a single answer. Prefer `dawid-skene` where single votes may be seen, and
    `class-share` where sites know different classes: there this is refused.

    Parameters
    ----------
    n_groups : int
        At least 3; odd is best. With G groups fewer than half may hold hostile sites.
    group_seed : int, optional
        For simulation; default a secret draw in each `start`.
    allow_skew : bool
        Go on although the sites know different classes.
    **options
        Of the `FedEnsemble` of each group; `rule` is mean-probability, `protection` secagg
        if not given.

    Raises
    ------
    InvalidValueError
        When built, if there are too few groups or the rule needs single answers.

    Privacy
    -------
    As the protection, for each group: under `secagg` coordinator and querier, who are one
    here, see the sum of each *group* and not only of all sites. An answer hides among the
    members of its group, at least the protection's smallest cohort. Groups are disjoint and
    drawn once a job; sites that keep a home refuse a row in another group.

    Notes
    -----
    Of hostile sites in f groups, ``f < n_groups / 2``, no entry of the median goes beyond the
    honest groups' entries, whatever they send within the rule's bound. f sites are in at most
    f groups. Beyond that it can be worse than the mean over all: of 15 sites in groups of
    three, 3 hostile ones left 62 of 100 digits right, and 78 under the mean. Coordinator and
    querier are trusted to draw and to count.

    Examples
    --------
    >>> FedGroupMedian(n_groups=5, protection="secagg").n_groups
    5
    """

    def __init__(
        self,
        *,
        n_groups: int = MIN_GROUPS,
        group_seed: int | None = None,
        allow_skew: bool = False,
        **options: Any,
    ) -> None:
        if type(n_groups) is not int or n_groups < MIN_GROUPS:
            raise InvalidValueError(f"n_groups is at least {MIN_GROUPS}, got {n_groups!r}")
        if not isinstance(group_seed, int | None):
            raise InvalidValueError("group_seed is a whole number")
        self._options = {"rule": "mean-probability", "protection": "secagg", **options}
        whole = FedEnsemble(**self._options)
        if whole.rule is None or whole.rule.discloses is not Disclosure.SUM:
            raise InvalidValueError(
                "the groups' rule is named, and needs a sum only", hint="rule='mean-probability'"
            )
        if whole.fraction_query < 1.0:
            raise InvalidValueError("all sites are dealt into groups: fraction_query is 1")
        require_local(whole)
        self._whole = whole
        self.n_groups, self.group_seed, self.allow_skew = n_groups, group_seed, allow_skew

    def start(self, grid: Grid, queries: npt.NDArray[np.generic]) -> GroupMedianResult:
        """Ask all groups, one after the other, and return the median.

        Parameters
        ----------
        grid : Grid
        queries : array of shape (n_queries, ...)

        Raises
        ------
        IncompatibleProtection
            If the sites know different classes, unless `allow_skew`.
        InvalidValueError
            If there are too few sites for the groups.
        QuorumNotMetError
            If fewer than three groups answer.
        """
        if not isinstance(queries, np.ndarray) or not len(queries):
            raise InvalidValueError("queries are a non-empty array of shape (n_queries, ...)")
        whole = self._whole
        whole.configure_onboarding(grid, int(grid.run.run_id), n_queries=len(queries))
        cards = whole.cohort
        profiles = {node_id: card.profile for node_id, card in cards.items()}
        asked_for = whole.classes
        whole.classes = classes = asked_for or shared_classes(profiles)
        try:
            return self._median(grid, queries, cards, classes)
        finally:
            whole.classes = asked_for

    def _median(
        self,
        grid: Grid,
        queries: npt.NDArray[np.generic],
        cards: dict[int, SiteCard],
        classes: tuple[str, ...],
    ) -> GroupMedianResult:
        profiles = [card.profile for card in cards.values()]
        warning = require_low_skew("group-median", profiles, classes, allow_skew=self.allow_skew)
        if warning:
            log.warning("%s", warning)
        least = max(self._whole.protection.min_cohort, self._whole.deadline.quorum)
        dealt = self._deal(sorted(cards), least)
        asked: list[tuple[tuple[int, ...], InferenceResult]] = []
        missing: list[str] = []
        for group in dealt:
            try:
                asked.append((group, self._ask(grid, queries, group, cards)))
            except (
                QueryError,
                ProtocolError,
            ) as exc:  # a group that fails is one less, not the end
                log.warning("%s", exc)
                missing.append(exc.code)
        if len(asked) < MIN_GROUPS:
            raise QuorumNotMetError(
                f"{len(asked)} of {len(dealt)} groups answered, {MIN_GROUPS} are needed"
                f" ({', '.join(missing)})",
                hint="raise deadline.timeout_s, or mend the sites that failed",
            )
        return _combined(asked, classes, missing=tuple(missing), warning=warning)

    def _deal(self, nodes: list[int], least: int) -> tuple[tuple[int, ...], ...]:
        """Deal until no gate objects to a group: each one's sum is opened by itself."""
        whole, refused = self._whole, None
        for attempt in range(_MAX_DEALS):
            seed = None if self.group_seed is None else self.group_seed + attempt
            dealt = draw_groups(nodes, n_groups=self.n_groups, least=least, seed=seed)
            try:
                for group in dealt:
                    whole.choosing.require_together(group, whole.chosen)
            except SelectionError as exc:
                refused = exc
                continue
            return dealt
        assert refused is not None  # noqa: S101  there is at least one attempt
        raise refused

    def _ask(
        self,
        grid: Grid,
        queries: npt.NDArray[np.generic],
        group: tuple[int, ...],
        cards: dict[int, SiteCard],
    ) -> InferenceResult:
        whole = self._whole
        job, querier = job_for(queries, whole)
        secret_is_here(job, whole.protection, querier, allowed=whole.allow_coordinator_key)
        here = {node_id: cards[node_id] for node_id in group}
        return whole.ask_cohort(grid, job, querier, cards=here, all_cards=here, weighed=cards)


def _combined(
    asked: list[tuple[tuple[int, ...], InferenceResult]],
    classes: tuple[str, ...],
    *,
    missing: tuple[str, ...],
    warning: str,
) -> GroupMedianResult:
    opened: Mapping[tuple[int, ...], Prediction] = {
        group: result.prediction for group, result in asked if result.prediction is not None
    }
    means = np.stack([prediction.probabilities for prediction in opened.values()])
    prediction = MeanProbability().decide(group_median(means), 1, classes)
    labels = np.stack([p.labels for p in opened.values()])
    return GroupMedianResult(
        prediction=prediction,
        groups=tuple(opened),
        results=tuple(result for _, result in asked),
        agreement=np.asarray((labels == prediction.labels).mean(axis=0)),
        missing=missing,
        warning=warning,
    )
