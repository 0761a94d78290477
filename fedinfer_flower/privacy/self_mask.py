"""The second mask of a site, which its neighbours can remove together and no few of them alone.

Pairwise masks alone fail against a coordinator and a querier that act together and call a
site dropped although it answered: the others then hand over its pairwise seeds, and what is
left on its payload is the querier's mask. With a mask of its own on top, a site's payload
opens only if its neighbours hand over shares of that mask, which honest ones do for sites
that they count among the survivors, as they hand over pairwise seeds for the others only.
No honest site does both for one site, because it confirms one set of survivors a batch.

Shamir's secret sharing is pycryptodome's, over GF(2**128).

References
----------
.. [1] Bonawitz et al., Practical Secure Aggregation for Privacy-Preserving Machine Learning,
   CCS 2017, section 4 (double masking).
.. [2] Shamir, How to Share a Secret, CACM 1979.
"""

from __future__ import annotations

import math
import os
from typing import Final

from Crypto.Protocol.SecretSharing import Shamir
from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from fedinfer_flower.errors import SealError
from fedinfer_flower.privacy.mask_graph import FULL_GRAPH_MAX
from fedinfer_flower.privacy.masks import SEED_BYTES, leaf

__all__ = [
    "SHARE_BYTES",
    "combine_shares",
    "new_secret",
    "open_share",
    "seal_share",
    "self_seed",
    "share_threshold",
    "split",
]

_SECRET_BYTES: Final = 16
SHARE_BYTES: Final = 32
"""16 of the share, 16 of the tag."""

_SPARSE_SHARE: Final = 0.4
_NONCE: Final = bytes(12)


def new_secret() -> bytes:
    """Return a fresh secret from which one batch's self-mask follows."""
    return os.urandom(_SECRET_BYTES)


def self_seed(secret: bytes, query_id: str) -> bytes:
    """Return the seed of the self-mask."""
    return HKDF(hashes.SHA256(), SEED_BYTES, None, b"fedinfer/v1/self|" + query_id.encode()).derive(
        secret
    )


def share_threshold(n_neighbours: int, n_dropouts: int) -> int:
    """Return how many of a site's neighbours must agree to remove its self-mask.

    In a full graph: all that are left when the most sites that may drop out did. In a
    sparse one, where many neighbours of one site may happen to drop out, two fifths.

    Examples
    --------
    >>> share_threshold(9, 3), share_threshold(50, 333)
    (6, 20)
    """
    if n_neighbours < FULL_GRAPH_MAX or n_neighbours > n_dropouts + n_neighbours // 2:
        return max(2, n_neighbours - n_dropouts)
    return max(2, math.ceil(_SPARSE_SHARE * n_neighbours))


def split(secret: bytes, threshold: int, n_shares: int) -> list[bytes]:
    """Return `n_shares` shares of 16 bytes, of which `threshold` give the secret back.

    Examples
    --------
    >>> secret = new_secret()
    >>> shares = split(secret, 2, 3)
    >>> combine_shares({1: shares[1], 2: shares[2]}) == secret
    True
    """
    ordered = sorted(Shamir.split(threshold, n_shares, secret, ssss=False))
    return [bytes(share) for _, share in ordered]


def combine_shares(shares: dict[int, bytes]) -> bytes:
    """Return the secret from shares by their number in `split`'s list."""
    numbered = [(number + 1, share) for number, share in shares.items()]
    return bytes(Shamir.combine(numbered, ssss=False))


def seal_share(share: bytes, pair: bytes, query_id: str, *, sender: int) -> bytes:
    """Encrypt a share for the other party of a pair: 32 bytes."""
    return AESGCM(_share_key(pair, query_id, sender)).encrypt(_NONCE, share, None)


def open_share(sealed: bytes, pair: bytes, query_id: str, *, sender: int) -> bytes:
    """Decrypt a share that the other party of a pair sent.

    Raises
    ------
    SealError
        If it was altered.
    """
    try:
        return AESGCM(_share_key(pair, query_id, sender)).decrypt(_NONCE, sealed, None)
    except InvalidTag:
        raise SealError("a share of a self-mask that does not open") from None


def _share_key(pair: bytes, query_id: str, sender: int) -> bytes:
    # One key for each direction and batch: a constant nonce is safe.
    return leaf(pair, f"share-{sender}", query_id)
