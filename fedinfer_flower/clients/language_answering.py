"""The sharer's side: what a site gives to receivers, as caches or as notes.

Axes: B questions.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

import numpy as np

from fedinfer_flower.clients.containment import contained
from fedinfer_flower.clients.language_state import Desk
from fedinfer_flower.errors import (
    BindingError,
    CacheError,
    EnvelopeError,
    HandleError,
    InvalidValueError,
    MediumRefusedError,
    ModelAnswerError,
    SizeLimitError,
)
from fedinfer_flower.wire.envelope import Envelope
from fedinfer_flower.wire.refine_ask import ShareAsk, ShareBody, open_ask, pack_body
from fedinfer_flower.wire.refine_documents import (
    FetchRequest,
    ShareOffer,
    ShareReply,
    ShareRequest,
)
from fedinfer_flower.wire.refine_fields import medium_of

if TYPE_CHECKING:
    from fedinfer_flower.kv.share import ShareSpec
    from fedinfer_flower.kv.static_scales import StaticScales
    from fedinfer_flower.refine.sharer import Shared

__all__ = ["fetch", "share"]

_SEE_LOG: Final = "see the site's own log"
_OFFER: Final = "offer"


def share(envelope: Envelope, desk: Desk, *, sender: int) -> Envelope:
    """Give what a receiver asks for, or offer it where it is large.

    Raises
    ------
    FedInferError
        Typed, and safe to send.
    """
    request = ShareRequest.read(envelope)
    ask = _opened(request.body, desk, query_id=request.query_id, sealed=request.sealed)
    if ask.medium != request.medium:
        raise BindingError("the ask is for another medium than its envelope says")
    _require_agreed(ask, desk, sealed=request.sealed)
    _admit(ask, desk, verb=ask.medium)
    body, evidence = _made(ask, desk, sealed=request.sealed)
    if ask.medium == "text" or len(body) <= desk.policy.one_phase_bytes:
        reply = ShareReply(query_id=request.query_id, body=body)
        return reply.to_envelope(run_id=desk.run_id, sender=sender)
    handle = desk.state.offers.put(
        body,
        size_bytes=len(body),
        querier=request.query_id,
        run_id=desk.scope(query_id=request.query_id, verb=_OFFER),
    )
    offer = ShareOffer(
        query_id=request.query_id, handle=handle, body_bytes=len(body), evidence=evidence
    )
    return offer.to_envelope(run_id=desk.run_id, sender=sender)


def fetch(envelope: Envelope, desk: Desk, *, sender: int) -> Envelope:
    """Give what was offered; a lost offer is made anew once, if the ask comes with it.

    Raises
    ------
    HandleError
        If the handle is unknown, spent, expired or another query's, and no ask came.
    FedInferError
        Typed, and safe to send.
    """
    request = FetchRequest.read(envelope)
    # A query id is one querier's: its consent is signed with it, and is worked on once.
    try:
        body = desk.state.offers.take(
            request.handle,
            querier=request.query_id,
            run_id=desk.scope(query_id=request.query_id, verb=_OFFER),
        )
    except HandleError:
        if not request.ask:
            raise
        ask = _opened(request.ask, desk, query_id=request.query_id, sealed=request.sealed)
        _require_agreed(ask, desk, sealed=request.sealed)
        _admit(ask, desk, verb="again")
        body, _ = _made(ask, desk, sealed=request.sealed)
    reply = ShareReply(query_id=request.query_id, body=body)
    return reply.to_envelope(run_id=desk.run_id, sender=sender)


def _opened(data: bytes, desk: Desk, *, query_id: str, sealed: bool) -> ShareAsk:
    if not sealed:
        desk.policy.require_on("coordinator_fusers", "let a coordinator read what it shares")
    return open_ask(
        data,
        identity=desk.identity,
        run_id=desk.run_id,
        query_id=query_id,
        sealed=sealed,
        limits=desk.limits,
    )


def _require_agreed(ask: ShareAsk, desk: Desk, *, sealed: bool) -> None:
    """Require both consents, the site's and the querier's, and all limits."""
    medium = medium_of(ask.share) if ask.medium == "cache" else ask.medium
    desk.policy.require_medium(medium)
    desk.passage.note(medium=medium)
    desk.passage.require_rows(len(ask.questions))
    desk.require_peer(ask.reply_to.key_id)
    # What travels between sites in seals may have begun in clear: only a signature tells.
    by_querier = sealed and ask.consent.querier is not None
    desk.require_consent(ask.consent, sealed=by_querier, round_number=ask.round_number)
    ask.consent.require_sharer(desk.identity.key_id)
    ask.consent.require_medium(medium)
    desk.policy.require_questions(ask.questions)
    if ask.medium == "cache" and ask.codec not in desk.policy.codecs:
        raise MediumRefusedError(
            "this site does not encode caches in the way that was asked for",
            hint=f"its codecs: {', '.join(desk.policy.codecs)}",
        )


def _admit(ask: ShareAsk, desk: Desk, *, verb: str) -> None:
    desk.admit(
        ask.consent,
        round_number=ask.round_number,
        verb=verb,
        peer=ask.reply_to.key_id,
        rows=len(ask.questions),
    )


def _made(ask: ShareAsk, desk: Desk, *, sealed: bool) -> tuple[bytes, Any]:
    """Return the packed body, and the evidence that a coordinator may see."""
    with (
        desk.state.lock,
        contained(ModelAnswerError, "the model could not help", hint=_SEE_LOG, pass_typed=True),
    ):
        body = _notes(ask, desk) if ask.medium == "text" else _cache(ask, desk, sealed=sealed)
    packed = pack_body(
        body,
        identity=desk.identity,
        reply_to=ask.reply_to,
        run_id=desk.run_id,
        query_id=ask.consent.query_id,
        round_number=ask.round_number,
        seal=sealed,
    )
    return packed, None if sealed else body.evidence


def _notes(ask: ShareAsk, desk: Desk) -> ShareBody:
    from fedinfer_flower.refine.sharer import Sharer

    site = desk.state.site
    length = min(ask.max_new_tokens, desk.policy.max_new_tokens)
    notes = Sharer(site.model, documents=site.documents).help(ask.questions, length)
    return ShareBody(notes=tuple(note[: desk.policy.max_note_chars] for note in notes))


def _cache(ask: ShareAsk, desk: Desk, *, sealed: bool) -> ShareBody:
    from fedinfer_flower.kv.payload import encode_entries
    from fedinfer_flower.kv.share import ShareSpec

    spec, scales = ShareSpec.from_dict(ask.share), _scales(ask)
    if spec.decode > desk.policy.max_decode:
        raise SizeLimitError(
            f"{spec.decode} tokens to decode on top; this site decodes {desk.policy.max_decode}"
        )
    shared, on_refined = _shared(ask, spec, desk)
    tokens = shared.entries.tokens
    if tokens > desk.policy.max_cache_tokens:
        raise SizeLimitError(f"a cache of {tokens} tokens is more than this site shares")
    try:
        # Not squeezed: how well numbers compress would show in the length.
        payload = encode_entries(shared.entries, codec=ask.codec, scales=scales, squeeze=False)
    except InvalidValueError as exc:
        raise EnvelopeError(f"the ask's codec does not fit: {exc.message}") from None
    tells = sealed or desk.policy.share_evidence
    aligned = shared.tokens is not None and bool(shared.sections)
    return ShareBody(
        payload=payload,
        evidence=shared.evidence.numpy().astype(np.float32) if tells else None,
        spans=_spans(shared) if aligned else (),
        sections=tuple(shared.sections) if aligned else (),
        on_refined=on_refined,
    )


def _shared(ask: ShareAsk, spec: ShareSpec, desk: Desk) -> tuple[Shared, bool]:
    """Compute the entries: in later rounds on what the site itself fused in the last."""
    from fedinfer_flower.refine.sharer import Sharer

    site = desk.state.site
    sharer = Sharer(site.model, documents=site.documents)
    before = desk.state.refined.get(desk.state_key(ask.consent, ask.round_number - 1))
    if before is not None and len(before.ids) == len(ask.questions):
        try:
            return sharer.share(ask.questions, spec, on=before), True
        except CacheError:
            pass  # a fused state lacks what this spec asks for: read the questions anew
    return sharer.share(ask.questions, spec), False


def _scales(ask: ShareAsk) -> StaticScales | None:
    from fedinfer_flower.kv.static_scales import StaticScales

    return StaticScales.from_bytes(ask.scales) if ask.scales else None


def _spans(shared: Shared) -> tuple[tuple[tuple[int, int], ...], ...]:
    rows = [] if shared.tokens is None else shared.tokens.spans
    return tuple(tuple((int(a), int(b)) for a, b in row) for row in rows)
