"""Labels from votes by noisy arg max: GNMax and Confident-GNMax.

Gaussian noise on every count, then the class with the largest: only that label is released.
The confident variant first checks, with noise of its own, whether the largest count reaches a
threshold, and abstains if not: rows on which voters disagree cost most and are worth least.

**Who may run this.** Whoever sees the votes: a site whose sub-teachers vote inside it, or an
aggregator that all voters trust. A party that also sees the noisy counts has more than the
label; towards it the price on any data still holds, the price on these data does not. A
querier who opens a noisy histogram of sites' votes is such a party.

Axes: K voters, B rows of a batch, C classes.

References
----------
.. [1] Papernot, Song, Mironov, Raghunathan, Talwar and Erlingsson, Scalable Private Learning
   with PATE, ICLR 2018, arXiv 1802.08908: definition of GNMax, algorithm 1 (Confident-GNMax).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Final

import numpy as np
import numpy.typing as npt

from fedinfer_flower.ensemble.base import Array
from fedinfer_flower.errors import InvalidScoresError, InvalidValueError, ShapeError
from fedinfer_flower.privacy import noise
from fedinfer_flower.privacy.fixed_point import IntArray
from fedinfer_flower.privacy.gnmax_accounting import (
    GRID_BITS,
    data_dependent_rdp,
    grid_steps,
    log_other_label,
    log_rarer_check,
)

__all__ = ["ABSTAIN", "ConfidenceCheck", "GNMax", "checked_counts", "vote_counts"]

ABSTAIN: Final = -1
"""In place of a label where the confidence check failed."""

_MAX_VOTES: Final = 2**31
_MAX_SIGMA: Final = 2.0**27
"""In votes, so that noise stays within what `noise.gaussian_integers` draws."""


@dataclass(frozen=True, kw_only=True)
class ConfidenceCheck:
    """Answer a row only if its largest count plus noise reaches a threshold.

    Parameters
    ----------
    threshold : float
        T, in votes; usually 0.6 to 0.8 of the number of voters.
    sigma : float
        sigma_1, standard deviation of the noise of the check, in votes. The check is paid for
        by every row, so it is usually larger than the noise of the answer.

    Raises
    ------
    InvalidValueError
        If a number is out of range.

    Privacy
    -------
    Set both before seeing any private vote, or on other data: a threshold that was tuned on
    the votes has leaked from them, and nothing here pays for that.

    Examples
    --------
    >>> ConfidenceCheck(threshold=70.0, sigma=20.0).mu_squared
    0.0025
    """

    threshold: float
    sigma: float

    def __post_init__(self) -> None:
        if not (math.isfinite(self.threshold) and 0.0 < self.threshold <= _MAX_VOTES):
            raise InvalidValueError(f"threshold is a number of votes, got {self.threshold!r}")
        _require_sigma(self.sigma)

    @property
    def mu_squared(self) -> float:
        """Price of one row on any data: the largest count moves by at most one."""
        return 1.0 / self.sigma**2


@dataclass(frozen=True, kw_only=True)
class GNMax:
    """Noisy arg max of votes.

    Prefer `fedinfer_flower.privacy.gnmax_account.GNMaxAccount.release`, which charges what it
    releases.

    Parameters
    ----------
    sigma : float
        Standard deviation of the noise on each count, in votes.
    check : ConfidenceCheck, optional
        With it, the confident variant.

    Raises
    ------
    InvalidValueError
        If `sigma` is out of range.

    Privacy
    -------
    Neighbours: one voter changes its vote on every row. If the voters are sub-teachers trained
    on disjoint shards, that covers one training record; if they are sites, one site. Towards
    everyone who sees labels and abstentions only, each row is a Gaussian mechanism of
    ``mu^2 = 2 / sigma^2`` for an answer plus ``1 / sigma_1^2`` for a check, on any data.
    Not hidden: the query, and that a row was asked.

    Examples
    --------
    >>> int(GNMax(sigma=1.0).release(np.array([[100, 0, 0]]))[0])
    0
    """

    sigma: float
    check: ConfidenceCheck | None = None

    def __post_init__(self) -> None:
        _require_sigma(self.sigma)

    @property
    def answer_mu_squared(self) -> float:
        """Price of one label on any data: two counts move by one, sensitivity sqrt(2)."""
        return 2.0 / self.sigma**2

    @property
    def row_mu_squared(self) -> float:
        """The most that one row can cost."""
        return self.answer_mu_squared + (self.check.mu_squared if self.check else 0.0)

    def release(self, counts_bc: IntArray) -> IntArray:
        """Draw labels, without charging anybody.

        Votes are integers on a grid of 2^-12 votes and stay so: noise is added as integers.
        If noisy counts tie (a chance of about 2^-13 / sigma for two equal counts) the lowest
        class index wins.

        Parameters
        ----------
        counts_bc : int array of shape (n_rows, n_classes)
            Votes; n_classes is at least 2.

        Returns
        -------
        labels : int64 array of shape (n_rows,)
            Class indices, or `ABSTAIN`.

        Raises
        ------
        ShapeError
            If the counts have another shape or are no integers.
        InvalidScoresError
            If a count is negative or beyond 2**31.
        MissingExtraError
            Without the extra ``dp``.
        """
        steps = checked_counts(counts_bc) << GRID_BITS
        scale = 2.0**GRID_BITS
        labels = (steps + noise.gaussian_integers(steps.shape, self.sigma * scale)).argmax(axis=1)
        if self.check is not None:
            tops = steps.max(axis=1)
            tops = tops + noise.gaussian_integers(tops.shape, self.check.sigma * scale)
            labels = np.where(tops >= grid_steps(self.check.threshold), labels, ABSTAIN)
        return np.asarray(labels, dtype=np.int64)

    def private_rdp(
        self, counts_bc: IntArray, labels_b: IntArray, *, any_neighbour: bool = True
    ) -> Array:
        """Return the divergence that these labels cost on these data, summed over rows.

        Parameters
        ----------
        counts_bc : int array of shape (n_rows, n_classes)
        labels_b : int array of shape (n_rows,)
            What was released; a row with `ABSTAIN` costs its check only.
        any_neighbour : bool
            Bound both directions. False gives the published bound, which holds in one: see
            `fedinfer_flower.privacy.gnmax_accounting`.

        Returns
        -------
        rdp : float array of shape (n_orders,)
            At `ORDERS`.

        Privacy
        -------
        Depends on the votes: **not to be published**.
        """
        answered = np.asarray(counts_bc)[np.asarray(labels_b) != ABSTAIN]
        log_q = log_other_label(answered, sigma=self.sigma, any_neighbour=any_neighbour)
        total = data_dependent_rdp(log_q, mu=math.sqrt(self.answer_mu_squared)).sum(axis=0)
        if self.check is not None:
            log_q = log_rarer_check(
                counts_bc,
                threshold=self.check.threshold,
                sigma=self.check.sigma,
                any_neighbour=any_neighbour,
            )
            total += data_dependent_rdp(log_q, mu=1.0 / self.check.sigma).sum(axis=0)
        return np.asarray(total)


def vote_counts(labels_kb: npt.ArrayLike, *, n_classes: int) -> IntArray:
    """Count votes.

    Parameters
    ----------
    labels_kb : int array of shape (n_voters, n_rows)
        Class index that each voter gives each row.
    n_classes : int

    Returns
    -------
    counts : int64 array of shape (n_rows, n_classes)

    Raises
    ------
    ShapeError
        If the labels have another shape or are no integers.
    InvalidScoresError
        If a label is not in [0, n_classes).

    Privacy
    -------
    One voter moves each row's counts by sqrt(2) in L2. The counts are as private as the votes.

    Examples
    --------
    >>> vote_counts([[0, 1], [0, 2], [1, 2]], n_classes=3)
    array([[2, 1, 0],
           [0, 1, 2]])
    """
    labels = np.asarray(labels_kb)
    if labels.ndim != 2 or labels.dtype.kind not in "iu":
        raise ShapeError("votes are integers of shape (n_voters, n_rows)")
    if labels.size and (int(labels.min()) < 0 or int(labels.max()) >= n_classes):
        raise InvalidScoresError(f"a vote is not one of {n_classes} classes")
    counts = np.zeros((labels.shape[1], n_classes), dtype=np.int64)
    rows = np.broadcast_to(np.arange(labels.shape[1]), labels.shape)
    np.add.at(counts, (rows, labels), 1)
    return counts


def checked_counts(counts_bc: npt.ArrayLike) -> IntArray:
    """Require vote counts: integers from 0 to 2**31, of at least two classes.

    Raises
    ------
    ShapeError
        If the shape is another, or the counts are no integers.
    InvalidScoresError
        If a count is out of range.

    Examples
    --------
    >>> checked_counts([[3, 1]]).dtype
    dtype('int64')
    """
    counts = np.asarray(counts_bc)
    if counts.ndim != 2 or counts.shape[1] < 2 or counts.dtype.kind not in "iu":
        raise ShapeError("vote counts are integers of shape (n_rows, n_classes of 2 or more)")
    if counts.size and (int(counts.min()) < 0 or int(counts.max()) > _MAX_VOTES):
        raise InvalidScoresError("a vote count is negative or too large")
    return counts.astype(np.int64)


def _require_sigma(sigma: float) -> None:
    if not (math.isfinite(sigma) and 0.0 < sigma <= _MAX_SIGMA):
        raise InvalidValueError(f"sigma is in (0, {_MAX_SIGMA:g}] votes, got {sigma!r}")
