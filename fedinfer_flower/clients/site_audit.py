"""A message in, a valid reply out: read, judged, answered, and written down before it leaves."""

from __future__ import annotations

from collections.abc import Callable

from flwr.app import Context, Message, RecordDict

from fedinfer_flower.clients.containment import log_locally
from fedinfer_flower.clients.policy_gate import Gate, Passage
from fedinfer_flower.errors import (
    AuditLogError,
    BindingError,
    EnvelopeError,
    FedInferError,
    ModelAnswerError,
)
from fedinfer_flower.observability.json_logs import about
from fedinfer_flower.observability.tracing import span
from fedinfer_flower.wire import messages
from fedinfer_flower.wire.envelope import Envelope, WireLimits
from fedinfer_flower.wire.records import pack, packed_bytes, unpack

__all__ = ["Handler", "answer_message", "refusal_of"]

Handler = Callable[[Message, Envelope, Context, Passage], Envelope]


def answer_message(
    message: Message, context: Context, handler: Handler, *, gate: Gate, limits: WireLimits
) -> Message:
    """Answer one message. Always returns a valid reply.

    A reply that is None or cannot be sent blocks a SuperNode for good, and the text of an
    exception travels to the server: neither leaves this function. Under a site policy what
    was decided is in the audit log when this returns; if it cannot be written there, the
    reply is that error and no answer.

    Parameters
    ----------
    handler : callable
        From the message, its envelope, Flower's context and the passage to the envelope of
        the answer.
    gate : Gate
    limits : WireLimits

    Returns
    -------
    reply : Message
    """
    passage = gate.passage(message)
    query_id = ""
    try:
        asked = _read(message, passage, limits)
        query_id = asked.query_id
        with about(query_id=query_id):
            content = _answered(message, asked, context, passage, handler)
        return Message(content, reply_to=message)
    except FedInferError as exc:
        error = refusal_of(exc, passage)
    envelope = messages.error(
        error, run_id=context.run_id, sender=context.node_id, query_id=query_id
    )
    return Message(pack(envelope), reply_to=message)


def refusal_of(error: FedInferError, passage: Passage) -> FedInferError:
    """Write a refusal down; return what to reply with, which is another error if that fails."""
    try:
        passage.refused(error)
    except FedInferError as exc:
        return exc
    except Exception as exc:
        log_locally(exc)
        return AuditLogError("the site's audit log failed", hint="see the site's own log")
    return error


def _read(message: Message, passage: Passage, limits: WireLimits) -> Envelope:
    try:
        if not message.has_content():
            raise EnvelopeError("a message without content")
        passage.require_size(len(packed_bytes(message.content)))
        return unpack(message.content, limits=limits)
    except FedInferError:
        raise
    except Exception as exc:
        log_locally(exc)
        raise EnvelopeError("the message could not be read") from None


def _answered(
    message: Message, asked: Envelope, context: Context, passage: Passage, handler: Handler
) -> RecordDict:
    try:
        with span("site.answer", query_id=asked.query_id, action=passage.verb):
            passage.note(query_id=asked.query_id, run_id=str(context.run_id))
            if asked.run_id != context.run_id:
                raise BindingError("the message belongs to another run")
            passage.require_action()
            # Packed in here, because a value that JSON cannot hold raises as well.
            content = pack(handler(message, asked, context, passage))
            passage.answered()
            return content
    except FedInferError:
        raise
    except BaseException as exc:  # a tokenizer that panics raises what is no `Exception`
        if isinstance(exc, (KeyboardInterrupt, GeneratorExit)):
            raise
        log_locally(exc)
        raise ModelAnswerError("the site's handler failed", hint="see the site's own log") from None
