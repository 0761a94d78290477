"""Proper score: the quadratic score of each site's answers, alone."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from fedinfer_flower.incentives.base import SCHEMES, Array, AuditedAnswers, ContributionScheme

__all__ = ["ProperScore"]


@SCHEMES.register("proper-score")
@dataclass(frozen=True, kw_only=True)
class ProperScore(ContributionScheme):
    """Score ``mean_t 2 p_k(y) - |p_k|^2 - 1/C``: strictly proper, 0 for a uniform answer.

    A site does best by answering what it believes, whatever the others do. It is not told
    apart from a copy of another, and specialists that are sure of the wrong class outside
    their own go below zero.

    Privacy
    -------
    ``|p_k|^2`` is not linear in the answer: needs each site's answers in clear.

    References
    ----------
    .. [1] Gneiting and Raftery, "Strictly proper scoring rules", 2007, section 4.1.

    Examples
    --------
    >>> p = np.array([[[0.9, 0.1]], [[0.5, 0.5]], [[0.1, 0.9]]])
    >>> answers = AuditedAnswers(probabilities_ktc=p, labels=np.array([0]))
    >>> ProperScore().contributions(answers).round(2)
    array([ 0.48,  0.  , -1.12])
    """

    needs_labels = True

    def contributions(self, answers: AuditedAnswers) -> Array:
        """Return the mean quadratic score above a uniform answer's."""
        self.check(answers)
        p, labels = answers.probabilities_ktc, answers.public().require_labels(self.name)
        at_label = p[:, np.arange(answers.n_queries), labels]
        score = 2.0 * at_label - np.square(p).sum(axis=-1) - 1.0 / answers.n_classes
        return np.asarray(score.mean(axis=1))
