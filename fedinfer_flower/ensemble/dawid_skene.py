"""Dawid-Skene: learn from the votes alone which site errs how."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from fedinfer_flower.ensemble.base import (
    RULES,
    Array,
    Disclosure,
    EnsembleRule,
    ScoreKind,
    SiteContext,
)
from fedinfer_flower.ensemble.majority_vote import split_vote
from fedinfer_flower.ensemble.options import option

__all__ = ["DawidSkene", "dawid_skene"]

_DIGITS = 12
"""Decimals kept of a posterior in each step. Between two answers of equal likelihood the
steps magnify any difference; without rounding the order of a sum would decide."""

_MIN_SITES = 3
"""With one site, any truth explains its votes; with two, either may be the one that errs."""


def dawid_skene(votes_kbc: Array, *, iterations: int, smoothing: float) -> Array:
    """Return posteriors of the truth by expectation maximisation.

    Parameters
    ----------
    votes_kbc : float array of shape (n_sites, n_queries, n_classes)
        Rows sum to 1.
    iterations : int
    smoothing : float
        Pseudo-count of every cell of a site's confusion matrix.

    Returns
    -------
    posterior : float array of shape (n_queries, n_classes)
    """
    posterior = votes_kbc.mean(axis=0) + 1e-3
    posterior /= posterior.sum(axis=1, keepdims=True)
    for _ in range(iterations):
        confusion = np.einsum("bm,kbc->kmc", posterior, votes_kbc) + smoothing
        confusion /= confusion.sum(axis=2, keepdims=True)
        log_posterior = np.log(posterior.mean(axis=0) + 1e-9)
        log_posterior = log_posterior + np.einsum("kbc,kmc->bm", votes_kbc, np.log(confusion))
        posterior = np.exp(log_posterior - log_posterior.max(axis=1, keepdims=True))
        posterior = (posterior / posterior.sum(axis=1, keepdims=True)).round(_DIGITS)
    return np.asarray(posterior)


@RULES.register("dawid-skene")
@dataclass(frozen=True, kw_only=True)
class DawidSkene(EnsembleRule):
    """Estimate each site's confusion matrix from the batch's votes and weigh them by it.

    The best rule against hostile sites that needs no labels, for batches of at least
    some 50 queries a class; prefer `majority-vote` for smaller ones, and
    `competence-vote` where sites have held-out data. Votes of fewer than three sites
    cannot tell who errs: they are averaged.

    Total: ``q(c) ~ pi_c prod_k C_k[c, y_k]``, with ``C_k[c, l] ~ sum q(c) 1[y_k = l]`` and
    ``pi`` the mean of q over the batch, iterated (Dawid and Skene, Applied Statistics
    28(1), 1979). A tied vote counts in equal parts.

    Parameters
    ----------
    iterations : int
    smoothing : float
        Pseudo-count of every cell of a site's confusion matrix.

    Privacy
    -------
    Needs each site's own votes: the coordinator sees them, with noise under `dp`, and
    learns each site's error rates. The answer to one query depends on the others in its
    batch.

    Examples
    --------
    >>> votes = np.array([[[1.0, 0.0]], [[1.0, 0.0]], [[0.0, 1.0]]])
    >>> DawidSkene().combine(votes).argmax(axis=1)
    array([0])
    """

    iterations: int = option(60, low=1, high=10_000)
    smoothing: float = option(0.1, low=1e-6, high=100.0)

    discloses = Disclosure.SCORES
    score_kind = ScoreKind.VOTE

    def sensitivity_l2(self, n_classes: int) -> float:  # noqa: ARG002
        """Return the distance between two votes."""
        return math.sqrt(2.0)

    def score(self, logits: Array, site: SiteContext) -> Array:  # noqa: ARG002
        """Return the vote."""
        return split_vote(logits)

    def combine(self, scores: Array) -> Array:
        """Return posteriors, each site's votes read through its estimated confusion."""
        # Votes under `dp` noise may be negative or sum to anything.
        votes = np.maximum(scores, 0.0)
        mass = votes.sum(axis=-1, keepdims=True)
        votes = np.where(mass > 0.0, votes / np.where(mass > 0.0, mass, 1.0), 1.0 / votes.shape[-1])
        if len(votes) < _MIN_SITES:
            return np.asarray(votes.mean(axis=0))
        return dawid_skene(votes, iterations=self.iterations, smoothing=self.smoothing)
