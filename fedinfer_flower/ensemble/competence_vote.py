"""Competence vote: what each site's vote says, given how it errs."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from fedinfer_flower.ensemble.base import (
    RULES,
    Array,
    EnsembleRule,
    Evidence,
    ScoreKind,
    SiteContext,
    softmax,
)
from fedinfer_flower.ensemble.majority_vote import split_vote
from fedinfer_flower.ensemble.options import option
from fedinfer_flower.errors import InvalidValueError, ShapeError

__all__ = ["CompetenceVote"]


@RULES.register("competence-vote")
@dataclass(frozen=True, kw_only=True)
class CompetenceVote(EnsembleRule):
    """Read each site's vote through the errors it made on its own held-out data.

    A vote for class l speaks for every class that the site often calls l. Use when each
    site has some tens of held-out examples of a class; prefer `class-share` with fewer.
    Where votes contradict each other, a class that no site has seen may win, because it
    contradicts none of them.

    Score: ``phi_k,c = log max(C_k[c, y_k], floor / C)`` with the vote y_k and the
    confusion ``C_k[c, l] = P(says l | truth c)``; naive Bayes over votes, which FENS
    calls polychotomous voting. A tied vote counts in equal parts.

    Parameters
    ----------
    floor : float
        Smallest confusion, in units of 1 / n_classes, the confusion of a class that the
        site has never seen. It says how much one site's error-free past may weigh.

    Privacy
    -------
    Needs the sum only. The confusion stays at the site, but a site that can be singled
    out in the sum shows the column of it that its vote picks. Noise of `dp` grows with
    ``log(n_classes / floor)``.

    Examples
    --------
    >>> site = SiteContext(
    ...     present=np.array([True, True]), confusion=np.array([[0.9, 0.1], [0.4, 0.6]])
    ... )
    >>> np.exp(CompetenceVote().score(np.array([[2.0, 1.0]]), site))
    array([[0.9, 0.4]])
    """

    floor: float = option(1e-2, low=1e-6, high=1.0)

    score_kind = ScoreKind.LOG_PROBABILITY
    needs = frozenset({Evidence.CONFUSION})

    def score_bound(self, n_classes: int) -> float:
        """Return ``log(n_classes / floor)``; 1.0 where that is nothing."""
        return math.log(n_classes / self.floor) or 1.0

    def sensitivity_l2(self, n_classes: int) -> float:
        """Return the diameter of the box [-score_bound, 0]."""
        return self.score_bound(n_classes) * math.sqrt(n_classes)

    def score(self, logits: Array, site: SiteContext) -> Array:
        """Return the log-likelihood of the vote under each class."""
        n_classes = logits.shape[-1]
        if site.confusion is None:
            raise InvalidValueError(
                f"rule {self.name!r} needs the confusion matrix of the local model",
                hint="give the site held-out data, or use 'class-share'",
            )
        if site.confusion.shape != (n_classes, n_classes):
            raise ShapeError(
                f"confusion has shape {site.confusion.shape}, expected {(n_classes, n_classes)}"
            )
        log_confusion = np.log(np.clip(site.confusion, self.floor / n_classes, 1.0))
        score = split_vote(logits) @ log_confusion.T
        # A mean of equal logarithms may miss their value by the last digit.
        return np.asarray(np.clip(score, -self.score_bound(n_classes), 0.0))

    def probabilities(self, total: Array, n_sites: int) -> Array:  # noqa: ARG002
        """Return the posterior under a uniform prior."""
        return softmax(self.class_totals(total))
