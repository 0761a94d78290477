"""A worker always replies: whatever an app does, a message that can be sent comes out.

A handler that returns None, returns no reply, returns what cannot be serialised, or raises what
is no `Exception` leaves a stock SuperNode waiting for ever. And Flower sends the text of an
exception to the server. Here every such case becomes an error with fixed words: a typed one for
the package's own messages, one of Flower's for any other.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from flwr.app import Context, Error, Message
from flwr.clientapp import ClientApp

from fedinfer_flower.clients.containment import log_locally
from fedinfer_flower.errors import FedInferError, ModelAnswerError, NotRegisteredError
from fedinfer_flower.wire import messages
from fedinfer_flower.wire.actions import PREFIX
from fedinfer_flower.wire.records import pack, unpack

if TYPE_CHECKING:
    from fedinfer_flower.flower_internals.task_desk import PackedReply

__all__ = ["SafeReply", "safe_reply"]

log = logging.getLogger("fedinfer_flower.site")

_APP_RAISED: Final = 2
"""Flower's code for a handler that failed."""
_FAILED: Final = "the site's app failed"
_SEE_LOG: Final = "see the site's own log"


@dataclass(frozen=True, kw_only=True)
class SafeReply:
    """What goes back to the SuperNode.

    Parameters
    ----------
    reply : PackedReply
    failed : str
        Name of the error's type; empty if the app answered by itself.
    """

    reply: PackedReply
    failed: str = ""


def safe_reply(message: Message, context: Context, app: Callable[[], ClientApp]) -> SafeReply:
    """Return the app's reply, or an error reply in its place.

    Parameters
    ----------
    message : Message
    context : Context
    app : callable
        Gives the app; may raise one of our typed errors, whose words are sent as they are.

    Privacy
    -------
    The server learns the type of our own errors and fixed words; of an app's exception nothing.
    """
    from fedinfer_flower.flower_internals.task_desk import pack_reply

    try:
        client_app = app()
    except FedInferError as exc:
        return SafeReply(
            reply=pack_reply(_error_reply(exc, message, context)), failed=type(exc).__name__
        )
    except BaseException as exc:  # importing a bundle runs its code
        return _failed(exc, message, context)
    try:
        reply = client_app(message=message, context=context)
        _require_reply(reply, message)
        return SafeReply(reply=pack_reply(reply))
    except BaseException as exc:  # `SystemExit` and a panic in native code as well
        return _failed(exc, message, context)


def _failed(exc: BaseException, message: Message, context: Context) -> SafeReply:
    from fedinfer_flower.flower_internals.task_desk import pack_reply

    log_locally(exc)
    words: FedInferError = ModelAnswerError(_FAILED, hint=_SEE_LOG)
    if isinstance(exc, ValueError) and "function registered with name" in str(exc):
        words = NotRegisteredError(
            "the site's ClientApp has no handler for this message",
            hint="add InferenceMod(load_model).attach(app) to the site's client_app.py",
        )
    return SafeReply(
        reply=pack_reply(_error_reply(words, message, context)), failed=type(exc).__name__
    )


def _require_reply(reply: object, message: Message) -> None:
    if not isinstance(reply, Message):
        raise TypeError("the handler did not return a Message")
    if reply.metadata.reply_to_message_id != message.metadata.message_id:
        raise TypeError("the handler did not return a reply to its message")


def _error_reply(exc: FedInferError, message: Message, context: Context) -> Message:
    if not message.metadata.message_type.startswith(PREFIX):
        return Message(Error(_APP_RAISED, exc.message), reply_to=message)
    query_id = ""
    try:
        query_id = unpack(message.content).query_id
    except Exception:
        log.debug("the query could not be read at all")
    envelope = messages.error(exc, run_id=context.run_id, sender=context.node_id, query_id=query_id)
    return Message(pack(envelope), reply_to=message)
