"""Entropy: the weights of the entropy vote, as rewards."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from fedinfer_flower.incentives.base import SCHEMES, Array, AuditedAnswers, ContributionScheme

__all__ = ["Entropy"]


@SCHEMES.register("entropy")
@dataclass(frozen=True, kw_only=True)
class Entropy(ContributionScheme):
    """Score ``mean_t e^-H(p_k) / sum_j e^-H(p_j)``: a baseline that pays overconfidence.

    Whoever answers one-hot, right or wrong, earns most. Never pay by it.

    Privacy
    -------
    Needs each site's answer to each query in clear.

    References
    ----------
    .. [1] FedSEI, "Federated Inference", arXiv 2603.02214.

    Examples
    --------
    >>> p = np.array([[[1.0, 0.0]], [[0.5, 0.5]]])
    >>> Entropy().contributions(AuditedAnswers(probabilities_ktc=p)).round(3)
    array([0.667, 0.333])
    """

    def contributions(self, answers: AuditedAnswers) -> Array:
        """Return the mean weight of the entropy vote."""
        self.check(answers)
        p = answers.probabilities_ktc
        weights = np.exp((p * np.log(np.maximum(p, 1e-12))).sum(axis=-1))
        return np.asarray((weights / weights.sum(axis=0)).mean(axis=1))
