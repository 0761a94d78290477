"""The sharers of a refinement, as requests to the receiver carry them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final

from fedinfer_flower.errors import EnvelopeError
from fedinfer_flower.wire import fields
from fedinfer_flower.wire.envelope import Envelope, Json
from fedinfer_flower.wire.language_card import LanguageCard
from fedinfer_flower.wire.refine_fields import objects, one_of

__all__ = ["SharerSeat", "read_seats", "seats_meta", "seats_sections"]

_MEDIA: Final = ("cache", "text")


@dataclass(frozen=True, kw_only=True)
class SharerSeat:
    """One sharer of a refinement, and how it is to give.

    Parameters
    ----------
    card : LanguageCard
    medium : str
        ``"cache"`` or ``"text"``.
    share, codec, scales
        What a fuser at the coordinator needs; empty where fusers run at the receiver, which
        knows its own.
    """

    card: LanguageCard
    medium: str
    share: Mapping[str, str | int | float | bool] = field(default_factory=dict)
    codec: str = ""
    scales: bytes = field(default=b"", repr=False)


def seats_meta(seats: Sequence[SharerSeat]) -> Json:
    """Return the meta field of the seats."""
    return [{"medium": s.medium, "share": dict(s.share), "codec": s.codec} for s in seats]


def seats_sections(seats: Sequence[SharerSeat]) -> tuple[tuple[str, bytes], ...]:
    """Return the sections of the seats."""
    return tuple(
        section
        for i, seat in enumerate(seats)
        for section in ((f"card-{i}", seat.card.to_bytes()), (f"scales-{i}", seat.scales))
    )


def read_seats(
    envelope: Envelope, *, before: Sequence[str] = (), after: Sequence[str] = ()
) -> tuple[SharerSeat, ...]:
    """Read the seats and verify their cards.

    Parameters
    ----------
    before, after : sequence of str
        The envelope's other sections, which must stand around those of the seats.

    Raises
    ------
    ProtocolError
        If a card is of another run, not signed by its own keys, or comes twice.
    """
    listed = objects(envelope.meta, "seats", "medium", "share", "codec")
    own = [f"{kind}-{i}" for i in range(len(listed)) for kind in ("card", "scales")]
    envelope.require_sections(*before, *own, *after)
    seats = tuple(
        SharerSeat(
            card=LanguageCard.from_bytes(envelope.section(f"card-{i}"), run_id=envelope.run_id),
            medium=one_of(entry, "medium", _MEDIA),
            share=fields.scalars(entry, "share"),
            codec=fields.text(entry, "codec", max_chars=32),
            scales=bytes(envelope.section(f"scales-{i}")),
        )
        for i, entry in enumerate(listed)
    )
    if len({seat.card.key_id for seat in seats}) != len(seats):
        raise EnvelopeError("a sharer that has two seats")
    return seats
