"""The ring in which shares add up: integers modulo 2**64, fixed point of 20 fraction bits.

numpy's uint64 arithmetic wraps around exactly as the ring's does.
"""

from __future__ import annotations

from typing import Final

import numpy as np
import numpy.typing as npt

from fedinfer_flower.errors import InvalidScoresError, ShapeError
from fedinfer_flower.privacy.masks import mask

__all__ = ["ONE", "RingArray", "centred", "decode", "encode_rows", "stream"]

Array = npt.NDArray[np.float64]
RingArray = npt.NDArray[np.uint64]
IntArray = npt.NDArray[np.int64]

ONE: Final = 2**20
"""The number 1 on the grid. An entry is rounded by at most half a step, 2**-21."""

_ROW_SLACK: Final = 1e-6


def encode_rows(probabilities_bc: Array) -> RingArray:
    """Turn probabilities into ring elements of the same shape.

    Parameters
    ----------
    probabilities_bc : float array of shape (n_queries, n_classes)

    Raises
    ------
    ShapeError
        If it is no such array, or empty.
    InvalidScoresError
        If a row is no distribution.

    Examples
    --------
    >>> encode_rows(np.array([[0.25, 0.75]]))
    array([[262144, 786432]], dtype=uint64)
    """
    rows = np.asarray(probabilities_bc, dtype=np.float64)
    if rows.ndim != 2 or 0 in rows.shape:
        raise ShapeError("evidence has shape (n_queries, n_classes), not empty")
    if not ((rows >= 0.0) & (rows <= 1.0 + _ROW_SLACK)).all():  # NaN is neither
        raise InvalidScoresError("evidence is probabilities: in [0, 1] and finite")
    if not np.allclose(rows.sum(axis=1), 1.0, rtol=0.0, atol=_ROW_SLACK):
        raise InvalidScoresError("each row of evidence sums to 1")
    return np.rint(rows * ONE).astype(np.uint64)


def centred(ring: RingArray) -> IntArray:
    """Return the representatives in [-2**63, 2**63)."""
    return np.ascontiguousarray(ring, dtype=np.uint64).view(np.int64)


def decode(ring: RingArray) -> Array:
    """Return ring elements as floats; inverse of `encode_rows` up to rounding."""
    return np.asarray(centred(ring) / ONE, dtype=np.float64)


def stream(seed: bytes, count: int) -> RingArray:
    """Return the `count` ring elements that a seed stands for (ChaCha20).

    Raises
    ------
    EnvelopeError
        If the seed does not have 32 bytes.

    Examples
    --------
    >>> len(stream(bytes(32), 5))
    5
    """
    words = mask(seed, 2 * count).astype("<u4", copy=False)
    return words.view("<u8").astype(np.uint64, copy=False)
