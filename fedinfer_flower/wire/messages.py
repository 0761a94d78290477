"""What each kind of envelope says: builders and strict readers, side by side.

============  =====================  ====================================================
kind          from → to              carries
============  =====================  ====================================================
``hello``     coordinator → site     nothing but the run
``profile``   site → coordinator     `SiteCard`: profile, public keys, signature
``query``     coordinator → site     `Question`: rule, protection, classes, inputs, key
``answer``    site → coordinator     protected scores, commitment to the profile
``error``     site → coordinator     code and fixed text of a typed error
``ping``      both                   nothing but the run
============  =====================  ====================================================
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from fedinfer_flower.errors import (
    BindingError,
    EnvelopeError,
    FedInferError,
    ShapeError,
    SizeLimitError,
    error_class,
)
from fedinfer_flower.query import MAX_CLASSES, CountsKind
from fedinfer_flower.wire import fields
from fedinfer_flower.wire.arrays import array_from_bytes, array_to_bytes
from fedinfer_flower.wire.envelope import DEFAULT_LIMITS, Envelope, Json, Kind, WireLimits
from fedinfer_flower.wire.identity import PublicIdentity
from fedinfer_flower.wire.roster import Roster

__all__ = [
    "Question",
    "answer",
    "check_bound",
    "error",
    "question",
    "read_answer",
    "read_error",
    "read_question",
]

Options = Mapping[str, str | int | float | bool]


@dataclass(frozen=True, kw_only=True)
class Question:
    """One batch as every site receives it.

    Parameters
    ----------
    query_id : str
    inputs : array of shape (n_queries, ...)
    classes : tuple of str
        The label space of the answer.
    n_sites : int
        Sites that are asked; fixes the capacity of the codec.
    rule, protection : str
    rule_options, protection_options : mapping
    class_totals : float array of shape (n_classes,), optional
        Sum of the committed class counts of all sites that are asked.
    counts_kind : CountsKind
        Whether the totals are of counts or of presence bits.
    public_key : bytes
        The querier's; empty for protections without one.
    key_id : str
        Its fingerprint.
    roster : Roster
        The sites that take part; empty where nothing is bound to them.
    querier : PublicIdentity, optional
        Who asks, in a sealed question; None in one that the coordinator asks itself.
    expires_at : float
        Seconds since 1970, after which no site answers; 0.0 for never.
    relay : bool
        Whether sites seal their answers to the querier, and the coordinator adds nothing.
    evidence : str
        Form of a second copy of the answer, for settlement: of
        `settlement.evidence.EvidenceForm`; empty for none.
    evidence_key : bytes
        The querier's public key for that copy; empty for forms without one.

    Privacy
    -------
    Whoever holds a question can read the inputs: every site that is asked, and the
    coordinator unless the question travels sealed (`wire.sealed_query`).
    """

    query_id: str
    inputs: npt.NDArray[np.generic] = field(repr=False)
    classes: tuple[str, ...]
    n_sites: int
    rule: str
    protection: str
    rule_options: Options = field(default_factory=dict)
    protection_options: Options = field(default_factory=dict)
    class_totals: npt.NDArray[np.float64] | None = None
    counts_kind: CountsKind = CountsKind.WITHHELD
    public_key: bytes = field(default=b"", repr=False)
    key_id: str = ""
    roster: Roster = field(default_factory=lambda: Roster(()), repr=False)
    querier: PublicIdentity | None = None
    expires_at: float = 0.0
    relay: bool = False
    evidence: str = ""
    evidence_key: bytes = field(default=b"", repr=False)

    @property
    def n_queries(self) -> int:
        """Rows of the batch."""
        return len(self.inputs)


def question(asked: Question, *, run_id: int) -> Envelope:
    """Build the envelope of a question."""
    dtype, data = array_to_bytes(asked.inputs)
    totals = None if asked.class_totals is None else [float(n) for n in asked.class_totals]
    return Envelope(
        kind=Kind.QUERY,
        run_id=run_id,
        query_id=asked.query_id,
        key_id=asked.key_id,
        shape=tuple(asked.inputs.shape),
        codec=dtype,
        meta={
            "classes": list(asked.classes),
            "class-totals": totals,
            "counts-kind": asked.counts_kind.value,
            "sites": asked.n_sites,
            "rule": asked.rule,
            "rule-options": dict(asked.rule_options),
            "protection": asked.protection,
            "protection-options": dict(asked.protection_options),
            "expires-at": asked.expires_at,
            "relay": asked.relay,
            "evidence": asked.evidence,
        },
        sections=(
            ("inputs", data),
            ("public-key", asked.public_key),
            ("roster", asked.roster.to_bytes()),
            ("querier", b"" if asked.querier is None else asked.querier.to_bytes()),
            ("evidence-key", asked.evidence_key),
        ),
    )


def read_question(envelope: Envelope, *, limits: WireLimits = DEFAULT_LIMITS) -> Question:
    """Read a question; the inputs are a read-only view of the message's bytes."""
    _require_kind(envelope, Kind.QUERY)
    envelope.require_sections("inputs", "public-key", "roster", "querier", "evidence-key")
    if len(envelope.shape) < 2 or not envelope.query_id:
        raise EnvelopeError("a query that is not (n_queries, ...), or has no id")
    if envelope.shape[0] > limits.max_rows:
        raise SizeLimitError(f"{envelope.shape[0]} rows; the limit is {limits.max_rows}")
    meta = envelope.meta
    fields.exactly(
        meta,
        *("classes", "class-totals", "counts-kind", "sites"),
        *("rule", "rule-options", "protection", "protection-options", "expires-at", "relay"),
        "evidence",
    )
    classes = fields.texts(meta, "classes", max_items=MAX_CLASSES)
    if not classes or len(set(classes)) != len(classes):
        raise EnvelopeError("a query without classes, or with one twice")
    n_sites = fields.whole(meta, "sites", low=1, high=1_000_000)
    roster = Roster.from_bytes(envelope.section("roster"))
    if len(roster) not in (0, n_sites):
        raise EnvelopeError("a query whose roster does not have the sites that it names")
    querier = envelope.section("querier")
    return Question(
        query_id=envelope.query_id,
        inputs=array_from_bytes(
            envelope.section("inputs"), dtype=envelope.codec, shape=envelope.shape
        ),
        classes=classes,
        n_sites=n_sites,
        rule=fields.text(meta, "rule", max_chars=64),
        protection=fields.text(meta, "protection", max_chars=64),
        rule_options=fields.scalars(meta, "rule-options"),
        protection_options=fields.scalars(meta, "protection-options"),
        class_totals=fields.optional_numbers(meta, "class-totals", length=len(classes)),
        counts_kind=_counts_kind(meta),
        public_key=bytes(envelope.section("public-key")),
        key_id=envelope.key_id,
        roster=roster,
        querier=PublicIdentity.from_bytes(querier) if len(querier) else None,
        expires_at=fields.number(meta, "expires-at"),
        relay=fields.flag(meta, "relay"),
        evidence=fields.text(meta, "evidence", max_chars=16),
        evidence_key=bytes(envelope.section("evidence-key")),
    )


def answer(
    asked: Question,
    *,
    run_id: int,
    sender: int,
    payload: bytes,
    width: int,
    commitment: str,
    statement: bytes = b"",
    evidence: bytes = b"",
) -> Envelope:
    """Build the envelope of one site's protected scores, with its signed statement.

    `evidence` is the copy for settlement; empty where none was asked for.
    """
    return Envelope(
        kind=Kind.ANSWER,
        run_id=run_id,
        query_id=asked.query_id,
        key_id=asked.key_id,
        sender=sender,
        shape=(asked.n_queries, width),
        codec=asked.protection,
        meta={"commitment": commitment},
        sections=(("scores", payload), ("statement", statement), ("evidence", evidence)),
    )


def read_answer(
    envelope: Envelope,
    asked: Question,
    *,
    n_queries: int,
    run_id: int,
    sender: int,
    width: int,
    commitment: str,
) -> bytes | memoryview:
    """Return the payload of an answer, after checking what it is bound to.

    Raises
    ------
    BindingError
        If run, query, key, sender, codec or profile is not the one that was asked.
    ShapeError
        If the shape is not (n_queries, width).
    """
    _require_kind(envelope, Kind.ANSWER)
    envelope.require_sections("scores", "statement", "evidence")
    fields.exactly(envelope.meta, "commitment")
    check_bound(envelope, run_id=run_id, sender=sender, query_id=asked.query_id)
    if envelope.key_id != asked.key_id:
        raise BindingError("the answer is made under another key than the querier's")
    if envelope.codec != asked.protection:
        raise BindingError("the answer is protected otherwise than was asked")
    if fields.text(envelope.meta, "commitment") != commitment:
        raise BindingError(
            "the site's profile changed since onboarding",
            hint="start the run again, so that the site is onboarded with its new profile",
        )
    if envelope.shape != (n_queries, width):
        raise ShapeError(f"scores of shape {envelope.shape}, expected {(n_queries, width)}")
    return envelope.section("scores")


def check_bound(envelope: Envelope, *, run_id: int, sender: int, query_id: str = "") -> None:
    """Require that an envelope belongs to this run, query and sender."""
    if envelope.run_id != run_id:
        raise BindingError("the envelope belongs to another run")
    if envelope.sender != sender:
        raise BindingError("the envelope names another sender")
    if envelope.query_id != query_id:
        raise BindingError("the envelope belongs to another query")


def error(exc: FedInferError, *, run_id: int, sender: int, query_id: str = "") -> Envelope:
    """Build the envelope of a typed error. Its text must be safe for the coordinator."""
    return Envelope(
        kind=Kind.ERROR,
        run_id=run_id,
        query_id=query_id,
        sender=sender,
        meta={"code": exc.code, "message": exc.message[:1000], "hint": exc.hint[:1000]},
    )


def read_error(envelope: Envelope, *, run_id: int, sender: int) -> FedInferError:
    """Read a typed error. The text is the site's: shown, never interpreted."""
    envelope.require_sections()
    fields.exactly(envelope.meta, "code", "message", "hint")
    check_bound(envelope, run_id=run_id, sender=sender, query_id=envelope.query_id)
    cls = error_class(fields.text(envelope.meta, "code", max_chars=8))
    message = fields.text(envelope.meta, "message", max_chars=1000)
    hint = fields.text(envelope.meta, "hint", max_chars=1000)
    return cls(_one_line(message), hint=_one_line(hint))


def _counts_kind(meta: Mapping[str, Json]) -> CountsKind:
    value = fields.text(meta, "counts-kind", max_chars=16)
    if value not in CountsKind.__members__.values():
        raise EnvelopeError("field 'counts-kind' is unknown")
    return CountsKind(value)


def _one_line(value: str) -> str:
    # A site's text ends in the coordinator's log and terminal: no control characters.
    return "".join(c if c.isprintable() else " " for c in value)


def _require_kind(envelope: Envelope, kind: Kind) -> None:
    if envelope.kind is not kind:
        raise EnvelopeError(f"expected a {kind.value} envelope, got {envelope.kind.value}")
