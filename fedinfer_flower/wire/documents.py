"""The two documents between querier and coordinator: a job in, a combined answer out.

Both are public: nothing in them is secret under any protection. They are what a querier
outside the federation writes to a file, or sends over a wire.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Final

import numpy as np
import numpy.typing as npt

from fedinfer_flower.errors import EnvelopeError, InvalidValueError, SizeLimitError
from fedinfer_flower.query import MAX_CLASSES
from fedinfer_flower.wire import fields
from fedinfer_flower.wire.arrays import array_from_bytes, array_to_bytes
from fedinfer_flower.wire.envelope import (
    DEFAULT_LIMITS,
    Envelope,
    Kind,
    WireLimits,
    decode,
    encode,
)
from fedinfer_flower.wire.roster import Roster

__all__ = ["MAX_JOB_ID", "CombinedAnswer", "CombinedBatch", "Options", "QueryJob"]

MAX_JOB_ID: Final = 56
"""Leaves room for a batch's number in a query id, which has at most 64 characters."""

_DIGEST: Final = re.compile(r"([0-9a-f]{64})?")

Options = Mapping[str, str | int | float | bool]


@dataclass(frozen=True, kw_only=True)
class QueryJob:
    """What a querier asks: inputs, how answers are to be protected, its public key.

    Parameters
    ----------
    job_id : str
        Random; the query id of batch i is ``<job_id>-<i>``.
    inputs : array of shape (n_queries, ...)
    batch_size : int
        Queries in one message.
    protection : str
    protection_options : mapping
    public_key : bytes
    key_id : str
    classes : tuple of str, optional
        Label space of the answer; default the union of the sites' classes.

    Privacy
    -------
    Holds the queries in clear. It has no secret key in it.
    """

    job_id: str
    inputs: npt.NDArray[np.generic] = field(repr=False)
    batch_size: int
    protection: str
    protection_options: Options = field(default_factory=dict)
    public_key: bytes = field(default=b"", repr=False)
    key_id: str = ""
    classes: tuple[str, ...] | None = None

    def __post_init__(self) -> None:
        if not 1 <= len(self.job_id) <= MAX_JOB_ID:
            raise InvalidValueError(f"a job id has 1 to {MAX_JOB_ID} characters")
        if self.inputs.ndim < 2 or len(self.inputs) == 0:
            raise InvalidValueError(
                f"queries have shape {self.inputs.shape}, expected (n_queries, ...)",
                hint="reshape a single query to (1, n_features)",
            )
        if not 1 <= self.batch_size <= DEFAULT_LIMITS.max_rows:
            raise InvalidValueError(
                f"batch_size is in [1, {DEFAULT_LIMITS.max_rows}], got {self.batch_size}"
            )
        if self.classes is not None and (
            not self.classes or len(set(self.classes)) != len(self.classes)
        ):
            raise InvalidValueError("a job names at least one class, and none twice")
        n_batches = -(-len(self.inputs) // self.batch_size)
        # One section of the combined answer is its roster.
        if n_batches > DEFAULT_LIMITS.max_sections - 1:
            raise InvalidValueError(
                f"{n_batches} batches; the limit is {DEFAULT_LIMITS.max_sections - 1}",
                hint="raise batch_size",
            )

    def batches(self) -> Iterator[tuple[str, npt.NDArray[np.generic]]]:
        """Yield (query id, inputs) of each batch."""
        for number, start in enumerate(range(0, len(self.inputs), self.batch_size)):
            yield f"{self.job_id}-{number}", self.inputs[start : start + self.batch_size]

    def to_bytes(self) -> bytes:
        """Return the job as one envelope."""
        dtype, data = array_to_bytes(self.inputs)
        return encode(
            Envelope(
                kind=Kind.JOB,
                query_id=self.job_id,
                key_id=self.key_id,
                shape=tuple(self.inputs.shape),
                codec=dtype,
                meta={
                    "batch-size": self.batch_size,
                    "protection": self.protection,
                    "protection-options": dict(self.protection_options),
                    "classes": None if self.classes is None else list(self.classes),
                },
                sections=(("inputs", data), ("public-key", self.public_key)),
            )
        )

    @classmethod
    def from_bytes(cls, data: bytes, *, limits: WireLimits = DEFAULT_LIMITS) -> QueryJob:
        """Read a job.

        Raises
        ------
        ProtocolError
            If the bytes are not exactly one valid job.
        """
        envelope = decode(data, limits=limits)
        if envelope.kind is not Kind.JOB or not envelope.query_id:
            raise EnvelopeError("the bytes are not a query job")
        envelope.require_sections("inputs", "public-key")
        meta = envelope.meta
        fields.exactly(meta, "batch-size", "protection", "protection-options", "classes")
        inputs = array_from_bytes(
            envelope.section("inputs"), dtype=envelope.codec, shape=envelope.shape
        )
        classes = meta["classes"]
        try:
            return cls(
                job_id=envelope.query_id,
                inputs=inputs,
                batch_size=fields.whole(meta, "batch-size", low=1, high=limits.max_rows),
                protection=fields.text(meta, "protection", max_chars=64),
                protection_options=fields.scalars(meta, "protection-options"),
                public_key=bytes(envelope.section("public-key")),
                key_id=envelope.key_id,
                classes=None
                if classes is None
                else fields.texts(meta, "classes", max_items=MAX_CLASSES),
            )
        except InvalidValueError as exc:
            raise EnvelopeError(f"the query job is not valid: {exc.message}") from None


@dataclass(frozen=True, kw_only=True)
class CombinedBatch:
    """The combined scores of one batch, as protected as the protection leaves them.

    Parameters
    ----------
    query_id : str
    n_queries : int
    n_sites : int
        Sites in the sum.
    total : bytes
    content : bytes
        SHA-256 of the message that asked the batch; masks are bound to it.
    """

    query_id: str
    n_queries: int
    n_sites: int
    total: bytes | memoryview = field(repr=False)
    content: bytes = field(default=b"", repr=False)


@dataclass(frozen=True, kw_only=True)
class CombinedAnswer:
    """What the coordinator hands to the querier, who alone can open it under `he`.

    Parameters
    ----------
    job_id : str
    rule, protection : str
    rule_options, protection_options : mapping
    classes : tuple of str
    n_sites_asked : int
        Fixes the codec's capacity.
    key_id : str
    batches : tuple of CombinedBatch
    roster : Roster
        The sites, where payloads are bound to their keys or sealed by them; else empty.
    relayed : bool
        Whether the totals are the sites' answers one by one, sealed to the querier.
    """

    job_id: str
    rule: str
    protection: str
    rule_options: Options
    protection_options: Options
    classes: tuple[str, ...]
    n_sites_asked: int
    key_id: str
    batches: tuple[CombinedBatch, ...]
    roster: Roster = field(default_factory=lambda: Roster(()), repr=False)
    relayed: bool = False

    def to_bytes(self) -> bytes:
        """Return the combined answer as one envelope."""
        return encode(
            Envelope(
                kind=Kind.COMBINED,
                query_id=self.job_id,
                key_id=self.key_id,
                shape=(sum(batch.n_queries for batch in self.batches), len(self.classes)),
                codec=self.protection,
                meta={
                    "rule": self.rule,
                    "rule-options": dict(self.rule_options),
                    "protection-options": dict(self.protection_options),
                    "classes": list(self.classes),
                    "sites": self.n_sites_asked,
                    "batches": [
                        [b.query_id, b.n_queries, b.n_sites, b.content.hex()] for b in self.batches
                    ],
                    "relayed": self.relayed,
                },
                sections=(
                    *((f"total-{i}", b.total) for i, b in enumerate(self.batches)),
                    ("roster", self.roster.to_bytes()),
                ),
            )
        )

    @classmethod
    def from_bytes(cls, data: bytes, *, limits: WireLimits = DEFAULT_LIMITS) -> CombinedAnswer:
        """Read a combined answer.

        Raises
        ------
        ProtocolError
            If the bytes are not exactly one valid combined answer.
        """
        envelope = decode(data, limits=limits)
        if envelope.kind is not Kind.COMBINED or not envelope.query_id:
            raise EnvelopeError("the bytes are not a combined answer")
        meta = envelope.meta
        fields.exactly(
            meta,
            *("rule", "rule-options", "protection-options", "classes", "sites", "batches"),
            "relayed",
        )
        rows = meta["batches"]
        if not isinstance(rows, list) or len(rows) + 1 != len(envelope.sections):
            raise EnvelopeError("the combined answer's batches do not match its sections")
        if len(rows) > limits.max_sections:
            raise SizeLimitError(f"{len(rows)} batches; the limit is {limits.max_sections}")
        return cls(
            job_id=envelope.query_id,
            rule=fields.text(meta, "rule", max_chars=64),
            protection=envelope.codec,
            rule_options=fields.scalars(meta, "rule-options"),
            protection_options=fields.scalars(meta, "protection-options"),
            classes=fields.texts(meta, "classes", max_items=MAX_CLASSES),
            n_sites_asked=fields.whole(meta, "sites", low=1, high=1_000_000),
            key_id=envelope.key_id,
            batches=tuple(_read_batch(row, i, envelope) for i, row in enumerate(rows)),
            roster=Roster.from_bytes(envelope.section("roster")),
            relayed=fields.flag(meta, "relayed"),
        )


def _read_batch(row: object, number: int, envelope: Envelope) -> CombinedBatch:
    if not isinstance(row, list) or len(row) != 4:
        raise EnvelopeError("a batch is not an id with two numbers and a digest")
    named = dict(zip(("query", "rows", "sites", "content"), row, strict=True))
    content = fields.text(named, "content", max_chars=64)
    if not _DIGEST.fullmatch(content):
        raise EnvelopeError("a batch without the digest of its question")
    return CombinedBatch(
        query_id=fields.text(named, "query", max_chars=64),
        n_queries=fields.whole(named, "rows", low=1, high=DEFAULT_LIMITS.max_rows),
        n_sites=fields.whole(named, "sites", low=1, high=1_000_000),
        total=envelope.section(f"total-{number}"),
        content=bytes.fromhex(content),
    )
