"""What coordinator and sites say to each other after a batch, to make good for dropouts.

==========  ===================================================  ===========================
round       request to a survivor                                reply
==========  ===================================================  ===========================
confirm     who survived                                         its signature of that
reveal      who survived; with self-masks: the signatures of     seeds that it shares with
            the others, and the shares that are meant for it     the dropped; with
                                                                 self-masks: opened shares
==========  ===================================================  ===========================

Without self-masks there is no confirm round, and none at all if nobody dropped out.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import IntEnum
from typing import Final

from fedinfer_flower.errors import BindingError, EnvelopeError
from fedinfer_flower.privacy.cohort import Cohort, bitmap, places_of

__all__ = ["Phase", "Records", "RecoveryRequest", "survivors_statement"]

_MAGIC: Final = b"FRR1"
_PLACE_BYTES: Final = 4

Records = dict[int, bytes]
"""Byte strings of one size by place in the roster."""


class Phase(IntEnum):
    """Which round of recovery a request opens."""

    CONFIRM = 1
    REVEAL = 2


@dataclass(frozen=True, kw_only=True)
class RecoveryRequest:
    """What the coordinator asks of one survivor.

    Parameters
    ----------
    phase : Phase
    context : bytes
        `Cohort.context`.
    survivors : frozenset of int
        Places whose answers are in the sum.
    signatures : dict of place to bytes
        64 bytes each; empty without self-masks.
    shares : dict of place to bytes
        Sealed shares, from these sites to the one asked; 32 bytes each.
    """

    phase: Phase
    context: bytes
    survivors: frozenset[int]
    signatures: Records = field(default_factory=dict, repr=False)
    shares: Records = field(default_factory=dict, repr=False)

    def to_bytes(self, n_sites: int) -> bytes:
        """Return the byte form; `n_sites` are in the roster."""
        head = _MAGIC + bytes([self.phase]) + self.context + bitmap(self.survivors, n_sites)
        return head + pack_records(self.signatures, 64) + pack_records(self.shares, 32)

    @classmethod
    def from_bytes(cls, data: bytes | memoryview, cohort: Cohort) -> RecoveryRequest:
        """Read a request that belongs to a batch.

        Raises
        ------
        EnvelopeError
            If it is not exactly one request.
        BindingError
            If it is of another batch, roster or querier.
        """
        raw, n_sites = bytes(data), len(cohort.roster)
        width = -(-n_sites // 8)
        start = len(_MAGIC) + 1 + 32
        if raw[:4] != _MAGIC or len(raw) < start + width or raw[4] not in (1, 2):
            raise EnvelopeError("the bytes are no recovery request")
        if raw[5:start] != cohort.context():
            raise BindingError("the recovery request belongs to another batch")
        survivors = places_of(raw[start : start + width], n_sites)
        signatures, rest = read_records(raw[start + width :], 64, n_sites)
        shares, rest = read_records(rest, 32, n_sites)
        if rest:
            raise EnvelopeError("a recovery request with bytes left over")
        return cls(
            phase=Phase(raw[4]),
            context=raw[5:start],
            survivors=survivors,
            signatures=signatures,
            shares=shares,
        )


def pack_records(records: Records, size: int) -> bytes:
    """Return the number of records, then place and bytes of each."""
    parts = [len(records).to_bytes(_PLACE_BYTES, "big")]
    for place in sorted(records):
        if len(records[place]) != size:
            raise EnvelopeError("a record of another size than agreed")
        parts += [place.to_bytes(_PLACE_BYTES, "big"), records[place]]
    return b"".join(parts)


def read_records(raw: bytes, size: int, n_sites: int) -> tuple[Records, bytes]:
    """Read what `pack_records` wrote; return (records, bytes left over).

    Raises
    ------
    EnvelopeError
        If a record is cut short, a place comes twice or is not in the roster.
    """
    count = int.from_bytes(raw[:_PLACE_BYTES], "big")
    step = _PLACE_BYTES + size
    end = _PLACE_BYTES + count * step
    if len(raw) < max(end, _PLACE_BYTES) or count > n_sites:
        raise EnvelopeError("records that are cut short")
    records: Records = {}
    for start in range(_PLACE_BYTES, end, step):
        place = int.from_bytes(raw[start : start + _PLACE_BYTES], "big")
        records[place] = raw[start + _PLACE_BYTES : start + step]
    if len(records) != count or any(place >= n_sites for place in records):
        raise EnvelopeError("records with a place twice, or outside the roster")
    return records, raw[end:]


def survivors_statement(cohort: Cohort, survivors: frozenset[int]) -> bytes:
    """Return what a site signs when it confirms who survived."""
    return cohort.context() + bitmap(survivors, len(cohort.roster))
