"""Banzhaf from coalitions: values from nothing but sums over random groups of sites."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from fedinfer_flower.ensemble.options import option
from fedinfer_flower.incentives.banzhaf import with_minus_without
from fedinfer_flower.incentives.base import (
    SCHEMES,
    Array,
    AuditedAnswers,
    CoalitionSums,
    ContributionScheme,
    Sight,
)
from fedinfer_flower.incentives.games import as_utility, query_utilities

__all__ = ["BanzhafCoalitions"]


@SCHEMES.register("banzhaf-coalitions")
@dataclass(frozen=True, kw_only=True)
class BanzhafCoalitions(ContributionScheme):
    """Ask each query of a random half of the sites; compare queries with and without a site.

    An unbiased estimate of the Banzhaf values (under the Brier game, of the Shapley values
    too) up to the coalitions that are too small to be opened, and it halves the cost of
    asking. Data hungry: hundreds of audits for a rough order, thousands for a good one.

    Parameters
    ----------
    utility : str
        ``accuracy`` or ``brier``; see `fedinfer_flower.incentives.games.Utility`.
    min_members : int
        Smallest coalition that may be opened; a smaller draw asks everybody instead. Where
        there are fewer sites, everybody is asked always, and all values are 0.
    seed : int
        Of the coalitions that `contributions` draws.

    Privacy
    -------
    Works on masked sums: whoever runs it sees the sum over each query's coalition, never one
    answer. One query asked of two coalitions would open their difference, so each is asked
    once.

    References
    ----------
    .. [1] Wang and Jia, "Data Banzhaf", 2023, equation 5 (sample reuse).

    Examples
    --------
    >>> sums = CoalitionSums(
    ...     members_tk=np.array([[True, False], [True, True]]),
    ...     totals_tc=np.array([[0.9, 0.1], [1.0, 1.0]]),
    ...     labels=np.array([0, 0]),
    ... )
    >>> BanzhafCoalitions(min_members=1, utility="accuracy").from_coalitions(sums)
    array([ 0. , -0.5])
    """

    sees = Sight.COALITION_SUMS
    needs_labels = True

    utility: str = "brier"
    min_members: int = option(3, low=1, high=1000)
    seed: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        as_utility(self.utility)

    def from_coalitions(self, sums: CoalitionSums) -> Array:
        """Return the estimate from opened sums.

        Returns
        -------
        values_k : float array of shape (n_sites,)
        """
        n_sites = sums.members_tk.shape[1]
        sizes = sums.members_tk.sum(axis=1)[None]
        utility = as_utility(self.utility)
        worth = query_utilities(sums.totals_tc[None], sizes, sums.labels, utility, n_sites)
        return with_minus_without(worth[0], sums.members_tk)

    def draw(self, answers: AuditedAnswers) -> CoalitionSums:
        """Return the sums that random coalitions of these sites would have opened."""
        rng = np.random.default_rng(self.seed)
        members = rng.random((answers.n_queries, answers.n_sites)) < 0.5
        members[members.sum(axis=1) < self.min_members] = True
        return CoalitionSums(
            members_tk=members,
            totals_tc=np.einsum("tk,ktc->tc", members, answers.probabilities_ktc),
            labels=answers.public().require_labels(self.name),
        )

    def contributions(self, answers: AuditedAnswers) -> Array:
        """Return the estimate from coalitions that are drawn here, of answers in clear."""
        self.check(answers)
        return self.from_coalitions(self.draw(answers))
