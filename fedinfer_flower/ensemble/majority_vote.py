"""Majority vote: one vote a site."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from fedinfer_flower.ensemble.base import (
    RULES,
    Array,
    EnsembleRule,
    ScoreKind,
    SiteContext,
)

__all__ = ["MajorityVote", "split_vote"]


def split_vote(logits: Array) -> Array:
    """Return each row's vote: 1.0 for the highest logit, shared evenly among tied ones.

    Examples
    --------
    >>> split_vote(np.array([[2.0, 1.0, 0.0], [2.0, 2.0, 0.0]]))
    array([[1. , 0. , 0. ],
           [0.5, 0.5, 0. ]])
    """
    highest = logits == logits.max(axis=-1, keepdims=True)
    return np.asarray(highest / highest.sum(axis=-1, keepdims=True))


@RULES.register("majority-vote")
@dataclass(frozen=True, kw_only=True)
class MajorityVote(EnsembleRule):
    """Give each site one vote for its most probable class.

    Loses least under strong `dp` noise, and needs no calibration. Prefer
    `mean-probability` or `class-share` otherwise: a vote forgets how sure a site was.

    Score: ``phi_k = 1[argmax z_k = c]``. A site whose classes tie splits its vote among
    them, so that no class gains by its place in the list; FedSEI's hard voting (arXiv
    2603.02214), the same otherwise, gives it to the lowest class id.

    Privacy
    -------
    Needs the sum only. Reveals the histogram of votes to the querier: with few sites, or
    with one site that alone knows a class, that is close to single votes.

    Examples
    --------
    >>> rule = MajorityVote()
    >>> site = SiteContext(present=np.array([True, True]))
    >>> rule.score(np.array([[0.2, 0.1], [0.3, 0.3]]), site)
    array([[1. , 0. ],
           [0.5, 0.5]])
    """

    score_kind = ScoreKind.VOTE

    def sensitivity_l2(self, n_classes: int) -> float:  # noqa: ARG002
        """Return the distance between two votes."""
        return math.sqrt(2.0)

    def score(self, logits: Array, site: SiteContext) -> Array:  # noqa: ARG002
        """Return the vote."""
        return split_vote(logits)
