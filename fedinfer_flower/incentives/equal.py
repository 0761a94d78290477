"""Equal: everybody the same, whatever was answered."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from fedinfer_flower.incentives.base import (
    SCHEMES,
    Array,
    AuditedAnswers,
    ContributionScheme,
    Sight,
)

__all__ = ["Equal"]


@SCHEMES.register("equal")
@dataclass(frozen=True, kw_only=True)
class Equal(ContributionScheme):
    """Score every site ``1 / K``: a baseline.

    Pays free riders like honest sites, and an owner once for each identity it makes up.

    Privacy
    -------
    Needs no answer.

    References
    ----------
    .. [1] FedSEI, "Federated Inference", arXiv 2603.02214.

    Examples
    --------
    >>> answers = AuditedAnswers(probabilities_ktc=np.full((4, 1, 2), 0.5))
    >>> Equal().contributions(answers)
    array([0.25, 0.25, 0.25, 0.25])
    """

    sees = Sight.NOTHING

    def contributions(self, answers: AuditedAnswers) -> Array:
        """Return ``1 / K`` for each."""
        self.check(answers)
        return np.full(answers.n_sites, 1.0 / answers.n_sites)
