"""Sealing: bytes that only named recipients can read, whoever carries them.

HPKE (RFC 9180: DHKEM X25519, HKDF-SHA256, AES-256-GCM) seals to one recipient. A body for
many is encrypted once, with AES-256-GCM under a fresh content key, and that key is sealed
to each of them.

HPKE's base mode does not say who sealed: what must be authentic is signed inside.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Final

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PublicKey
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.hpke import AEAD, KDF, KEM, Suite

from fedinfer_flower.errors import EnvelopeError, SealError
from fedinfer_flower.wire.identity import Identity, PublicIdentity

__all__ = ["SealedBody", "open_body", "open_sealed", "seal_for", "seal_to"]

_CONTENT_KEY_BYTES: Final = 32
_KEY_ID_BYTES: Final = 32
_WRAP_BYTES: Final = 80
"""32 of the ephemeral key, 32 of the content key, 16 of the tag."""

_RECORD_BYTES: Final = _KEY_ID_BYTES + _WRAP_BYTES
_DOMAIN: Final = b"fedinfer/v1/seal|"

# A content key encrypts exactly one body, so a constant nonce is safe.
_NONCE: Final = bytes(12)


def _suite() -> Suite:
    return Suite(KEM.X25519, KDF.HKDF_SHA256, AEAD.AES_256_GCM)


def seal_to(public: PublicIdentity, plaintext: bytes, *, info: bytes) -> bytes:
    """Seal to one recipient.

    Parameters
    ----------
    info : bytes
        What the bytes are for; whoever opens them must name the same.

    Returns
    -------
    sealed : bytes
        48 bytes longer than the plaintext.

    Raises
    ------
    EnvelopeError
        If the recipient's key is no public key.

    Examples
    --------
    >>> site = Identity.generate()
    >>> open_sealed(site, seal_to(site.public, b"text", info=b"test"), info=b"test")
    b'text'
    """
    try:
        key = X25519PublicKey.from_public_bytes(public.agreement_key)
        return bytes(_suite().encrypt(plaintext, key, _DOMAIN + info))
    except ValueError:  # all-zero keys and other points of low order
        raise EnvelopeError("a recipient's agreement key is no X25519 public key") from None


def open_sealed(identity: Identity, sealed: bytes | memoryview, *, info: bytes) -> bytes:
    """Open what `seal_to` sealed.

    Raises
    ------
    SealError
        If it was sealed to another key, for another purpose, or altered.
    """
    try:
        return bytes(_suite().decrypt(bytes(sealed), identity.agreement, _DOMAIN + info))
    except (InvalidTag, ValueError):
        raise SealError(
            "sealed bytes that do not open with this key",
            hint="was it sealed to this party's present key? Fetch the directory again",
        ) from None


@dataclass(frozen=True, kw_only=True)
class SealedBody:
    """A body that each of several recipients can open.

    Parameters
    ----------
    body : bytes
        16 bytes longer than the plaintext.
    wraps : bytes
        A record of 112 bytes for each recipient: key id (32), sealed content key (80).
    """

    body: bytes | memoryview = field(repr=False)
    wraps: bytes | memoryview = field(repr=False)


def seal_for(recipients: Sequence[PublicIdentity], plaintext: bytes, *, info: bytes) -> SealedBody:
    """Seal one body to several recipients.

    Privacy
    -------
    Whoever carries it sees its length, and the key ids of the recipients.
    """
    key = os.urandom(_CONTENT_KEY_BYTES)
    # Each wrap is bound to the purpose; the body to the key, hence to all of them.
    wraps = [bytes.fromhex(r.key_id) + seal_to(r, key, info=info) for r in recipients]
    return SealedBody(
        body=AESGCM(key).encrypt(_NONCE, plaintext, _DOMAIN + info), wraps=b"".join(wraps)
    )


def open_body(identity: Identity, sealed: SealedBody, *, info: bytes) -> bytes:
    """Open a body as one of its recipients.

    Raises
    ------
    SealError
        If this party is no recipient, or anything was altered.

    Examples
    --------
    >>> a, b = Identity.generate(), Identity.generate()
    >>> sealed = seal_for([a.public, b.public], b"text", info=b"test")
    >>> open_body(b, sealed, info=b"test")
    b'text'
    """
    key = open_sealed(identity, _own_wrap(identity.key_id, sealed.wraps), info=info)
    try:
        return AESGCM(key).decrypt(_NONCE, bytes(sealed.body), _DOMAIN + info)
    except (InvalidTag, ValueError, OverflowError):
        raise SealError("a sealed body that was altered on its way") from None


def _own_wrap(key_id: str, wraps: bytes | memoryview) -> bytes:
    own = bytes.fromhex(key_id)
    table = bytes(wraps)
    for start in range(0, len(table) - _RECORD_BYTES + 1, _RECORD_BYTES):
        if table[start : start + _KEY_ID_BYTES] == own:
            return table[start + _KEY_ID_BYTES : start + _RECORD_BYTES]
    raise SealError(
        f"the query is not sealed to this party's key {key_id[:16]}",
        hint="the querier holds an older key, or another party's: fetch the directory again",
    )
