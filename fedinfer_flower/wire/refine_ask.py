"""Between receiver and sharer: the ask, and what the sharer gives.

Both are signed by who made them. They are sealed to the other site wherever fusers run at the
receiver, so that the coordinator relays what it cannot read.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Final

from fedinfer_flower.errors import BindingError, EnvelopeError, SignatureError
from fedinfer_flower.wire import fields
from fedinfer_flower.wire.envelope import (
    DEFAULT_LIMITS,
    Envelope,
    Kind,
    WireLimits,
    decode,
    encode,
)
from fedinfer_flower.wire.identity import Identity, PublicIdentity
from fedinfer_flower.wire.refine_asked import QuerierConsent
from fedinfer_flower.wire.refine_fields import (
    MAX_QUESTIONS,
    MAX_ROUNDS,
    Evidence,
    Span,
    evidence_from_bytes,
    evidence_to_bytes,
    key_id,
    one_of,
    require_verb,
    spans_from_bytes,
    spans_to_bytes,
    texts_from_bytes,
    texts_to_bytes,
)
from fedinfer_flower.wire.sealing import open_sealed, seal_to

__all__ = ["ShareAsk", "ShareBody", "open_ask", "open_body", "pack_ask", "pack_body"]

_ASK_DOMAIN: Final = "language ask"
_BODY_DOMAIN: Final = "language body"
_ASK: Final = "share-ask"
_BODY: Final = "share-body"
_SIGNATURE_BYTES: Final = 64
_MEDIA: Final = ("cache", "text")


@dataclass(frozen=True, kw_only=True)
class ShareAsk:
    """What a receiver asks one sharer.

    Parameters
    ----------
    questions : tuple of str
        In other words than the querier's, if the receiver rewrites.
    consent : QuerierConsent
    round_number : int
        From 1.
    medium : str
        ``"cache"`` or ``"text"``.
    share : mapping
        For caches: what to send, as ``ShareSpec.to_dict`` gives it; empty for text.
    codec : str
        For caches: how to encode it.
    scales : bytes
        Static scales of the codec, where it has them.
    max_new_tokens : int
        For text: length of a note.
    sharer : str
        Key id of the site that is asked.
    reply_to : PublicIdentity
        The receiver.

    Privacy
    -------
    The sharer reads the rewritten questions.
    """

    questions: tuple[str, ...] = field(repr=False)
    consent: QuerierConsent
    round_number: int
    medium: str
    sharer: str
    reply_to: PublicIdentity
    share: Mapping[str, str | int | float | bool] = field(default_factory=dict)
    codec: str = ""
    scales: bytes = field(default=b"", repr=False)
    max_new_tokens: int = 32

    def to_bytes(self) -> bytes:
        """Return the ask in clear, without its signature."""
        return encode(
            Envelope(
                kind=Kind.QUERY,
                run_id=self.consent.run_id,
                query_id=self.consent.query_id,
                codec=self.codec,
                meta={
                    "verb": _ASK,
                    "consent": self.consent.to_meta(),
                    "round": self.round_number,
                    "medium": self.medium,
                    "share": dict(self.share),
                    "max-new-tokens": self.max_new_tokens,
                    "sharer": self.sharer,
                },
                sections=(
                    ("questions", texts_to_bytes(self.questions)),
                    ("scales", self.scales),
                    ("reply-to", self.reply_to.to_bytes()),
                    *self.consent.sections(),
                ),
            )
        )

    @classmethod
    def from_bytes(
        cls, data: bytes | memoryview, *, limits: WireLimits = DEFAULT_LIMITS
    ) -> ShareAsk:
        """Read an ask.

        Raises
        ------
        ProtocolError
        """
        envelope = decode(data, limits=limits)
        require_verb(envelope, Kind.QUERY, _ASK)
        envelope.require_sections("questions", "scales", "reply-to", "querier", "consent-signature")
        meta = envelope.meta
        fields.exactly(
            meta, "verb", "consent", "round", "medium", "share", "max-new-tokens", "sharer"
        )
        questions = texts_from_bytes(envelope.section("questions"))
        if not questions:
            raise EnvelopeError("an ask without questions")
        return cls(
            questions=questions,
            consent=QuerierConsent.read(meta["consent"], envelope),
            round_number=fields.whole(meta, "round", low=1, high=MAX_ROUNDS),
            medium=one_of(meta, "medium", _MEDIA),
            sharer=key_id(meta, "sharer"),
            reply_to=PublicIdentity.from_bytes(envelope.section("reply-to")),
            share=fields.scalars(meta, "share"),
            codec=envelope.codec,
            scales=bytes(envelope.section("scales")),
            max_new_tokens=fields.whole(meta, "max-new-tokens", low=1, high=1 << 20),
        )


def pack_ask(
    ask: ShareAsk, *, identity: Identity, sharer: PublicIdentity, seal: bool = True
) -> bytes:
    """Sign an ask as its receiver, and seal it to the sharer.

    Raises
    ------
    BindingError
        If the ask names another receiver or sharer.

    Examples
    --------
    >>> receiver, site = Identity.generate(), Identity.generate()
    >>> ask = ShareAsk(questions=("why ?",), consent=QuerierConsent(run_id=7, query_id="q"),
    ...                round_number=1, medium="text", sharer=site.key_id,
    ...                reply_to=receiver.public)
    >>> packed = pack_ask(ask, identity=receiver, sharer=site.public)
    >>> open_ask(packed, identity=site, run_id=7, query_id="q", sealed=True) == ask
    True
    """
    if ask.reply_to != identity.public or ask.sharer != sharer.key_id:
        raise BindingError("an ask names its receiver and its sharer")
    plain = ask.to_bytes()
    info = _ask_info(ask.consent.run_id, ask.consent.query_id, sharer.key_id)
    signed = identity.sign(_ASK_DOMAIN, info + plain) + plain
    return seal_to(sharer, signed, info=info) if seal else signed


def open_ask(
    data: bytes | memoryview,
    *,
    identity: Identity,
    run_id: int,
    query_id: str,
    sealed: bool,
    limits: WireLimits = DEFAULT_LIMITS,
) -> ShareAsk:
    """Open an ask at its sharer, and require its receiver's signature.

    Raises
    ------
    ProtocolError
        If it is sealed to another site, altered, of another run or batch, or the receiver
        is not the one that the querier named.
    """
    info = _ask_info(run_id, query_id, identity.key_id)
    signed = open_sealed(identity, data, info=info) if sealed else bytes(data)
    plain = signed[_SIGNATURE_BYTES:]
    ask = ShareAsk.from_bytes(plain, limits=limits)
    ask.reply_to.verify(_ASK_DOMAIN, info + plain, signed[:_SIGNATURE_BYTES])
    ask.reply_to.require_usable()
    bound = (ask.sharer, ask.consent.run_id, ask.consent.query_id)
    if bound != (identity.key_id, run_id, query_id):
        raise BindingError("the ask belongs to another site, run or batch")
    if ask.consent.receiver not in ("", ask.reply_to.key_id):
        raise BindingError("the ask is by another receiver than the querier named")
    if ask.consent.querier is not None and not sealed:
        raise SignatureError("a querier's questions in clear: only a coordinator's own are")
    return ask


@dataclass(frozen=True, kw_only=True)
class ShareBody:
    """What a sharer gives: entries with evidence, or notes.

    Parameters
    ----------
    payload : bytes
        Encoded entries; empty for text.
    notes : tuple of str
        One a question; empty for caches.
    evidence : float32 array (B, 4), optional
        How certain the sharer's model is of its own answer.
    spans : tuple of tuple of (int, int)
        For fusers that align tokens, of whole prompts only: characters that each real token
        of a prompt covers.
    sections : tuple of (int, int)
        With `spans`: where the question stands in each prompt.
    on_refined : bool
        Whether the entries stand on what the sharer had fused itself in the round before.

    Privacy
    -------
    A cache can be inverted: whoever reads it can read what was asked, and much of the
    sharer's document. Notes are what the model wrote about that document.
    """

    payload: bytes = field(default=b"", repr=False)
    notes: tuple[str, ...] = field(default=(), repr=False)
    evidence: Evidence | None = field(default=None, repr=False)
    spans: tuple[tuple[Span, ...], ...] = field(default=(), repr=False)
    sections: tuple[Span, ...] = field(default=(), repr=False)
    on_refined: bool = False

    def to_bytes(self, *, run_id: int, query_id: str) -> bytes:
        """Return the body in clear, without its signature."""
        return encode(
            Envelope(
                kind=Kind.ANSWER,
                run_id=run_id,
                query_id=query_id,
                meta={"verb": _BODY, "on-refined": self.on_refined},
                sections=(
                    ("payload", self.payload),
                    ("notes", texts_to_bytes(self.notes)),
                    ("evidence", evidence_to_bytes(self.evidence)),
                    ("spans", spans_to_bytes((*self.spans, self.sections) if self.spans else ())),
                ),
            )
        )

    @classmethod
    def from_bytes(
        cls, data: bytes | memoryview, *, limits: WireLimits = DEFAULT_LIMITS
    ) -> ShareBody:
        """Read a body. Its payload is still to be decoded, strictly.

        Raises
        ------
        ProtocolError
        """
        envelope = decode(data, limits=limits)
        require_verb(envelope, Kind.ANSWER, _BODY)
        envelope.require_sections("payload", "notes", "evidence", "spans")
        fields.exactly(envelope.meta, "verb", "on-refined")
        evidence = envelope.section("evidence")
        if len(evidence) > 16 * MAX_QUESTIONS:
            raise EnvelopeError("evidence of more questions than a batch has")
        *spans, sections = spans_from_bytes(envelope.section("spans")) or ((),)
        if spans and len(spans) != len(sections):
            raise EnvelopeError("spans of tokens without the places of the questions")
        return cls(
            payload=bytes(envelope.section("payload")),
            notes=texts_from_bytes(envelope.section("notes")),
            evidence=evidence_from_bytes(evidence),
            spans=tuple(spans),
            sections=sections,
            on_refined=fields.flag(envelope.meta, "on-refined"),
        )


def pack_body(
    body: ShareBody,
    *,
    identity: Identity,
    reply_to: PublicIdentity,
    run_id: int,
    query_id: str,
    round_number: int,
    seal: bool = True,
) -> bytes:
    """Sign a body as its sharer, and seal it to the receiver.

    Examples
    --------
    >>> receiver, site = Identity.generate(), Identity.generate()
    >>> about = dict(run_id=7, query_id="q", round_number=1)
    >>> packed = pack_body(ShareBody(notes=("x",)), identity=site,
    ...                    reply_to=receiver.public, **about)
    >>> open_body(packed, identity=receiver, sharer=site.public, sealed=True, **about).notes
    ('x',)
    """
    plain = body.to_bytes(run_id=run_id, query_id=query_id)
    info = _body_info(run_id, query_id, round_number, identity.key_id, reply_to.key_id)
    signed = identity.sign(_BODY_DOMAIN, info + plain) + plain
    return seal_to(reply_to, signed, info=info) if seal else signed


def open_body(
    data: bytes | memoryview,
    *,
    sharer: PublicIdentity,
    run_id: int,
    query_id: str,
    round_number: int,
    sealed: bool,
    identity: Identity | None = None,
    receiver: str = "",
    limits: WireLimits = DEFAULT_LIMITS,
) -> ShareBody:
    """Open a body, and require its sharer's signature.

    Parameters
    ----------
    identity : Identity, optional
        The receiver's keys; a coordinator that reads in clear gives `receiver` instead.
    receiver : str
        Key id of the receiver.

    Raises
    ------
    ProtocolError
        If it is of another batch, round, sharer or receiver, or was altered.
    """
    to = receiver if identity is None else identity.key_id
    info = _body_info(run_id, query_id, round_number, sharer.key_id, to)
    if not sealed:
        signed = bytes(data)
    elif identity is None:
        raise BindingError("a sealed body opens with its receiver's keys only")
    else:
        signed = open_sealed(identity, data, info=info)
    plain = signed[_SIGNATURE_BYTES:]
    sharer.verify(_BODY_DOMAIN, info + plain, signed[:_SIGNATURE_BYTES])
    return ShareBody.from_bytes(plain, limits=limits)


def _ask_info(run_id: int, query_id: str, sharer: str) -> bytes:
    return f"ask|{run_id}|{query_id}|{sharer}".encode()


def _body_info(run_id: int, query_id: str, round_number: int, sharer: str, receiver: str) -> bytes:
    return f"body|{run_id}|{query_id}|{round_number}|{sharer}|{receiver}".encode()
