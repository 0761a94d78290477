"""How much of the sites' answers an attacker got back."""

from __future__ import annotations

from typing import Final

import numpy as np

from fedinfer_flower.ensemble.base import Array
from fedinfer_flower.privacy.base import Protection, ScorePlan

__all__ = ["RECOVERED_SHARE", "STRONG_EPSILON", "promises_noise", "recovered_share"]

RECOVERED_SHARE: Final = 0.5
"""An answer counts as read when half of the error of a guess is gone. Far from both sides:
exact reading gives 1, and noise that hides an answer gives 0."""

STRONG_EPSILON: Final = 2.0
"""Largest epsilon whose promise is read as a claim to stop an attack: any two answers are
then at odds of at most e^2 = 7.4. Larger ones still bound attacks, but loosely."""


def recovered_share(estimate: Array, truth: Array) -> float:
    """Return the share of a guess's error that an estimate removes, at least 0.

    The guess is the mean of the true rows, which is better than what a stranger would guess.

    Parameters
    ----------
    estimate, truth : float arrays of shape (n_queries, width)

    Examples
    --------
    >>> truth = np.array([[0.0, 1.0], [1.0, 0.0]])
    >>> recovered_share(truth, truth), recovered_share(truth + 9.0, truth)
    (1.0, 0.0)
    """
    guess = np.sqrt(np.mean((truth - truth.mean(axis=0)) ** 2))
    error = np.sqrt(np.mean((estimate - truth) ** 2))
    # Where all rows are alike there is nothing to read.
    return float(max(1.0 - error / guess, 0.0)) if guess > 0.0 else 0.0


def promises_noise(protection: Protection, plan: ScorePlan) -> bool:
    """Return whether a row of an answer is private with a strong epsilon."""
    promise = protection.epsilon_delta(plan)
    return promise is not None and promise[0] <= STRONG_EPSILON
