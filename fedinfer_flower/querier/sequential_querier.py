"""`SequentialQuerier`: asks under seal, group after group, and opens each group's sum."""

from __future__ import annotations

import secrets
import time
from collections.abc import Callable, Sequence

import numpy as np
import numpy.typing as npt

from fedinfer_flower.ensemble.base import EnsembleRule, make_rule
from fedinfer_flower.errors import BindingError, ConfigError, InvalidValueError
from fedinfer_flower.planning.label_space import class_totals, shared_classes
from fedinfer_flower.planning.question import choose_rule
from fedinfer_flower.planning.rounding import require_exact, require_sets, rounding
from fedinfer_flower.querier.querier import Querier
from fedinfer_flower.query import Prediction, SiteId
from fedinfer_flower.selection.base import Selection, SelectionNeed, Selector, make_selector
from fedinfer_flower.selection.history import SiteHistory
from fedinfer_flower.selection.sequential_selector import SequentialSelector
from fedinfer_flower.wire.directory import Directory
from fedinfer_flower.wire.documents import CombinedAnswer
from fedinfer_flower.wire.sealed_job import SealedJob

__all__ = ["SequentialQuerier"]


class SequentialQuerier:
    """A querier elsewhere that asks further sites only about what is still open.

    Take `next_job`, have the coordinator run it, give the answer to `add`, and repeat until
    `next_job` returns None.

    Parameters
    ----------
    querier : Querier
    directory : Directory
        Every site that may be asked; all stay in one run.
    inputs : array of shape (n_queries, ...)
    selector : str or Selector
        A sequential one.
    rule : str or EnsembleRule
    classes : sequence of str, optional
    history : SiteHistory, optional
        Registered owners are read from it: sites of one owner never share a group.
    sets : callable, optional
        Prediction sets for ``stop="set"``; see `FedSequential`.

    Raises
    ------
    ConfigError
        If the selector asks everybody at once.

    Privacy
    -------
    As `FedSequential`, but under seal: the coordinator sees which groups are asked, and how
    many rows, never the rows. The querier opens the sum of each group.
    """

    def __init__(
        self,
        querier: Querier,
        *,
        directory: Directory,
        inputs: npt.ArrayLike,
        selector: str | Selector = "early-exit",
        rule: str | EnsembleRule = "auto",
        classes: Sequence[str] | None = None,
        history: SiteHistory | None = None,
        sets: Callable[[Prediction], npt.NDArray[np.bool_]] | None = None,
    ) -> None:
        picked = make_selector(selector) if isinstance(selector, str) else selector
        if not isinstance(picked, SequentialSelector):
            raise ConfigError(
                f"selector {picked.name!r} asks everybody at once",
                hint="ask all sites of directory.only(...) at once, or selector='early-exit'",
            )
        require_exact(picked, querier.protection)
        require_sets(picked, given=sets is not None)
        self._sets = sets
        self._querier, self._directory = querier, directory
        self._inputs = np.asarray(inputs)
        profiles = {n: card.profile for n, card in enumerate(directory.cards)}
        self._classes = shared_classes(profiles) if classes is None else tuple(classes)
        named = make_rule(rule) if isinstance(rule, str) and rule != "auto" else rule
        self._rule, _ = choose_rule(
            None if isinstance(named, str) else named,
            querier.protection,
            profiles,
            classes=self._classes,
        )
        candidates = (SiteHistory() if history is None else history).candidates(
            {SiteId(n): card for n, card in enumerate(directory.cards)}
        )
        need = SelectionNeed(
            classes=self._classes,
            n_queries=len(self._inputs),
            rule=self._rule.name,
            protection=querier.protection.name,
            at_least=querier.protection.min_cohort,
            group_size=max(3, querier.protection.min_cohort),
            now_s=time.time(),
            # Sites must not be able to foresee lots.
            seed=secrets.randbits(63),
        )
        self.selection: Selection = picked.select(candidates, need)
        totals, kind = class_totals(profiles, self._classes)
        self._answer = picked.begin(
            self.selection,
            candidates,
            need,
            self._rule,
            class_totals=totals,
            counts_kind=kind,
            slack=rounding(
                querier.protection, self._rule, len(self._classes), len(directory.cards)
            ),
        )
        self._asked: SealedJob | None = None

    @property
    def n_sites_asked(self) -> npt.NDArray[np.int64]:
        """Sites that were asked about each query so far, shape (n_queries,)."""
        return self._answer.n_sites_asked

    def next_job(self) -> SealedJob | None:
        """Return the job for the next group, about the rows still open; None at the end."""
        group = self._answer.group
        if group is None:
            return None
        if self._asked is not None:
            raise InvalidValueError(
                "the last job waits for its answer: the same rows again would be a second sum",
                hint="give its answer to add(), or call skip()",
            )
        members = self.selection.groups[group]
        # By place and not by name: a name is a site's own claim.
        cards = tuple(self._directory.cards[int(n)] for n in sorted(members))
        self._asked = self._querier.ask(
            self._inputs[self._answer.open_rows],
            directory=Directory(run_id=self._directory.run_id, cards=cards),
            weighed=self._directory,
            rule=self._rule,
            classes=self._classes,
        )
        return self._asked

    def add(self, combined: CombinedAnswer) -> None:
        """Take in the combined answer to the last job.

        Raises
        ------
        BindingError
            If it answers another job.
        ProtocolError
            If it does not open.
        """
        if self._asked is None or combined.job_id != self._asked.job_id:
            raise BindingError("the combined answer is not to the job that was asked last")
        totals = self._querier.totals(combined)
        n_sites = min(batch.n_sites for batch in combined.batches)
        shown = None if self._sets is None else self._answer.preview(totals, n_sites=n_sites)
        self._answer.add(
            self._answer.group,
            totals,
            self._answer.open_rows,
            n_sites=n_sites,
            prediction_sets=None if self._sets is None or shown is None else self._sets(shown),
        )
        self._asked = None

    def skip(self) -> None:
        """Go on without the group that was asked last: it did not answer."""
        if self._asked is None:
            raise InvalidValueError("no job is waiting for an answer")
        self._answer.skip(self._answer.group)
        self._asked = None

    def decide(self) -> Prediction:
        """Return one answer for each query, from what has come so far."""
        return self._answer.decide()
