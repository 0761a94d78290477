"""The receiver's last step: check what sharers gave, choose, fuse, quote, and answer.

Nothing that a sharer sends keeps the receiver from its own answer.

Axes: B questions, J sharers.
"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from fedinfer_flower.clients.containment import contained
from fedinfer_flower.clients.language_state import Desk
from fedinfer_flower.clients.refine_fusing import fuse_parts
from fedinfer_flower.clients.refine_parts import open_parts
from fedinfer_flower.clients.refine_rephrasing import KEPT, Kept, keep, open_questions
from fedinfer_flower.errors import (
    BindingError,
    EnvelopeError,
    HandleError,
    InvalidValueError,
    ModelAnswerError,
    ReplayError,
    SizeLimitError,
)
from fedinfer_flower.wire.envelope import Envelope
from fedinfer_flower.wire.refine_answers import AnswerReply, Answers, pack_answers
from fedinfer_flower.wire.refine_asked import Asked
from fedinfer_flower.wire.refine_request import CandidatesRequest, RefineRequest

if TYPE_CHECKING:
    from fedinfer_flower.kv.past import Past
    from fedinfer_flower.language.decoding import Decoding

__all__ = ["refine", "score_candidates"]

_SEE_LOG: Final = "see the site's own log"
_DECODING: Final = ("max_new_tokens", "temperature", "top_k", "top_p", "seed", "stop")
_MAX_CANDIDATES: Final = 256


def refine(envelope: Envelope, desk: Desk, *, sender: int) -> Envelope:
    """Answer questions with what sharers gave, or alone.

    Raises
    ------
    FedInferError
        Typed, and safe to send.
    """
    request = RefineRequest.read(envelope)
    with (
        desk.state.lock,
        contained(ModelAnswerError, "the model could not answer", hint=_SEE_LOG, pass_typed=True),
    ):
        kept = _kept(request, desk)
        parts = open_parts(request.parts, kept, desk)
        past, used = fuse_parts(kept, parts, desk)
        texts = _decoded(kept, past, desk)
        _spend_both(kept, request, desk)
        if request.keep and request.round_number < kept.asked.consent.max_rounds:
            key = desk.state_key(kept.asked.consent, request.round_number)
            desk.state.refined.put(key, past)
    tells = request.host == "coordinator" and desk.policy.share_evidence
    answers = Answers(
        texts=tuple(texts),
        sharers=tuple(used),
        used=np.stack(list(used.values()), 1) if used else None,
        evidence=kept.own.evidence.numpy().astype(np.float32) if tells else None,
    )
    return _reply(answers, kept.asked, desk, request.round_number, parts.dropped, sender=sender)


def score_candidates(envelope: Envelope, desk: Desk, *, sender: int) -> Envelope:
    """Score given answers.

    Raises
    ------
    FedInferError
        Typed, and safe to send.
    """
    request = CandidatesRequest.read(envelope)
    desk.policy.require_on("candidates", "score answers")
    asked = open_questions(
        request.asked,
        desk,
        query_id=request.query_id,
        sealed=request.sealed,
        round_number=1,
        host="receiver",
    )
    if not 1 <= len(asked.candidates) <= _MAX_CANDIDATES or not all(asked.candidates):
        raise EnvelopeError(f"between 1 and {_MAX_CANDIDATES} candidates, none of them empty")
    longest = desk.policy.max_note_chars
    if any(len(candidate) > longest for candidate in asked.candidates):
        raise SizeLimitError(f"a candidate of more than {longest} characters")
    rows = len(asked.questions)
    desk.admit(asked.consent, round_number=1, verb="candidates", peer="", rows=rows)
    model = desk.state.model
    with (
        desk.state.lock,
        contained(ModelAnswerError, "the model could not score", hint=_SEE_LOG, pass_typed=True),
    ):
        prompts = [model.prompts.ask(question) for question in asked.questions]
        scores = model.score(prompts, asked.candidates).float().numpy()
    answers = Answers(texts=(), scores=scores.astype(np.float32))
    return _reply(answers, asked, desk, 1, {}, sender=sender)


def _reply(
    answers: Answers,
    asked: Asked,
    desk: Desk,
    round_number: int,
    dropped: Mapping[str, str],
    *,
    sender: int,
) -> Envelope:
    querier = asked.consent.querier
    body = pack_answers(
        answers,
        identity=desk.identity,
        run_id=desk.run_id,
        query_id=asked.consent.query_id,
        round_number=round_number,
        querier=querier,
    )
    reply = AnswerReply(
        query_id=asked.consent.query_id,
        body=body,
        sealed=querier is not None,
        dropped=dropped,
    )
    return reply.to_envelope(run_id=desk.run_id, sender=sender)


def _kept(request: RefineRequest, desk: Desk) -> Kept:
    """Return what was kept under the handle, or compute it anew from the questions."""
    desk.policy.require_on("answers", "answer questions")
    # The own answer is a request of its own: it stays to be had where the refined one failed.
    verb = "refine" if request.parts else "own"
    try:
        # A query id is one querier's: its consent is signed with it, and is worked on once.
        found = desk.state.kept.take(
            request.handle,
            querier=request.query_id,
            run_id=desk.scope(query_id=request.query_id, verb=KEPT),
        )
        assert isinstance(found, Kept)  # noqa: S101  nothing else is ever put there
        if (found.round_number, found.host) != (request.round_number, request.host):
            raise BindingError("the handle belongs to another round")
        kept = found
        desk.require_consent(
            kept.asked.consent, sealed=kept.sealed, round_number=request.round_number
        )
        desk.passage.note(n_rows=len(kept.asked.questions))
        _use_up(kept.asked, request, desk, verb=verb)
    except HandleError:
        if not request.asked:
            raise
        asked = open_questions(
            request.asked,
            desk,
            query_id=request.query_id,
            sealed=request.sealed,
            round_number=request.round_number,
            host=request.host,
        )
        # Before the model works on it: a replay must cost the site nothing.
        _use_up(asked, request, desk, verb=verb)
        kept = keep(
            asked,
            request.sharers,
            desk,
            sealed=request.sealed,
            round_number=request.round_number,
            host=request.host,
            rephraser=asked.rephrase or desk.state.rephrase,
        )
    return kept


def _spend_both(kept: Kept, request: RefineRequest, desk: Desk) -> None:
    """Answer a batch once: a refined answer uses up the own one, and the other way round."""
    other = "own" if request.parts else "refine"
    with contextlib.suppress(ReplayError):
        _use_up(kept.asked, request, desk, verb=other)


def _use_up(asked: Asked, request: RefineRequest, desk: Desk, *, verb: str) -> None:
    desk.admit(
        asked.consent,
        round_number=request.round_number,
        verb=verb,
        peer="",
        rows=len(asked.questions),
    )


def _decoded(kept: Kept, past: Past, desk: Desk) -> list[str]:
    from fedinfer_flower.refine.receiver import Receiver

    model = desk.state.model
    settings = _decoding(kept.asked.decoding, desk)
    room = model.layout.window - int(past.ids_positions.max())
    settings = replace(settings, max_new_tokens=max(1, min(settings.max_new_tokens, room)))
    return Receiver(model).answer(past, settings)


def _decoding(given: Mapping[str, Any], desk: Desk) -> Decoding:
    from fedinfer_flower.language.decoding import Decoding

    if not set(given) <= set(_DECODING):
        raise EnvelopeError("the questions come with an unknown setting of decoding")
    options = dict(given)
    most = desk.policy.max_new_tokens
    options["max_new_tokens"] = min(options.get("max_new_tokens", most), most)
    try:
        return Decoding(**options)
    except (InvalidValueError, TypeError):
        raise EnvelopeError("the questions come with settings of decoding out of range") from None
