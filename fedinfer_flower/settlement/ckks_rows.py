"""Evidence under CKKS: rows that the coordinator weighs blind, and one number a site opened.

Slots hold the entries of a batch in row order, 1024 a ciphertext. Multiplied slot by slot
with the weights, all ciphertexts of a site are added into one. The mean of all slots of a
plaintext is its constant coefficient, so that coefficient is the row sum. The coordinator
adds a uniform polynomial to the ciphertext's first half: what the querier decrypts is uniform,
every coefficient of it. It returns the constant one, and the coordinator takes off what it
added.

There is one prime of 40 bits and no division: scale 2**19 for entries and for weights makes
2**38 of a product, and only the constant coefficient has to fit.
"""

from __future__ import annotations

import hashlib
import math
import secrets
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

import numpy as np

from fedinfer_flower.errors import (
    BindingError,
    InvalidCiphertextError,
    ProtectionRefusedError,
    SettlementError,
    ShapeError,
)
from fedinfer_flower.privacy import he_context
from fedinfer_flower.privacy.ciphertext_gate import (
    pack_polynomials,
    packed_bytes,
    read_polynomials,
)
from fedinfer_flower.privacy.he_schemes import CKKS, DEGREE, Scheme
from fedinfer_flower.settlement.ring import Array, encode_rows

__all__ = [
    "CIPHERTEXT_BYTES",
    "SLOT_ERROR_STD",
    "SettlementKeys",
    "add_rows",
    "blinded_row_sum",
    "check_payload",
    "encrypt_rows",
    "open_constants",
    "open_totals",
    "payload_bytes",
    "signed_constant",
]

_SCALE_BITS: Final = 19
ROWS: Final = Scheme(
    name="ckks-rows",
    code=CKKS.code,
    slots=CKKS.slots,
    scale=2.0**_SCALE_BITS,
    plain_modulus=0,
)
PRIME: Final = ROWS.ciphertext_primes[0].value
CIPHERTEXT_BYTES: Final = packed_bytes(ROWS.ciphertext_primes)
PRODUCT_SCALE: Final = 2 ** (2 * _SCALE_BITS)

SLOT_ERROR_STD: Final = 7e-4
"""Standard deviation of a fresh ciphertext's error in one slot; measured 6.5e-4."""

_LEAST_WEIGHT: Final = 2.0**-18
"""A ciphertext with only smaller weights is left out: encoded, they could be all zero."""

_DIGEST_BYTES: Final = 32
_NATIVE_ERRORS = (ValueError, RuntimeError, TypeError, IndexError)


@dataclass(frozen=True, kw_only=True)
class SettlementKeys:
    """The querier's keys for the evidence of one epoch; make new ones for the next.

    Parameters
    ----------
    public_key : bytes
        Travels with the question as ``evidence_key``; 28,678 bytes.
    secret_key : bytes
        Stays with the querier.
    """

    public_key: bytes = field(repr=False)
    secret_key: bytes = field(repr=False)

    @classmethod
    def make(cls) -> SettlementKeys:
        """Make fresh keys.

        Raises
        ------
        MissingExtraError
            Without the extra ``he``.
        """
        public, secret = he_context.new_keys(ROWS)
        return cls(public_key=public, secret_key=secret)


def _n_chunks(n_queries: int, n_classes: int) -> int:
    return -(-n_queries * n_classes // ROWS.slots)


def payload_bytes(n_queries: int, n_classes: int) -> int:
    """Return the exact size of a site's evidence of a batch.

    Examples
    --------
    >>> payload_bytes(200, 10)
    40992
    """
    return _DIGEST_BYTES + _n_chunks(n_queries, n_classes) * CIPHERTEXT_BYTES


def _context(public_key: bytes) -> Any:
    if he_context.holds_secret(public_key):
        raise ProtectionRefusedError(
            "the settlement key that came with the query is a secret key",
            hint="the querier sends SettlementKeys.public_key only, and makes new keys",
        )
    context = he_context.load_public(public_key, ROWS)
    # With one prime there is none to divide by.
    context.auto_rescale = False
    return context


def _chunks(entries_bc: Array) -> list[Array]:
    flat = np.asarray(entries_bc, dtype=np.float64).ravel()
    padded = np.zeros(-(-flat.size // ROWS.slots) * ROWS.slots)
    padded[: flat.size] = flat
    return list(padded.reshape(-1, ROWS.slots))


def encrypt_rows(public_key: bytes, probabilities_bc: Array) -> bytes:
    """Encrypt a site's evidence of a batch to the querier's settlement key.

    Raises
    ------
    ProtectionRefusedError
        If the key is a secret key.
    ProtocolError
        If the key is malformed, or a row is no distribution.
    """
    encode_rows(probabilities_bc)  # refuses what is no distribution
    context = _context(public_key)
    packed = (he_context.encrypt(context, ROWS, c.tolist()) for c in _chunks(probabilities_bc))
    return b"".join([hashlib.sha256(public_key).digest(), *packed])


def check_payload(payload: bytes | memoryview, *, n_queries: int, n_classes: int) -> None:
    """Check a site's evidence before the native library sees any of it.

    Raises
    ------
    ShapeError
        If it has another length than the batch's.
    InvalidCiphertextError
        If it holds what is no ciphertext.
    """
    expected = payload_bytes(n_queries, n_classes)
    if len(payload) != expected:
        raise ShapeError(f"encrypted evidence has {expected} bytes here, got {len(payload)}")
    for chunk in _packed(payload):
        read_polynomials(chunk, ROWS.ciphertext_primes)


def _packed(payload: bytes | memoryview) -> list[memoryview]:
    view = memoryview(payload)
    starts = range(_DIGEST_BYTES, len(view), CIPHERTEXT_BYTES)
    return [view[start : start + CIPHERTEXT_BYTES] for start in starts]


def _loaded(context: Any, public_key: bytes, payload: bytes | memoryview) -> list[Any]:
    if bytes(payload[:_DIGEST_BYTES]) != hashlib.sha256(public_key).digest():
        raise BindingError("evidence was encrypted under another settlement key")
    return [he_context.read_vector(context, ROWS, c, ROWS.slots) for c in _packed(payload)]


def add_rows(public_key: bytes, payloads: Iterable[bytes | memoryview]) -> bytes:
    """Add the sites' evidence of one batch, at the coordinator."""
    context = _context(public_key)
    total: list[Any] = []
    for payload in payloads:
        loaded = _loaded(context, public_key, payload)
        if total:
            loaded = [he_context.add(a, b) for a, b in zip(total, loaded, strict=True)]
        total = loaded
    packed = (he_context.pack_vector(vector, ROWS) for vector in total)
    return b"".join([hashlib.sha256(public_key).digest(), *packed])


def open_totals(
    keys: SettlementKeys, packed: bytes | memoryview, *, n_queries: int, n_classes: int
) -> Array:
    """Decrypt the sum over sites of a batch, at the querier; shape (n_queries, n_classes)."""
    check_payload(packed, n_queries=n_queries, n_classes=n_classes)
    context = he_context.load_secret(keys.secret_key, keys.public_key, ROWS)
    vectors = _loaded(context, keys.public_key, packed)
    slots = np.concatenate([he_context.decrypt(vector) for vector in vectors])
    return np.asarray(slots[: n_queries * n_classes].reshape(n_queries, n_classes))


def blinded_row_sum(
    public_key: bytes, weighed: Sequence[tuple[bytes | memoryview, Array]]
) -> tuple[bytes, int]:
    """Weigh one site's evidence of several batches, add it up and blind it.

    Parameters
    ----------
    weighed : sequence of (payload, weights_bc)
        Weights of shape (n_queries, n_classes), zero in rows that are no audits. Largest
        absolute weight 1; the largest of each row add up to at most 1024.

    Returns
    -------
    blinded : bytes
        One ciphertext, for the querier. Its plaintext is uniform.
    blind : int
        What the constant coefficient was blinded with; stays with the coordinator.
    """
    context = _context(public_key)
    total: Any = None
    for payload, weights_bc in weighed:
        vectors = _loaded(context, public_key, payload)
        for vector, weights in zip(vectors, _chunks(weights_bc), strict=True):
            if np.abs(weights).max() < _LEAST_WEIGHT:
                continue
            try:
                product = vector * weights.tolist()
            except _NATIVE_ERRORS:
                raise InvalidCiphertextError("evidence could not be weighed") from None
            total = product if total is None else he_context.add(total, product)
    if total is None:
        raise SettlementError("all weights are zero: there is nothing to settle")
    residues = read_polynomials(he_context.pack_vector(total, ROWS), ROWS.ciphertext_primes).copy()
    blind = np.array([secrets.randbelow(PRIME) for _ in range(DEGREE)], dtype=np.uint64)
    residues[:DEGREE] = (residues[:DEGREE] + blind) % np.uint64(PRIME)
    # Residues are values at all roots of X^n + 1, whose mean is the constant coefficient.
    mean = sum(int(word) for word in blind) * pow(DEGREE, -1, PRIME) % PRIME
    return pack_polynomials(residues, ROWS.ciphertext_primes), mean


def open_constants(keys: SettlementKeys, blinded: bytes | memoryview) -> list[int]:
    """Decrypt blinded row sums, at the querier; return their constant coefficients.

    Parameters
    ----------
    blinded : bytes
        Ciphertexts, one after the other.

    Raises
    ------
    InvalidCiphertextError
        If one is no ciphertext.
    """
    context = he_context.load_secret(keys.secret_key, keys.public_key, ROWS)
    view, found = memoryview(blinded), []
    for start in range(0, len(view), CIPHERTEXT_BYTES):
        packed = view[start : start + CIPHERTEXT_BYTES]
        slots = he_context.decrypt(he_context.read_vector(context, ROWS, packed, ROWS.slots))
        found.append(round(math.fsum(slots) / ROWS.slots * 2**_SCALE_BITS) % PRIME)
    return found


def signed_constant(residue: int) -> float:
    """Return the sum over slots that an unblinded constant coefficient stands for."""
    signed = residue % PRIME
    signed = signed - PRIME if signed > PRIME // 2 else signed
    return signed / PRODUCT_SCALE * ROWS.slots
