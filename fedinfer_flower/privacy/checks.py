"""What each role checks before it believes an array of scores.

Axes: B queries, S width of a score.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from fedinfer_flower.ensemble.base import Array, Disclosure
from fedinfer_flower.errors import InvalidScoresError, ShapeError
from fedinfer_flower.privacy.base import ScorePlan

__all__ = [
    "ROUNDING_SLACK",
    "check_scores",
    "read_array",
    "read_total",
    "require_within",
]

ROUNDING_SLACK = 1e-6
"""Relative excess over a bound that rounding to float32 and back can explain; more is an
error of the sender, and is refused instead of clipped."""


def require_within(values: Array, limit: float, *, what: str) -> None:
    """Refuse values that are not finite or larger than `limit` in absolute value.

    Raises
    ------
    InvalidScoresError
        Without any of the values in its text.
    """
    # NaN compares false to everything, so it fails this test as well.
    if not bool(np.all(np.abs(values) <= limit)):
        raise InvalidScoresError(f"{what} hold entries that are not finite or beyond their bound")


def check_scores(scores: Array, plan: ScorePlan) -> None:
    """Refuse scores that do not fit the plan; the first step of every site side.

    Raises
    ------
    ShapeError
        If the scores are not of shape (n_queries, width) with at least one row.
    InvalidScoresError
        If an entry is not finite, or beyond the rule's bound.
    """
    if scores.ndim != 2 or scores.shape[0] < 1 or scores.shape[1] != plan.width:
        raise ShapeError(f"expected scores of shape (n_queries, {plan.width}), got {scores.shape}")
    require_within(scores, plan.bound * (1.0 + ROUNDING_SLACK), what="the scores")


def read_array(payload: bytes | memoryview, dtype: str, shape: tuple[int, int]) -> npt.NDArray[Any]:
    """View a payload as an array of exactly this shape and little-endian dtype.

    Raises
    ------
    ShapeError
        If the payload has another length.
    """
    expected = shape[0] * shape[1] * np.dtype(dtype).itemsize
    if len(payload) != expected:
        raise ShapeError(f"expected a payload of {expected} bytes, got {len(payload)}")
    return np.frombuffer(payload, dtype=dtype).reshape(shape)


def read_total(
    total: bytes | memoryview, plan: ScorePlan, *, n_queries: int, limit: float
) -> Array:
    """Read a total of 64-bit floats; entries of a sum stay within `limit`.

    What a rule that discloses SCORES combines has no bound that the querier knows, so
    there it checks for finite numbers only.
    """
    opened = read_array(total, "<f8", (n_queries, plan.width)).astype(np.float64)
    largest = limit if plan.discloses is Disclosure.SUM else np.finfo(np.float64).max
    require_within(opened, float(largest), what="the combined scores")
    return opened
