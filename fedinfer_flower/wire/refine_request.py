"""Requests that end in answers: what the sharers gave to a receiver; candidates to score."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Final, Self

import numpy as np
import numpy.typing as npt

from fedinfer_flower.errors import EnvelopeError
from fedinfer_flower.wire import fields
from fedinfer_flower.wire.envelope import Envelope, Kind
from fedinfer_flower.wire.refine_fields import (
    HOSTS,
    MAX_QUESTIONS,
    bits_from_bytes,
    bits_to_bytes,
    key_id,
    objects,
    one_of,
    query_id_of,
    require_verb,
    round_of,
)
from fedinfer_flower.wire.refine_seats import SharerSeat, read_seats, seats_meta, seats_sections

__all__ = ["CandidatesRequest", "Part", "RefineRequest"]

_PART_MEDIA: Final = ("cache", "text", "projected")


@dataclass(frozen=True, kw_only=True)
class Part:
    """What one sharer gave, on its way to the receiver.

    Parameters
    ----------
    sharer : str
        Key id.
    medium : str
        ``"cache"`` and ``"text"``: a `ShareBody` as the sharer packed it. ``"projected"``:
        entries that a fuser at the coordinator put into the receiver's space, encoded.
    body : bytes
    gate : uint8 array (B,), optional
        For ``"projected"``: for which questions to use it; None for all.
    """

    sharer: str
    medium: str
    body: bytes = field(repr=False)
    gate: npt.NDArray[np.uint8] | None = field(default=None, repr=False)


@dataclass(frozen=True, kw_only=True)
class RefineRequest:
    """Ask a receiver for its answers.

    Parameters
    ----------
    query_id : str
    round_number : int
    handle : str
        Of the `RephraseReply`; empty where there was none.
    asked : bytes
        The questions again, so that a receiver which lost them can start anew; may be empty
        where there is a handle.
    sealed : bool
    sharers : tuple of SharerSeat
        With `asked`: as in the `RephraseRequest`.
    parts : tuple of Part
        None: the receiver answers alone.
    host : str
    keep : bool
        Whether a further round follows, so that the site keeps what it fused.
    """

    query_id: str
    round_number: int
    handle: str = ""
    asked: bytes = field(default=b"", repr=False)
    sealed: bool = False
    sharers: tuple[SharerSeat, ...] = ()
    parts: tuple[Part, ...] = ()
    host: str = "receiver"
    keep: bool = False

    def to_envelope(self, *, run_id: int) -> Envelope:
        """Return the message."""
        return Envelope(
            kind=Kind.QUERY,
            run_id=run_id,
            query_id=self.query_id,
            meta={
                "verb": "refine",
                "round": self.round_number,
                "handle": self.handle,
                "sealed": self.sealed,
                "host": self.host,
                "keep": self.keep,
                "seats": seats_meta(self.sharers),
                "parts": [{"sharer": p.sharer, "medium": p.medium} for p in self.parts],
            },
            sections=(
                ("asked", self.asked),
                *seats_sections(self.sharers),
                *(
                    section
                    for i, p in enumerate(self.parts)
                    for section in (
                        (f"part-{i}", p.body),
                        (f"gate-{i}", b"" if p.gate is None else bits_to_bytes(p.gate[:, None])),
                    )
                ),
            ),
        )

    @classmethod
    def read(cls, envelope: Envelope) -> Self:
        """Read the message, and verify the cards in it."""
        require_verb(envelope, Kind.QUERY, "refine")
        meta = envelope.meta
        fields.exactly(meta, "verb", "round", "handle", "sealed", "host", "keep", "seats", "parts")
        listed = objects(meta, "parts", "sharer", "medium")
        names = [f"{kind}-{i}" for i in range(len(listed)) for kind in ("part", "gate")]
        sharers = read_seats(envelope, before=("asked",), after=names)
        parts = []
        for i, entry in enumerate(listed):
            gate = envelope.section(f"gate-{i}")
            if len(gate) > MAX_QUESTIONS:
                raise EnvelopeError("a gate of more questions than a batch has")
            bits = bits_from_bytes(gate, rows=len(gate), sharers=1)[:, 0] if len(gate) else None
            parts.append(
                Part(
                    sharer=key_id(entry, "sharer"),
                    medium=one_of(entry, "medium", _PART_MEDIA),
                    body=bytes(envelope.section(f"part-{i}")),
                    gate=bits,
                )
            )
        if len({p.sharer for p in parts}) != len(parts):
            raise EnvelopeError("a sharer that gave twice")
        return cls(
            query_id=query_id_of(envelope),
            round_number=round_of(meta),
            handle=fields.text(meta, "handle", max_chars=128),
            asked=bytes(envelope.section("asked")),
            sealed=fields.flag(meta, "sealed"),
            sharers=sharers,
            parts=tuple(parts),
            host=one_of(meta, "host", HOSTS),
            keep=fields.flag(meta, "keep"),
        )


@dataclass(frozen=True, kw_only=True)
class CandidatesRequest:
    """Ask a site how likely its model finds given answers.

    Parameters
    ----------
    query_id : str
    asked : bytes
        `Asked` with candidates.
    sealed : bool
    """

    query_id: str
    asked: bytes = field(repr=False)
    sealed: bool = False

    def to_envelope(self, *, run_id: int) -> Envelope:
        """Return the message."""
        return Envelope(
            kind=Kind.QUERY,
            run_id=run_id,
            query_id=self.query_id,
            meta={"verb": "candidates", "sealed": self.sealed},
            sections=(("asked", self.asked),),
        )

    @classmethod
    def read(cls, envelope: Envelope) -> Self:
        """Read the message."""
        require_verb(envelope, Kind.QUERY, "candidates")
        envelope.require_sections("asked")
        fields.exactly(envelope.meta, "verb", "sealed")
        return cls(
            query_id=query_id_of(envelope),
            asked=bytes(envelope.section("asked")),
            sealed=fields.flag(envelope.meta, "sealed"),
        )
