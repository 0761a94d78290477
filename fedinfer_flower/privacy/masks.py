"""Masks that cancel: streams of ChaCha20 under keys that two parties agree on.

Keys form a tree. The root is the X25519 secret of two parties; below it one key a session;
below that one a batch and purpose. A key at a leaf produces one stream and nothing else, so
a leaf may be handed over (to make good for a dropout) without touching any other batch.
"""

from __future__ import annotations

from typing import Final

import numpy as np
import numpy.typing as npt
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from fedinfer_flower.errors import EnvelopeError

__all__ = ["SEED_BYTES", "RingArray", "leaf", "mask", "pair_key"]

SEED_BYTES: Final = 32
_DOMAIN: Final = b"fedinfer/v1/mask|"

_MOST_AGREED: Final = 4096
_agreed: dict[tuple[bytes, bytes, bytes], bytes] = {}
"""Keys of sessions, by own key, peer and session: an agreement takes longer than the mask of a
small batch. They stay in a process that holds the long-term key anyway."""

RingArray = npt.NDArray[np.uint32]
"""Entries modulo 2**32; numpy's addition wraps around as the ring's does."""


def _derive(secret: bytes, info: bytes) -> bytes:
    return HKDF(hashes.SHA256(), SEED_BYTES, None, _DOMAIN + info).derive(secret)


def pair_key(mine: X25519PrivateKey, peer: bytes, session: bytes) -> bytes:
    """Return the key that this party and `peer` share in a session.

    Parameters
    ----------
    mine : X25519PrivateKey
    peer : bytes
        The other party's agreement key, 32 bytes.
    session : bytes
        `Cohort.session`.

    Raises
    ------
    EnvelopeError
        If the peer's key is no public key, or one of low order: the shared secret would
        be known to everyone.

    Examples
    --------
    >>> a, b = X25519PrivateKey.generate(), X25519PrivateKey.generate()
    >>> there, back = b.public_key().public_bytes_raw(), a.public_key().public_bytes_raw()
    >>> pair_key(a, there, b"s") == pair_key(b, back, b"s")
    True
    """
    own = mine.public_key().public_bytes_raw()
    known = _agreed.get((own, peer, session))
    if known is not None:
        return known
    both = b"".join(sorted((own, peer)))
    try:
        secret = mine.exchange(X25519PublicKey.from_public_bytes(peer))
    except ValueError:
        raise EnvelopeError("an agreement key that is no X25519 public key") from None
    derived = _derive(secret, b"pair|" + session + both)
    if len(_agreed) >= _MOST_AGREED:
        _agreed.clear()
    _agreed[own, peer, session] = derived
    return derived


def leaf(key: bytes, purpose: str, query_id: str) -> bytes:
    """Return the seed of one stream: of one purpose, in one batch."""
    return _derive(key, f"{purpose}|{query_id}".encode())


def mask(seed: bytes, count: int) -> RingArray:
    """Return the `count` ring elements that a seed stands for.

    Raises
    ------
    EnvelopeError
        If the seed does not have 32 bytes.

    Examples
    --------
    >>> len(mask(bytes(32), 5))
    5
    """
    if len(seed) != SEED_BYTES:
        raise EnvelopeError("a mask's seed has 32 bytes")
    # A leaf key produces this one stream, so a constant nonce is safe.
    cipher = Cipher(algorithms.ChaCha20(seed, bytes(16)), mode=None)
    stream = cipher.encryptor().update(bytes(4 * count))
    return np.frombuffer(stream, dtype="<u4").astype(np.uint32, copy=False)
