"""The roster: which sites, with which keys and profiles, take part in a batch.

Everybody who masks, unmasks or signs must mean the same sites in the same order, so a
roster has one byte form and one digest.
"""

from __future__ import annotations

import hashlib
import re
from dataclasses import dataclass, field
from typing import Final

from fedinfer_flower.errors import BindingError, EnvelopeError
from fedinfer_flower.wire.identity import PublicIdentity

__all__ = ["Roster", "Seat"]

_SEAT_BYTES: Final = 96
_COMMITMENT = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True, kw_only=True)
class Seat:
    """One site's place in a roster.

    Parameters
    ----------
    identity : PublicIdentity
    commitment : str
        Digest of the profile that the site declared: see `SiteProfile.commitment`.
    """

    identity: PublicIdentity
    commitment: str

    def __post_init__(self) -> None:
        if not _COMMITMENT.fullmatch(self.commitment):
            raise EnvelopeError("a commitment is 64 hex digits")


@dataclass(frozen=True)
class Roster:
    """Sites in the order of their key ids, none twice.

    Parameters
    ----------
    seats : tuple of Seat
        In any order; kept sorted.

    Raises
    ------
    EnvelopeError
        If a key comes twice: the masks between its two places would cancel.

    Examples
    --------
    >>> from fedinfer_flower.wire.identity import Identity
    >>> seats = [Seat(identity=Identity.generate().public, commitment="0" * 64) for _ in "abc"]
    >>> roster = Roster(tuple(seats))
    >>> Roster.from_bytes(roster.to_bytes()) == roster
    True
    >>> roster.place_of(seats[0].identity.key_id) in (0, 1, 2)
    True
    """

    seats: tuple[Seat, ...]
    _raw: bytes = field(init=False, repr=False, compare=False)
    _digest: bytes = field(init=False, repr=False, compare=False)
    _key_ids: tuple[str, ...] = field(init=False, repr=False, compare=False)
    _places: dict[str, int] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        ordered = sorted(self.seats, key=lambda seat: seat.identity.key_id)
        object.__setattr__(self, "seats", tuple(ordered))
        keys = [seat.identity.key_id for seat in ordered]
        agreement = {seat.identity.agreement_key for seat in ordered}
        if len(set(keys)) != len(keys) or len(agreement) != len(keys):
            raise EnvelopeError("a roster with the same key twice")
        # Worked out once: a roster of a thousand sites is looked up thousands of times.
        raw = b"".join(
            seat.identity.to_bytes() + bytes.fromhex(seat.commitment) for seat in ordered
        )
        object.__setattr__(self, "_raw", raw)
        object.__setattr__(self, "_digest", hashlib.sha256(raw).digest())
        object.__setattr__(self, "_key_ids", tuple(keys))
        object.__setattr__(self, "_places", {key: place for place, key in enumerate(keys)})

    def __len__(self) -> int:
        return len(self.seats)

    @property
    def key_ids(self) -> tuple[str, ...]:
        """Fingerprints of the sites, in order."""
        return self._key_ids

    def place_of(self, key_id: str) -> int:
        """Return a site's place.

        Raises
        ------
        BindingError
            If it has none.
        """
        if key_id not in self._places:
            raise BindingError(f"the site with key {key_id[:16]} is not in the query's roster")
        return self._places[key_id]

    def digest(self) -> bytes:
        """Return the SHA-256 of the byte form."""
        return self._digest

    def to_bytes(self) -> bytes:
        """Return 96 bytes a site: both keys and the commitment."""
        return self._raw

    @classmethod
    def from_bytes(cls, data: bytes | memoryview) -> Roster:
        """Read a roster.

        Raises
        ------
        EnvelopeError
            If the bytes are not exactly one roster, in order.
        """
        raw = bytes(data)
        if len(raw) % _SEAT_BYTES:
            raise EnvelopeError("a roster of broken length")
        parts = (raw[i : i + _SEAT_BYTES] for i in range(0, len(raw), _SEAT_BYTES))
        seats = tuple(
            Seat(identity=PublicIdentity.from_bytes(p[:64]), commitment=p[64:].hex()) for p in parts
        )
        roster = cls(seats)
        if roster.seats != seats:
            raise EnvelopeError("a roster that is not in the order of its key ids")
        return roster
