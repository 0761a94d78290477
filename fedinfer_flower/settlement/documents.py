"""What coordinator and querier write to each other to settle an epoch; one envelope each.

==================  ===========================  ==========================================
document            from, to                     holds
==================  ===========================  ==========================================
SettlementRequest   coordinator, to the querier  sites, query ids, sums of evidence over all
                                                 sites, the sites' sealed halves
SettlementReply     querier, to the coordinator  places and labels of the audits, their
                                                 totals, the querier's half of each row sum
BlindedRows         coordinator, to the querier  (`ckks`) a blinded row sum of each site
SlotSums            querier, to the coordinator  (`ckks`) what they decrypt to, with noise
==================  ===========================  ==========================================

Each names the one it answers by digest, and so fits that one alone.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Final, Self

import numpy as np

from fedinfer_flower.ensemble.options import Scalar
from fedinfer_flower.errors import EnvelopeError
from fedinfer_flower.query import MAX_CLASSES
from fedinfer_flower.settlement import ckks_rows
from fedinfer_flower.settlement.forms import EvidenceForm
from fedinfer_flower.settlement.reading import (
    DIGEST,
    EPOCH_ID,
    answered_digest,
    noise_of,
    read_document,
    words,
)
from fedinfer_flower.settlement.ring import IntArray, RingArray
from fedinfer_flower.settlement.shares import SEALED_HALF_BYTES
from fedinfer_flower.wire import fields
from fedinfer_flower.wire.envelope import (
    DEFAULT_LIMITS,
    Envelope,
    Kind,
    WireLimits,
    encode,
)

__all__ = ["SettlementReply", "SettlementRequest"]

_MAX_SITES: Final = 100_000


@dataclass(frozen=True, kw_only=True, eq=False)
class SettlementRequest:
    """What the coordinator asks the querier to settle.

    Parameters
    ----------
    epoch_id : str
        32 hex digits, random.
    form : EvidenceForm
    scheme : str
    scheme_options : mapping
    sites : tuple of str
        Key ids; every one gave evidence of every row.
    queries : tuple of (str, int)
        Query ids and their numbers of rows.
    n_classes : int
    totals : bytes
        Sums over the sites: 8 bytes an entry, or ciphertexts.
    halves : bytes
        Sealed halves, site by site, within it query by query; only under `shares`.
    """

    epoch_id: str
    form: EvidenceForm
    scheme: str
    scheme_options: Mapping[str, Scalar]
    sites: tuple[str, ...]
    queries: tuple[tuple[str, int], ...]
    n_classes: int
    totals: bytes | memoryview = field(repr=False)
    halves: bytes | memoryview = field(default=b"", repr=False)

    def __post_init__(self) -> None:
        if not EPOCH_ID.fullmatch(self.epoch_id):
            raise EnvelopeError("an epoch id is 32 hex digits")
        ids = [query_id for query_id, _ in self.queries]
        if len(set(ids)) != len(ids) or not ids:
            raise EnvelopeError("a settlement names a query id twice, or none")
        if len(set(self.sites)) != len(self.sites):
            raise EnvelopeError("a settlement names a site twice")
        n_halves = len(self.sites) * len(ids) if self.form is EvidenceForm.SHARES else 0
        sizes = [
            ckks_rows.payload_bytes(n, self.n_classes)
            if self.form is EvidenceForm.CKKS
            else 8 * n * self.n_classes
            for _, n in self.queries
        ]
        if len(self.halves) != n_halves * SEALED_HALF_BYTES or len(self.totals) != sum(sizes):
            raise EnvelopeError("a settlement's sums and halves do not fit its queries and sites")

    @property
    def n_rows(self) -> int:
        """Rows of all queries together."""
        return sum(n for _, n in self.queries)

    @property
    def digest(self) -> str:
        """SHA-256 of the byte form, in hex."""
        return hashlib.sha256(self.to_bytes()).hexdigest()

    def half(self, site: int, query: int) -> memoryview:
        """Return one sealed half."""
        start = (site * len(self.queries) + query) * SEALED_HALF_BYTES
        return memoryview(self.halves)[start : start + SEALED_HALF_BYTES]

    def to_bytes(self) -> bytes:
        """Return the request as one envelope."""
        return encode(
            Envelope(
                kind=Kind.SETTLEMENT_REQUEST,
                query_id=self.epoch_id,
                shape=(self.n_rows, self.n_classes),
                codec=self.form.value,
                meta={
                    "scheme": self.scheme,
                    "options": dict(self.scheme_options),
                    "sites": list(self.sites),
                    "queries": [list(query) for query in self.queries],
                    "classes": self.n_classes,
                },
                sections=(("totals", self.totals), ("halves", self.halves)),
            )
        )

    @classmethod
    def from_bytes(cls, data: bytes, *, limits: WireLimits = DEFAULT_LIMITS) -> SettlementRequest:
        """Read a request.

        Raises
        ------
        ProtocolError
            If the bytes are not exactly one valid request.
        """
        envelope = read_document(data, Kind.SETTLEMENT_REQUEST, limits, "totals", "halves")
        meta = envelope.meta
        fields.exactly(meta, "scheme", "options", "sites", "queries", "classes")
        if envelope.codec not in EvidenceForm.__members__.values():
            raise EnvelopeError("evidence of an unknown form")
        if not isinstance(meta["queries"], list):
            raise EnvelopeError("field 'queries' is not a list")
        sites = fields.texts(meta, "sites", max_items=_MAX_SITES)
        if not all(DIGEST.fullmatch(site) for site in sites):
            raise EnvelopeError("a site's key id is 64 hex digits")
        request = cls(
            epoch_id=envelope.query_id,
            form=EvidenceForm(envelope.codec),
            scheme=fields.text(meta, "scheme", max_chars=64),
            scheme_options=fields.scalars(meta, "options"),
            sites=sites,
            queries=tuple(_query(item, limits) for item in meta["queries"]),
            n_classes=fields.whole(meta, "classes", low=1, high=MAX_CLASSES),
            totals=envelope.section("totals"),
            halves=envelope.section("halves"),
        )
        if envelope.shape != (request.n_rows, request.n_classes):
            raise EnvelopeError("a settlement's shape differs from its queries'")
        return request


@dataclass(frozen=True, kw_only=True, eq=False)
class SettlementReply:
    """What the querier reveals of an epoch, and its halves of the row sums.

    Parameters
    ----------
    epoch_id : str
    answers_to : str
        Digest of the request.
    audits_t3 : int array of shape (n_audits, 3)
        Number of the query in the request, row in it, label.
    totals_tc : int array of shape (n_audits, n_classes)
        Sums over the sites on the grid of 2**-20.
    weights_tc : int array of shape (n_audits, n_classes)
        The weights on their grid; see `RowWeights.on_grid`.
    halves_k : uint64 array of shape (n_sites,)
        The querier's halves, noise included; empty under `ckks`.
    noise_std : float
        Of its noise, in contribution units.
    signature : bytes
        By the querier; empty where it has no identity.
    """

    epoch_id: str
    answers_to: str
    audits_t3: IntArray = field(repr=False)
    totals_tc: IntArray = field(repr=False)
    weights_tc: IntArray = field(repr=False)
    halves_k: RingArray = field(repr=False)
    noise_std: float = 0.0
    signature: bytes = field(default=b"", repr=False)

    @property
    def digest(self) -> str:
        """SHA-256 of the byte form, in hex."""
        return hashlib.sha256(self.to_bytes()).hexdigest()

    def with_signature(self, signature: bytes) -> Self:
        """Return the same document with another signature."""
        return replace(self, signature=signature)

    def to_bytes(self) -> bytes:
        """Return the reply as one envelope."""
        return encode(
            Envelope(
                kind=Kind.SETTLEMENT_REPLY,
                query_id=self.epoch_id,
                shape=tuple(self.totals_tc.shape),
                meta={"answers-to": self.answers_to, "noise": self.noise_std},
                sections=(
                    ("audits", self.audits_t3.astype("<i8").tobytes()),
                    ("totals", self.totals_tc.astype("<i8").tobytes()),
                    ("weights", self.weights_tc.astype("<i8").tobytes()),
                    ("halves", self.halves_k.astype("<u8").tobytes()),
                    ("signature", self.signature),
                ),
            )
        )

    @classmethod
    def from_bytes(cls, data: bytes, *, limits: WireLimits = DEFAULT_LIMITS) -> SettlementReply:
        """Read a reply.

        Raises
        ------
        ProtocolError
            If the bytes are not exactly one valid reply.
        """
        names = ("audits", "totals", "weights", "halves", "signature")
        envelope = read_document(data, Kind.SETTLEMENT_REPLY, limits, *names)
        fields.exactly(envelope.meta, "answers-to", "noise")
        shape = envelope.shape
        if len(shape) != 2 or not (1 <= shape[0] <= limits.max_rows and shape[1] >= 1):
            raise EnvelopeError("a settlement's totals have shape (n_audits, n_classes)")
        return cls(
            epoch_id=envelope.query_id,
            answers_to=answered_digest(envelope.meta),
            audits_t3=words(envelope.section("audits"), np.int64, (shape[0], 3)),
            totals_tc=words(envelope.section("totals"), np.int64, (shape[0], shape[1])),
            weights_tc=words(envelope.section("weights"), np.int64, (shape[0], shape[1])),
            halves_k=words(envelope.section("halves"), np.uint64, (-1,)),
            noise_std=noise_of(envelope.meta),
            signature=bytes(envelope.section("signature")),
        )


def _query(item: Any, limits: WireLimits) -> tuple[str, int]:
    if not isinstance(item, list) or len(item) != 2:
        raise EnvelopeError("a query is not an id with a number of rows")
    named = {"query": item[0], "rows": item[1]}
    return (
        fields.text(named, "query", max_chars=64),
        fields.whole(named, "rows", low=1, high=limits.max_rows),
    )
