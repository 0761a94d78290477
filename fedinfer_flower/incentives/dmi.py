"""Determinant mutual information: truthful without labels, for two or three classes."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from fedinfer_flower.errors import InvalidValueError
from fedinfer_flower.incentives.base import SCHEMES, Array, AuditedAnswers, ContributionScheme
from fedinfer_flower.incentives.correlated_agreement import joint_frequencies, peers_of

__all__ = ["DeterminantMutualInformation"]


@SCHEMES.register("dmi")
@dataclass(frozen=True, kw_only=True)
class DeterminantMutualInformation(ContributionScheme):
    """Score ``mean_j det(M_ij of one half) det(M_ij of the other)``.

    Telling the truth is a dominant strategy with at least 2C queries and two sites. But the
    determinant vanishes as soon as a site never votes a class in one half, so that beyond
    three classes, or with specialists, everybody earns about 0: a baseline for small tasks.

    Privacy
    -------
    Needs each site's vote on each query in clear.

    References
    ----------
    .. [1] Kong, "Dominantly truthful multi-task peer prediction with a constant number of
       tasks", 2020, mechanism 1.

    Examples
    --------
    >>> good = np.eye(2)[[0, 0, 1, 1]]
    >>> constant = np.eye(2)[[0, 0, 0, 0]]
    >>> p = np.stack([good, good, constant])
    >>> DeterminantMutualInformation().contributions(AuditedAnswers(probabilities_ktc=p))
    array([0.03125, 0.03125, 0.     ])
    """

    def contributions(self, answers: AuditedAnswers) -> Array:
        """Return the mean over a site's peers of other owners; 0 without any."""
        self.check(answers)
        if answers.n_queries < 2 * answers.n_classes:
            raise InvalidValueError(
                f"scheme {self.name!r} needs two queries for each class at least, got"
                f" {answers.n_queries} for {answers.n_classes} classes"
            )
        first, second = (
            np.linalg.det(joint_frequencies(answers, slice(start, None, 2))) for start in (0, 1)
        )
        # Rounding leaves dust in a determinant of a singular matrix; it is no information.
        product = np.where(np.abs(first * second) > 1e-24, first * second, 0.0)
        peers = peers_of(answers)
        return np.asarray((product * peers).sum(axis=1) / np.maximum(peers.sum(axis=1), 1.0))
