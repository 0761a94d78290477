"""Correlated agreement: votes that go together across pairs of sites, without labels."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from fedinfer_flower.errors import InvalidValueError
from fedinfer_flower.incentives.base import SCHEMES, Array, AuditedAnswers, ContributionScheme

__all__ = ["CorrelatedAgreement", "joint_frequencies", "peers_of"]


def joint_frequencies(answers: AuditedAnswers, half: slice) -> Array:
    """Return how often pairs of sites vote each pair of classes on some queries.

    Returns
    -------
    joint_ijab : float array of shape (n_sites, n_sites, n_classes, n_classes)
        Sums to 1 over the classes.
    """
    onehot = np.eye(answers.n_classes)[answers.votes()[:, half]]
    joint = np.einsum("ita,jtb->ijab", onehot, onehot, optimize=True)
    return np.asarray(joint / onehot.shape[1])


def peers_of(answers: AuditedAnswers) -> Array:
    """Return 1.0 where one site is scored against another: never against its own owner's.

    Returns
    -------
    peers_ij : float array of shape (n_sites, n_sites)
    """
    owners = answers.owners or tuple(f"site {k}" for k in range(answers.n_sites))
    return np.array([[float(a != b) for b in owners] for a in owners])


@SCHEMES.register("correlated-agreement")
@dataclass(frozen=True, kw_only=True)
class CorrelatedAgreement(ContributionScheme):
    """Score ``mean_j sum_ab D_ij(a, b) S_ij(a, b)``, with ``D = P_ij - P_i P_j^T``.

    S marks the pairs of votes that go together more often than by chance. It is learnt on
    one half of the queries and used on the other, so that no pair fits its own noise. No
    relabelling of the classes and no fixed answer pays more than the truth does; a majority
    that agrees on something else is not noticed.

    Privacy
    -------
    Needs each site's vote on each query in clear.

    References
    ----------
    .. [1] Shnayder, Agarwal, Frongillo, Parkes, "Informed truthfulness in multi-task peer
       prediction", 2016, definition 5 and section 6 (learnt from reports).

    Examples
    --------
    >>> good = np.eye(2)[[0, 0, 1, 1]]
    >>> constant = np.eye(2)[[0, 0, 0, 0]]
    >>> p = np.stack([good, good, constant])
    >>> CorrelatedAgreement().contributions(AuditedAnswers(probabilities_ktc=p))
    array([0.25, 0.25, 0.  ])
    """

    def contributions(self, answers: AuditedAnswers) -> Array:
        """Return the mean over a site's peers of other owners; 0 without any."""
        self.check(answers)
        if answers.n_queries < 2:
            raise InvalidValueError(f"scheme {self.name!r} splits the queries: 2 at least")
        halves = [joint_frequencies(answers, slice(start, None, 2)) for start in (0, 1)]
        # Products of the marginals: what independent votes would look like.
        deltas = [
            joint - joint.sum(axis=3)[..., :, None] * joint.sum(axis=2)[..., None, :]
            for joint in halves
        ]
        # To nine digits: cells that are 0 up to rounding do not go together.
        signs = [delta > 1e-9 for delta in deltas]
        scores_ij = sum((deltas[i] * signs[1 - i]).sum(axis=(2, 3)) for i in (0, 1)) / 2.0
        peers = peers_of(answers)
        return np.asarray((scores_ij * peers).sum(axis=1) / np.maximum(peers.sum(axis=1), 1.0))
