"""Wire forms of an encrypted query, in the envelopes that every message uses.

============  =====================  ====================================================
kind          from → to              carries
============  =====================  ====================================================
``job``       querier → coordinator  `EncryptedJob`: encrypted batches, public key
``query``     coordinator → site     `EncryptedQuestion`: one batch, public key, classes
``answer``    site → coordinator     encrypted logits, commitment to the profile
============  =====================  ====================================================

The sum goes back as `wire.documents.CombinedAnswer` under the protection's name. All sizes
follow from plan, features and classes; bytes of another size are refused unread.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Final

from fedinfer_flower.encrypted_query.ckks_batch import public_key_bytes, query_bytes, reply_bytes
from fedinfer_flower.encrypted_query.network import MAX_CLASSES, MAX_FEATURES
from fedinfer_flower.encrypted_query.plans import Plan, plan_of
from fedinfer_flower.errors import (
    BindingError,
    EnvelopeError,
    InvalidValueError,
    ShapeError,
    SizeLimitError,
)
from fedinfer_flower.privacy.base import key_id_of
from fedinfer_flower.wire import fields
from fedinfer_flower.wire.envelope import DEFAULT_LIMITS, Envelope, Kind, WireLimits, decode, encode
from fedinfer_flower.wire.messages import check_bound

__all__ = [
    "ACTION",
    "NAME",
    "EncryptedBatch",
    "EncryptedJob",
    "EncryptedQuestion",
    "answer",
    "read_answer",
]

NAME: Final = "encrypted-query"
"""Name of the protection, and codec of its envelopes."""

ACTION: Final = "fi_encrypted"
"""Flower action of one encrypted batch."""

_MAX_SITES: Final = 1_000_000
Bytes = bytes | memoryview


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise InvalidValueError(message)


@dataclass(frozen=True, kw_only=True)
class EncryptedBatch:
    """One encrypted batch of a job.

    Parameters
    ----------
    query_id : str
    n_queries : int
    inputs : bytes
    """

    query_id: str
    n_queries: int
    inputs: Bytes = field(repr=False)


@dataclass(frozen=True, kw_only=True)
class EncryptedJob:
    """What a querier asks, for the coordinator: nothing in it is secret.

    Parameters
    ----------
    job_id : str
    plan : Plan
    n_features : int
    input_bound : float
        Declared bound on the absolute value of every input.
    public_key : bytes
    key_id : str
    batches : tuple of EncryptedBatch
    classes : tuple of str, optional
        Label space of the answer; default the union of the sites' classes.

    Privacy
    -------
    Shows the number of queries and features, and the declared bound. The inputs are
    encrypted; the secret key is not in it.
    """

    job_id: str
    plan: Plan
    n_features: int
    input_bound: float
    public_key: Bytes = field(repr=False)
    key_id: str
    batches: tuple[EncryptedBatch, ...]
    classes: tuple[str, ...] | None = None

    def __post_init__(self) -> None:
        _require(1 <= len(self.job_id) <= 56, "a job id has 1 to 56 characters")
        _require(1 <= self.n_features <= MAX_FEATURES, f"at most {MAX_FEATURES} features")
        _require(_positive(self.input_bound), "input_bound is a positive number")
        _require(len(self.batches) > 0, "a job has at least one batch")
        _require(
            all(1 <= batch.n_queries <= self.plan.slots for batch in self.batches),
            f"a batch has 1 to {self.plan.slots} queries",
        )
        if self.classes is not None:
            _require(_distinct(self.classes), "a job names at least one class, and none twice")
        size = query_bytes(self.plan, self.n_features)
        _require(
            all(len(batch.inputs) == size for batch in self.batches)
            and len(self.public_key) == public_key_bytes(self.plan),
            "the ciphertexts or the key have another size than the plan's",
        )

    @property
    def n_queries(self) -> int:
        """Rows of all batches."""
        return sum(batch.n_queries for batch in self.batches)

    def to_bytes(self) -> bytes:
        """Return the job as one envelope."""
        return encode(
            Envelope(
                kind=Kind.JOB,
                query_id=self.job_id,
                key_id=self.key_id,
                shape=(self.n_queries, self.n_features),
                codec=NAME,
                meta={
                    "plan": self.plan.name,
                    "input-bound": self.input_bound,
                    "classes": None if self.classes is None else list(self.classes),
                    "batches": [[b.query_id, b.n_queries] for b in self.batches],
                },
                sections=(
                    ("public-key", self.public_key),
                    *((f"inputs-{i}", b.inputs) for i, b in enumerate(self.batches)),
                ),
            )
        )

    @classmethod
    def from_bytes(cls, data: Bytes, *, limits: WireLimits = DEFAULT_LIMITS) -> EncryptedJob:
        """Read a job.

        Raises
        ------
        ProtocolError
            If the bytes are not exactly one valid job.
        """
        envelope = decode(data, limits=limits)
        if envelope.kind is not Kind.JOB or envelope.codec != NAME or len(envelope.shape) != 2:
            raise EnvelopeError("the bytes are not an encrypted job")
        meta = envelope.meta
        fields.exactly(meta, "plan", "input-bound", "classes", "batches")
        rows = meta["batches"]
        if not isinstance(rows, list) or len(rows) != len(envelope.sections) - 1:
            raise EnvelopeError("the job's batches do not match its sections")
        classes = meta["classes"]
        try:
            job = cls(
                job_id=envelope.query_id,
                plan=plan_of(fields.text(meta, "plan", max_chars=32)),
                n_features=envelope.shape[1],
                input_bound=fields.number(meta, "input-bound"),
                public_key=envelope.section("public-key"),
                key_id=envelope.key_id,
                classes=None
                if classes is None
                else fields.texts(meta, "classes", max_items=MAX_CLASSES),
                batches=tuple(_read_batch(row, i, envelope) for i, row in enumerate(rows)),
            )
        except InvalidValueError as exc:
            raise EnvelopeError(f"the encrypted job is not valid: {exc.message}") from None
        if job.n_queries != envelope.shape[0]:
            raise EnvelopeError("the job's shape differs from its batches")
        return job


def _read_batch(row: object, number: int, envelope: Envelope) -> EncryptedBatch:
    if not isinstance(row, list) or len(row) != 2:
        raise EnvelopeError("a batch is not an id with a number")
    named = dict(zip(("query", "rows"), row, strict=True))
    return EncryptedBatch(
        query_id=fields.text(named, "query", max_chars=64),
        n_queries=fields.whole(named, "rows", low=1, high=DEFAULT_LIMITS.max_rows),
        inputs=envelope.section(f"inputs-{number}"),
    )


@dataclass(frozen=True, kw_only=True)
class EncryptedQuestion:
    """One batch as every site receives it.

    Parameters
    ----------
    query_id : str
    n_queries, n_features : int
    classes : tuple of str
    plan : Plan
    input_bound : float
    n_sites : int
        Sites that are asked: the sum must hold all of their logits.
    min_sites : int
        Fewest sites whose sum the coordinator promises to release.
    public_key, inputs : bytes
    key_id : str
    """

    query_id: str
    n_queries: int
    n_features: int
    classes: tuple[str, ...]
    plan: Plan
    input_bound: float
    n_sites: int
    min_sites: int
    public_key: Bytes = field(repr=False)
    inputs: Bytes = field(repr=False)
    key_id: str

    def to_envelope(self, *, run_id: int) -> Envelope:
        """Build the envelope."""
        return Envelope(
            kind=Kind.QUERY,
            run_id=run_id,
            query_id=self.query_id,
            key_id=self.key_id,
            shape=(self.n_queries, self.n_features),
            codec=NAME,
            meta={
                "classes": list(self.classes),
                "plan": self.plan.name,
                "input-bound": self.input_bound,
                "sites": self.n_sites,
                "min-sites": self.min_sites,
            },
            sections=(("inputs", self.inputs), ("public-key", self.public_key)),
        )

    @classmethod
    def from_envelope(cls, envelope: Envelope) -> EncryptedQuestion:
        """Read and check everything but the ciphertexts themselves.

        Raises
        ------
        ProtocolError
        """
        if envelope.kind is not Kind.QUERY or envelope.codec != NAME or not envelope.query_id:
            raise EnvelopeError("the envelope is no encrypted query")
        envelope.require_sections("inputs", "public-key")
        meta = envelope.meta
        fields.exactly(meta, "classes", "plan", "input-bound", "sites", "min-sites")
        if len(envelope.shape) != 2 or not 1 <= envelope.shape[1] <= MAX_FEATURES:
            raise ShapeError(f"an encrypted query is (n_queries, at most {MAX_FEATURES} features)")
        asked = cls(
            query_id=envelope.query_id,
            n_queries=envelope.shape[0],
            n_features=envelope.shape[1],
            classes=fields.texts(meta, "classes", max_items=MAX_CLASSES),
            plan=plan_of(fields.text(meta, "plan", max_chars=32)),
            input_bound=fields.number(meta, "input-bound"),
            n_sites=fields.whole(meta, "sites", low=1, high=_MAX_SITES),
            min_sites=fields.whole(meta, "min-sites", low=1, high=_MAX_SITES),
            public_key=envelope.section("public-key"),
            inputs=envelope.section("inputs"),
            key_id=envelope.key_id,
        )
        asked._check()
        return asked

    def _check(self) -> None:
        if not 1 <= self.n_queries <= self.plan.slots:
            raise SizeLimitError(f"a batch has 1 to {self.plan.slots} queries")
        if not _distinct(self.classes):
            raise EnvelopeError("a query without classes, or with one twice")
        if not _positive(self.input_bound) or self.min_sites > self.n_sites:
            raise EnvelopeError("the query's bound or numbers of sites make no sense")
        if len(self.public_key) != public_key_bytes(self.plan):
            raise EnvelopeError("the public key has another size than the plan's")
        if len(self.inputs) != query_bytes(self.plan, self.n_features):
            raise ShapeError("the encrypted inputs have another size than their shape's")
        if key_id_of(bytes(self.public_key)) != self.key_id:
            raise BindingError("the public key is not the one that the key id names")


def answer(
    asked: EncryptedQuestion,
    *,
    run_id: int,
    sender: int,
    logits: bytes,
    commitment: str,
    agreement: float | None,
) -> Envelope:
    """Build the envelope of one site's encrypted logits.

    Parameters
    ----------
    agreement : float, optional
        Share of calibration rows on which polynomial form and model agree, if the site
        shares it: one number about its own model, readable by the coordinator.
    """
    return Envelope(
        kind=Kind.ANSWER,
        run_id=run_id,
        query_id=asked.query_id,
        key_id=asked.key_id,
        sender=sender,
        shape=(asked.n_queries, len(asked.classes)),
        codec=NAME,
        meta={"commitment": commitment, "agreement": agreement},
        sections=(("logits", logits),),
    )


def read_answer(
    envelope: Envelope, asked: EncryptedQuestion, *, run_id: int, sender: int, commitment: str
) -> tuple[Bytes, float | None]:
    """Return (encrypted logits, agreement or None), after checking what they are bound to.

    Raises
    ------
    BindingError
        If run, query, key, sender, codec or profile is not the one that was asked.
    ShapeError
        If shape or size are not those of the question.
    """
    if envelope.kind is not Kind.ANSWER:
        raise EnvelopeError(f"expected an answer envelope, got {envelope.kind.value}")
    envelope.require_sections("logits")
    fields.exactly(envelope.meta, "commitment", "agreement")
    check_bound(envelope, run_id=run_id, sender=sender, query_id=asked.query_id)
    if envelope.key_id != asked.key_id:
        raise BindingError("the answer is made under another key than the querier's")
    if envelope.codec != NAME:
        raise BindingError("the answer is protected otherwise than was asked")
    if fields.text(envelope.meta, "commitment") != commitment:
        raise BindingError(
            "the site's profile changed since onboarding",
            hint="start the run again, so that the site is onboarded with its new profile",
        )
    logits = envelope.section("logits")
    if envelope.shape != (asked.n_queries, len(asked.classes)) or len(logits) != reply_bytes(
        asked.plan, len(asked.classes)
    ):
        raise ShapeError("encrypted logits of another shape or size than was asked")
    agreement = envelope.meta["agreement"]
    if agreement is not None:
        agreement = fields.number(envelope.meta, "agreement")
        if not 0.0 <= agreement <= 1.0:
            raise EnvelopeError("field 'agreement' is not a share")
    return logits, agreement


def _positive(value: float) -> bool:
    return math.isfinite(value) and value > 0.0


def _distinct(classes: tuple[str, ...]) -> bool:
    return 0 < len(classes) == len(set(classes))
