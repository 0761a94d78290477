"""Competence: the sites that were right most often when it could be checked.

Axes: K candidates, C classes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from fedinfer_flower.ensemble.options import option
from fedinfer_flower.errors import InvalidValueError
from fedinfer_flower.selection.base import (
    SELECTORS,
    Array,
    SelectionNeed,
    Selector,
    SiteEvidence,
)
from fedinfer_flower.selection.candidate import Candidate

__all__ = ["Competence"]


@SELECTORS.register("competence")
@dataclass(frozen=True, kw_only=True)
class Competence(Selector):
    """Take the sites with the highest audited accuracy, shrunk towards one half.

    ``score_k = sum_c v_c (right_kc + prior) / (asked_kc + 2 prior)`` over the classes that
    the site's model knows. Each site is judged alone: several that know the same classes
    are taken together, so prefer `coverage-greedy` where sites specialise.

    Where no candidate has audit tallies, because the protection shows no single answer,
    the mean contribution score of settled epochs takes their place, shrunk towards 0. Where
    some have tallies, those without stand at the prior: the two scales do not compare.

    What a site says of its own accuracy is never used: a model of one class is always right
    about it.

    Parameters
    ----------
    prior : float
        Pseudo-counts of right and of wrong answers, for each class.
    weighting : str
        ``uniform``: every class counts the same. ``asked``: as often as it was audited, over
        all candidates, which is the accuracy on queries like the audits.
    window : int
        Latest epochs to look at; 0 for all.

    Privacy
    -------
    Needs the tallies of audit queries, or settled scores. Both are the coordinator's (or
    the querier's) own; no site is asked for anything.

    Examples
    --------
    >>> from fedinfer_flower.profile import SiteProfile
    >>> from fedinfer_flower.query import SiteId
    >>> from fedinfer_flower.selection.candidate import AuditTally, SiteRecord
    >>> def site(number, right):
    ...     tally = AuditTally(epoch=1, right={"x": right}, asked={"x": 8.0})
    ...     profile = SiteProfile(name=f"s{number}", classes=("x",))
    ...     record = SiteRecord(tallies=(tally,))
    ...     return Candidate(site_id=SiteId(number), profile=profile, record=record)
    >>> Competence().score([site(1, 3.0), site(2, 7.0)], SelectionNeed(classes=("x",)))
    array([0.4, 0.8])
    """

    prior: float = option(1.0, low=1e-3, high=1e6)
    weighting: str = "uniform"
    window: int = option(0, low=0, high=1_000_000)

    needs = frozenset({SiteEvidence.AUDITS})

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.weighting not in ("uniform", "asked"):
            raise InvalidValueError(
                f"weighting {self.weighting[:32]!r} of selector 'competence' is unknown",
                hint="'uniform' or 'asked'",
            )

    def score(self, candidates: Sequence[Candidate], need: SelectionNeed) -> Array:
        """Return audited accuracy in [0, 1], or contribution a query where there is none."""
        since = need.epoch - self.window + 1 if self.window else 0
        asked_kc = np.array(
            [c.record.audits(need.classes, since_epoch=since)[1] for c in candidates], dtype=float
        ).reshape(len(candidates), len(need.classes))
        if not asked_kc.any():
            return self._merits(candidates, since)
        weights_c = np.ones(len(need.classes))
        if self.weighting == "asked":
            weights_c = asked_kc.sum(axis=0)
        competence_kc = np.array(
            [c.competence(need.classes, prior=self.prior, since_epoch=since) for c in candidates]
        )
        return np.asarray(competence_kc @ (weights_c / weights_c.sum()))

    def _merits(self, candidates: Sequence[Candidate], since: int) -> Array:
        means = []
        for candidate in candidates:
            merits = [value for epoch, value in candidate.record.merits if epoch >= since]
            means.append(sum(merits) / (len(merits) + 2.0 * self.prior))
        return np.array(means, dtype=float)
