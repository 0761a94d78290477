"""Quotient pay: sites that answer alike are one site, paid once.

Under most schemes, Shapley values too, an owner that runs its site twice earns more. Merged
into one player first, the copies share what one of them would get.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from fedinfer_flower.errors import InvalidValueError, ShapeError
from fedinfer_flower.incentives.base import (
    Array,
    AuditedAnswers,
    ContributionScheme,
    IntArray,
    Sight,
)

__all__ = ["Quotient", "duplicate_clusters", "owner_clusters", "split_within"]


def duplicate_clusters(
    answers: AuditedAnswers, *, threshold: float = 0.9, min_deviations: int = 5
) -> tuple[int, ...]:
    """Return for each site the first site of its cluster.

    Two sites are one if they have the same owner, if their answers are equal to six digits
    on every query, or if they agree on more than `threshold` of the queries on which either
    votes against the plurality, of which there must be `min_deviations`. Whatever is linked
    through others is one cluster.

    Parameters
    ----------
    threshold : float
        In [0, 1). Agreement on deviations, not on answers: good models agree anyway, but do
        not make the same mistakes.
    min_deviations : int
        Fewer say nothing: accurate or tiny sets of audits hide duplicates.

    Privacy
    -------
    Needs each site's answers in clear.

    Examples
    --------
    >>> p = np.eye(3)[[[0, 1, 2] * 4, [1, 0, 2] * 4, [1, 0, 2] * 4, [0, 1, 2] * 4]]
    >>> duplicate_clusters(AuditedAnswers(probabilities_ktc=p))
    (0, 1, 1, 0)
    """
    if not 0.0 <= threshold < 1.0 or min_deviations < 1:
        raise InvalidValueError("threshold is in [0, 1) and min_deviations at least 1")
    votes, p = answers.votes(), answers.probabilities_ktc
    tally = np.eye(answers.n_classes)[votes].sum(axis=0)
    deviates = votes != tally.argmax(axis=1)
    cluster = list(owner_clusters(answers.owners or range(answers.n_sites)))
    for i in range(answers.n_sites):
        for j in range(i):
            off = deviates[i] | deviates[j]
            alike = off.sum() >= min_deviations and ((votes[i] == votes[j])[off].mean() > threshold)
            if alike or np.abs(p[i] - p[j]).max() < 1e-6:
                old, new = max(cluster[i], cluster[j]), min(cluster[i], cluster[j])
                cluster = [new if first == old else first for first in cluster]
    return tuple(cluster)


def owner_clusters(owners: Sequence[object]) -> tuple[int, ...]:
    """Return for each site the first site of its owner.

    All that is left under row sums, where nobody sees the answers. An owner that registers
    under two names is two owners.

    Examples
    --------
    >>> owner_clusters(("ward", "lab", "ward"))
    (0, 1, 0)
    """
    first: dict[object, int] = {}
    return tuple(first.setdefault(owner, place) for place, owner in enumerate(owners))


def split_within(values: Array, clusters: Sequence[int]) -> Array:
    """Return each cluster's mean value, split equally among its sites.

    For row sums: the mean of the members' row sums is the row sum of their mean answer under
    the same weights. The weights still count each member, so that many copies can bend them;
    the merged game of `Quotient` does not.

    Parameters
    ----------
    values : float array of shape (n_sites,)
    clusters : sequence of int
        As from `duplicate_clusters` or `owner_clusters`.

    Examples
    --------
    >>> split_within(np.array([4.0, 3.0, 2.0]), (0, 1, 0))
    array([1.5, 3. , 1.5])
    """
    if len(values) != len(clusters):
        raise ShapeError(f"{len(values)} values for clusters of {len(clusters)} sites")
    inside = _same(clusters)
    sizes = inside.sum(axis=1)
    return np.asarray((inside @ values) / sizes**2)


def _same(clusters: Sequence[int]) -> npt.NDArray[np.bool_]:
    place: IntArray = np.asarray(clusters, dtype=np.int64)
    return np.asarray(place[:, None] == place)


@dataclass(frozen=True)
class Quotient:
    """A scheme over clusters of duplicates in place of sites.

    The scheme is run on one mean answer for each cluster; a cluster's value is split equally
    among its sites. With exact copies the family earns what one site would.

    Parameters
    ----------
    scheme : ContributionScheme
        What the clusters are scored by.
    threshold, min_deviations
        As of `duplicate_clusters`.

    Privacy
    -------
    Needs each site's answers in clear, whatever the scheme needs. Under row sums use
    `split_within` with `owner_clusters`.

    References
    ----------
    .. [1] Quotient semivalues, arXiv 2605.07663.

    Examples
    --------
    >>> from fedinfer_flower.incentives import make_scheme
    >>> p = np.array([[[0.9, 0.1]], [[0.9, 0.1]], [[0.4, 0.6]]])
    >>> answers = AuditedAnswers(probabilities_ktc=p, labels=np.array([0]))
    >>> Quotient(make_scheme("proper-score")).contributions(answers).round(2)
    array([ 0.24,  0.24, -0.22])
    """

    scheme: ContributionScheme
    threshold: float = 0.9
    min_deviations: int = 5

    @property
    def name(self) -> str:
        """Name of the scheme, marked."""
        return f"quotient {self.scheme.name}"

    @property
    def sees(self) -> Sight:
        """Each site's answers."""
        return Sight.ANSWERS

    @property
    def needs_labels(self) -> bool:
        """Whether the scheme does."""
        return self.scheme.needs_labels

    def contributions(self, answers: AuditedAnswers) -> Array:
        """Return one score a site.

        Returns
        -------
        values_k : float array of shape (n_sites,)
        """
        clusters = duplicate_clusters(
            answers, threshold=self.threshold, min_deviations=self.min_deviations
        )
        inside = _same(clusters)
        firsts = sorted(set(clusters))
        means = inside[firsts] / inside[firsts].sum(axis=1, keepdims=True)
        merged = AuditedAnswers(
            probabilities_ktc=np.einsum("gk,ktc->gtc", means, answers.probabilities_ktc),
            labels=answers.labels,
        )
        values = dict(zip(firsts, self.scheme.contributions(merged), strict=True))
        shared = [values[first] / inside[first].sum() for first in clusters]
        return np.array(shared, dtype=float)
