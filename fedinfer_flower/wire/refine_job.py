"""The two documents between a language querier and a coordinator: a sealed job, its answers.

The coordinator reads who asks whom, how many questions, and on what terms. Questions and
answers inside are sealed to the receivers and to the querier.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Final

from fedinfer_flower.errors import EnvelopeError
from fedinfer_flower.wire import fields
from fedinfer_flower.wire.envelope import (
    DEFAULT_LIMITS,
    Envelope,
    Json,
    Kind,
    WireLimits,
    decode,
    encode,
)
from fedinfer_flower.wire.identity import PublicIdentity
from fedinfer_flower.wire.refine_fields import MAX_QUESTIONS, MAX_ROUNDS, MEDIA, key_ids, some_of

__all__ = ["AskedBatch", "RefineAnswer", "RefineJob", "RefinedPart"]

_CODEC: Final = "refine"
_KEY_ID: Final = re.compile(r"[0-9a-f]{64}")
_QUERY_ID: Final = re.compile(r"[0-9a-zA-Z_-]{1,64}")


@dataclass(frozen=True, kw_only=True)
class AskedBatch:
    """One batch of questions for one receiver.

    Parameters
    ----------
    query_id : str
        Of this batch and receiver.
    number : int
        Of the batch: the same questions go to every receiver under one number.
    receiver : str
        Key id.
    n_questions : int
    asked : bytes
        Sealed to the receiver.
    """

    query_id: str
    number: int
    receiver: str
    n_questions: int
    asked: bytes = field(repr=False)


@dataclass(frozen=True, kw_only=True)
class RefineJob:
    """What a querier hands to a coordinator that must not read its questions.

    Parameters
    ----------
    job_id : str
    run_id : int
        The run in which the sites answer.
    querier : PublicIdentity
    sharers : tuple of str
        Key ids of the sites that may be asked to help.
    media : tuple of str
        What the querier consents to: ``"text"``, ``"cache"``, ``"full-cache"``.
    rounds : int
        Most rounds.
    rephrase : str
        How receivers put the questions into other words.
    expires_at : float
        Seconds since 1970.
    batches : tuple of AskedBatch

    Privacy
    -------
    The coordinator reads everything but `asked`. Sites believe nothing of it: what binds
    them is inside the seal again, signed by the querier.
    """

    job_id: str
    run_id: int
    querier: PublicIdentity
    sharers: tuple[str, ...]
    media: tuple[str, ...]
    rounds: int
    rephrase: str
    expires_at: float
    batches: tuple[AskedBatch, ...]

    @property
    def receivers(self) -> tuple[str, ...]:
        """Key ids of the receivers, in the order of the job."""
        return tuple(dict.fromkeys(batch.receiver for batch in self.batches))

    @property
    def n_questions(self) -> int:
        """Questions, each counted once however many receivers it has."""
        return sum({b.number: b.n_questions for b in self.batches}.values())

    def to_bytes(self) -> bytes:
        """Return the job as one envelope."""
        return encode(
            Envelope(
                kind=Kind.SEALED_JOB,
                run_id=self.run_id,
                query_id=self.job_id,
                codec=_CODEC,
                meta={
                    "sharers": list(self.sharers),
                    "media": list(self.media),
                    "rounds": self.rounds,
                    "rephrase": self.rephrase,
                    "expires-at": self.expires_at,
                    "batches": [
                        [b.query_id, b.number, b.receiver, b.n_questions] for b in self.batches
                    ],
                },
                sections=(
                    ("querier", self.querier.to_bytes()),
                    *((f"asked-{i}", batch.asked) for i, batch in enumerate(self.batches)),
                ),
            )
        )

    @classmethod
    def from_bytes(cls, data: bytes, *, limits: WireLimits = DEFAULT_LIMITS) -> RefineJob:
        """Read a job.

        Raises
        ------
        ProtocolError
            If the bytes are not exactly one valid job.
        """
        envelope = decode(data, limits=limits)
        if (envelope.kind, envelope.codec) != (Kind.SEALED_JOB, _CODEC) or not envelope.query_id:
            raise EnvelopeError("the bytes are not a job of a language querier")
        meta = envelope.meta
        fields.exactly(meta, "sharers", "media", "rounds", "rephrase", "expires-at", "batches")
        rows = _rows(meta, "batches", width=4)
        envelope.require_sections("querier", *(f"asked-{i}" for i in range(len(rows))))
        batches = tuple(
            AskedBatch(
                query_id=_matching(row[0], _QUERY_ID, "query id"),
                number=_whole(row[1], high=DEFAULT_LIMITS.max_sections),
                receiver=_matching(row[2], _KEY_ID, "receiver"),
                n_questions=_whole(row[3], low=1, high=MAX_QUESTIONS),
                asked=bytes(envelope.section(f"asked-{i}")),
            )
            for i, row in enumerate(rows)
        )
        if not batches or len({b.query_id for b in batches}) != len(batches):
            raise EnvelopeError("a job without batches, or with a query id twice")
        return cls(
            job_id=envelope.query_id,
            run_id=envelope.run_id,
            querier=PublicIdentity.from_bytes(envelope.section("querier")),
            sharers=key_ids(meta, "sharers"),
            media=some_of(meta, "media", MEDIA),
            rounds=fields.whole(meta, "rounds", low=1, high=MAX_ROUNDS),
            rephrase=fields.text(meta, "rephrase", max_chars=64),
            expires_at=fields.number(meta, "expires-at"),
            batches=batches,
        )


@dataclass(frozen=True, kw_only=True)
class RefinedPart:
    """One receiver's answers to one batch.

    Parameters
    ----------
    query_id : str
    receiver : str
        Key id.
    round : int
        The last one that the receiver answered.
    n_questions : int
    answers : bytes
        Sealed to the querier, or JSON in clear.
    """

    query_id: str
    receiver: str
    round: int
    n_questions: int
    answers: bytes = field(repr=False)


@dataclass(frozen=True, kw_only=True)
class RefineAnswer:
    """What a coordinator hands back to a querier.

    Parameters
    ----------
    job_id : str
    run_id : int
    parts : tuple of RefinedPart
        Of the receivers that answered.
    failures : mapping of query id to str
        Codes of what kept the others from answering.
    """

    job_id: str
    run_id: int
    parts: tuple[RefinedPart, ...]
    failures: Mapping[str, str] = field(default_factory=dict)

    def to_bytes(self) -> bytes:
        """Return the answers as one envelope."""
        return encode(
            Envelope(
                kind=Kind.COMBINED,
                run_id=self.run_id,
                query_id=self.job_id,
                codec=_CODEC,
                meta={
                    "parts": [[p.query_id, p.receiver, p.round, p.n_questions] for p in self.parts],
                    "failures": dict(self.failures),
                },
                sections=tuple((f"answers-{i}", p.answers) for i, p in enumerate(self.parts)),
            )
        )

    @classmethod
    def from_bytes(cls, data: bytes, *, limits: WireLimits = DEFAULT_LIMITS) -> RefineAnswer:
        """Read answers.

        Raises
        ------
        ProtocolError
            If the bytes are not exactly one valid document.
        """
        envelope = decode(data, limits=limits)
        if (envelope.kind, envelope.codec) != (Kind.COMBINED, _CODEC):
            raise EnvelopeError("the bytes are not the answers of a refined query")
        fields.exactly(envelope.meta, "parts", "failures")
        rows = _rows(envelope.meta, "parts", width=4)
        envelope.require_sections(*(f"answers-{i}" for i in range(len(rows))))
        failures = envelope.meta["failures"]
        if not isinstance(failures, dict) or len(failures) > limits.max_sections:
            raise EnvelopeError("field 'failures' is not a short object")
        return cls(
            job_id=envelope.query_id,
            run_id=envelope.run_id,
            parts=tuple(
                RefinedPart(
                    query_id=_matching(row[0], _QUERY_ID, "query id"),
                    receiver=_matching(row[1], _KEY_ID, "receiver"),
                    round=_whole(row[2], low=1, high=MAX_ROUNDS),
                    n_questions=_whole(row[3], low=1, high=MAX_QUESTIONS),
                    answers=bytes(envelope.section(f"answers-{i}")),
                )
                for i, row in enumerate(rows)
            ),
            failures={
                _matching(query_id, _QUERY_ID, "query id"): fields.text(
                    failures, query_id, max_chars=8
                )
                for query_id in failures
            },
        )


def _rows(meta: Mapping[str, Json], name: str, *, width: int) -> list[list[Json]]:
    rows = meta.get(name)
    if not isinstance(rows, list) or not all(
        isinstance(row, list) and len(row) == width for row in rows
    ):
        raise EnvelopeError(f"field {name!r} is not a list of rows of {width}")
    return rows


def _whole(value: Json, *, low: int = 0, high: int) -> int:
    return fields.whole({"number": value}, "number", low=low, high=high)


def _matching(value: Json, pattern: re.Pattern[str], name: str) -> str:
    if not isinstance(value, str) or not pattern.fullmatch(value):
        raise EnvelopeError(f"a {name} that is malformed")
    return value
