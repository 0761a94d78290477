"""Base of selectors whose groups of sites are asked one after the other; no selector itself."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from fedinfer_flower.ensemble.base import Array, EnsembleRule
from fedinfer_flower.profile import CountsKind
from fedinfer_flower.selection.base import Selection, SelectionNeed, Selector
from fedinfer_flower.selection.candidate import Candidate
from fedinfer_flower.selection.sequential import Route, SequentialAnswer

__all__ = ["SequentialSelector"]


@dataclass(frozen=True, kw_only=True)
class SequentialSelector(Selector):
    """Base of selectors whose groups are asked one after the other."""

    sequential: ClassVar[bool] = True

    @abstractmethod
    def route(
        self,
        selection: Selection,
        candidates: Sequence[Candidate],
        need: SelectionNeed,
        rule: EnsembleRule,
        *,
        class_totals: Array | None = None,
        counts_kind: CountsKind = CountsKind.COUNTS,
        slack: float = 1e-6,
    ) -> Route:
        """Return where rows go; see `begin` for the parameters."""

    def shares(
        self,
        selection: Selection,  # noqa: ARG002
        candidates: Sequence[Candidate],  # noqa: ARG002
        need: SelectionNeed,  # noqa: ARG002
        rule: EnsembleRule,  # noqa: ARG002
        *,
        class_totals: Array | None,  # noqa: ARG002
        counts_kind: CountsKind,  # noqa: ARG002
    ) -> Array | None:
        """Return ``shares_gc`` of `SequentialAnswer`, where totals are to be divided by them."""
        return None

    def begin(
        self,
        selection: Selection,
        candidates: Sequence[Candidate],
        need: SelectionNeed,
        rule: EnsembleRule,
        *,
        class_totals: Array | None = None,
        counts_kind: CountsKind = CountsKind.COUNTS,
        slack: float = 1e-6,
    ) -> SequentialAnswer:
        """Return the empty answer to ``need.n_queries`` rows.

        Parameters
        ----------
        selection : Selection
            As `select` returned it.
        candidates : sequence of Candidate
            The selected sites among them.
        need : SelectionNeed
        rule : EnsembleRule
            The one that is asked; never by the name "auto".
        class_totals : float array of shape (n_classes,), optional
            As told to the sites of *every* group: over all selected sites.
        counts_kind : CountsKind
            Of these totals.
        slack : float
            How far totals may be off in units of the score: the protection's rounding over
            all sites. Covers the width of ties (1e-9) as well.
        """
        return SequentialAnswer(
            rule,
            classes=need.classes,
            group_sizes=[len(group) for group in selection.groups],
            n_queries=need.n_queries,
            route=self.route(
                selection,
                candidates,
                need,
                rule,
                class_totals=class_totals,
                counts_kind=counts_kind,
                slack=slack,
            ),
            shares_gc=self.shares(
                selection,
                candidates,
                need,
                rule,
                class_totals=class_totals,
                counts_kind=counts_kind,
            ),
        )
