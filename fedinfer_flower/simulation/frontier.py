"""Accuracy against the number of sites asked, by selector, from each site's own scores.

Every site's model is trained here, as its site does, and scores every row once. The package's
own rule then adds up whichever sites a selector picks. Axes: K sites, B rows, T audits,
C classes.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

import numpy as np
import numpy.typing as npt

from fedinfer_flower.clients.site_model import SiteModel, prepare
from fedinfer_flower.ensemble.base import EnsembleRule, SiteContext
from fedinfer_flower.planning.label_space import class_totals
from fedinfer_flower.planning.question import question_template, with_batch
from fedinfer_flower.privacy.base import make_protection
from fedinfer_flower.query import CountsKind, SiteId
from fedinfer_flower.selection.base import SelectionNeed
from fedinfer_flower.selection.candidate import AuditTally, Candidate, SiteRecord
from fedinfer_flower.simulation.data import Dataset
from fedinfer_flower.simulation.institution import read_institution
from fedinfer_flower.wire.roster import Roster

__all__ = ["SiteScores", "site_scores"]

Array = npt.NDArray[np.float64]
IntArray = npt.NDArray[np.int64]


@dataclass(frozen=True, kw_only=True, eq=False)
class SiteScores:
    """What every site says to every row, and what it needs to turn that into a score.

    Parameters
    ----------
    rule : EnsembleRule
        Needs the sum of scores alone.
    classes : tuple of str
    candidates : tuple of Candidate
        Site ids are places, from 0; nothing is remembered of them yet.
    logits_kbc : float array of shape (n_sites, n_rows, n_classes)
        Calibrated.
    contexts : tuple of SiteContext
        Of all rows; class totals are filled in for each set of sites.
    labels_b : int array of shape (n_rows,)
    n_audits : int
        The first so many rows are audits: whoever learns is shown these, and accuracy is
        measured on the others.

    Privacy
    -------
    For simulation: nobody in a federation holds all of this.
    """

    rule: EnsembleRule
    classes: tuple[str, ...]
    candidates: tuple[Candidate, ...]
    logits_kbc: Array = field(repr=False)
    contexts: tuple[SiteContext, ...] = field(repr=False)
    labels_b: IntArray = field(repr=False)
    n_audits: int

    @property
    def labels(self) -> IntArray:
        """Labels of the rows on which accuracy is measured."""
        return self.labels_b[self.n_audits :]

    def need(self, **limits: object) -> SelectionNeed:
        """Return what is asked for: all rows that are no audits."""
        return SelectionNeed(
            classes=self.classes,
            n_queries=len(self.labels),
            rule=self.rule.name,
            **limits,  # type: ignore[arg-type]
        )

    def class_totals(self, among: Sequence[int]) -> tuple[Array | None, CountsKind]:
        """Return what the sites of a query are told of their classes."""
        return class_totals({k: self.candidates[k].profile for k in among}, self.classes)

    def totals(
        self, chosen: Sequence[int], *, among: Sequence[int] | None = None, audits: bool = False
    ) -> Array:
        """Return the rule's sum over sites, its weights normalised over `among`.

        Returns
        -------
        totals_bs : float array of shape (n_rows, score_width)
            Of the audits, or of the other rows.
        """
        known, kind = self.class_totals(chosen if among is None else among)
        rows = slice(0, self.n_audits) if audits else slice(self.n_audits, None)
        scores = []
        for k in chosen:
            own = self.candidates[k].profile
            context = _rows_of(self.contexts[k], rows)
            context = dataclasses.replace(
                context,
                class_totals=known,
                class_counts=None if known is None else own.aligned_counts(self.classes, kind),
            )
            scores.append(self.rule.score(self.logits_kbc[k, rows], context))
        return np.asarray(np.sum(scores, axis=0))

    def right(self, chosen: Sequence[int]) -> int:
        """Return how many rows a set of sites gets right that is asked at once."""
        prediction = self.rule.decide(self.totals(chosen), len(chosen), self.classes)
        return int((prediction.labels == self.labels).sum())

    def tally(self, site: int, rows: IntArray, *, epoch: int) -> AuditTally:
        """Return how often a site alone was right on some audits."""
        labels = self.labels_b[rows]
        hits = self.logits_kbc[site, rows].argmax(axis=1) == labels
        n = len(self.classes)
        right = np.bincount(labels[hits], minlength=n).astype(float)
        asked = np.bincount(labels, minlength=n).astype(float)
        return AuditTally(
            epoch=epoch,
            right=dict(zip(self.classes, right.tolist(), strict=True)),
            asked=dict(zip(self.classes, asked.tolist(), strict=True)),
        )

    def audited(self) -> tuple[Candidate, ...]:
        """Return the sites after one epoch in which all were asked all audits."""
        rows = np.arange(self.n_audits)
        return tuple(
            remembering(c, (self.tally(k, rows, epoch=1),)) for k, c in enumerate(self.candidates)
        )


def remembering(candidate: Candidate, tallies: tuple[AuditTally, ...]) -> Candidate:
    """Return a site with these audits on record, and no others."""
    return dataclasses.replace(candidate, record=SiteRecord(tallies=tallies))


def site_scores(
    folder: Path,
    dataset: Dataset,
    n_sites: int,
    *,
    rule: EnsembleRule,
    n_audits: int,
    price: float,
) -> SiteScores:
    """Train each institution's model here, and let each look at every test row.

    Parameters
    ----------
    folder : Path
        Of `write_institutions`.
    dataset : Dataset
        Its test rows are asked.
    n_sites : int
    rule : EnsembleRule
    n_audits : int
    price : float
        Credits a row that each site asks for.
    """
    models = [_model(folder, site, price=price) for site in range(n_sites)]
    profiles = {site: model.profile for site, model in enumerate(models)}
    template = question_template(
        inputs=dataset.test_inputs,
        rule=rule,
        protection=make_protection("plain"),
        profiles=profiles,
        classes=dataset.classes,
        public_key=b"",
        key_id="",
        roster=Roster(()),
    )
    asked = with_batch(template, "frontier", dataset.test_inputs)
    logits = [m.calibrated_logits(dataset.test_inputs, dataset.classes) for m in models]
    return SiteScores(
        rule=rule,
        classes=dataset.classes,
        candidates=tuple(
            Candidate(site_id=SiteId(site), profile=profile) for site, profile in profiles.items()
        ),
        logits_kbc=np.stack(logits),
        contexts=tuple(model.context(asked, rule) for model in models),
        labels_b=dataset.test_labels,
        n_audits=n_audits,
    )


def _model(folder: Path, site: int, *, price: float) -> SiteModel:
    local = dataclasses.replace(read_institution(folder, site).fit(), price_per_query=price)
    return prepare(local, name=f"site-{site}", share_counts=CountsKind.COUNTS)


_BY_ROW: Final = {"familiarity": 0, "augmented_tbc": 1}


def _rows_of(context: SiteContext, rows: slice) -> SiteContext:
    changed: dict[str, Array] = {}
    for name, axis in _BY_ROW.items():
        values: Array | None = getattr(context, name)
        if values is not None:
            changed[name] = values[rows] if axis == 0 else values[:, rows]
    return dataclasses.replace(context, **changed)  # type: ignore[arg-type]
