"""The only module that talks to TenSEAL: schemes, keys, and one ciphertext at a time.

Contexts are made with one thread: a forked process hangs in TenSEAL's pool otherwise. A
context is made in the process that uses it; only bytes travel. Values are encrypted one
ciphertext at a time, packed full.
"""

from __future__ import annotations

import functools
import os
from dataclasses import dataclass
from types import ModuleType
from typing import Any, Protocol

from fedinfer_flower.errors import BindingError, EnvelopeError, InvalidCiphertextError
from fedinfer_flower.privacy.base import optional_module
from fedinfer_flower.privacy.ciphertext_gate import check_ciphertext, check_public_key

__all__ = [
    "BFV",
    "CKKS",
    "Scheme",
    "Vector",
    "decrypt",
    "encrypt",
    "load_ciphertext",
    "load_public",
    "load_secret",
    "new_keys",
]

_DEGREE = 2048
_COEFF_BITS = [40, 14]
"""128-bit security allows 54 bits at degree 2048 (homomorphicencryption.org standard, table
1). TenSEAL always makes relinearisation keys, which take a second prime; ciphertexts carry
only the first."""

_PRIME_BYTES = 8


@dataclass(frozen=True)
class Scheme:
    """Fixed parameters of one encryption scheme; not negotiable, so never downgraded.

    Parameters
    ----------
    name : str
    code : int
        Its number in messages.
    slots : int
        Values in one ciphertext.
    scale : float, optional
        CKKS scale; None for BFV.
    plain_modulus : int
        BFV plaintext modulus; 0 for CKKS.
    """

    name: str
    code: int
    slots: int
    scale: float | None
    plain_modulus: int

    @property
    def ciphertext_bytes(self) -> int:
        """Most bytes of one ciphertext: two polynomials, uncompressed, with headers."""
        return 2 * _DEGREE * _PRIME_BYTES + 512

    @property
    def message_bytes(self) -> int:
        """Most bytes of one serialised vector of one ciphertext."""
        return self.ciphertext_bytes + 32

    @property
    def public_key_bytes(self) -> int:
        """Most bytes of a public key: two polynomials of all primes, uncompressed."""
        return 2 * _DEGREE * _PRIME_BYTES * len(_COEFF_BITS) + 1024


BFV = Scheme(name="bfv", code=1, slots=_DEGREE, scale=None, plain_modulus=67104769)
"""Integers, exact. The modulus is the largest 26-bit prime that is 1 modulo 4096, as packing
needs. The sum of 4096 ciphertexts stays 12 standard deviations of its own noise away from a
wrong decryption."""

CKKS = Scheme(name="ckks", code=2, slots=_DEGREE // 2, scale=2.0**26, plain_modulus=0)
"""Approximate reals; wraps around silently beyond ``2**40 / (2 * 2**26) = 8192``."""


class Vector(Protocol):
    """One ciphertext as TenSEAL wraps it."""

    def serialize(self) -> bytes:
        """Return the vector's bytes."""

    def __add__(self, other: Vector) -> Vector:
        """Add value by value, under encryption."""


def _tenseal() -> ModuleType:
    return optional_module("tenseal", extra="he")


def _new_context(scheme: Scheme) -> Any:
    ts = _tenseal()
    kind = ts.SCHEME_TYPE.BFV if scheme is BFV else ts.SCHEME_TYPE.CKKS
    context = ts.context(
        kind,
        poly_modulus_degree=_DEGREE,
        plain_modulus=scheme.plain_modulus,
        coeff_mod_bit_sizes=_COEFF_BITS,
        n_threads=1,
    )
    if scheme.scale is not None:
        context.global_scale = scheme.scale
    return context


def new_keys(scheme: Scheme) -> tuple[bytes, bytes]:
    """Make a fresh key pair; return (public, secret) bytes.

    The public bytes hold parameters and the public key, no secret and no evaluation keys.
    They are serialised without the secret rather than made by dropping it: TenSEAL's
    `make_context_public` leaves a working decryptor in the object.
    """
    context = _new_context(scheme)
    keep: dict[str, bool] = {"save_relin_keys": False, "save_galois_keys": False}
    public = context.serialize(save_secret_key=False, **keep)
    secret = context.serialize(save_secret_key=True, **keep)
    return public, secret


@functools.cache
def _parameter_ids(scheme: Scheme) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Return SEAL's hashes of the agreed parameters, at key level and at ciphertext level."""
    seal = _new_context(scheme).seal_context().data
    return tuple(seal.key_parms_id()), tuple(seal.first_parms_id())


def _load_context(serialized: bytes, scheme: Scheme) -> Any:
    try:
        context = _tenseal().context_from(serialized, 1)
        key_id = tuple(context.seal_context().data.key_parms_id())
    except (ValueError, RuntimeError, TypeError, IndexError):
        raise EnvelopeError("the key bytes are not a TenSEAL context") from None
    # A relay could swap in weaker parameters, or a modulus that makes sums wrap.
    if key_id != _parameter_ids(scheme)[0]:
        raise BindingError(f"the key has other parameters than scheme {scheme.name!r}")
    return context


@functools.lru_cache(maxsize=8)
def _cached_public(public_key: bytes, scheme: Scheme, process: int) -> Any:  # noqa: ARG001
    context = _load_context(public_key, scheme)
    if context.is_private() or not context.has_public_key():
        raise EnvelopeError("the key bytes hold something else than one public key")
    return context


def load_public(public_key: bytes, scheme: Scheme) -> Any:
    """Load a querier's public key, checked; the last eight stay loaded.

    Raises
    ------
    EnvelopeError
        If the bytes are not exactly a public key.
    BindingError
        If the key has other parameters than the scheme.
    """
    written_scale = -1.0 if scheme.scale is None else scheme.scale
    try:
        check_public_key(public_key, scale=written_scale, most_bytes=scheme.public_key_bytes)
    except InvalidCiphertextError as refused:
        raise EnvelopeError(f"the public key is malformed: {refused.message}") from None
    # By process, because a context must not be used on the other side of a fork.
    return _cached_public(public_key, scheme, os.getpid())


def load_secret(secret_key: bytes, scheme: Scheme) -> Any:
    """Load the querier's own secret key.

    Raises
    ------
    EnvelopeError
        If the bytes are not a secret key.
    BindingError
        If the key has other parameters than the scheme.
    """
    context = _load_context(secret_key, scheme)
    if not context.is_private():
        raise EnvelopeError("the querier's secret key bytes hold no secret key")
    return context


def _vector_functions(scheme: Scheme) -> tuple[Any, Any]:
    ts = _tenseal()
    if scheme is BFV:
        return ts.bfv_vector, ts.bfv_vector_from
    return ts.ckks_vector, ts.ckks_vector_from


def encrypt(context: Any, scheme: Scheme, values: list[int] | list[float]) -> bytes:
    """Encrypt at most `scheme.slots` values into one ciphertext, and serialise it."""
    make, _ = _vector_functions(scheme)
    return bytes(make(context, values).serialize())


def load_ciphertext(
    context: Any, scheme: Scheme, message: bytes | memoryview, n_values: int
) -> Vector:
    """Pass bytes through the gate, load them, and check what was loaded.

    Raises
    ------
    InvalidCiphertextError
        If they are not one ciphertext of `n_values` values under this scheme.
    """
    check_ciphertext(
        message, n_values=n_values, scale=scheme.scale, most_bytes=scheme.ciphertext_bytes
    )
    _, read = _vector_functions(scheme)
    try:
        vector: Vector = read(context, bytes(message))
        (ciphertext,) = vector.ciphertext()  # type: ignore[attr-defined]
        sound = (
            ciphertext.size() == 2
            and tuple(ciphertext.parms_id()) == _parameter_ids(scheme)[1]
            and ciphertext.is_ntt_form() == (scheme is CKKS)
            and ciphertext.scale == (scheme.scale or 1.0)
            # "Transparent" is SEAL's word for a message that anyone can read.
            and not ciphertext.is_transparent()
        )
    except (ValueError, RuntimeError, TypeError, IndexError):
        # The library's text is not passed on: it may describe the content.
        raise InvalidCiphertextError("a ciphertext could not be loaded") from None
    if not sound:
        raise InvalidCiphertextError("a ciphertext has other parameters than agreed")
    return vector


def decrypt(vector: Vector) -> list[float]:
    """Decrypt a vector that was loaded into a context with the secret key.

    Raises
    ------
    InvalidCiphertextError
        If the library refuses.
    """
    try:
        return list(vector.decrypt())  # type: ignore[attr-defined]
    except (ValueError, RuntimeError, TypeError, IndexError):
        raise InvalidCiphertextError("a ciphertext could not be decrypted") from None
