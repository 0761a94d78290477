"""Final agreement: who voted for the joint answer shares the query's reward."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from fedinfer_flower.incentives.base import (
    SCHEMES,
    Array,
    AuditedAnswers,
    ContributionScheme,
    likeliest,
)

__all__ = ["FinalAgreement"]


@SCHEMES.register("final-agreement")
@dataclass(frozen=True, kw_only=True)
class FinalAgreement(ContributionScheme):
    """Score ``mean_t 1[vote_k = joint answer] / |{j : vote_j = joint answer}|``: a baseline.

    Pays constant and random answers whenever they happen to agree, and rewards following the
    herd. Labels are not used.

    Privacy
    -------
    Needs each site's vote on each query in clear.

    References
    ----------
    .. [1] FedSEI, "Federated Inference", arXiv 2603.02214.

    Examples
    --------
    >>> p = np.array([[[0.9, 0.1]], [[0.6, 0.4]], [[0.3, 0.7]]])
    >>> FinalAgreement().contributions(AuditedAnswers(probabilities_ktc=p))
    array([0.5, 0.5, 0. ])
    """

    def contributions(self, answers: AuditedAnswers) -> Array:
        """Return the mean share of the winners' reward."""
        self.check(answers)
        joint = likeliest(answers.public().total_tc)
        agrees = answers.votes() == joint
        winners = np.maximum(agrees.sum(axis=0), 1)
        return np.asarray((agrees / winners).mean(axis=1))
