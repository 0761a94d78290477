"""A question under seal, and an answer under seal: what the coordinator relays unread.

``sealed question = seal( signature | encoded question )``: the querier signs the whole
question, which names the roster, so no recipient can pass it on as meant for others, and
no coordinator can change rule, protection, cohort or rows.
"""

from __future__ import annotations

from typing import Final

from fedinfer_flower.errors import BindingError, SealError, SignatureError
from fedinfer_flower.wire.envelope import (
    DEFAULT_LIMITS,
    Envelope,
    Kind,
    WireLimits,
    decode,
    encode,
)
from fedinfer_flower.wire.identity import Identity, PublicIdentity
from fedinfer_flower.wire.messages import Question, question, read_question
from fedinfer_flower.wire.sealing import SealedBody, open_body, open_sealed, seal_for, seal_to

__all__ = [
    "ANSWER_SEAL_BYTES",
    "open_answer",
    "open_question",
    "seal_answer",
    "seal_question",
    "sealed_query_envelope",
]

_DOMAIN: Final = "query"
_ANSWER_DOMAIN: Final = "answer"
_SIGNATURE_BYTES: Final = 64

ANSWER_SEAL_BYTES: Final = 48 + _SIGNATURE_BYTES
"""By how much a sealed answer is longer than its payload."""


def seal_question(asked: Question, *, identity: Identity, run_id: int) -> SealedBody:
    """Sign a question as its querier, and seal it to every site of its roster.

    Raises
    ------
    BindingError
        If the question names another querier, or has no roster.
    """
    if asked.querier != identity.public or not len(asked.roster):
        raise BindingError("a sealed question names its querier and its sites")
    plain = encode(question(asked, run_id=run_id))
    recipients = [seat.identity for seat in asked.roster.seats]
    return seal_for(
        recipients, identity.sign(_DOMAIN, plain) + plain, info=_info(asked.query_id, run_id)
    )


def sealed_query_envelope(sealed: SealedBody, *, query_id: str, run_id: int) -> Envelope:
    """Return what the coordinator sends to every site."""
    return Envelope(
        kind=Kind.SEALED_QUERY,
        run_id=run_id,
        query_id=query_id,
        sections=(("body", sealed.body), ("wraps", sealed.wraps)),
    )


def open_question(
    envelope: Envelope, *, identity: Identity, limits: WireLimits = DEFAULT_LIMITS
) -> Question:
    """Open a sealed question at a site, and require its querier's signature.

    Raises
    ------
    SealError
        If it is not sealed to this site, or was altered.
    SignatureError
        If the querier that it names did not sign it.
    BindingError
        If it is of another run or batch than its envelope says.
    """
    envelope.require_sections("body", "wraps")
    sealed = SealedBody(body=envelope.section("body"), wraps=envelope.section("wraps"))
    info = _info(envelope.query_id, envelope.run_id)
    opened = open_body(identity, sealed, info=info)
    inner = decode(opened[_SIGNATURE_BYTES:], limits=limits)
    asked = read_question(inner, limits=limits)
    if asked.querier is None:
        raise SignatureError("a sealed question that names no querier")
    asked.querier.verify(_DOMAIN, opened[_SIGNATURE_BYTES:], opened[:_SIGNATURE_BYTES])
    if (inner.run_id, asked.query_id) != (envelope.run_id, envelope.query_id):
        raise BindingError("the sealed question belongs to another run or batch")
    return asked


def seal_answer(
    payload: bytes, *, querier: PublicIdentity, query_id: str, identity: Identity
) -> bytes:
    """Sign one site's answer and seal it to the querier.

    Returns
    -------
    sealed : bytes
        `ANSWER_SEAL_BYTES` longer than the payload.
    """
    info = _answer_info(query_id, identity.key_id)
    signature = identity.sign(_ANSWER_DOMAIN, info + payload)
    return seal_to(querier, signature + payload, info=info)


def open_answer(
    sealed: bytes | memoryview, *, identity: Identity, query_id: str, site: PublicIdentity
) -> bytes:
    """Open one site's answer at the querier, and require the site's signature.

    Raises
    ------
    SealError
        If it is of another batch or site, or was altered.
    SignatureError
        If the site did not sign it: anybody can seal to the querier.
    """
    info = _answer_info(query_id, site.key_id)
    try:
        opened = open_sealed(identity, sealed, info=info)
    except SealError:
        raise SealError(
            f"the answer under key {site.key_id[:16]} does not open: it was altered, or is of"
            " another batch"
        ) from None
    payload = opened[_SIGNATURE_BYTES:]
    site.verify(_ANSWER_DOMAIN, info + payload, opened[:_SIGNATURE_BYTES])
    return payload


def _info(query_id: str, run_id: int) -> bytes:
    return b"question|" + run_id.to_bytes(8, "big") + query_id.encode()


def _answer_info(query_id: str, site: str) -> bytes:
    return b"answer|" + site.encode() + b"|" + query_id.encode()
