"""Answers of a receiver, signed, and sealed to the querier where its questions were sealed.

Axes: B questions, J sharers, C candidates.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Final, Self

import numpy as np
import numpy.typing as npt

from fedinfer_flower.errors import EnvelopeError
from fedinfer_flower.wire import fields
from fedinfer_flower.wire.arrays import array_from_bytes
from fedinfer_flower.wire.envelope import (
    DEFAULT_LIMITS,
    Envelope,
    Kind,
    WireLimits,
    decode,
    encode,
)
from fedinfer_flower.wire.identity import Identity, PublicIdentity
from fedinfer_flower.wire.messages import check_bound
from fedinfer_flower.wire.refine_fields import (
    Evidence,
    bits_from_bytes,
    bits_to_bytes,
    codes,
    evidence_from_bytes,
    evidence_to_bytes,
    key_ids,
    require_verb,
    texts_from_bytes,
    texts_to_bytes,
)
from fedinfer_flower.wire.sealing import open_sealed, seal_to

__all__ = [
    "AnswerReply",
    "Answers",
    "open_answers",
    "pack_answers",
]

_ANSWER_DOMAIN: Final = "language answer"
_SIGNATURE_BYTES: Final = 64


@dataclass(frozen=True, kw_only=True)
class Answers:
    """What a receiver answers.

    Parameters
    ----------
    texts : tuple of str
        One a question; empty where candidates were scored.
    sharers : tuple of str
        Key ids of those whose parts could be used, in the order of the columns of `used`.
    used : uint8 array (B, J)
        Which of them each answer rests on.
    evidence : float32 array (B, 4), optional
        Of the receiver's own answer, where the site agrees to tell.
    scores : float32 array (B, C), optional
        Log-probabilities of candidates.

    Privacy
    -------
    `used` says which institution knew something about each question. It travels with the
    answers: sealed to the querier where they are.
    """

    texts: tuple[str, ...] = field(repr=False)
    sharers: tuple[str, ...] = ()
    used: npt.NDArray[np.uint8] | None = field(default=None, repr=False)
    evidence: Evidence | None = field(default=None, repr=False)
    scores: npt.NDArray[np.float32] | None = field(default=None, repr=False)

    def to_bytes(self, *, run_id: int, query_id: str) -> bytes:
        """Return the answers in clear, without their signature."""
        scores = b"" if self.scores is None else np.asarray(self.scores, dtype="<f4").tobytes()
        used = b"" if self.used is None else bits_to_bytes(self.used)
        return encode(
            Envelope(
                kind=Kind.ANSWER,
                run_id=run_id,
                query_id=query_id,
                shape=() if self.scores is None else tuple(self.scores.shape),
                meta={"verb": "answers", "sharers": list(self.sharers)},
                sections=(
                    ("texts", texts_to_bytes(self.texts)),
                    ("used", used),
                    ("evidence", evidence_to_bytes(self.evidence)),
                    ("scores", scores),
                ),
            )
        )

    @classmethod
    def from_bytes(
        cls, data: bytes | memoryview, *, rows: int, limits: WireLimits = DEFAULT_LIMITS
    ) -> Self:
        """Read answers to `rows` questions.

        Raises
        ------
        ProtocolError
        """
        envelope = decode(data, limits=limits)
        require_verb(envelope, Kind.ANSWER, "answers")
        envelope.require_sections("texts", "used", "evidence", "scores")
        fields.exactly(envelope.meta, "verb", "sharers")
        sharers = key_ids(envelope.meta, "sharers")
        texts = texts_from_bytes(envelope.section("texts"))
        scores = _scores(envelope, rows)
        if len(texts) != (0 if scores is not None else rows):
            raise EnvelopeError("answers to another number of questions")
        return cls(
            texts=texts,
            sharers=sharers,
            used=bits_from_bytes(envelope.section("used"), rows=rows, sharers=len(sharers)),
            evidence=evidence_from_bytes(envelope.section("evidence"), rows=rows),
            scores=scores,
        )


@dataclass(frozen=True, kw_only=True)
class AnswerReply:
    """Answers on their way to the querier.

    Parameters
    ----------
    query_id : str
    body : bytes
        `Answers`, signed by the site; sealed where the questions were.
    sealed : bool
    dropped : mapping of key id to error code
        Sharers whose parts could not be used, and why.
    """

    query_id: str
    body: bytes = field(repr=False)
    sealed: bool
    dropped: Mapping[str, str] = field(default_factory=dict)

    def to_envelope(self, *, run_id: int, sender: int) -> Envelope:
        """Return the message."""
        return Envelope(
            kind=Kind.ANSWER,
            run_id=run_id,
            query_id=self.query_id,
            sender=sender,
            meta={"verb": "refined", "sealed": self.sealed, "dropped": dict(self.dropped)},
            sections=(("body", self.body),),
        )

    @classmethod
    def read(cls, envelope: Envelope, *, run_id: int, sender: int, query_id: str) -> Self:
        """Read the message; `open_answers` reads the body."""
        require_verb(envelope, Kind.ANSWER, "refined")
        check_bound(envelope, run_id=run_id, sender=sender, query_id=query_id)
        envelope.require_sections("body")
        fields.exactly(envelope.meta, "verb", "sealed", "dropped")
        return cls(
            query_id=query_id,
            body=bytes(envelope.section("body")),
            sealed=fields.flag(envelope.meta, "sealed"),
            dropped=codes(envelope.meta, "dropped"),
        )


def pack_answers(
    answers: Answers,
    *,
    identity: Identity,
    run_id: int,
    query_id: str,
    round_number: int,
    querier: PublicIdentity | None,
) -> bytes:
    """Sign answers as their site, and seal them to the querier if there is one.

    Examples
    --------
    >>> site, me = Identity.generate(), Identity.generate()
    >>> about = dict(run_id=7, query_id="q", round_number=1)
    >>> packed = pack_answers(Answers(texts=("x",)), identity=site, querier=me.public, **about)
    >>> open_answers(packed, site=site.public, identity=me, rows=1, **about).texts
    ('x',)
    """
    plain = answers.to_bytes(run_id=run_id, query_id=query_id)
    info = _info(run_id, query_id, round_number, identity.key_id)
    signed = identity.sign(_ANSWER_DOMAIN, info + plain) + plain
    return signed if querier is None else seal_to(querier, signed, info=info)


def open_answers(
    data: bytes | memoryview,
    *,
    site: PublicIdentity,
    run_id: int,
    query_id: str,
    round_number: int,
    rows: int,
    identity: Identity | None = None,
    limits: WireLimits = DEFAULT_LIMITS,
) -> Answers:
    """Open answers, and require their site's signature.

    Parameters
    ----------
    identity : Identity, optional
        The querier's keys where the answers are sealed; None for answers in clear.

    Raises
    ------
    ProtocolError
        If they are of another batch, round or site, or were altered.
    """
    info = _info(run_id, query_id, round_number, site.key_id)
    signed = bytes(data) if identity is None else open_sealed(identity, data, info=info)
    plain = signed[_SIGNATURE_BYTES:]
    site.verify(_ANSWER_DOMAIN, info + plain, signed[:_SIGNATURE_BYTES])
    return Answers.from_bytes(plain, rows=rows, limits=limits)


def _scores(envelope: Envelope, rows: int) -> npt.NDArray[np.float32] | None:
    data = envelope.section("scores")
    if not len(data):
        return None
    scores = array_from_bytes(data, dtype="float32", shape=envelope.shape).astype(np.float32)
    if scores.ndim != 2 or len(scores) != rows:
        raise EnvelopeError("scores of another number of questions")
    return scores


def _info(run_id: int, query_id: str, round_number: int, site: str) -> bytes:
    return f"answer|{run_id}|{query_id}|{round_number}|{site}".encode()
