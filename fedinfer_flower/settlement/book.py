"""The evidence book: what the coordinator keeps of the sites' evidence until settlement."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, field
from typing import Final

import numpy as np

from fedinfer_flower.errors import (
    InvalidScoresError,
    InvalidValueError,
    ReplayError,
    SettlementError,
    ShapeError,
    SizeLimitError,
)
from fedinfer_flower.settlement import ckks_rows
from fedinfer_flower.settlement.forms import EvidenceForm
from fedinfer_flower.settlement.ring import ONE, RingArray, centred
from fedinfer_flower.settlement.row_sums import MIN_SITES
from fedinfer_flower.settlement.shares import CoordinatorHalf

__all__ = ["EvidenceBook", "QueryEvidence", "clear_rows"]

DEFAULT_MAX_BYTES: Final = 256 << 20


@dataclass(kw_only=True)
class QueryEvidence:
    """Evidence of one query id: its shape, and a payload a site."""

    n_queries: int
    n_classes: int
    payloads: dict[str, bytes] = field(default_factory=dict, repr=False)

    @property
    def shape(self) -> tuple[int, int]:
        """Rows and classes."""
        return (self.n_queries, self.n_classes)


class EvidenceBook:
    """Evidence by query id and site. Mutable; not thread-safe.

    Sites that did not answer, or gave none, are simply missing.

    Parameters
    ----------
    form : EvidenceForm
        The same for everything in the book.
    classes : tuple of str
        Label space of the answers, in its order: that of the audits' labels.
    max_bytes : int
        Most that the book holds: 8 bytes an entry of each site's evidence in clear or in
        shares, 20 to 40 under CKKS.

    Privacy
    -------
    Held by the coordinator. In shares or under CKKS it says nothing about any answer but
    its size, and who gave it.

    Examples
    --------
    >>> book = EvidenceBook(EvidenceForm.CLEAR)
    >>> row = np.array([[ONE, 0]], dtype="<u8").tobytes()
    >>> book.add("q-0", "a" * 64, row, n_queries=1, n_classes=2)
    >>> book.sites("q-0")
    frozenset({'aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa'})
    """

    def __init__(
        self,
        form: EvidenceForm,
        *,
        classes: tuple[str, ...] = (),
        max_bytes: int = DEFAULT_MAX_BYTES,
    ) -> None:
        if max_bytes < 1:
            raise InvalidValueError("a book's max_bytes is positive")
        self.form = EvidenceForm(form)
        self.classes = classes
        self.max_bytes = max_bytes
        self._queries: dict[str, QueryEvidence] = {}
        self._n_bytes = 0

    def __repr__(self) -> str:
        return f"<evidence book, {self.form.value}, {len(self._queries)} query ids>"

    @property
    def query_ids(self) -> tuple[str, ...]:
        """Query ids in the order in which they came."""
        return tuple(self._queries)

    def __getitem__(self, query_id: str) -> QueryEvidence:
        return self._queries[query_id]

    def sites(self, query_id: str) -> frozenset[str]:
        """Return the key ids of the sites that gave evidence of a query."""
        return frozenset(self._queries[query_id].payloads)

    def add(
        self,
        query_id: str,
        key_id: str,
        payload: bytes | memoryview,
        *,
        n_queries: int,
        n_classes: int,
    ) -> None:
        """Check a site's evidence and keep it.

        Raises
        ------
        ProtocolError
            If it is not what an honest site sends, came before, or no longer fits: as
            `ShapeError`, `InvalidScoresError`, `InvalidCiphertextError`, `ReplayError` or
            `SizeLimitError`. The book is unchanged.
        """
        if len(payload) + self._n_bytes > self.max_bytes:
            raise SizeLimitError(f"the evidence book holds at most {self.max_bytes} bytes")
        _check(self.form, payload, (n_queries, n_classes))
        entry = self._queries.get(query_id)
        if entry is None:
            entry = QueryEvidence(n_queries=n_queries, n_classes=n_classes)
        if entry.shape != (n_queries, n_classes):
            raise ShapeError("evidence of one query in two shapes")
        if key_id in entry.payloads:
            raise ReplayError(f"a second copy of evidence of key {key_id[:16]}")
        entry.payloads[key_id] = bytes(payload)
        self._queries[query_id] = entry
        self._n_bytes += len(payload)

    def forget(self, query_id: str) -> None:
        """Drop all evidence of a query; nothing happens where there is none.

        For a query of which some evidence did not fit: totals over a part of the sites that
        answered, taken from the sum over all, tell the answers of the rest.
        """
        entry = self._queries.pop(query_id, None)
        if entry is not None:
            self._n_bytes -= sum(len(payload) for payload in entry.payloads.values())

    def merge(self, other: EvidenceBook) -> None:
        """Take over everything in another book, of other query ids.

        Raises
        ------
        SettlementError
            If it is of another form or label space.
        ReplayError
            If a query id is in both.
        SizeLimitError
            If both together do not fit.
        """
        if other.form is not self.form:
            raise SettlementError("evidence of two forms does not add up")
        if other.classes != self.classes:
            raise SettlementError(
                "evidence of two label spaces does not add up",
                hint="ask all jobs of an epoch with the same classes=...",
            )
        if set(self._queries) & set(other._queries):
            raise ReplayError("two evidence books with the same query id")
        if self._n_bytes + other._n_bytes > self.max_bytes:
            raise SizeLimitError(f"the evidence book holds at most {self.max_bytes} bytes")
        self._queries.update(other._queries)
        self._n_bytes += other._n_bytes

    def largest_cohort(
        self, *, exclude: Collection[str] = ()
    ) -> tuple[frozenset[str], tuple[str, ...]]:
        """Return the set of sites that answered most rows together, and those query ids.

        Sums over different sets of sites are different games, and row sums over different
        numbers of rows do not compare: one epoch has one set. Other queries are left for
        another epoch.

        Raises
        ------
        SettlementError
            If no query has evidence of three sites.
        """
        rows: dict[tuple[frozenset[str], int], int] = {}
        for query_id, entry in self._queries.items():
            if query_id not in exclude and len(entry.payloads) >= MIN_SITES:
                key = (frozenset(entry.payloads), entry.n_classes)
                rows[key] = rows.get(key, 0) + entry.n_queries
        if not rows:
            raise SettlementError(
                f"no query with evidence of at least {MIN_SITES} sites",
                hint="did the querier ask with evidence=True? Sites settle only where their owners"
                " agreed: InferenceMod(..., agrees_to=('settlement',))",
            )
        best = max(rows, key=lambda key: (rows[key], len(key[0])))
        return best[0], tuple(
            query_id
            for query_id, entry in self._queries.items()
            if query_id not in exclude and (frozenset(entry.payloads), entry.n_classes) == best
        )


def clear_rows(payload: bytes | memoryview, shape: tuple[int, int]) -> RingArray:
    """Read evidence in clear.

    Raises
    ------
    ShapeError
        If the bytes do not fill the shape.
    InvalidScoresError
        If a row is no distribution on the grid.
    """
    if len(payload) != 8 * shape[0] * shape[1]:
        raise ShapeError(f"evidence in clear has {8 * shape[0] * shape[1]} bytes here")
    rows = np.frombuffer(payload, dtype="<u8").reshape(shape).astype(np.uint64)
    if rows.max() > ONE or np.abs(centred(rows).sum(axis=1) - ONE).max() > shape[1] + 2:
        raise InvalidScoresError("evidence with a row that is no distribution")
    return rows


def _check(form: EvidenceForm, payload: bytes | memoryview, shape: tuple[int, int]) -> None:
    if min(shape) < 1:
        raise ShapeError("evidence has at least one row and one class")
    if form is EvidenceForm.CLEAR:
        clear_rows(payload, shape)
    elif form is EvidenceForm.SHARES:
        CoordinatorHalf.from_bytes(payload, shape=shape)
    else:
        ckks_rows.check_payload(payload, n_queries=shape[0], n_classes=shape[1])
