"""Noise from a cryptographic generator, on the integer grid.

Privacy noise must be unpredictable: whoever can guess the generator's state can subtract
the noise. So there is no seed and no `numpy.random` here; every call takes a fresh key from
the operating system and expands it with ChaCha20.

Noise is added after scores became integers. ``x + rint(G)`` equals ``rint(x + G)``, which is
the continuous Gaussian mechanism followed by rounding, and its support does not depend on x.
A float with noise in it has low bits that do.
"""

from __future__ import annotations

import math
import os

import numpy as np
import numpy.typing as npt
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms

from fedinfer_flower.errors import InvalidValueError
from fedinfer_flower.privacy.base import optional_module
from fedinfer_flower.privacy.fixed_point import IntArray

__all__ = ["coin_flips", "gaussian_integers", "random_words", "uniform_below"]

WordArray = npt.NDArray[np.uint64]

_KEY_BYTES = 32
_SIGN_BIT = np.uint64(63)
_BELOW_SIGN = np.uint64(2**63 - 1)


def random_words(count: int) -> WordArray:
    """Return `count` independent, uniform 64-bit words.

    Examples
    --------
    >>> len(random_words(3))
    3
    """
    # The key is used once, so a constant nonce is safe.
    cipher = Cipher(algorithms.ChaCha20(os.urandom(_KEY_BYTES), bytes(16)), mode=None)
    stream = cipher.encryptor().update(bytes(8 * count))
    return np.frombuffer(stream, dtype="<u8").astype(np.uint64, copy=False)


def gaussian_integers(shape: tuple[int, ...], std: float) -> IntArray:
    """Draw rounded Gaussian noise.

    Each draw inverts the normal distribution function in its lower tail, where a float
    keeps its relative precision: 63 bits and a further 64 make a number in (0, 1/2], one
    bit the sign. A single 52-bit uniform would make outcomes beyond 8.2 deviations
    impossible, and grain the rare outcomes that differential privacy is about.

    Parameters
    ----------
    shape : tuple of int
    std : float
        Standard deviation in grid steps.

    Returns
    -------
    noise : int64 array of this shape

    Raises
    ------
    InvalidValueError
        If `std` is not in (0, 2**40].
    MissingExtraError
        Without the extra ``dp``.

    Examples
    --------
    >>> gaussian_integers((2, 3), 50.0).shape
    (2, 3)
    """
    if not 0.0 < std <= 2.0**40:
        raise InvalidValueError("the standard deviation of noise is in (0, 2**40]")
    special = optional_module("scipy.special", extra="dp")
    count = math.prod(shape)
    words = random_words(2 * count)
    high, low = words[:count], words[count:]
    # The last term keeps the draw above 0, at 13.2 standard deviations.
    below_half = (high & _BELOW_SIGN) * 2.0**-64 + low * 2.0**-128 + 2.0**-130
    magnitude = np.rint(std * -special.ndtri(below_half)).astype(np.int64)
    signed = np.where(high >> _SIGN_BIT, -magnitude, magnitude)
    return np.asarray(signed.reshape(shape), dtype=np.int64)


def coin_flips(count: int, probability: float) -> npt.NDArray[np.bool_]:
    """Flip `count` coins; a probability that no 64-bit word can express is rounded up.

    Rounding up matters at large epsilon: a coin that never fell would be no privacy at all.

    Parameters
    ----------
    count : int
    probability : float
        Of True, in (0, 1).

    Examples
    --------
    >>> coin_flips(2, 0.5).dtype
    dtype('bool')
    """
    if not 0.0 < probability < 1.0:
        raise InvalidValueError("the probability of a coin is in (0, 1)")
    # Two units in the last place cover the rounding of the product.
    threshold = min(math.ceil(probability * (1.0 + 2.0**-51) * 2.0**64), 2**64 - 1)
    return random_words(count) < np.uint64(threshold)


def uniform_below(count: int, limit: int) -> IntArray:
    """Draw `count` integers, uniform in [0, limit), without modulo bias.

    Parameters
    ----------
    count : int
    limit : int
        In [1, 2**32].

    Examples
    --------
    >>> int(uniform_below(4, 1).sum())
    0
    """
    if not 1 <= limit <= 2**32:
        raise InvalidValueError("the limit of a uniform draw is in [1, 2**32]")
    # Words past the last whole multiple of the limit would favour small results.
    usable = 2**64 // limit * limit
    words = random_words(count)
    while usable < 2**64 and bool((late := words >= np.uint64(usable)).any()):
        words = words.copy()
        words[late] = random_words(int(late.sum()))
    return (words % np.uint64(limit)).astype(np.int64)
