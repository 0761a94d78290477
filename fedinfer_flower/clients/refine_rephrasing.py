"""The receiver's first step: read questions, decide whom to ask and how, rewrite, and ask.

Axes: B questions.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from fedinfer_flower.clients.containment import contained
from fedinfer_flower.clients.language_state import Desk
from fedinfer_flower.errors import (
    BindingError,
    EnvelopeError,
    FedInferError,
    FuserError,
    InvalidValueError,
    MediumRefusedError,
    ModelAnswerError,
    PromptTooLongError,
    SizeLimitError,
    UnknownNameError,
)
from fedinfer_flower.wire.envelope import Envelope
from fedinfer_flower.wire.refine_ask import ShareAsk, pack_ask
from fedinfer_flower.wire.refine_asked import Asked, open_asked
from fedinfer_flower.wire.refine_documents import RelayedAsk, RephraseReply, RephraseRequest
from fedinfer_flower.wire.refine_fields import medium_of
from fedinfer_flower.wire.refine_seats import SharerSeat

if TYPE_CHECKING:
    from fedinfer_flower.kv.fuser import Fuser
    from fedinfer_flower.language.model import Prefill

__all__ = ["KEPT", "Expected", "Kept", "keep", "open_questions", "rephrase"]

KEPT: Final = "kept"
_SEE_LOG: Final = "see the site's own log"
_VERBATIM: Final = "none"


@dataclass(frozen=True, eq=False, kw_only=True)
class Expected:
    """What a sharer was asked for.

    Parameters
    ----------
    seat : SharerSeat
    medium : str
    share : mapping
    codec : str
    fuser : Fuser, optional
        The receiver's own, for caches.
    """

    seat: SharerSeat
    medium: str
    share: Mapping[str, Any] = field(default_factory=dict)
    codec: str = ""
    fuser: Fuser | None = field(default=None, repr=False)


@dataclass(frozen=True, eq=False, kw_only=True)
class Kept:
    """What a receiver keeps between rewriting and answering.

    Parameters
    ----------
    asked : Asked
    sealed : bool
    round_number : int
    host : str
    own : Prefill
        The model's reading of the questions alone.
    documents : tuple of tuple of str
        The site's own, read before each question.
    expected : mapping of key id to Expected
    refused, changed : mapping of key id to error code
    """

    asked: Asked
    sealed: bool
    round_number: int
    host: str
    own: Prefill
    documents: tuple[tuple[str, ...], ...]
    expected: Mapping[str, Expected]
    refused: Mapping[str, str]
    changed: Mapping[str, str]


def rephrase(envelope: Envelope, desk: Desk, *, sender: int) -> Envelope:
    """Rewrite questions for each sharer, and keep what the answer will need.

    Raises
    ------
    FedInferError
        Typed, and safe to send.
    """
    request = RephraseRequest.read(envelope)
    asked = open_questions(
        request.asked,
        desk,
        query_id=request.query_id,
        sealed=request.sealed,
        round_number=request.round_number,
        host=request.host,
    )
    desk.admit(
        asked.consent,
        round_number=request.round_number,
        verb="rephrase",
        peer="",
        rows=len(asked.questions),
    )
    with (
        desk.state.lock,
        contained(
            ModelAnswerError, "the questions could not be read", hint=_SEE_LOG, pass_typed=True
        ),
    ):
        kept = keep(
            asked,
            request.sharers,
            desk,
            sealed=request.sealed,
            round_number=request.round_number,
            host=request.host,
            rephraser=_rephraser_name(asked, request, desk),
        )
        asks = _asks(kept, desk, rephraser=_rephraser_name(asked, request, desk))
    tells = request.host == "coordinator" and desk.policy.share_evidence
    reply = RephraseReply(
        query_id=request.query_id,
        round_number=request.round_number,
        handle=_handle(kept, desk),
        asks=tuple(asks),
        refused=kept.refused,
        changed=kept.changed,
        evidence=kept.own.evidence.numpy().astype(np.float32) if tells else None,
    )
    return reply.to_envelope(run_id=desk.run_id, sender=sender)


def open_questions(
    data: bytes, desk: Desk, *, query_id: str, sealed: bool, round_number: int, host: str
) -> Asked:
    """Open questions to this site as receiver, and require every consent and limit.

    Raises
    ------
    FedInferError
    """
    desk.policy.require_on("answers", "answer questions")
    if host == "coordinator":
        if sealed:
            raise BindingError(
                "sealed questions with fusers at the coordinator, which would read them",
                hint="host the fusers at the receiver",
            )
        desk.policy.require_on("coordinator_fusers", "let a coordinator read what sites share")
    if sealed:
        asked = open_asked(
            data, identity=desk.identity, run_id=desk.run_id, query_id=query_id, limits=desk.limits
        )
    else:
        asked = Asked.from_bytes(data, limits=desk.limits)
        if asked.consent.querier is not None:
            raise EnvelopeError("questions in clear cannot show that their querier asked them")
    consent = asked.consent
    if (consent.run_id, consent.query_id) != (desk.run_id, query_id):
        raise BindingError("the questions belong to another run or batch")
    if consent.receiver != desk.identity.key_id and (sealed or consent.receiver):
        raise BindingError("the questions are meant for another site")
    desk.require_consent(consent, sealed=sealed, round_number=round_number)
    desk.passage.require_rows(len(asked.questions))
    desk.policy.require_questions(asked.questions)
    return asked


def keep(
    asked: Asked,
    seats: Sequence[SharerSeat],
    desk: Desk,
    *,
    sealed: bool,
    round_number: int,
    host: str,
    rephraser: str,
) -> Kept:
    """Read the questions, and decide for each sharer whether and how to ask it."""
    expected: dict[str, Expected] = {}
    refused: dict[str, str] = {}
    changed: dict[str, str] = {}
    for seat in seats:
        key_id = seat.card.key_id
        try:
            found, why = _expected(asked, seat, desk, host=host, rephraser=rephraser)
        except FedInferError as exc:
            refused[key_id] = exc.code
            continue
        expected[key_id] = found
        if why:
            changed[key_id] = why
    own, documents = _read_alone(asked.questions, desk)
    return Kept(
        asked=asked,
        sealed=sealed,
        round_number=round_number,
        host=host,
        own=own,
        documents=documents,
        expected=expected,
        refused=refused,
        changed=changed,
    )


def _read_alone(
    questions: Sequence[str], desk: Desk
) -> tuple[Prefill, tuple[tuple[str, ...], ...]]:
    """Read the questions, behind own documents where the site agreed and they fit."""
    from fedinfer_flower.refine.receiver import Receiver

    receiver, look_up = Receiver(desk.state.model), desk.state.site.documents
    none: tuple[tuple[str, ...], ...] = ((),) * len(questions)
    if look_up is None or not desk.policy.answers_from_documents:
        return receiver.own(questions), none
    try:
        found = tuple(tuple(look_up(question)) for question in questions)
        return receiver.own(questions, found), found
    except (ModelAnswerError, PromptTooLongError):
        return receiver.own(questions), none  # the log has said why


def _expected(
    asked: Asked, seat: SharerSeat, desk: Desk, *, host: str, rephraser: str
) -> tuple[Expected, str]:
    """Return what to ask a sharer for, and the code of why not for the planned cache."""
    if seat.card.key_id == desk.identity.key_id:
        raise BindingError("a site is no sharer of its own")
    desk.require_peer(seat.card.key_id)
    asked.consent.require_sharer(seat.card.key_id)
    if seat.medium == "text":
        return _in_text(asked, seat), ""
    try:
        rows = len(asked.questions)
        hosted = host == "coordinator"
        planned = _hosted(seat) if hosted else _own(seat, desk, rephraser, rows=rows)
        _require(asked, seat, medium_of(planned.share))
    except (FuserError, MediumRefusedError) as exc:
        if host == "coordinator":
            raise
        try:
            return _in_text(asked, seat), exc.code
        except MediumRefusedError:
            raise exc from None
    return planned, ""


def _in_text(asked: Asked, seat: SharerSeat) -> Expected:
    _require(asked, seat, "text")
    return Expected(seat=seat, medium="text")


def _require(asked: Asked, seat: SharerSeat, medium: str) -> None:
    asked.consent.require_medium(medium)
    if medium not in seat.card.media:
        raise MediumRefusedError("the sharer does not share in this way")


def _hosted(seat: SharerSeat) -> Expected:
    if not seat.share or not seat.codec:
        raise FuserError("the coordinator's fuser does not say what the sharer must send")
    return Expected(seat=seat, medium="cache", share=seat.share, codec=seat.codec)


def _own(seat: SharerSeat, desk: Desk, rephraser: str, *, rows: int) -> Expected:
    fuser = desk.state.bank.get(seat.card.model_digest, desk.state.model.layout.model_digest)
    if fuser.needs_alignment and rephraser != _VERBATIM:
        raise FuserError(
            "a fuser that aligns tokens needs the questions in the same words at both sites",
            hint='ask with rephrase="none", or train a last-token fuser',
        )
    bits = fuser.scales.bits if fuser.scales is not None else 0
    common = [
        codec
        for codec in desk.policy.codecs
        if codec in seat.card.codecs
        and (not codec.startswith("static") or codec == f"static{bits}")
    ]
    if not common:
        raise MediumRefusedError("receiver and sharer have no codec in common")
    if len(common) > 1 and _travels(fuser, common[0], rows) > _travels(fuser, common[1], rows):
        common = common[1:]
    share = fuser.spec.share.to_dict()
    return Expected(seat=seat, medium="cache", share=share, codec=common[0], fuser=fuser)


def _travels(fuser: Fuser, codec: str, rows: int) -> int:
    """Return the bytes of a reply, and of the scales that the ask for it carries."""
    from fedinfer_flower.kv.payload import payload_bytes

    share, layout = fuser.spec.share, fuser.spec.sharer
    # Of a full cache every prompt is long: there the scales weigh nothing.
    tokens = [share.tokens(layout.window if share.full else share.last)] * rows
    static = codec.startswith("static") and fuser.scales is not None
    scales = len(fuser.scales.to_bytes()) if static and fuser.scales is not None else 0
    return payload_bytes(layout, tokens, codec, share.hidden) + scales


def _rephraser_name(asked: Asked, request: RephraseRequest, desk: Desk) -> str:
    # Whoever only relays sealed questions must not decide in which words they travel on.
    by_request = "" if request.sealed else request.rephrase
    return asked.rephrase or by_request or desk.state.rephrase


def _asks(kept: Kept, desk: Desk, *, rephraser: str) -> list[RelayedAsk]:
    from fedinfer_flower.language.rephrase import make_rephraser, sharer_styles

    try:
        rewrite = make_rephraser(rephraser, desk.state.model)
    except (UnknownNameError, InvalidValueError):
        raise EnvelopeError("no rephraser of the name that was asked for") from None
    styles = sharer_styles(kept.expected)
    asks = []
    for key_id, wanted in kept.expected.items():
        questions = rewrite.rephrase(list(kept.asked.questions), style=styles[key_id])
        scales = wanted.fuser.scales if wanted.fuser is not None else None
        own_scales = scales.to_bytes() if scales and wanted.codec.startswith("static") else b""
        ask = ShareAsk(
            questions=tuple(questions),
            consent=kept.asked.consent,
            round_number=kept.round_number,
            medium=wanted.medium,
            sharer=key_id,
            reply_to=desk.identity.public,
            share=dict(wanted.share),
            codec=wanted.codec,
            scales=wanted.seat.scales if kept.host == "coordinator" else own_scales,
            max_new_tokens=desk.policy.max_new_tokens,
        )
        sealed = kept.host != "coordinator"
        body = pack_ask(ask, identity=desk.identity, sharer=wanted.seat.card.identity, seal=sealed)
        asks.append(RelayedAsk(sharer=key_id, medium=wanted.medium, body=body))
    return asks


def _handle(kept: Kept, desk: Desk) -> str:
    """Keep what was read; without a handle where it is too large, and then it is read again."""
    query_id = kept.asked.consent.query_id
    try:
        return desk.state.kept.put(
            kept,
            size_bytes=_size(kept),
            querier=query_id,
            run_id=desk.scope(query_id=query_id, verb=KEPT),
        )
    except SizeLimitError:
        return ""


def _size(kept: Kept) -> int:
    entries = kept.own.entries
    tensors = (*entries.keys, *entries.values)
    return sum(x.numel() * x.element_size() for x in tensors) + 4 * sum(
        len(question) for question in kept.asked.questions
    )
