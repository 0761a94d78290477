"""Who answers one batch together: what masks, recovery and unmasking are bound to."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

from fedinfer_flower.errors import EnvelopeError
from fedinfer_flower.wire.roster import Roster

__all__ = ["Cohort", "bitmap", "places_of"]


@dataclass(frozen=True, kw_only=True)
class Cohort:
    """The sites of one batch, and the batch's id.

    Parameters
    ----------
    query_id : str
        Used for one batch only: two payloads under the same masks would give away the
        difference of what they hide.
    roster : Roster
    public_key : bytes
        The querier's, of this session.
    content : bytes
        Digest of the very message that asked. Sites that are told different rows, rules or
        options under one query id, and a site that is asked twice at once, then have masks
        that do not cancel.

    Examples
    --------
    >>> Cohort(query_id="q-0", roster=Roster(()), public_key=b"").context().hex()[:8]
    'dac695a9'
    """

    query_id: str
    roster: Roster
    public_key: bytes
    content: bytes = b""

    def session(self) -> bytes:
        """Return a digest of roster and querier: 32 bytes, the same for all batches of a job."""
        return hashlib.sha256(
            b"fedinfer/v1/session|" + self.roster.digest() + self.public_key
        ).digest()

    def context(self) -> bytes:
        """Return a digest of everything: what a site remembers of a batch, 32 bytes."""
        return hashlib.sha256(self.session() + self.batch_id.encode()).digest()

    @property
    def batch_id(self) -> str:
        """Query id and content: what masks are derived for."""
        return f"{self.query_id}|{self.content.hex()}"


def bitmap(places: set[int] | frozenset[int], size: int) -> bytes:
    r"""Return a bit for each place, the first one lowest.

    Examples
    --------
    >>> bitmap({0, 9}, 10)
    b'\x01\x02'
    """
    bits = sum(1 << place for place in places)
    return bits.to_bytes(-(-size // 8), "little")


def places_of(raw: bytes, size: int) -> frozenset[int]:
    """Read what `bitmap` wrote.

    Raises
    ------
    EnvelopeError
        If the length is wrong, or a bit beyond the last place is set.

    Examples
    --------
    >>> sorted(places_of(bitmap({0, 9}, 10), 10))
    [0, 9]
    """
    bits = int.from_bytes(raw, "little")
    if len(raw) != -(-size // 8) or bits >> size:
        raise EnvelopeError("a bitmap that does not fit the roster")
    return frozenset(place for place in range(size) if bits >> place & 1)
