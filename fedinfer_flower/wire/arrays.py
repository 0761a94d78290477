"""Arrays as bytes: raw little-endian values, a short list of dtypes, sizes checked first."""

from __future__ import annotations

import math
from typing import Final

import numpy as np
import numpy.typing as npt

from fedinfer_flower.errors import InvalidScoresError, InvalidValueError, ShapeError

__all__ = ["DTYPES", "array_from_bytes", "array_to_bytes"]

DTYPES: Final = ("bool", "uint8", "int32", "int64", "float16", "float32", "float64")
"""Dtypes that inputs may have. No objects and no strings: nothing that could run code."""


def array_to_bytes(array: npt.NDArray[np.generic]) -> tuple[str, bytes]:
    """Return (dtype name, bytes) of an array of shape (n_queries, ...).

    Raises
    ------
    InvalidValueError
        If the dtype is not in `DTYPES`, or a value is not finite.
    """
    name = array.dtype.name
    if name not in DTYPES:
        raise InvalidValueError(
            f"inputs of dtype {name} do not travel", hint=f"convert to one of {', '.join(DTYPES)}"
        )
    if array.dtype.kind == "f" and not np.isfinite(array).all():
        raise InvalidValueError("inputs have NaN or infinite values", hint="impute them first")
    return name, np.ascontiguousarray(array, dtype=array.dtype.newbyteorder("<")).tobytes()


def array_from_bytes(
    data: bytes | memoryview, *, dtype: str, shape: tuple[int, ...]
) -> npt.NDArray[np.generic]:
    """Return a read-only view of `data` as an array.

    Raises
    ------
    ShapeError
        If the dtype is unknown, or the bytes do not fill the shape exactly, or it is empty.
    InvalidScoresError
        If a value is not finite.

    Examples
    --------
    >>> name, data = array_to_bytes(np.array([[1.0, 2.0]]))
    >>> array_from_bytes(data, dtype=name, shape=(1, 2))
    array([[1., 2.]])
    """
    if dtype not in DTYPES:
        raise ShapeError("an array of unknown dtype")
    little = np.dtype(dtype).newbyteorder("<")
    # A dimension of zero would let the others be of any size.
    if not shape or 0 in shape or len(data) != math.prod(shape) * little.itemsize:
        raise ShapeError(f"{len(data)} bytes do not fill an array of shape {shape} and {dtype}")
    array: npt.NDArray[np.generic] = np.frombuffer(data, dtype=little).reshape(shape)
    if array.dtype.kind == "f" and not np.isfinite(array).all():
        raise InvalidScoresError("an array with NaN or infinite values")
    array.flags.writeable = False
    return array
