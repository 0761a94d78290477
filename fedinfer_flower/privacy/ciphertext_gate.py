"""The gate between bytes of other roles and the native HE library.

Bytes must be checked before the native library reads them, whoever sent them. Checking the
library's own format from outside is not enough, because much of it is compressed and nested.
So that format does not travel at all. Roles exchange ciphertexts and public keys as bare
polynomials: a fixed number of residues, each in a fixed number of bytes and below its prime.
There is nothing else to say, nothing to parse, and every such array is a sound ciphertext.

The receiver checks length and range, and then writes the native message itself, so the
library only ever reads what this module has written. It also saves a sixth of the bytes.

The gate does not authenticate the sender, and a ciphertext of anything whatever passes:
homomorphic encryption is malleable. The envelope authenticates; the querier checks the range
of what it decrypts.

A ciphertext is two polynomials, a public key likewise; polynomials are stored one after the
other, within each all residues of the first prime and then of the second.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator

import numpy as np
import numpy.typing as npt

from fedinfer_flower.errors import InvalidCiphertextError
from fedinfer_flower.privacy.he_schemes import DEGREE, Prime, Scheme

__all__ = [
    "Residues",
    "native_context",
    "native_vector",
    "pack_polynomials",
    "packed_bytes",
    "read_polynomials",
]

Residues = npt.NDArray[np.uint64]

_POLYNOMIALS = 2

# seal::Serialization::SEALHeader: magic, header size, version (2 bytes), compression (none),
# reserved (2 bytes), length of the whole object.
_SEAL_HEADER = struct.Struct("<HBBBBHQ")
_SEAL_MAGIC = 0xA15E
# seal::Ciphertext: parameter id, whether in NTT form, number of polynomials, degree, number
# of primes, scale, correction factor (1 outside of BGV).
_SEAL_CIPHERTEXT = struct.Struct("<32s?QQQdQ")

# Tags of protocol buffers: field number times 8, plus 0 for a varint, 1 for eight bytes,
# 2 for a length and that many bytes.
_VARINT, _DOUBLE, _BYTES = 0, 1, 2

_AUTO_FLAGS = 7
"""TenSEAL's defaults: relinearise, rescale, switch moduli. Additions use none of them."""


def packed_bytes(primes: tuple[Prime, ...]) -> int:
    """Return the exact size of a ciphertext or a key between roles.

    Examples
    --------
    >>> from fedinfer_flower.privacy.he_schemes import BFV
    >>> packed_bytes(BFV.ciphertext_primes)
    20480
    """
    return _POLYNOMIALS * DEGREE * sum(prime.wire_bytes for prime in primes)


def _blocks(primes: tuple[Prime, ...]) -> Iterator[Prime]:
    """Yield the prime of each run of DEGREE residues."""
    for _ in range(_POLYNOMIALS):
        yield from primes


def pack_polynomials(residues: Residues, primes: tuple[Prime, ...]) -> bytes:
    """Pack two polynomials for another role.

    Parameters
    ----------
    residues : uint64 array of shape (2 * n_primes * DEGREE,)
        As SEAL stores them, each below its prime.
    primes : tuple of Prime
    """
    parts = []
    for prime, block in zip(_blocks(primes), residues.reshape(-1, DEGREE), strict=True):
        octets = block.astype("<u8").view(np.uint8).reshape(DEGREE, 8)
        parts.append(octets[:, : prime.wire_bytes].tobytes())
    return b"".join(parts)


def read_polynomials(packed: bytes | memoryview, primes: tuple[Prime, ...]) -> Residues:
    """Check what another role sent, and return its residues.

    Raises
    ------
    InvalidCiphertextError
        If the length is not exactly right, a residue is not below its prime, or the second
        polynomial is zero: then anyone could read the message.

    Examples
    --------
    >>> from fedinfer_flower.privacy.he_schemes import BFV
    >>> read_polynomials(bytes(20_480), BFV.ciphertext_primes)  # doctest: +ELLIPSIS
    Traceback (most recent call last):
    ...
    fedinfer_flower.errors.InvalidCiphertextError: FI307 ...
    """
    if len(packed) != packed_bytes(primes):
        raise InvalidCiphertextError(
            f"two polynomials take {packed_bytes(primes)} bytes, got {len(packed)}"
        )
    data = np.frombuffer(packed, dtype=np.uint8)
    blocks = []
    at = 0
    for prime in _blocks(primes):
        octets = np.zeros((DEGREE, 8), dtype=np.uint8)
        end = at + DEGREE * prime.wire_bytes
        octets[:, : prime.wire_bytes] = data[at:end].reshape(DEGREE, prime.wire_bytes)
        block = octets.view("<u8").ravel().astype(np.uint64, copy=False)
        if int(block.max()) >= prime.value:
            raise InvalidCiphertextError("a residue is not below its prime")
        blocks.append(block)
        at = end
    residues = np.concatenate(blocks)
    if not residues[len(residues) // _POLYNOMIALS :].any():
        raise InvalidCiphertextError("a ciphertext that hides nothing")
    return residues


def native_vector(
    residues: Residues, scheme: Scheme, *, n_values: int, version: tuple[int, int]
) -> bytes:
    """Write TenSEAL's message of a vector of one ciphertext.

    Parameters
    ----------
    residues : uint64 array of shape (2 * DEGREE,)
        Checked by `read_polynomials`.
    scheme : Scheme
    n_values : int
        Worked out by the receiver from its own batch; never read from a message.
    version : tuple of int
        Major and minor version of the SEAL that will read it.
    """
    is_ntt = scheme.scale is not None
    ciphertext = _seal_polynomials(residues, scheme, scheme.ciphertext_primes, is_ntt, version)
    message = _field(1, _BYTES, _varint(n_values)) + _field(2, _BYTES, ciphertext)
    if scheme.scale is None:
        return message
    return message + _field(3, _DOUBLE, struct.pack("<d", scheme.scale))


def native_context(residues: Residues, scheme: Scheme, *, version: tuple[int, int]) -> bytes:
    """Write TenSEAL's message of a context of our parameters and this public key.

    Parameters
    ----------
    residues : uint64 array of shape (4 * DEGREE,)
        Checked by `read_polynomials`.
    scheme : Scheme
    version : tuple of int
        Major and minor version of the SEAL that will read it.
    """
    key = _seal_polynomials(residues, scheme, scheme.key_primes, True, version)
    scale = -1.0 if scheme.scale is None else scheme.scale
    public = (
        _field(1, _BYTES, key)
        + _field(2, _VARINT, _varint(_AUTO_FLAGS))
        + _field(3, _DOUBLE, struct.pack("<d", scale))
    )
    return _field(1, _BYTES, _seal_parameters(scheme, version)) + _field(2, _BYTES, public)


def _seal_parameters(scheme: Scheme, version: tuple[int, int]) -> bytes:
    body = struct.pack("<BQQ", scheme.code, DEGREE, len(scheme.key_primes))
    for modulus in (*(prime.value for prime in scheme.key_primes), scheme.plain_modulus):
        body += _seal_object(struct.pack("<Q", modulus), version)
    return _seal_object(body, version)


def _seal_polynomials(
    residues: Residues,
    scheme: Scheme,
    primes: tuple[Prime, ...],
    is_ntt: bool,
    version: tuple[int, int],
) -> bytes:
    # A public key is a ciphertext to SEAL, with scale 1.
    scale = scheme.scale if scheme.scale is not None and primes != scheme.key_primes else 1.0
    head = _SEAL_CIPHERTEXT.pack(
        scheme.parameter_id(primes), is_ntt, _POLYNOMIALS, DEGREE, len(primes), scale, 1
    )
    array = struct.pack("<Q", residues.size) + residues.astype("<u8").tobytes()
    return _seal_object(head + _seal_object(array, version), version)


def _seal_object(body: bytes, version: tuple[int, int]) -> bytes:
    length = _SEAL_HEADER.size + len(body)
    return _SEAL_HEADER.pack(_SEAL_MAGIC, _SEAL_HEADER.size, *version, 0, 0, length) + body


def _varint(value: int) -> bytes:
    octets = bytearray()
    while value > 0x7F:
        octets.append(value & 0x7F | 0x80)
        value >>= 7
    octets.append(value)
    return bytes(octets)


def _field(number: int, wire_type: int, content: bytes) -> bytes:
    length = _varint(len(content)) if wire_type == _BYTES else b""
    return _varint(number << 3 | wire_type) + length + content
