"""Flower message types of the package: ``query.fi_<verb>``, one identifier after the dot."""

from __future__ import annotations

__all__ = [
    "ACTIONS",
    "ENCRYPTED",
    "HELLO",
    "PING",
    "PREDICT",
    "PREFIX",
    "RECOVER",
    "message_type",
]

PREFIX = "query.fi_"

HELLO = "fi_hello"
"""Onboarding: the site says what it knows about, and commits to it."""

PREDICT = "fi_predict"
"""One batch of queries; the reply carries protected scores."""

RECOVER = "fi_recover"
"""After a batch under masks: help to make good for sites that dropped out."""

PING = "fi_ping"
"""Is the site's handler alive? Loads no model."""

ENCRYPTED = "fi_encrypted"
"""One batch of encrypted queries; the reply carries encrypted logits."""

ACTIONS = (HELLO, PREDICT, RECOVER, ENCRYPTED, PING)


def message_type(action: str) -> str:
    """Return Flower's message type of an action.

    Examples
    --------
    >>> message_type(PREDICT)
    'query.fi_predict'
    """
    return f"query.{action}"
