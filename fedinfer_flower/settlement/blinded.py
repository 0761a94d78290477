"""The second exchange of a settlement under CKKS: blinded rows there, their sums back."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field, replace
from typing import Self

import numpy as np

from fedinfer_flower.settlement.reading import answered_digest, noise_of, read_document, words
from fedinfer_flower.settlement.ring import RingArray
from fedinfer_flower.wire import fields
from fedinfer_flower.wire.envelope import DEFAULT_LIMITS, Envelope, Kind, WireLimits, encode

__all__ = ["BlindedRows", "SlotSums"]


@dataclass(frozen=True, kw_only=True, eq=False)
class BlindedRows:
    """Row sums under encryption, blinded: one ciphertext a site.

    Parameters
    ----------
    epoch_id : str
    answers_to : str
        Digest of the reply.
    rows : bytes
    """

    epoch_id: str
    answers_to: str
    rows: bytes | memoryview = field(repr=False)

    @property
    def digest(self) -> str:
        """SHA-256 of the byte form, in hex."""
        return hashlib.sha256(self.to_bytes()).hexdigest()

    def to_bytes(self) -> bytes:
        """Return the rows as one envelope."""
        return encode(
            Envelope(
                kind=Kind.SETTLEMENT_ROWS,
                query_id=self.epoch_id,
                meta={"answers-to": self.answers_to},
                sections=(("rows", self.rows),),
            )
        )

    @classmethod
    def from_bytes(cls, data: bytes, *, limits: WireLimits = DEFAULT_LIMITS) -> BlindedRows:
        """Read blinded rows.

        Raises
        ------
        ProtocolError
            If the bytes are not exactly that.
        """
        envelope = read_document(data, Kind.SETTLEMENT_ROWS, limits, "rows")
        fields.exactly(envelope.meta, "answers-to")
        rows = envelope.section("rows")
        return cls(epoch_id=envelope.query_id, answers_to=answered_digest(envelope.meta), rows=rows)


@dataclass(frozen=True, kw_only=True, eq=False)
class SlotSums:
    """What blinded rows decrypt to: one residue a site, noise included.

    Parameters
    ----------
    epoch_id : str
    answers_to : str
        Digest of the blinded rows.
    sums_k : uint64 array of shape (n_sites,)
    noise_std : float
        Of the noise in them, in contribution units.
    signature : bytes
    """

    epoch_id: str
    answers_to: str
    sums_k: RingArray = field(repr=False)
    noise_std: float
    signature: bytes = field(default=b"", repr=False)

    def with_signature(self, signature: bytes) -> Self:
        """Return the same document with another signature."""
        return replace(self, signature=signature)

    def to_bytes(self) -> bytes:
        """Return the sums as one envelope."""
        return encode(
            Envelope(
                kind=Kind.SETTLEMENT_SUMS,
                query_id=self.epoch_id,
                meta={"answers-to": self.answers_to, "noise": self.noise_std},
                sections=(
                    ("sums", self.sums_k.astype("<u8").tobytes()),
                    ("signature", self.signature),
                ),
            )
        )

    @classmethod
    def from_bytes(cls, data: bytes, *, limits: WireLimits = DEFAULT_LIMITS) -> SlotSums:
        """Read slot sums.

        Raises
        ------
        ProtocolError
            If the bytes are not exactly that.
        """
        envelope = read_document(data, Kind.SETTLEMENT_SUMS, limits, "sums", "signature")
        fields.exactly(envelope.meta, "answers-to", "noise")
        return cls(
            epoch_id=envelope.query_id,
            answers_to=answered_digest(envelope.meta),
            sums_k=words(envelope.section("sums"), np.uint64, (-1,)),
            noise_std=noise_of(envelope.meta),
            signature=bytes(envelope.section("signature")),
        )
