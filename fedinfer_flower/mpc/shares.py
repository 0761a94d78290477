"""Replicated secret sharing over the integers modulo 2^64, as ABY3 uses it.

A value is written as a fixed-point integer x and split into three parts that add up to it::

    x = r0 + r1 + r2  (mod 2^64)      r0, r1 uniform, from a cryptographic generator
    party i holds (r_i, r_i+1)        party 2 holds (r2, r0)

Any two of the three parts are uniform and independent of x, so what one party holds says
nothing about x: that is unconditional, and holds for every distribution of x. Two parties
hold all three parts, and have x.

Axes: the last axis of what a party holds has length 2, its two parts side by side. That is
the memory layout of SPU's ``aby3.AShr<FM64>``.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Final, TypeAlias

import numpy as np
import numpy.typing as npt
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms

from fedinfer_flower.errors import BindingError, InvalidScoresError, InvalidValueError, ShapeError
from fedinfer_flower.privacy.noise import random_words

__all__ = [
    "FRACTION_BITS",
    "MAX_MAGNITUDE",
    "N_PARTIES",
    "Words",
    "decode_integers",
    "decode_reals",
    "encode_reals",
    "held_from_bytes",
    "held_to_bytes",
    "join",
    "split",
    "zero_masks",
]

Words: TypeAlias = npt.NDArray[np.uint64]

N_PARTIES: Final = 3

FRACTION_BITS: Final = 18
"""SPU's default for a ring of 64 bits: steps of 3.8e-6."""

MAX_MAGNITUDE: Final = 2.0**16
"""Largest input or weight. A product has 36 fraction bits, and SPU's truncation is exact up
to one step only while it stays below 2^62: the sum of a layer's products must stay below
2^26. The bound leaves a factor of 2^10 to a product of 1."""


def encode_reals(values: npt.NDArray[np.generic]) -> Words:
    """Return values as fixed-point integers modulo 2^64.

    Parameters
    ----------
    values : float array
        Finite, within `MAX_MAGNITUDE`.

    Raises
    ------
    InvalidValueError
        For NaN, infinity, or a value that is too large.

    Examples
    --------
    >>> encode_reals(np.array([1.0, -1.0])).astype(np.int64)
    array([ 262144, -262144])
    """
    reals = np.asarray(values, dtype=np.float64)
    # NaN compares false with everything: "not <=" catches it with the rest.
    if not bool((np.abs(reals) <= MAX_MAGNITUDE).all()):
        raise InvalidValueError(
            f"a value to be shared is not finite, or beyond {MAX_MAGNITUDE:g}",
            hint="scale the inputs, as the network's training did",
        )
    return np.rint(reals * 2.0**FRACTION_BITS).astype(np.int64).view(np.uint64)


def decode_reals(words: Words) -> npt.NDArray[np.float64]:
    """Return fixed-point integers as reals."""
    return np.asarray(words.view(np.int64) * 2.0**-FRACTION_BITS, dtype=np.float64)


def decode_integers(words: Words, *, low: int, high: int) -> npt.NDArray[np.int64]:
    """Return counts or labels, which are shared without fraction bits.

    Raises
    ------
    InvalidScoresError
        If one lies outside [low, high]: the parties' results are not those of the protocol.
    """
    integers = words.view(np.int64)
    if not bool(((integers >= low) & (integers <= high)).all()):
        raise InvalidScoresError(
            f"the joint result has an integer outside [{low}, {high}]",
            hint="a party deviated from the protocol, or a value overflowed",
        )
    return integers.copy()


def split(words: Words) -> tuple[Words, Words, Words]:
    """Split fixed-point integers among three parties.

    Parameters
    ----------
    words : uint64 array of any shape

    Returns
    -------
    held : three uint64 arrays of shape (..., 2)
        What party 0, 1 and 2 hold.

    Privacy
    -------
    One party's array is uniform whatever the words are. Two parties' arrays determine them.

    References
    ----------
    .. [1] Araki, Furukawa, Lindell, Nof, Ohara. High-throughput semi-honest secure
       three-party computation with an honest majority. CCS 2016, section 2.1.
    .. [2] Mohassel, Rindal. ABY3: a mixed protocol framework for machine learning. CCS 2018.

    Examples
    --------
    >>> held = split(encode_reals(np.array([0.5, -2.0])))
    >>> [h.shape for h in held]
    [(2, 2), (2, 2), (2, 2)]
    >>> decode_reals(join(held))
    array([ 0.5, -2. ])
    """
    drawn = random_words(2 * words.size).reshape((2, *words.shape))
    return _replicated(drawn[0], drawn[1], words - drawn[0] - drawn[1])


def join(held: Sequence[Words]) -> Words:
    """Add up what the three parties hold.

    Each part is held by two parties, so one party that sends other shares than it has is
    noticed here. One that deviated earlier, in the protocol itself, is not.

    Raises
    ------
    BindingError
        If two parties disagree on a part that both hold.
    """
    if len(held) != N_PARTIES or len({h.shape for h in held}) != 1 or held[0].shape[-1:] != (2,):
        raise ShapeError("a value is held by three parties, two parts each")
    for i in range(N_PARTIES):
        if not np.array_equal(held[i][..., 1], held[(i + 1) % N_PARTIES][..., 0]):
            raise BindingError(
                f"parties {i} and {(i + 1) % N_PARTIES} hold different copies of one part",
                hint="one of them altered its result; find out which before you ask again",
            )
    total: Words = held[0][..., 0] + held[1][..., 0] + held[2][..., 0]
    return total


def zero_masks(seed: bytes, number: int, shape: tuple[int, ...]) -> tuple[Words, Words, Words]:
    """Return what each party adds to its shares so that they are fresh, and their sum is not.

    Whoever made a query knows all its shares, and gets all shares of the result. Without
    masks that querier would look at more than the result.

    Parameters
    ----------
    seed : bytes
        32 bytes that all three parties know, and the querier does not.
    number : int
        Of the result: a mask that is used twice cancels.
    shape : tuple of int
        Of the result.

    Returns
    -------
    masks : three uint64 arrays of shape (*shape, 2)

    Examples
    --------
    >>> join(zero_masks(bytes(32), 0, (2,)))
    array([0, 0], dtype=uint64)
    """
    cipher = Cipher(algorithms.ChaCha20(seed, number.to_bytes(16, "little")), mode=None)
    stream = cipher.encryptor().update(bytes(16 * math.prod(shape)))
    drawn = np.frombuffer(stream, dtype="<u8").astype(np.uint64, copy=False)
    first, second = drawn.reshape((2, *shape))
    return _replicated(first, second, np.uint64(0) - first - second)


def _replicated(*parts: Words) -> tuple[Words, Words, Words]:
    first, second, third = (
        np.stack([parts[i], parts[(i + 1) % N_PARTIES]], axis=-1) for i in range(N_PARTIES)
    )
    return first, second, third


def held_to_bytes(held: Words) -> bytes:
    """Return what a party holds as little-endian words."""
    return np.ascontiguousarray(held, dtype="<u8").tobytes()


def held_from_bytes(data: bytes | memoryview, shape: tuple[int, ...]) -> Words:
    """Read what a party holds of an array of this shape.

    Returns
    -------
    held : uint64 array of shape (..., 2)

    Raises
    ------
    ShapeError
        If the bytes do not fill it exactly.
    """
    if len(data) != 16 * math.prod(shape):
        raise ShapeError(f"{len(data)} bytes do not fill one party's shares of shape {shape}")
    words = np.frombuffer(data, dtype="<u8").astype(np.uint64, copy=False)
    return words.reshape((*shape, 2))
