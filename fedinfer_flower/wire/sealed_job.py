"""A job under seal: the coordinator learns how to combine, and not what is asked."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Final

from fedinfer_flower.errors import EnvelopeError
from fedinfer_flower.query import MAX_CLASSES
from fedinfer_flower.wire import fields
from fedinfer_flower.wire.documents import MAX_JOB_ID, Options
from fedinfer_flower.wire.envelope import (
    DEFAULT_LIMITS,
    Envelope,
    Kind,
    WireLimits,
    decode,
    encode,
)
from fedinfer_flower.wire.identity import PublicIdentity
from fedinfer_flower.wire.roster import Roster
from fedinfer_flower.wire.sealing import SealedBody

__all__ = ["MAX_SEALED_BATCHES", "SealedBatch", "SealedJob"]

MAX_SEALED_BATCHES: Final = (DEFAULT_LIMITS.max_sections - 3) // 2
"""Each has two sections, beside the three of the job: more could be written, not read."""


@dataclass(frozen=True, kw_only=True)
class SealedBatch:
    """One batch under seal.

    Parameters
    ----------
    query_id : str
    n_queries : int
    sealed : SealedBody
    """

    query_id: str
    n_queries: int
    sealed: SealedBody = field(repr=False)


@dataclass(frozen=True, kw_only=True)
class SealedJob:
    """What a querier hands to a coordinator that must not read its queries.

    Parameters
    ----------
    job_id : str
    run_id : int
        The run in which the sites answer.
    rule, protection : str
    rule_options, protection_options : mapping
    rule_reason : str
    classes : tuple of str
    roster : Roster
        The sites that can open it.
    querier : PublicIdentity
    public_key : bytes
        For the protection.
    key_id : str
        Its fingerprint.
    expires_at : float
    relay : bool
        Whether answers come sealed to the querier, for the coordinator to pass on.
    batches : tuple of SealedBatch

    Privacy
    -------
    The coordinator reads everything but the batches: who asks, which sites, which rule,
    how many rows. Sites believe nothing of it: all of it is inside the seal again, signed.
    """

    job_id: str
    run_id: int
    rule: str
    protection: str
    rule_options: Options = field(default_factory=dict)
    protection_options: Options = field(default_factory=dict)
    rule_reason: str = ""
    classes: tuple[str, ...]
    roster: Roster = field(repr=False)
    querier: PublicIdentity
    public_key: bytes = field(default=b"", repr=False)
    key_id: str = ""
    expires_at: float = 0.0
    relay: bool = False
    batches: tuple[SealedBatch, ...]

    @property
    def n_queries(self) -> int:
        """Rows of all batches."""
        return sum(batch.n_queries for batch in self.batches)

    def to_bytes(self) -> bytes:
        """Return the job as one envelope."""
        return encode(
            Envelope(
                kind=Kind.SEALED_JOB,
                run_id=self.run_id,
                query_id=self.job_id,
                key_id=self.key_id,
                meta={
                    "rule": self.rule,
                    "rule-options": dict(self.rule_options),
                    "rule-reason": self.rule_reason,
                    "protection": self.protection,
                    "protection-options": dict(self.protection_options),
                    "classes": list(self.classes),
                    "expires-at": self.expires_at,
                    "relay": self.relay,
                    "batches": [[b.query_id, b.n_queries] for b in self.batches],
                },
                sections=tuple(self._sections()),
            )
        )

    def _sections(self) -> Iterator[tuple[str, bytes | memoryview]]:
        yield "public-key", self.public_key
        yield "querier", self.querier.to_bytes()
        yield "roster", self.roster.to_bytes()
        for number, batch in enumerate(self.batches):
            yield f"body-{number}", batch.sealed.body
            yield f"wraps-{number}", batch.sealed.wraps

    @classmethod
    def from_bytes(cls, data: bytes, *, limits: WireLimits = DEFAULT_LIMITS) -> SealedJob:
        """Read a sealed job.

        Raises
        ------
        ProtocolError
            If the bytes are not exactly one sealed job.
        """
        envelope = decode(data, limits=limits)
        if envelope.kind is not Kind.SEALED_JOB or not 1 <= len(envelope.query_id) <= MAX_JOB_ID:
            raise EnvelopeError("the bytes are not a sealed job")
        meta = envelope.meta
        fields.exactly(
            meta,
            *("rule", "rule-options", "rule-reason", "protection", "protection-options"),
            *("classes", "expires-at", "relay", "batches"),
        )
        rows = meta["batches"]
        if not isinstance(rows, list) or not rows:
            raise EnvelopeError("a sealed job without batches")
        names = [f"{part}-{i}" for i in range(len(rows)) for part in ("body", "wraps")]
        envelope.require_sections("public-key", "querier", "roster", *names)
        return cls(
            job_id=envelope.query_id,
            run_id=envelope.run_id,
            rule=fields.text(meta, "rule", max_chars=64),
            protection=fields.text(meta, "protection", max_chars=64),
            rule_options=fields.scalars(meta, "rule-options"),
            protection_options=fields.scalars(meta, "protection-options"),
            rule_reason=fields.text(meta, "rule-reason", max_chars=1000),
            classes=fields.texts(meta, "classes", max_items=MAX_CLASSES),
            roster=Roster.from_bytes(envelope.section("roster")),
            querier=PublicIdentity.from_bytes(envelope.section("querier")),
            public_key=bytes(envelope.section("public-key")),
            key_id=envelope.key_id,
            expires_at=fields.number(meta, "expires-at"),
            relay=fields.flag(meta, "relay"),
            batches=tuple(_batch(row, i, envelope, limits) for i, row in enumerate(rows)),
        )


def _batch(row: object, number: int, envelope: Envelope, limits: WireLimits) -> SealedBatch:
    if not isinstance(row, list) or len(row) != 2:
        raise EnvelopeError("a sealed batch is not an id with a number")
    named = dict(zip(("query", "rows"), row, strict=True))
    # A coordinator makes room for as many rows as a job claims: a row has a byte at least.
    most = min(limits.max_rows, max(len(envelope.section(f"body-{number}")), 1))
    return SealedBatch(
        query_id=fields.text(named, "query", max_chars=64),
        n_queries=fields.whole(named, "rows", low=1, high=most),
        sealed=SealedBody(
            body=envelope.section(f"body-{number}"), wraps=envelope.section(f"wraps-{number}")
        ),
    )
