"""How well an attack does, and how sure one can be of that number.

Loss thresholds with an average accuracy hide what matters: an attack that is sure of ten
members and guesses about the rest is worse for these ten than one that is slightly right
about all. So membership is reported as the true positive rate at a low false positive rate.

References
----------
.. [1] Carlini, Chien, Nasr, Song, Terzis and Tramer, Membership Inference Attacks From First
   Principles, IEEE S&P 2022, section III (what to report).
"""

from __future__ import annotations

import math
from typing import Final

import numpy as np
import numpy.typing as npt

from fedinfer_flower.ensemble.base import Array
from fedinfer_flower.errors import InvalidValueError
from fedinfer_flower.privacy.base import optional_module

__all__ = [
    "ERROR_RATE",
    "area_under_curve",
    "binomial_threshold",
    "bootstrapped_rates",
    "clopper_pearson",
    "dp_bound",
    "student_quantile",
    "true_positive_rate",
]

ERROR_RATE: Final = 1e-4
"""Chance that an attack which knows nothing is said to succeed."""

Bools = npt.NDArray[np.bool_]


def student_quantile(tail: float, *, n_groups: int) -> float:
    """Return how many standard errors a mean of groups exceeds with this chance.

    With an error that was itself estimated from so few groups.

    Examples
    --------
    >>> round(student_quantile(1e-4, n_groups=8), 2), round(student_quantile(1e-4, n_groups=64), 2)
    (7.55, 3.98)
    """
    if n_groups < 2:
        raise InvalidValueError("a standard error needs two groups or more")
    special = optional_module("scipy.special", extra="dp")
    # The spread of resampled means is that of a sample, with n in place of n - 1.
    small = math.sqrt(n_groups / (n_groups - 1))
    return float(-special.stdtrit(n_groups - 1, tail)) * small


def _checked(scores: Array, members: Bools) -> None:
    if scores.shape != members.shape or members.all() or not members.any():
        raise InvalidValueError("scores and members have one shape, with members and others")


def true_positive_rate(scores: Array, members: Bools, *, false_positive_rate: float) -> float:
    """Return the share of members found at the threshold of this false positive rate.

    Ties at the threshold are split as a coin would: an attacker may flip one.

    Parameters
    ----------
    scores : float array
        Large for a member.
    members : bool array of the same shape
    false_positive_rate : float
        In (0, 1).

    Raises
    ------
    InvalidValueError
        If there are no members, or nothing else.

    Examples
    --------
    >>> true_positive_rate(np.array([3.0, 1.0, 2.0, 0.0]), np.array([True, True, False, False]),
    ...                    false_positive_rate=0.5)
    1.0
    """
    _checked(scores, members)
    others = np.sort(scores[~members], axis=None)[::-1]
    allowed = false_positive_rate * others.size
    threshold = others[min(math.floor(allowed), others.size - 1)]
    found, tied = scores[members] > threshold, scores[members] == threshold
    spare = allowed - (others > threshold).sum()
    coin = min(spare / (others == threshold).sum(), 1.0)
    return float(found.mean() + coin * tied.mean())


def area_under_curve(scores: Array, members: Bools) -> float:
    """Return the chance that a member scores higher than another record; ties count half.

    Examples
    --------
    >>> area_under_curve(np.array([2.0, 1.0, 1.0]), np.array([True, True, False]))
    0.75
    """
    _checked(scores, members)
    flat, is_member = scores.ravel(), members.ravel()
    _, place, counts = np.unique(flat, return_inverse=True, return_counts=True)
    # Rank of a group of ties: the middle of the places it takes.
    ranks = (np.cumsum(counts) - (counts - 1) / 2.0)[place]
    n_in = int(is_member.sum())
    wins = ranks[is_member].sum() - n_in * (n_in + 1) / 2.0
    return float(wins / (n_in * (flat.size - n_in)))


def clopper_pearson(hits: int, trials: int, *, confidence: float = 0.95) -> tuple[float, float]:
    """Return the exact confidence interval of a rate.

    References
    ----------
    .. [1] Clopper and Pearson, Biometrika 26, 1934.

    Examples
    --------
    >>> low, high = clopper_pearson(0, 100)
    >>> low, round(high, 4)
    (0.0, 0.0362)
    """
    if not (0 <= hits <= trials and trials > 0 and 0.0 < confidence < 1.0):
        raise InvalidValueError("hits lie in [0, trials], trials are positive")
    special = optional_module("scipy.special", extra="dp")
    tail = (1.0 - confidence) / 2.0
    low = 0.0 if hits == 0 else float(special.betaincinv(hits, trials - hits + 1, tail))
    high = 1.0 if hits == trials else float(special.betaincinv(hits + 1, trials - hits, 1.0 - tail))
    return low, high


def binomial_threshold(chance: float, trials: int, *, error_rate: float = ERROR_RATE) -> float:
    """Return the success rate that guessing exceeds with at most `error_rate`.

    Examples
    --------
    >>> binomial_threshold(0.5, 100)
    0.68
    """
    if not (0.0 <= chance <= 1.0 and trials > 0 and 0.0 < error_rate < 1.0):
        raise InvalidValueError("chance is a probability, trials are positive")
    special = optional_module("scipy.special", extra="dp")
    # The chance of more than `hits` successes among `trials`.
    tails = special.bdtrc(np.arange(trials), trials, chance)
    enough = np.flatnonzero(np.asarray(tails) <= error_rate)
    return float(enough[0] / trials) if len(enough) else 1.0


def bootstrapped_rates(
    scores: Array,
    members: Bools,
    groups: npt.NDArray[np.int64],
    *,
    false_positive_rate: float,
    repeats: int = 400,
    seed: int = 0,
) -> Array:
    """Return `true_positive_rate` for `repeats` resamples of groups, drawn with replacement.

    Records of one world share models, so that a binomial interval over records would be
    too narrow. Worlds are independent given the pool of records.

    Parameters
    ----------
    scores : float array of shape (n_rows, n_records)
    members : bool array of shape (n_rows, n_records)
    groups : int array of shape (n_rows,)
        The world of each row.
    false_positive_rate : float
        In (0, 0.25].
    repeats, seed : int

    Examples
    --------
    >>> scores, members = np.array([[3.0, 1.0], [2.0, 0.0]]), np.array([[True, False]] * 2)
    >>> bootstrapped_rates(scores, members, np.arange(2), false_positive_rate=0.1, repeats=2)
    array([1., 1.])
    """
    _checked(scores, members)
    # Counts between the upper quantiles of the others, so that a resample is a sum of rows.
    levels = np.linspace(1.0, 1.0 - min(3.0 * false_positive_rate, 1.0), 600)
    edges = np.unique(np.quantile(scores[~members], levels))
    above_in, above_out, n_in, n_out = [], [], [], []
    for group in np.unique(groups):
        rows = groups == group
        found, others = scores[rows][members[rows]], scores[rows][~members[rows]]
        above_in.append(len(found) - np.searchsorted(np.sort(found), edges, "right"))
        above_out.append(len(others) - np.searchsorted(np.sort(others), edges, "right"))
        n_in.append(len(found))
        n_out.append(len(others))
    rng = np.random.default_rng(seed)
    rates = np.empty(repeats)
    for repeat in range(repeats):
        drawn = rng.integers(0, len(n_in), len(n_in))
        false = np.array(above_out)[drawn].sum(axis=0) / max(np.array(n_out)[drawn].sum(), 1)
        true = np.array(above_in)[drawn].sum(axis=0) / max(np.array(n_in)[drawn].sum(), 1)
        # Edges rise, so both rates fall: turned round for the interpolation.
        rates[repeat] = np.interp(false_positive_rate, false[::-1], true[::-1])
    return rates


def dp_bound(false_positive_rate: float, *, epsilon: float, delta: float) -> float:
    """Return the most true positives that any test of an (epsilon, delta)-private answer finds.

    ``min(e^epsilon * FPR + delta, 1 - e^-epsilon * (1 - delta - FPR))``.

    References
    ----------
    .. [1] Kairouz, Oh and Viswanath, ICML 2015, theorem 2.1.

    Examples
    --------
    >>> round(dp_bound(0.01, epsilon=1.0, delta=1e-5), 4)
    0.0272
    """
    rising = math.exp(min(epsilon, 700.0)) * false_positive_rate + delta
    falling = 1.0 - math.exp(-epsilon) * (1.0 - delta - false_positive_rate)
    return min(rising, falling, 1.0)
