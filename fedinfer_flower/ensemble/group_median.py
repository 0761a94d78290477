"""Medians of the means of groups: an order statistic that works on secure sums.

Nobody may see a single site's answer, so nobody can sort them. The sums of disjoint groups may
be seen, each hiding its members, and their median withstands hostile sites as long as they sit
in fewer than half of the groups. Axes: G groups, B queries, C classes.

References
----------
.. [1] Chen, Su and Xu, Distributed Statistical Machine Learning in Adversarial Settings:
   Byzantine Gradient Descent, SIGMETRICS 2018, section 3 (geometric median of means).
.. [2] Minsker, Geometric median and robust estimation in Banach spaces, Bernoulli 21, 2015.
"""

from __future__ import annotations

import secrets
from collections.abc import Sequence
from typing import Final

import numpy as np

from fedinfer_flower.ensemble.base import PROBABILITY_FLOOR, Array
from fedinfer_flower.errors import InvalidValueError, ShapeError

__all__ = ["MIN_GROUPS", "draw_groups", "group_median", "withstands"]

MIN_GROUPS: Final = 3
"""Two groups have no middle: their median is their mean."""


def withstands(n_groups: int) -> int:
    """Return how many groups may be wholly hostile: fewer than half.

    Hostile sites that do not choose their group may be as many; more may be withstood by
    luck, if several fall into one group, and none beyond is promised.

    Examples
    --------
    >>> withstands(3), withstands(7)
    (1, 3)
    """
    return (n_groups - 1) // 2


def draw_groups(
    site_ids: Sequence[int], *, n_groups: int, least: int = 3, seed: int | None = None
) -> tuple[tuple[int, ...], ...]:
    """Deal the sites into groups of nearly equal size, by lot.

    Parameters
    ----------
    site_ids : sequence of int
        Distinct.
    n_groups : int
        Odd is best: an even number withstands no more than the odd one below it.
    least : int
        Fewest sites of a group: its sum hides each member among so many.
    seed : int, optional
        For simulation. Default a fresh secret draw: who could foresee the groups could place
        one hostile site in each.

    Raises
    ------
    InvalidValueError
        If there are too few sites.

    Examples
    --------
    >>> sorted(map(len, draw_groups(range(10), n_groups=3)))
    [3, 3, 4]
    """
    if n_groups < MIN_GROUPS or least < 1:
        raise InvalidValueError(f"there are at least {MIN_GROUPS} groups of at least one site")
    if len(set(site_ids)) != len(site_ids):
        raise InvalidValueError("a site is in one group only")
    if len(site_ids) < n_groups * least:
        raise InvalidValueError(
            f"{len(site_ids)} sites do not make {n_groups} groups of {least}",
            hint=f"ask {n_groups * least} sites, or fewer groups",
        )
    rng = np.random.default_rng(secrets.randbits(128) if seed is None else seed)
    dealt = [int(site_ids[k]) for k in rng.permutation(len(site_ids))]
    return tuple(tuple(sorted(dealt[g::n_groups])) for g in range(n_groups))


def group_median(means_gbc: Array) -> Array:
    """Return the coordinate-wise median of the groups' probabilities, with rows that sum to 1.

    Each entry before normalising lies between entries of honest groups if fewer than half of
    the groups are hostile.

    Parameters
    ----------
    means_gbc : float array of shape (n_groups, n_queries, n_classes)

    Returns
    -------
    probabilities_bc : float array of shape (n_queries, n_classes)

    Examples
    --------
    >>> group_median(np.array([[[0.8, 0.2]], [[0.7, 0.3]], [[0.0, 1.0]]]))
    array([[0.7, 0.3]])
    """
    means = np.asarray(means_gbc, dtype=np.float64)
    if means.ndim != 3 or len(means) < MIN_GROUPS:
        raise ShapeError(f"means are (n_groups, n_queries, n_classes), {MIN_GROUPS} groups or more")
    if not (np.isfinite(means).all() and (means >= 0.0).all()):
        raise InvalidValueError("means of probabilities are finite and not negative")
    middle = np.maximum(np.median(means, axis=0), PROBABILITY_FLOOR)
    return np.asarray(middle / middle.sum(axis=1, keepdims=True))
