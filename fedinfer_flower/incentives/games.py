"""The games that Shapley, Banzhaf and leave-one-out values are worked out for.

Axes: M coalitions, T audit queries, C classes.

Both games are of the mean-probability ensemble with weights ``1/K``. They are given sums of
members' probabilities, so that no coalition's answers have to be stored.
"""

from __future__ import annotations

from enum import StrEnum
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from fedinfer_flower.errors import InvalidValueError
from fedinfer_flower.incentives.base import Array, AuditedAnswers, IntArray

__all__ = [
    "Utility",
    "all_coalition_values",
    "as_utility",
    "coalition_values",
    "marginal_bound",
    "members_of",
    "query_utilities",
]

_CHUNK_VALUES: Final = 2_000_000
"""Most floats in one array of coalition sums: 16 MB."""


class Utility(StrEnum):
    """What a coalition's answer is worth."""

    ACCURACY = "accuracy"
    """1 for a right answer, shared where classes tie; nobody's answer is a guess, 1/C."""
    BRIER = "brier"
    """``2 <s, e_y> - |s|^2`` with s the sum of ``(p_k - 1/C) / K``; nobody's answer is 0."""


def as_utility(name: str) -> Utility:
    """Return the utility of that name.

    Raises
    ------
    InvalidValueError
        If there is none.
    """
    if name not in tuple(Utility):
        raise InvalidValueError(
            f"no utility is called {name[:32]!r}", hint=f"known: {', '.join(Utility)}"
        )
    return Utility(name)


def marginal_bound(utility: Utility, n_sites: int) -> float:
    """Return the most that one site's joining can change a coalition's utility by.

    An accuracy lies in [0, 1]. In the Brier game ``|q_k| <= 1/K`` and ``|s| <= 1``, so that
    ``|2 <q_k, e_y> - 2 <s, q_k> - |q_k|^2| <= (4 + 1/K) / K``.
    """
    return 1.0 if utility is Utility.ACCURACY else (4.0 + 1.0 / n_sites) / n_sites


def query_utilities(
    sums_mtc: Array,
    sizes: npt.NDArray[np.number[Any]],
    labels: IntArray,
    utility: Utility,
    n_sites: int,
) -> Array:
    """Return what coalitions' answers to single queries are worth.

    Parameters
    ----------
    sums_mtc : float array of shape (n_coalitions, n_queries, n_classes)
        Sums of the members' probabilities.
    sizes : int array broadcastable to (n_coalitions, n_queries)
        Members.
    labels : int array of shape (n_queries,)
    n_sites : int
        K of the whole game.

    Returns
    -------
    utilities_mt : float array of shape (n_coalitions, n_queries)
    """
    at_label = np.take_along_axis(sums_mtc, labels[None, :, None], axis=2)[..., 0]
    if utility is Utility.BRIER:
        # |s|^2 of centred sums without centring them: each row sums to the coalition's size.
        squared = np.einsum("mtc,mtc->mt", sums_mtc, sums_mtc) - sizes**2 / sums_mtc.shape[2]
        centred = at_label - sizes / sums_mtc.shape[2]
        return np.asarray(2.0 * centred / n_sites - squared / n_sites**2)
    # To nine digits: the order in which members were added must not decide a tie.
    best = sums_mtc.max(axis=2) - 1e-9
    tied = (sums_mtc >= best[..., None]).sum(axis=2)
    return np.asarray((at_label >= best) / tied)


def coalition_values(
    answers: AuditedAnswers, members_mk: npt.NDArray[np.bool_], utility: Utility
) -> Array:
    """Return the mean utility of some coalitions.

    Parameters
    ----------
    members_mk : bool array of shape (n_coalitions, n_sites)

    Returns
    -------
    values : float array of shape (n_coalitions,)
    """
    labels = answers.public().require_labels("coalition value")
    n_sites, n_queries, n_classes = answers.probabilities_ktc.shape
    flat = answers.probabilities_ktc.reshape(n_sites, -1)
    step = max(1, _CHUNK_VALUES // (n_queries * n_classes))
    values = np.empty(len(members_mk))
    for start in range(0, len(members_mk), step):
        some = members_mk[start : start + step].astype(float)
        sums = (some @ flat).reshape(len(some), n_queries, n_classes)
        sizes = some.sum(axis=1)[:, None]
        utilities = query_utilities(sums, sizes, labels, utility, n_sites)
        values[start : start + step] = utilities.mean(axis=1)
    return values


def all_coalition_values(answers: AuditedAnswers, utility: Utility) -> Array:
    """Return the mean utility of every coalition; bit k of its place says whether k is in.

    Returns
    -------
    values : float array of shape (2 ** n_sites,)
    """
    labels = answers.public().require_labels("coalition value")
    n_sites, n_queries, n_classes = answers.probabilities_ktc.shape
    n_coalitions = 1 << n_sites
    sizes = members_of(n_sites).sum(axis=1)[:, None]
    step = max(1, _CHUNK_VALUES // (n_coalitions * n_classes))
    totals = np.zeros(n_coalitions)
    for start in range(0, n_queries, step):
        some = answers.probabilities_ktc[:, start : start + step]
        sums = np.zeros((n_coalitions, some.shape[1], n_classes))
        for k, answer in enumerate(some):  # every coalition without k, and the same with it
            np.add(sums[: 1 << k], answer, out=sums[1 << k : 2 << k])
        chunk_labels = labels[start : start + step]
        totals += query_utilities(sums, sizes, chunk_labels, utility, n_sites).sum(axis=1)
    return np.asarray(totals / n_queries)


def members_of(n_sites: int) -> npt.NDArray[np.bool_]:
    """Return who is in each coalition, in the order of `all_coalition_values`.

    Examples
    --------
    >>> members_of(2).astype(int).tolist()
    [[0, 0], [1, 0], [0, 1], [1, 1]]
    """
    places = np.arange(1 << n_sites)[:, None]
    return np.asarray((places >> np.arange(n_sites)) & 1, dtype=bool)
