"""Evidence as two additive shares: site -> coordinator ``x - B``, site -> querier the seed of B.

The querier's half travels through the coordinator, sealed: a seed, and the site's signature
over it. It is bound to site and query id, so the coordinator
can neither make one up, nor use one for another site or query.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from typing import Final

import numpy as np

from fedinfer_flower.errors import ShapeError
from fedinfer_flower.privacy.masks import SEED_BYTES
from fedinfer_flower.settlement.ring import RingArray, stream
from fedinfer_flower.wire.identity import Identity, PublicIdentity
from fedinfer_flower.wire.sealing import open_sealed, seal_to

__all__ = ["SEALED_HALF_BYTES", "CoordinatorHalf", "open_half", "split_rows"]

_DOMAIN: Final = "evidence"
_SIGNATURE_BYTES: Final = 64
SEALED_HALF_BYTES: Final = 48 + _SIGNATURE_BYTES + SEED_BYTES
"""Of the querier's half, whatever the number of rows."""


@dataclass(frozen=True, kw_only=True, eq=False)
class CoordinatorHalf:
    """What the coordinator holds of one site's evidence of one query.

    Parameters
    ----------
    share_bc : uint64 array of shape (n_queries, n_classes)
        Uniform, whatever the evidence.
    sealed : bytes
        The querier's half, unreadable here.
    """

    share_bc: RingArray = field(repr=False)
    sealed: bytes = field(repr=False)

    def to_bytes(self) -> bytes:
        """Return 8 bytes an entry and `SEALED_HALF_BYTES`."""
        return self.sealed + self.share_bc.astype("<u8").tobytes()

    @classmethod
    def from_bytes(cls, data: bytes | memoryview, *, shape: tuple[int, int]) -> CoordinatorHalf:
        """Read a half of known shape.

        Raises
        ------
        ShapeError
            If the bytes do not fill it exactly.
        """
        view = memoryview(data)
        expected = SEALED_HALF_BYTES + 8 * shape[0] * shape[1]
        if len(view) != expected:
            raise ShapeError(f"evidence in shares has {expected} bytes here, got {len(view)}")
        share = np.frombuffer(view[SEALED_HALF_BYTES:], dtype="<u8").reshape(shape)
        return cls(share_bc=share.astype(np.uint64), sealed=bytes(view[:SEALED_HALF_BYTES]))


def _info(query_id: str, site: str) -> bytes:
    return b"evidence|" + site.encode() + b"|" + query_id.encode()


def split_rows(
    rows_bc: RingArray, *, querier: PublicIdentity, identity: Identity, query_id: str
) -> CoordinatorHalf:
    """Split evidence at a site.

    Parameters
    ----------
    rows_bc : uint64 array of shape (n_queries, n_classes)
        See `ring.encode_rows`.
    querier : PublicIdentity
        To whom one half is sealed.
    identity : Identity
        The site's own keys.

    Privacy
    -------
    The coordinator's half is ``x - B`` with B the output of ChaCha20 under a fresh key:
    uniform to whoever lacks the seed. The querier's half is independent of x. Both together
    are x.
    """
    seed = os.urandom(SEED_BYTES)
    share = rows_bc - stream(seed, rows_bc.size).reshape(rows_bc.shape)
    info = _info(query_id, identity.key_id)
    plain = identity.sign(_DOMAIN, info + seed) + seed
    return CoordinatorHalf(share_bc=share, sealed=seal_to(querier, plain, info=info))


def open_half(
    sealed: bytes | memoryview, *, identity: Identity, query_id: str, site: PublicIdentity
) -> bytes:
    """Open the querier's half; return the seed of B.

    Raises
    ------
    SealError
        If it is of another query or site, sealed to another querier, or altered.
    SignatureError
        If the site did not sign it: anybody can seal to the querier.
    """
    info = _info(query_id, site.key_id)
    plain = open_sealed(identity, sealed, info=info)
    signature, seed = plain[:_SIGNATURE_BYTES], plain[_SIGNATURE_BYTES:]
    site.verify(_DOMAIN, info + seed, signature)
    return seed
