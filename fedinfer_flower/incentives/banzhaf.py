"""Banzhaf: mean marginal worth over all coalitions, each as likely as any other."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import numpy as np
import numpy.typing as npt

from fedinfer_flower.ensemble.options import option
from fedinfer_flower.incentives.base import SCHEMES, Array, AuditedAnswers, ContributionScheme
from fedinfer_flower.incentives.games import (
    all_coalition_values,
    as_utility,
    coalition_values,
    members_of,
)

__all__ = ["Banzhaf", "with_minus_without"]

_EXACT_SITES: Final = 12


def with_minus_without(values: Array, members_mk: npt.NDArray[np.bool_]) -> Array:
    """Return the mean value of coalitions with each site, less that of those without.

    Every coalition counts for every site (maximum sample reuse). A site that is in all of
    them, or in none, gets 0.

    Examples
    --------
    >>> with_minus_without(np.array([0.0, 1.0]), np.array([[False, True], [True, True]]))
    array([1., 0.])
    """
    inside, outside = members_mk.sum(axis=0), (~members_mk).sum(axis=0)
    mean_in = values @ members_mk / np.maximum(inside, 1)
    mean_out = values @ ~members_mk / np.maximum(outside, 1)
    return np.where((inside > 0) & (outside > 0), mean_in - mean_out, 0.0)


@SCHEMES.register("banzhaf")
@dataclass(frozen=True, kw_only=True)
class Banzhaf(ContributionScheme):
    """Score the mean marginal worth over all 2^(K-1) coalitions of the others.

    Of all semivalues the one whose ranking noise in the values disturbs least. Values do not
    sum to the ensemble's worth. Exact up to 12 sites, else estimated from random coalitions.

    Parameters
    ----------
    utility : str
        ``accuracy`` or ``brier``; see `fedinfer_flower.incentives.games.Utility`.
    n_coalitions : int
        Random coalitions where there are more than 12 sites.
    seed : int
        Of the random coalitions.

    Privacy
    -------
    Needs each site's answer to each audit query in clear; `BanzhafCoalitions` does not.

    References
    ----------
    .. [1] Wang and Jia, "Data Banzhaf", 2023, theorem 4.2 and equation 5 (sample reuse).

    Examples
    --------
    >>> p = np.array([[[0.9, 0.1]], [[0.4, 0.6]], [[0.4, 0.6]]])
    >>> answers = AuditedAnswers(probabilities_ktc=p, labels=np.array([0]))
    >>> Banzhaf().contributions(answers)
    array([ 0.875, -0.125, -0.125])
    """

    needs_labels = True

    utility: str = "accuracy"
    n_coalitions: int = option(4096, low=2, high=1_000_000)
    seed: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        as_utility(self.utility)

    def contributions(self, answers: AuditedAnswers) -> Array:
        """Return the Banzhaf values, exact or estimated."""
        self.check(answers)
        utility, n_sites = as_utility(self.utility), answers.n_sites
        if n_sites <= _EXACT_SITES:
            return with_minus_without(all_coalition_values(answers, utility), members_of(n_sites))
        rng = np.random.default_rng(self.seed)
        members = rng.random((self.n_coalitions, n_sites)) < 0.5
        return with_minus_without(coalition_values(answers, members, utility), members)
