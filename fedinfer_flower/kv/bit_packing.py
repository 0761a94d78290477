"""Small symbols as bytes, and back."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from fedinfer_flower.errors import CacheError

__all__ = ["pack_symbols", "packed_bytes", "unpack_symbols"]

_NIBBLE = 4


def packed_bytes(count: int, bits: int) -> int:
    """Return the bytes that `count` symbols of 4 or 8 bits take."""
    return (count * bits + 7) // 8


def pack_symbols(symbols: npt.NDArray[np.uint8], bits: int) -> bytes:
    """Pack symbols below 2**bits; of two in a byte the first has the low half.

    Examples
    --------
    >>> pack_symbols(np.array([1, 2, 15], np.uint8), 4).hex()
    '210f'
    """
    flat = symbols.reshape(-1)
    if bits != _NIBBLE:
        return flat.tobytes()
    even = np.zeros(packed_bytes(flat.size, bits) * 2, np.uint8)
    even[: flat.size] = flat
    return (even[::2] | (even[1::2] << _NIBBLE)).tobytes()


def unpack_symbols(data: memoryview, count: int, bits: int) -> npt.NDArray[np.uint8]:
    """Undo `pack_symbols`.

    Parameters
    ----------
    data : memoryview
        Exactly `packed_bytes(count, bits)` long.
    count : int
    bits : int
        4 or 8.

    Raises
    ------
    CacheError
        If the unused half of the last byte is not 0: one cache has one form.
    """
    raw = np.frombuffer(data, np.uint8)
    if bits != _NIBBLE:
        return raw
    both = np.empty(raw.size * 2, np.uint8)
    both[::2], both[1::2] = raw & 15, raw >> _NIBBLE
    if both[count:].any():
        raise CacheError("a cache payload with bits after its last symbol")
    return both[:count]
