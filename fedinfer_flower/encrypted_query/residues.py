"""Ciphertexts and keys between roles: a fixed number of residues, each below its prime.

The same gate as `privacy.ciphertext_gate`, for chains of several primes. The native library's
own format never travels. The receiver knows from its plan how long the bytes are, checks that
and the range of each residue, and writes the native message itself (`native`).

The gate authenticates nobody, and a ciphertext of anything passes.

Layout: two polynomials one after the other; within each, all residues of the first prime, then
of the second; a residue takes the bytes that its prime takes, little-endian.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import numpy.typing as npt

from fedinfer_flower.errors import InvalidCiphertextError

__all__ = ["Residues", "pack_pair", "packed_bytes", "read_pair", "read_pairs"]

Residues = npt.NDArray[np.uint64]


def _width(prime: int) -> int:
    return (prime.bit_length() + 7) // 8


def packed_bytes(degree: int, primes: tuple[int, ...]) -> int:
    """Return the exact size of two polynomials.

    Examples
    --------
    >>> packed_bytes(4096, (9_007_199_254_429_697, 1_099_511_480_321))
    98304
    """
    return 2 * degree * sum(map(_width, primes))


def pack_pair(residues: Residues, degree: int, primes: tuple[int, ...]) -> bytes:
    """Pack two polynomials for another role.

    Parameters
    ----------
    residues : uint64 array of shape (2 * n_primes * degree,)
        As the native library stores them.
    """
    parts = []
    for prime, block in zip((*primes, *primes), residues.reshape(-1, degree), strict=True):
        octets = block.astype("<u8").view(np.uint8).reshape(degree, 8)
        parts.append(octets[:, : _width(prime)].tobytes())
    return b"".join(parts)


def read_pair(packed: bytes | memoryview, degree: int, primes: tuple[int, ...]) -> Residues:
    """Check two polynomials from another role and return their residues.

    Raises
    ------
    InvalidCiphertextError
        If the length is not exactly right, a residue is not below its prime, or the second
        polynomial is zero modulo a prime: then anyone could read the message.

    Examples
    --------
    >>> read_pair(bytes(98_304), 4096, (9_007_199_254_429_697, 1_099_511_480_321))
    ... # doctest: +ELLIPSIS
    Traceback (most recent call last):
    ...
    fedinfer_flower.errors.InvalidCiphertextError: FI307 ...
    """
    expected = packed_bytes(degree, primes)
    if len(packed) != expected:
        raise InvalidCiphertextError(f"two polynomials take {expected} bytes, got {len(packed)}")
    data = np.frombuffer(packed, dtype=np.uint8)
    blocks = np.zeros((2 * len(primes), degree), dtype=np.uint64)
    at = 0
    for prime, block in zip((*primes, *primes), blocks, strict=True):
        octets = np.zeros((degree, 8), dtype=np.uint8)
        end = at + degree * _width(prime)
        octets[:, : _width(prime)] = data[at:end].reshape(degree, -1)
        block[:] = octets.view("<u8").ravel()
        if int(block.max()) >= prime:
            raise InvalidCiphertextError("a residue is not below its prime")
        at = end
    if not blocks[len(primes) :].any(axis=1).all():
        raise InvalidCiphertextError("a ciphertext that hides nothing")
    return blocks.ravel()


def read_pairs(
    packed: bytes | memoryview, *, count: int, degree: int, primes: tuple[int, ...]
) -> Iterator[Residues]:
    """Check the length of `count` pairs, then yield the residues of each.

    Raises
    ------
    InvalidCiphertextError
        As `read_pair`.
    """
    step = packed_bytes(degree, primes)
    view = memoryview(packed)
    if len(view) != count * step:
        raise InvalidCiphertextError(
            f"{count} ciphertexts take {count * step} bytes, got {len(view)}"
        )
    for start in range(0, len(view), step):
        yield read_pair(view[start : start + step], degree, primes)
