"""What a site learns about its own model from held-out data of its own."""

from __future__ import annotations

import math
from typing import Final

import numpy as np
import numpy.typing as npt

from fedinfer_flower.ensemble.base import Array, log_softmax

__all__ = ["MIN_HOLDOUT", "confusion_matrix", "fit_temperature", "negative_log_likelihood"]

MIN_HOLDOUT: Final = 10
"""Fewest held-out examples for a temperature; below, its error exceeds its use."""

_HOTTEST: Final = 20.0


def negative_log_likelihood(logits: Array, labels: npt.NDArray[np.int64], tau: float) -> float:
    """Return the mean negative log-likelihood at temperature `tau`, in nats."""
    rows = np.arange(len(labels))
    return float(-log_softmax(logits / tau)[rows, labels].mean())


def fit_temperature(logits: Array, labels: npt.NDArray[np.int64]) -> float:
    """Return the temperature in [1, 20] that makes held-out labels likeliest.

    Never below 1: the held-out data of a site is as skewed as its training data, so it
    says how confident the model may be among the classes it knows, and nothing about
    queries from outside them. A temperature below 1 sharpens exactly those.

    Parameters
    ----------
    logits : float array of shape (n_examples, n_local_classes)
    labels : int array of shape (n_examples,)
        Column of the true class.

    Returns
    -------
    tau : float
        1.0 if there are fewer than `MIN_HOLDOUT` examples.

    References
    ----------
    .. [1] Guo et al., On Calibration of Modern Neural Networks, 2017, section 4.2.

    Examples
    --------
    >>> fit_temperature(np.zeros((3, 2)), np.array([0, 1, 0]))
    1.0
    """
    if len(labels) < MIN_HOLDOUT:
        return 1.0
    # The loss is convex in 1/tau, so a ternary search over log(tau) finds its minimum.
    low, high = 0.0, math.log(_HOTTEST)
    for _ in range(40):
        left, right = low + (high - low) / 3, high - (high - low) / 3
        at_left = negative_log_likelihood(logits, labels, math.exp(left))
        at_right = negative_log_likelihood(logits, labels, math.exp(right))
        low, high = (low, right) if at_left <= at_right else (left, high)
    return math.exp((low + high) / 2)


def confusion_matrix(
    votes: npt.NDArray[np.int64], labels: npt.NDArray[np.int64], n_classes: int
) -> Array:
    """Return estimates of P(model says column | truth is row).

    Counts start at 0.01, so that nothing seen is impossible; the row of a class that
    never occurs is uniform.

    Examples
    --------
    >>> confusion_matrix(np.array([0, 0]), np.array([0, 0]), 2).round(2)
    array([[1. , 0. ],
           [0.5, 0.5]])
    """
    counts = np.full((n_classes, n_classes), 1e-2)
    np.add.at(counts, (labels, votes), 1.0)
    return np.asarray(counts / counts.sum(axis=1, keepdims=True))
