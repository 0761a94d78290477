"""Requests to receivers and sharers of a refinement, and their replies.

==================  =======================================  ===============================
action              the coordinator sends                    the site returns
==================  =======================================  ===============================
``fi_introduce``    a ``hello`` envelope                     `LanguageCard`
``fi_rephrase``     `RephraseRequest`                        `RephraseReply`
``fi_share_cache``  `ShareRequest`, or `FetchRequest`        `ShareReply` or `ShareOffer`
``fi_generate``     `ShareRequest`                           `ShareReply`
``fi_refine``       `RefineRequest`                          `AnswerReply`
``fi_candidates``   `CandidatesRequest`                      `AnswerReply`
==================  =======================================  ===============================

`RefineRequest` and `CandidatesRequest` are in `wire.refine_request`, `AnswerReply` in
`wire.refine_answers`, what asks and shares hold in `wire.refine_ask`, the questions and the
consent in `wire.refine_asked`, the card in `wire.language_card`.

A site that fails replies with an ``error`` envelope (`wire.messages.read_error`). Every
document here has ``to_envelope`` and ``read``, which is strict.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Final, Self

from fedinfer_flower.errors import EnvelopeError
from fedinfer_flower.wire import fields
from fedinfer_flower.wire.envelope import Envelope, Kind
from fedinfer_flower.wire.messages import check_bound
from fedinfer_flower.wire.refine_fields import (
    HOSTS,
    Evidence,
    codes,
    evidence_from_bytes,
    evidence_to_bytes,
    key_id,
    objects,
    one_of,
    query_id_of,
    require_verb,
    round_of,
)
from fedinfer_flower.wire.refine_seats import SharerSeat, read_seats, seats_meta, seats_sections

__all__ = [
    "FetchRequest",
    "RelayedAsk",
    "RephraseReply",
    "RephraseRequest",
    "ShareOffer",
    "ShareReply",
    "ShareRequest",
    "read_share_reply",
]

_MEDIA: Final = ("cache", "text")


@dataclass(frozen=True, kw_only=True)
class RephraseRequest:
    """Ask a receiver to rewrite questions for its sharers.

    Parameters
    ----------
    query_id : str
    round_number : int
    asked : bytes
        `Asked`, in clear or sealed to the receiver.
    sealed : bool
    sharers : tuple of SharerSeat
    host : str
        Where fusers run: ``"receiver"`` or ``"coordinator"``.
    rephrase : str
        Name of the rephraser; empty for the site's own choice. Where the questions are
        sealed, only `Asked.rephrase` counts.
    """

    query_id: str
    round_number: int
    asked: bytes = field(repr=False)
    sealed: bool
    sharers: tuple[SharerSeat, ...]
    host: str = "receiver"
    rephrase: str = ""

    def to_envelope(self, *, run_id: int) -> Envelope:
        """Return the message."""
        return Envelope(
            kind=Kind.QUERY,
            run_id=run_id,
            query_id=self.query_id,
            meta={
                "verb": "rephrase",
                "round": self.round_number,
                "sealed": self.sealed,
                "host": self.host,
                "rephrase": self.rephrase,
                "seats": seats_meta(self.sharers),
            },
            sections=(("asked", self.asked), *seats_sections(self.sharers)),
        )

    @classmethod
    def read(cls, envelope: Envelope) -> Self:
        """Read the message, and verify the cards in it."""
        require_verb(envelope, Kind.QUERY, "rephrase")
        meta = envelope.meta
        fields.exactly(meta, "verb", "round", "sealed", "host", "rephrase", "seats")
        sharers = read_seats(envelope, before=("asked",))
        return cls(
            query_id=query_id_of(envelope),
            round_number=round_of(meta),
            asked=bytes(envelope.section("asked")),
            sealed=fields.flag(meta, "sealed"),
            sharers=sharers,
            host=one_of(meta, "host", HOSTS),
            rephrase=fields.text(meta, "rephrase", max_chars=64),
        )


@dataclass(frozen=True, kw_only=True)
class RelayedAsk:
    """An ask for the coordinator to carry to one sharer.

    Parameters
    ----------
    sharer : str
        Key id.
    medium : str
        ``"cache"`` goes with `SHARE_CACHE`, ``"text"`` with `GENERATE`. It may be text where
        a cache was planned: see `RephraseReply.changed`.
    body : bytes
    """

    sharer: str
    medium: str
    body: bytes = field(repr=False)


@dataclass(frozen=True, kw_only=True)
class RephraseReply:
    """Asks for the sharers, and a handle for what the receiver keeps.

    Parameters
    ----------
    query_id : str
    round_number : int
    handle : str
        Names what the receiver keeps until `RefineRequest`.
    asks : tuple of RelayedAsk
    refused : mapping of key id to error code
        Sharers that are not asked.
    changed : mapping of key id to error code
        Sharers that are asked in text, with the reason why not for a cache.
    evidence : float32 array (B, 4), optional
        Of the receiver's own answer; only where fusers run at the coordinator and the
        site agrees to tell.
    """

    query_id: str
    round_number: int
    handle: str
    asks: tuple[RelayedAsk, ...]
    refused: Mapping[str, str] = field(default_factory=dict)
    changed: Mapping[str, str] = field(default_factory=dict)
    evidence: Evidence | None = field(default=None, repr=False)

    def to_envelope(self, *, run_id: int, sender: int) -> Envelope:
        """Return the message."""
        return Envelope(
            kind=Kind.ANSWER,
            run_id=run_id,
            query_id=self.query_id,
            sender=sender,
            meta={
                "verb": "rephrased",
                "round": self.round_number,
                "handle": self.handle,
                "asks": [{"sharer": a.sharer, "medium": a.medium} for a in self.asks],
                "refused": dict(self.refused),
                "changed": dict(self.changed),
            },
            sections=(
                ("evidence", evidence_to_bytes(self.evidence)),
                *((f"ask-{i}", a.body) for i, a in enumerate(self.asks)),
            ),
        )

    @classmethod
    def read(cls, envelope: Envelope, *, run_id: int, sender: int, query_id: str) -> Self:
        """Read the message."""
        require_verb(envelope, Kind.ANSWER, "rephrased")
        check_bound(envelope, run_id=run_id, sender=sender, query_id=query_id)
        meta = envelope.meta
        fields.exactly(meta, "verb", "round", "handle", "asks", "refused", "changed")
        listed = objects(meta, "asks", "sharer", "medium")
        envelope.require_sections("evidence", *(f"ask-{i}" for i in range(len(listed))))
        asks = tuple(
            RelayedAsk(
                sharer=key_id(entry, "sharer"),
                medium=one_of(entry, "medium", _MEDIA),
                body=bytes(envelope.section(f"ask-{i}")),
            )
            for i, entry in enumerate(listed)
        )
        if len({a.sharer for a in asks}) != len(asks):
            raise EnvelopeError("a sharer that is asked twice")
        return cls(
            query_id=query_id,
            round_number=round_of(meta),
            handle=fields.text(meta, "handle", max_chars=128),
            asks=asks,
            refused=codes(meta, "refused"),
            changed=codes(meta, "changed"),
            evidence=evidence_from_bytes(envelope.section("evidence")),
        )


@dataclass(frozen=True, kw_only=True)
class ShareRequest:
    """Carry an ask to its sharer.

    Parameters
    ----------
    query_id : str
    medium : str
        ``"cache"`` with `SHARE_CACHE`, ``"text"`` with `GENERATE`.
    body : bytes
        `RelayedAsk.body`.
    sealed : bool
        False only where fusers run at the coordinator.
    """

    query_id: str
    medium: str
    body: bytes = field(repr=False)
    sealed: bool = True

    def to_envelope(self, *, run_id: int) -> Envelope:
        """Return the message."""
        return Envelope(
            kind=Kind.QUERY,
            run_id=run_id,
            query_id=self.query_id,
            meta={"verb": "share", "medium": self.medium, "sealed": self.sealed},
            sections=(("ask", self.body),),
        )

    @classmethod
    def read(cls, envelope: Envelope) -> Self:
        """Read the message."""
        require_verb(envelope, Kind.QUERY, "share")
        envelope.require_sections("ask")
        fields.exactly(envelope.meta, "verb", "medium", "sealed")
        return cls(
            query_id=query_id_of(envelope),
            medium=one_of(envelope.meta, "medium", _MEDIA),
            body=bytes(envelope.section("ask")),
            sealed=fields.flag(envelope.meta, "sealed"),
        )


@dataclass(frozen=True, kw_only=True)
class FetchRequest:
    """Fetch what a sharer offered.

    Parameters
    ----------
    query_id : str
    handle : str
    ask : bytes
        The ask again, so that a sharer which lost the offer can make it anew, once; may be
        empty.
    sealed : bool
    """

    query_id: str
    handle: str
    ask: bytes = field(default=b"", repr=False)
    sealed: bool = True

    def to_envelope(self, *, run_id: int) -> Envelope:
        """Return the message."""
        return Envelope(
            kind=Kind.QUERY,
            run_id=run_id,
            query_id=self.query_id,
            meta={"verb": "fetch", "handle": self.handle, "sealed": self.sealed},
            sections=(("ask", self.ask),),
        )

    @classmethod
    def read(cls, envelope: Envelope) -> Self:
        """Read the message."""
        require_verb(envelope, Kind.QUERY, "fetch")
        envelope.require_sections("ask")
        fields.exactly(envelope.meta, "verb", "handle", "sealed")
        return cls(
            query_id=query_id_of(envelope),
            handle=fields.text(envelope.meta, "handle", max_chars=128),
            ask=bytes(envelope.section("ask")),
            sealed=fields.flag(envelope.meta, "sealed"),
        )


@dataclass(frozen=True, kw_only=True)
class ShareReply:
    """What a sharer gives.

    Parameters
    ----------
    query_id : str
    body : bytes
        `ShareBody`, sealed to the receiver unless the ask was in clear.
    """

    query_id: str
    body: bytes = field(repr=False)

    def to_envelope(self, *, run_id: int, sender: int) -> Envelope:
        """Return the message."""
        return Envelope(
            kind=Kind.ANSWER,
            run_id=run_id,
            query_id=self.query_id,
            sender=sender,
            meta={"verb": "shared"},
            sections=(("body", self.body),),
        )


@dataclass(frozen=True, kw_only=True)
class ShareOffer:
    """Where the body is large: fetch it by its handle, or do without.

    Parameters
    ----------
    query_id : str
    handle : str
    body_bytes : int
    evidence : float32 array (B, 4), optional
        Only where fusers run at the coordinator and the site agrees to tell.
    """

    query_id: str
    handle: str
    body_bytes: int
    evidence: Evidence | None = field(default=None, repr=False)

    def to_envelope(self, *, run_id: int, sender: int) -> Envelope:
        """Return the message."""
        return Envelope(
            kind=Kind.ANSWER,
            run_id=run_id,
            query_id=self.query_id,
            sender=sender,
            meta={"verb": "offered", "handle": self.handle, "body-bytes": self.body_bytes},
            sections=(("evidence", evidence_to_bytes(self.evidence)),),
        )


def read_share_reply(
    envelope: Envelope, *, run_id: int, sender: int, query_id: str
) -> ShareReply | ShareOffer:
    """Read what a sharer gave or offered.

    Raises
    ------
    ProtocolError
    """
    check_bound(envelope, run_id=run_id, sender=sender, query_id=query_id)
    if envelope.meta.get("verb") == "shared":
        require_verb(envelope, Kind.ANSWER, "shared")
        envelope.require_sections("body")
        fields.exactly(envelope.meta, "verb")
        return ShareReply(query_id=query_id, body=bytes(envelope.section("body")))
    require_verb(envelope, Kind.ANSWER, "offered")
    envelope.require_sections("evidence")
    fields.exactly(envelope.meta, "verb", "handle", "body-bytes")
    return ShareOffer(
        query_id=query_id,
        handle=fields.text(envelope.meta, "handle", max_chars=128),
        body_bytes=fields.whole(envelope.meta, "body-bytes", low=0, high=1 << 40),
        evidence=evidence_from_bytes(envelope.section("evidence")),
    )
