"""Row sums with public weights, in fixed point, and the guards that keep them sums.

Axes: T audit rows, C classes.

The row sum of site k is ``sum_t <p_k(t) - 1/C, M(t)>``. Weights that sit on few rows would
turn it into single answers, so weights are checked before anything is opened, by both roles.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from typing import Final

import numpy as np

from fedinfer_flower.errors import SettlementError
from fedinfer_flower.incentives.base import LinearScheme, PublicFacts
from fedinfer_flower.privacy.gaussian_dp import epsilon_of
from fedinfer_flower.settlement.ring import ONE, Array, IntArray, RingArray

__all__ = [
    "MAX_ROW_SHARE",
    "MIN_AUDITS",
    "MIN_SITES",
    "MIN_SPARE_BITS",
    "RECOMMENDED_AUDITS",
    "RowWeights",
    "check_totals",
]

MIN_AUDITS: Final = 30
RECOMMENDED_AUDITS: Final = 200
MIN_SITES: Final = 3
"""A sum over two sites tells each the other's answer."""
MAX_ROW_SHARE: Final = 0.1
"""Largest share of one row in all weights: no row sum is mostly one answer."""

MIN_SPARE_BITS: Final = 32.0
"""Fewest bits that a row sum without noise has to leave open; see `RowWeights.spare_bits`."""

_MAX_AUDITS: Final = 2**20
"""Keeps weighted sums below 2**62: weights and entries are at most 2**20 on the grid."""


@dataclass(frozen=True, kw_only=True, eq=False)
class RowWeights:
    """M of one epoch, worked out alike by coordinator and querier.

    Parameters
    ----------
    weights_tc : float array of shape (n_audits, n_classes)
    peak : float
        Largest absolute weight.
    grid_tc : int array of shape (n_audits, n_classes)
        The weights on a grid of ``peak / 2**20``.
    """

    weights_tc: Array = field(repr=False)
    peak: float
    grid_tc: IntArray = field(repr=False)

    @classmethod
    def of(cls, scheme: LinearScheme, facts: PublicFacts) -> RowWeights:
        """Work out the weights of a scheme, and refuse weights that would open answers.

        Raises
        ------
        SettlementError
            If there are too few or too many audits or too few sites, if all weights are
            zero, or if one audit weighs more than `MAX_ROW_SHARE`.
        """
        if facts.n_sites < MIN_SITES:
            raise SettlementError(
                f"an epoch of {facts.n_sites} sites; the sum of fewer than {MIN_SITES} tells"
                " each the others' answers",
                hint="settle queries that more sites answered",
            )
        if not MIN_AUDITS <= facts.n_queries <= _MAX_AUDITS:
            raise SettlementError(
                f"an epoch of {facts.n_queries} audits, at least {MIN_AUDITS} are needed and at"
                f" most {_MAX_AUDITS} fit",
                hint=f"settle when {RECOMMENDED_AUDITS} audits have been answered",
            )
        weights = np.asarray(scheme.weights(facts), dtype=np.float64)
        if weights.shape != facts.total_tc.shape or not np.isfinite(weights).all():
            raise SettlementError(f"scheme {scheme.name!r} gave weights that are no weights")
        # A constant along a row multiplies the answer's sum, which is 1: it opens nothing.
        spread = np.ptp(weights, axis=1)
        if spread.sum() <= 0.0:
            raise SettlementError("all weights are zero: there is nothing to settle")
        if spread.max() > MAX_ROW_SHARE * spread.sum():
            raise SettlementError(
                "one audit would make up most of a row sum, and so be opened by it",
                hint="mix in audits of every class, several of each, before settling",
            )
        peak = float(np.abs(weights).max())
        grid = np.rint(weights / peak * ONE).astype(np.int64)
        return cls(weights_tc=weights, peak=peak, grid_tc=grid)

    def on_grid(self, grid_tc: IntArray) -> RowWeights:
        """Return the same weights on another role's grid.

        Two machines may round a weight to neighbouring integers, and shares of sums with
        different weights do not add up.

        Raises
        ------
        SettlementError
            If a weight is more than one step away from this role's own.
        """
        own = self.grid_tc
        # Compared, not subtracted: a difference could wrap around.
        if grid_tc.shape != own.shape or not (
            (grid_tc >= own - 1).all() and (grid_tc <= own + 1).all()
        ):
            raise SettlementError(
                "the other role's weights are not those of the scheme, the labels and the totals",
                hint="install the same release of fedinfer-flower at every role",
            )
        return replace(self, grid_tc=grid_tc)

    @property
    def n_audits(self) -> int:
        """T."""
        return int(self.weights_tc.shape[0])

    def ring_sum(self, entries_tc: RingArray) -> int:
        """Return the weighted sum of ring elements, an integer in [0, 2**64)."""
        product = entries_tc * self.grid_tc.view(np.uint64)
        return int(product.sum(dtype=np.uint64))

    @property
    def unit(self) -> float:
        """What 1 in a weighted sum of ring elements stands for, in contribution units."""
        return self.peak / (ONE * ONE)

    def value(self, ring_sum: int) -> float:
        """Return the contribution that a weighted sum of ring elements stands for."""
        signed = (ring_sum + 2**63) % 2**64 - 2**63
        return float(signed * self.unit - self.centre)

    @property
    def centre(self) -> float:
        """What a uniform answer would sum to, which is taken off."""
        n_classes = self.weights_tc.shape[1]
        return float(self.grid_tc.sum() / ONE * self.peak / n_classes)

    @property
    def error(self) -> float:
        """Bound on the fixed-point error of one contribution.

        Entries are off by at most half a step, 2**-21. Weights are off by as much of the
        peak, or three times that on another role's grid; an answer's entries sum to 1, and
        so do those of the uniform answer.
        """
        n_queries, n_classes = self.weights_tc.shape
        half = 0.5 / ONE
        entries = float(np.abs(self.weights_tc).sum()) + self.peak * n_queries * n_classes * half
        return float(half * (entries + 6.0 * self.peak * n_queries) * (1.0 + 1e-6))

    @property
    def largest(self) -> float:
        """Largest absolute contribution that a site can have by answering with distributions."""
        best = self.weights_tc.max(axis=1) - self.weights_tc.mean(axis=1)
        worst = self.weights_tc.mean(axis=1) - self.weights_tc.min(axis=1)
        return float(max(best.sum(), worst.sum()))

    @property
    def spare_bits(self) -> float:
        """How many bits of one-hot answers a row sum without noise leaves open, at least.

        Answers that are 0 or 1 have ``n_classes ** n_audits`` possibilities, and their row
        sum is one of ``2 * n_audits * 2**20`` grid values: with few audits the sum could be
        solved for the answers.
        """
        n_queries, n_classes = self.weights_tc.shape
        return float(n_queries * math.log2(n_classes) - math.log2(2.0 * n_queries * ONE))

    @property
    def sensitivity(self) -> float:
        """How far one changed answer to one audit moves a row sum, weights taken as given."""
        return float(np.ptp(self.weights_tc, axis=1).max())

    def epsilon(self, noise_std: float, delta: float) -> float:
        """Return epsilon of one row sum for one audit answer, by the Gaussian mechanism.

        The weights are taken as given: they come from the audit rows' totals and labels,
        which both roles see without noise and which this does not account for.

        Parameters
        ----------
        noise_std : float
            In contribution units; 0 for no noise.
        delta : float
        """
        if noise_std <= 0.0:
            return math.inf
        return epsilon_of(self.sensitivity / noise_std, delta)


def check_totals(totals_tc: Array, n_sites: int, *, slack: float) -> None:
    """Require that totals could be sums of `n_sites` distributions.

    Parameters
    ----------
    totals_tc : float array of shape (n_audits, n_classes)
    slack : float
        How far an entry may be off, by the codec of the evidence's form.

    Raises
    ------
    SettlementError
        If an entry is negative or larger than `n_sites`, or a row does not sum to it: a
        site sent what is no distribution, or a share was altered. Which one stays unknown.
    """
    n_classes = totals_tc.shape[1]
    fits = (
        np.isfinite(totals_tc).all()
        and totals_tc.min() >= -slack
        and totals_tc.max() <= n_sites + slack
        and np.abs(totals_tc.sum(axis=1) - n_sites).max() <= slack * n_classes
    )
    if not fits:
        raise SettlementError(
            "the sums of evidence are no sums of distributions: a site sent what is none, or"
            " a share was altered on its way",
            hint="leave this epoch unsettled; settle by groups of sites to narrow it down",
        )
