"""What a selector is: it scores the sites that may be asked, and picks among them.

Axes: K candidates, C classes.

Gates come first (`selection.gates`): what may not be asked is no candidate any more. A
selector then has two methods, `score` and `select`, and most need to write only the first.
"""

from __future__ import annotations

import dataclasses
import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import ClassVar, Final

import numpy as np
import numpy.typing as npt

from fedinfer_flower.ensemble.options import Scalar, checked_options, require_known_options
from fedinfer_flower.errors import InvalidValueError, SelectionError
from fedinfer_flower.query import SiteId
from fedinfer_flower.registry import Registry
from fedinfer_flower.selection.candidate import Candidate
from fedinfer_flower.selection.lots import lots
from fedinfer_flower.selection.purse import Purse

__all__ = [
    "SELECTORS",
    "Selection",
    "SelectionNeed",
    "Selector",
    "SiteEvidence",
    "make_selector",
]

Array = npt.NDArray[np.float64]

_MOST_COST: Final = 1e300


class SiteEvidence(StrEnum):
    """What a selector needs to know of the sites beyond that they are there."""

    CLASS_COUNTS = "class-counts"
    AUDITS = "audits"
    MERITS = "merits"
    FAMILIARITY = "familiarity"


@dataclass(frozen=True, kw_only=True)
class SelectionNeed:
    """What is to be asked, and within which limits.

    Parameters
    ----------
    classes : tuple of str
        Label space of the answer.
    n_queries : int
        Rows.
    rule, protection : str
    at_least : int
        Fewest sites: the largest of quorum, protection's cohort and `min_query_nodes`.
    at_most : int, optional
        Most sites; None for no limit.
    budget : float, optional
        Most to pay for all rows together, in the unit of ``price_per_query``.
    latency_s : float, optional
        Seconds by which a site is expected to answer.
    epsilon_per_query : float, optional
        What one row costs a site under the protection.
    group_size : int
        Fewest sites in one released sum: the size of a group that is asked together.
    reply_bytes : int
        Of one site's reply to all rows.
    epoch : int
        Number of the present epoch.
    now_s : float
        Seconds since 1970.
    seed : int
        For selectors that draw lots.
    """

    classes: tuple[str, ...]
    n_queries: int = 1
    rule: str = "auto"
    protection: str = "plain"
    at_least: int = 1
    at_most: int | None = None
    budget: float | None = None
    latency_s: float | None = None
    epsilon_per_query: float | None = None
    group_size: int = 3
    reply_bytes: int = 0
    epoch: int = 0
    now_s: float = 0.0
    seed: int = 0

    def __post_init__(self) -> None:
        if self.n_queries < 1 or self.at_least < 1 or self.group_size < 1:
            raise InvalidValueError("n_queries, at_least and group_size are at least 1")
        if self.at_most is not None and self.at_most < self.at_least:
            raise InvalidValueError(
                f"at_most {self.at_most} is below at_least {self.at_least}",
                hint="the protection, the quorum or min_query_nodes needs that many sites",
            )
        for name in ("budget", "latency_s", "epsilon_per_query"):
            value = getattr(self, name)
            if value is not None and not (math.isfinite(value) and value >= 0.0):
                raise InvalidValueError(f"{name} is a number that is not negative")

    def cost(self, candidate: Candidate) -> float:
        """Return what one site asks for all rows."""
        # A site may quote anything: sums over sites stay finite.
        return min(candidate.price * self.n_queries, _MOST_COST)

    def room(self, n_candidates: int) -> int:
        """Return the most sites that may be asked."""
        return n_candidates if self.at_most is None else min(self.at_most, n_candidates)


@dataclass(frozen=True, kw_only=True)
class Selection:
    """Whom to ask, in which order, and why.

    Parameters
    ----------
    groups : tuple of tuple of SiteId
        Sites that are asked together, in the order of asking. One group unless the
        selector is sequential; later groups may never be asked.
    reasons : mapping of SiteId to str
        One for each selected site.
    scores : mapping of SiteId to float
        Of every candidate, selected or not.
    refused : mapping of SiteId to str
        Sites that a gate left out, and why.
    expected_accuracy : float, optional
        Where the selector has evidence for it.
    """

    groups: tuple[tuple[SiteId, ...], ...]
    reasons: Mapping[SiteId, str]
    scores: Mapping[SiteId, float] = field(default_factory=dict)
    refused: Mapping[SiteId, str] = field(default_factory=dict)
    expected_accuracy: float | None = None

    def __post_init__(self) -> None:
        chosen = self.site_ids
        if len(set(chosen)) != len(chosen) or set(chosen) != set(self.reasons):
            raise InvalidValueError("a selection names each site once, with a reason")

    @property
    def site_ids(self) -> tuple[SiteId, ...]:
        """All sites that may be asked, in the order of asking."""
        return tuple(site for group in self.groups for site in group)


@dataclass(frozen=True, kw_only=True)
class Selector(ABC):
    """Base of all selectors: a frozen dataclass whose fields are its options.

    A subclass writes `score`; `select` then takes the best within the limits. It may write
    `select` too, where the worth of a site depends on which others are chosen.

    Attributes
    ----------
    name : str
        Registered name.
    needs : frozenset of SiteEvidence
        What has to be known of the sites.
    sequential : bool
        Whether `select` returns groups that are asked one after the other.
    """

    name: ClassVar[str] = ""
    needs: ClassVar[frozenset[SiteEvidence]] = frozenset()
    sequential: ClassVar[bool] = False

    def __post_init__(self) -> None:
        for name, value in checked_options(f"selector {self.name!r}", self).items():
            object.__setattr__(self, name, value)

    def options(self) -> dict[str, Scalar]:
        """Return the options that make the same selector elsewhere; see `make_selector`."""
        return dataclasses.asdict(self)

    @abstractmethod
    def score(self, candidates: Sequence[Candidate], need: SelectionNeed) -> Array:
        """Return how much each site is worth asking, alone; larger is better.

        Returns
        -------
        scores_k : float array of shape (n_candidates,)
            Finite.
        """

    def select(self, candidates: Sequence[Candidate], need: SelectionNeed) -> Selection:
        """Pick the sites with the highest scores that fit the limits.

        Ties go by lot (`SelectionNeed.seed`), not by a site's place in the list.

        Raises
        ------
        SelectionError
            If fewer than ``need.at_least`` fit.
        """
        scores = self.score(candidates, need)
        order = np.lexsort((lots(candidates, need.seed), -scores))
        return self.within_limits(candidates, need, [int(k) for k in order], scores)

    def within_limits(
        self,
        candidates: Sequence[Candidate],
        need: SelectionNeed,
        order: Sequence[int],
        scores: Array,
        *,
        reasons: Mapping[int, str] | None = None,
        expected_accuracy: float | None = None,
    ) -> Selection:
        """Return a selection of the first candidates of an order that fit count and budget.

        A dear site is passed over where the money left would not buy the rest of
        ``need.at_least``.

        Parameters
        ----------
        order : sequence of int
            Places in `candidates`, the best first.
        reasons : mapping of int to str, optional
            By place; default names the selector and the score.

        Raises
        ------
        SelectionError
            If fewer than ``need.at_least`` fit.
        """
        purse = Purse(
            [need.cost(candidates[place]) for place in order],
            budget=need.budget,
            at_least=need.at_least,
            at_most=need.room(len(candidates)),
        )
        chosen: list[int] = []
        for rank, place in enumerate(order):
            if purse.fits(rank):
                purse.take(rank)
                chosen.append(place)
        if len(chosen) < need.at_least:
            raise SelectionError(
                f"selector {self.name!r} finds {len(chosen)} of {len(candidates)} sites within"
                f" the limits, {need.at_least} are needed",
                hint="raise the budget or at_most, or loosen a gate",
            )
        said = reasons or {}
        return Selection(
            groups=(tuple(candidates[k].site_id for k in chosen),),
            reasons={
                candidates[k].site_id: said.get(k, f"{self.name}: {scores[k]:.4g}") for k in chosen
            },
            scores={c.site_id: float(s) for c, s in zip(candidates, scores, strict=True)},
            expected_accuracy=expected_accuracy,
        )


SELECTORS: Registry[Selector] = Registry(
    kind="selector", package="fedinfer_flower.selection", group="fedinfer_flower.selectors"
)
"""All selectors by name."""


def make_selector(name: str, options: Mapping[str, object] | None = None) -> Selector:
    """Build a selector from its registered name and its options.

    Raises
    ------
    UnknownNameError
        If no selector has that name.
    InvalidValueError
        If an option does not exist, has the wrong type or lies outside its range.

    Examples
    --------
    >>> from fedinfer_flower.selection import make_selector
    >>> make_selector("all")
    AllSites()
    """
    cls = SELECTORS.get(name)
    given = dict(options or {})
    known = [f.name for f in dataclasses.fields(cls) if f.init]
    require_known_options(f"selector {name!r}", given, known)
    return cls(**given)
