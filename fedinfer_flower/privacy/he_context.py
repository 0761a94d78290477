"""The only module that talks to TenSEAL: keys, and one ciphertext at a time.

Contexts are made with one thread: a forked process hangs in TenSEAL's pool otherwise. A
context is made in the process that uses it; only bytes travel, and those of other roles
reach TenSEAL through `ciphertext_gate` alone.
"""

from __future__ import annotations

import functools
import operator
import os
import struct
from collections.abc import Sequence
from types import ModuleType
from typing import Any, Protocol

import numpy as np

from fedinfer_flower.errors import (
    BindingError,
    EnvelopeError,
    InvalidCiphertextError,
    MissingExtraError,
)
from fedinfer_flower.privacy.base import optional_module
from fedinfer_flower.privacy.ciphertext_gate import (
    Residues,
    native_context,
    native_vector,
    pack_polynomials,
    packed_bytes,
    read_polynomials,
)
from fedinfer_flower.privacy.he_schemes import BFV, DEGREE, Scheme

__all__ = [
    "Vector",
    "add",
    "decrypt",
    "encrypt",
    "holds_secret",
    "load_public",
    "load_secret",
    "new_keys",
    "pack_vector",
    "public_key_bytes",
    "read_vector",
]

# Kind of key ("FHP" or "FHS"), version, scheme, reserved.
_KEY_HEADER = struct.Struct("<3sBBB")
_PUBLIC, _SECRET, _VERSION = b"FHP", b"FHS", 1

_CIPHERTEXT_SIZE = 2 * DEGREE
_KEY_SIZE = 4 * DEGREE

# What pybind11 makes of the library's exceptions. Their texts are not passed on: they may
# describe the content.
_NATIVE_ERRORS = (ValueError, RuntimeError, TypeError, IndexError)


class Vector(Protocol):
    """One ciphertext as TenSEAL wraps it."""

    def serialize(self) -> bytes:
        """Return TenSEAL's own bytes."""


def _tenseal() -> ModuleType:
    return optional_module("tenseal", extra="he")


def _new_context(scheme: Scheme) -> Any:
    ts = _tenseal()
    context = ts.context(
        ts.SCHEME_TYPE.BFV if scheme is BFV else ts.SCHEME_TYPE.CKKS,
        poly_modulus_degree=DEGREE,
        plain_modulus=scheme.plain_modulus,
        coeff_mod_bit_sizes=[prime.value.bit_length() for prime in scheme.key_primes],
        n_threads=1,
    )
    if scheme.scale is not None:
        context.global_scale = scheme.scale
    return context


@functools.cache
def _first(size: int) -> operator.itemgetter[Any]:
    return operator.itemgetter(*range(size))


def _residues(polynomials: Any, size: int) -> Residues:
    """Copy the residues out of a SEAL ciphertext, one by one: it offers no array."""
    return np.array(_first(size)(polynomials), dtype=np.uint64)


def _public_residues(context: Any) -> Residues:
    key = context.public_key().data  # must outlive the view of its data
    return _residues(key.data(), _KEY_SIZE)


@functools.cache
def _native_version(scheme: Scheme) -> tuple[int, int]:
    """Return SEAL's version, after a check that it reads what we write.

    Raises
    ------
    MissingExtraError
        If this TenSEAL stores ciphertexts in another way than the releases we support.
    """
    context = _new_context(scheme)
    own = context.serialize(save_secret_key=True, save_relin_keys=False, save_galois_keys=False)
    header = own.find(b"\x5e\xa1\x10")
    version = (own[header + 3], own[header + 4])
    try:
        loaded = _tenseal().context_from(
            native_context(_public_residues(context), scheme, version=version), 1
        )
        sent = read_polynomials(encrypt(loaded, scheme, [5, -6]), scheme.ciphertext_primes)
        message = native_vector(sent, scheme, n_values=2, version=version)
        opened = decrypt(_reader(scheme)(context, message))
    except (InvalidCiphertextError, *_NATIVE_ERRORS):
        opened = []
    if [round(number) for number in opened] != [5, -6]:
        raise MissingExtraError(
            "the installed TenSEAL stores ciphertexts in a way that this release does not know",
            hint="pip install 'fedinfer-flower[he]' for a version that fits",
        )
    return version


def public_key_bytes(scheme: Scheme) -> int:
    """Return the exact size of a public key.

    Examples
    --------
    >>> public_key_bytes(BFV)
    28678
    """
    return _KEY_HEADER.size + packed_bytes(scheme.key_primes)


def new_keys(scheme: Scheme) -> tuple[bytes, bytes]:
    """Make a fresh key pair; return (public, secret) bytes.

    The public bytes are packed from the public key's numbers alone. TenSEAL's own way of
    dropping the secret, `make_context_public`, leaves a working decryptor in the object.
    """
    _native_version(scheme)
    context = _new_context(scheme)
    packed = pack_polynomials(_public_residues(context), scheme.key_primes)
    secret = context.serialize(save_secret_key=True, save_relin_keys=False, save_galois_keys=False)
    return (
        _KEY_HEADER.pack(_PUBLIC, _VERSION, scheme.code, 0) + packed,
        _KEY_HEADER.pack(_SECRET, _VERSION, scheme.code, 0) + secret,
    )


def holds_secret(key: bytes) -> bool:
    """Tell whether key bytes are those of a secret key."""
    return key[: len(_SECRET)] == _SECRET


def _key_body(key: bytes, kind: bytes, scheme: Scheme) -> memoryview:
    if len(key) < _KEY_HEADER.size:
        raise EnvelopeError("the key is missing or cut short")
    found, version, code, reserved = _KEY_HEADER.unpack_from(key)
    if (found, version, reserved) != (kind, _VERSION, 0):
        raise EnvelopeError("the bytes are no key of this kind")
    if code != scheme.code:
        raise BindingError(f"the key is of another scheme than {scheme.name!r}")
    return memoryview(key)[_KEY_HEADER.size :]


def load_public(public_key: bytes, scheme: Scheme) -> Any:
    """Load a querier's public key, checked; the last eight stay loaded.

    Raises
    ------
    EnvelopeError
        If the bytes are not exactly a public key.
    BindingError
        If the key is of another scheme.
    """
    # By process, because a context must not be used on the other side of a fork.
    return _cached_public(public_key, scheme, os.getpid())


@functools.lru_cache(maxsize=8)
def _cached_public(public_key: bytes, scheme: Scheme, process: int) -> Any:  # noqa: ARG001
    body = _key_body(public_key, _PUBLIC, scheme)
    try:
        residues = read_polynomials(body, scheme.key_primes)
        message = native_context(residues, scheme, version=_native_version(scheme))
        context = _tenseal().context_from(message, 1)
    except (InvalidCiphertextError, *_NATIVE_ERRORS):
        raise EnvelopeError("the public key is malformed") from None
    return context


def load_secret(secret_key: bytes, public_key: bytes, scheme: Scheme) -> Any:
    """Load the querier's own secret key.

    Raises
    ------
    EnvelopeError
        If the bytes are no secret key.
    BindingError
        If the key is of another scheme, or the two keys are no pair.
    """
    body = _key_body(secret_key, _SECRET, scheme)
    try:
        context = _tenseal().context_from(bytes(body), 1)
        ours = pack_polynomials(_public_residues(context), scheme.key_primes)
        is_private = context.is_private()
    except _NATIVE_ERRORS:
        raise EnvelopeError("the querier's secret key is malformed") from None
    if not is_private or ours != public_key[_KEY_HEADER.size :]:
        raise BindingError("the querier's public and secret key are no pair")
    return context


def _reader(scheme: Scheme) -> Any:
    ts = _tenseal()
    return ts.bfv_vector_from if scheme is BFV else ts.ckks_vector_from


def encrypt(context: Any, scheme: Scheme, values: Sequence[float]) -> bytes:
    """Encrypt at most `scheme.slots` values into one ciphertext, and pack it."""
    ts = _tenseal()
    make = ts.bfv_vector if scheme is BFV else ts.ckks_vector
    return pack_vector(make(context, values), scheme)


def pack_vector(vector: Vector, scheme: Scheme) -> bytes:
    """Pack a ciphertext for another role."""
    (polynomials,) = vector.ciphertext()  # type: ignore[attr-defined]
    return pack_polynomials(_residues(polynomials, _CIPHERTEXT_SIZE), scheme.ciphertext_primes)


def read_vector(context: Any, scheme: Scheme, packed: memoryview, n_values: int) -> Vector:
    """Pass a packed ciphertext through the gate, and load it.

    Raises
    ------
    InvalidCiphertextError
        If it is not one ciphertext of this scheme.
    """
    residues = read_polynomials(packed, scheme.ciphertext_primes)
    version = _native_version(scheme)
    message = native_vector(residues, scheme, n_values=n_values, version=version)
    try:
        vector: Vector = _reader(scheme)(context, message)
    except _NATIVE_ERRORS:
        raise InvalidCiphertextError("a ciphertext could not be loaded") from None
    return vector


def add(one: Vector, other: Vector) -> Vector:
    """Add two ciphertexts under the same key, value by value, into a new one.

    Raises
    ------
    InvalidCiphertextError
        If the library refuses, as it does if the sum would hide nothing.
    """
    try:
        total: Vector = one + other  # type: ignore[operator]
    except _NATIVE_ERRORS:
        raise InvalidCiphertextError("a ciphertext could not be added") from None
    return total


def decrypt(vector: Vector) -> list[float]:
    """Decrypt a vector that was loaded into a context with the secret key.

    Raises
    ------
    InvalidCiphertextError
        If the library refuses.
    """
    try:
        return list(vector.decrypt())  # type: ignore[attr-defined]
    except _NATIVE_ERRORS:
        raise InvalidCiphertextError("a ciphertext could not be decrypted") from None
