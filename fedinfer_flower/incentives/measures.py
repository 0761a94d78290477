"""How well a reward split follows merit, and what cheating gains.

Shares are of positive parts: scores below zero count as zero, and if nobody is above it
everybody has an equal share.
"""

from __future__ import annotations

from collections.abc import Collection

import numpy as np

from fedinfer_flower.errors import InvalidValueError, ShapeError
from fedinfer_flower.incentives.base import Array

__all__ = [
    "attacker_share",
    "chance_adjusted_f",
    "clone_gain",
    "cosine",
    "fairness_f",
    "kendall",
    "kl_divergence",
    "shares",
    "spearman",
    "top_one_hit",
]


def shares(scores: Array) -> Array:
    """Return positive parts over their sum.

    Examples
    --------
    >>> shares(np.array([3.0, 1.0, -2.0]))
    array([0.75, 0.25, 0.  ])
    """
    scores = np.asarray(scores, dtype=float)
    if scores.ndim != 1 or not len(scores) or not np.isfinite(scores).all():
        raise InvalidValueError("scores are one finite number a site")
    positive = np.maximum(scores, 0.0)
    largest = positive.max()
    if largest == 0.0:
        return np.full(len(scores), 1.0 / len(scores))
    return np.asarray(positive / largest / (positive / largest).sum())


def _pair(first: Array, second: Array) -> tuple[Array, Array]:
    first, second = np.asarray(first, dtype=float), np.asarray(second, dtype=float)
    if first.ndim != 1 or first.shape != second.shape or not len(first):
        raise ShapeError("a measure compares two numbers for each of the same sites")
    return first, second


def fairness_f(merit: Array, reward: Array) -> float:
    """Return ``F = 1 - |merit shares - reward shares|_1 / 2``.

    Near 1 for almost anything where sites are alike, an equal split too: read it beside
    `chance_adjusted_f` and `spearman`.

    References
    ----------
    .. [1] FedSEI, "Federated Inference", arXiv 2603.02214: merit is standalone accuracy.

    Examples
    --------
    >>> fairness_f(np.array([0.75, 0.25]), np.array([1.0, 1.0]))
    0.75
    """
    first, second = _pair(merit, reward)
    return float(1.0 - np.abs(shares(first) - shares(second)).sum() / 2.0)


def chance_adjusted_f(accuracy: Array, reward: Array, n_classes: int) -> float:
    """Return F against accuracy above chance, ``max(acc - 1/C, 0)``: guessing has no merit.

    Examples
    --------
    >>> chance_adjusted_f(np.array([0.75, 0.5]), np.array([1.0, 1.0]), 2)
    0.5
    """
    return fairness_f(np.asarray(accuracy, dtype=float) - 1.0 / n_classes, reward)


def _ranks(values: Array) -> Array:
    _, place, counts = np.unique(values, return_inverse=True, return_counts=True)
    ends = np.cumsum(counts)
    return np.asarray((ends - (counts - 1) / 2.0)[place])


def spearman(first: Array, second: Array) -> float:
    """Return the rank correlation; 0 where either does not rank at all.

    Examples
    --------
    >>> round(spearman(np.array([1.0, 2.0, 3.0]), np.array([0.1, 0.5, 0.4])), 3)
    0.5
    """
    a, b = (_ranks(values) for values in _pair(first, second))
    a, b = a - a.mean(), b - b.mean()
    size = float(np.sqrt((a @ a) * (b @ b)))
    return float(a @ b) / size if size > 0.0 else 0.0


def kendall(first: Array, second: Array) -> float:
    """Return tau-b: agreeing pairs less disagreeing ones; 0 where either does not rank.

    Examples
    --------
    >>> round(kendall(np.array([1.0, 2.0, 3.0]), np.array([0.1, 0.5, 0.4])), 3)
    0.333
    """
    a, b = (np.sign(values[:, None] - values) for values in _pair(first, second))
    size = float(np.sqrt(np.square(a).sum() * np.square(b).sum()))
    return float((a * b).sum()) / size if size > 0.0 else 0.0


def cosine(first: Array, second: Array) -> float:
    """Return the cosine of the angle; 0 where either is zero.

    Examples
    --------
    >>> cosine(np.array([1.0, 0.0]), np.array([0.0, 1.0]))
    0.0
    """
    a, b = _pair(first, second)
    size = float(np.sqrt(a @ a) * np.sqrt(b @ b))
    return float(a @ b) / size if size > 0.0 else 0.0


def kl_divergence(merit: Array, reward: Array, *, floor: float = 1e-6) -> float:
    """Return KL(merit shares || reward shares) in nats, with shares of at least `floor`.

    Examples
    --------
    >>> round(kl_divergence(np.array([0.75, 0.25]), np.array([1.0, 1.0])), 3)
    0.131
    """
    a, b = (np.maximum(shares(values), floor) for values in _pair(merit, reward))
    a, b = a / a.sum(), b / b.sum()
    return float((a * np.log(a / b)).sum())


def top_one_hit(merit: Array, reward: Array) -> bool:
    """Return whether the best-paid site is one of the best.

    Examples
    --------
    >>> top_one_hit(np.array([0.9, 0.5]), np.array([3.0, 1.0]))
    True
    """
    a, b = _pair(merit, reward)
    return bool(a[b.argmax()] == a.max())


def attacker_share(rewards: Array, attackers: Collection[int]) -> float:
    """Return what part of the pot some sites get together.

    Examples
    --------
    >>> attacker_share(np.array([2.0, 1.0, 1.0]), {2})
    0.25
    """
    return float(shares(rewards)[sorted(set(attackers))].sum())


def clone_gain(
    before: Array, after: Array, *, original: int, family: Collection[int], floor: float = 1e-3
) -> float:
    """Return what a site and its copies get together, over what it got alone.

    Parameters
    ----------
    before, after : float arrays
        Scores without and with the copies; of unlike lengths.
    original : int
        Place of the site in `before`.
    family : collection of int
        Places of the site and its copies in `after`.
    floor : float
        Least share before, where a site earned almost nothing.

    Examples
    --------
    >>> clone_gain(np.ones(2), np.ones(3), original=0, family={0, 2}).__round__(3)
    1.333
    """
    alone = max(float(shares(before)[original]), floor)
    return attacker_share(after, family) / alone
