"""Flower message types of the package: ``query.fi_<verb>``, one identifier after the dot."""

from __future__ import annotations

__all__ = [
    "ACTIONS",
    "CALIBRATE",
    "CANDIDATES",
    "ENCRYPTED",
    "GENERATE",
    "HELLO",
    "INTRODUCE",
    "LANGUAGE_ACTIONS",
    "PING",
    "PREDICT",
    "PREFIX",
    "RECOVER",
    "REFINE",
    "REPHRASE",
    "SHARE_CACHE",
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

CALIBRATE = "fi_calibrate"
"""Held-out rows are counted at the site by how badly its model fits them; protected counts out."""

ACTIONS = (HELLO, PREDICT, RECOVER, ENCRYPTED, CALIBRATE, PING)

INTRODUCE = "fi_introduce"
"""The site shows its language card: model, media that it shares, fusers that it has."""

REPHRASE = "fi_rephrase"
"""To a receiver: questions in, rewritten questions for each sharer out."""

SHARE_CACHE = "fi_share_cache"
"""To a sharer: rewritten questions in, KV entries out; or the handle of an offer in."""

GENERATE = "fi_generate"
"""To a sharer: rewritten questions in, notes in text out."""

REFINE = "fi_refine"
"""To a receiver: what sharers gave in, answers out."""

CANDIDATES = "fi_candidates"
"""To a site: questions and possible answers in, log-probabilities out."""

LANGUAGE_ACTIONS = (INTRODUCE, REPHRASE, SHARE_CACHE, GENERATE, REFINE, CANDIDATES)
"""Registered by `LanguageMod`, beside those of `ACTIONS` or without them."""


def message_type(action: str) -> str:
    """Return Flower's message type of an action.

    Examples
    --------
    >>> message_type(PREDICT)
    'query.fi_predict'
    """
    return f"query.{action}"
