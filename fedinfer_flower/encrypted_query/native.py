"""The native library's messages, written from checked residues and our own plan alone.

Nothing of another role's bytes is copied into them but residues.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence

from fedinfer_flower.encrypted_query.plans import REPLY_SCALE, SCALE, Plan
from fedinfer_flower.encrypted_query.residues import Residues

__all__ = ["Version", "ciphertext_message", "key_message", "switching_keys_message"]

Version = tuple[int, int]
"""Major and minor version of the native library that will read the message."""

# Magic, header size, version (2 bytes), compression (none), reserved, length of the whole.
_HEADER = struct.Struct("<HBBBBHQ")
_MAGIC = 0xA15E
# Parameter id, in NTT form, polynomials, degree, primes, scale, correction factor (1 in CKKS).
_CIPHERTEXT = struct.Struct("<32s?QQQdQ")


def _object(body: bytes, version: Version) -> bytes:
    size = _HEADER.size
    return _HEADER.pack(_MAGIC, size, *version, 0, 0, size + len(body)) + body


def _polynomials(
    residues: Residues, plan: Plan, primes: tuple[int, ...], scale: float, version: Version
) -> bytes:
    head = _CIPHERTEXT.pack(plan.parameter_id(primes), True, 2, plan.degree, len(primes), scale, 1)
    array = struct.pack("<Q", residues.size) + residues.astype("<u8").tobytes()
    return _object(head + _object(array, version), version)


def ciphertext_message(
    residues: Residues, plan: Plan, primes: tuple[int, ...], version: Version
) -> bytes:
    """Write a ciphertext of a query or, if `primes` are those of a reply, of a reply."""
    scale = REPLY_SCALE if primes == plan.reply_primes else SCALE
    return _polynomials(residues, plan, primes, scale, version)


def key_message(residues: Residues, plan: Plan, version: Version) -> bytes:
    """Write a public key: to the native library a ciphertext of scale 1."""
    return _polynomials(residues, plan, plan.key_primes, 1.0, version)


def switching_keys_message(keys: Sequence[Residues], plan: Plan, version: Version) -> bytes:
    """Write a relinearisation key: one public key for each prime of a query."""
    body = plan.parameter_id(plan.key_primes) + struct.pack("<QQ", 1, len(keys))
    return _object(body + b"".join(key_message(key, plan, version) for key in keys), version)
