"""Entries in the database: read as they are, written at the end only."""

# ruff: noqa: S608 - statements are put together from constants; values travel beside them
from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Final

from fedinfer_flower.errors import InvalidValueError, LedgerError
from fedinfer_flower.incentives.ledger.entry import Draft, Entry, Head, Posting
from fedinfer_flower.incentives.ledger.names import DIGEST, EXTERNAL
from fedinfer_flower.incentives.ledger.rules import step
from fedinfer_flower.incentives.ledger.states import State
from fedinfer_flower.receipts.canonical import canonical_bytes

if TYPE_CHECKING:
    from sqlalchemy import Connection

__all__ = ["Book"]

_PAGE: Final = 500
_COLUMNS: Final = "seq, at, kind, key, subject, memo, previous, hash"
_POSTINGS: Final = "SELECT seq, account, amount, balance FROM ledger_postings WHERE seq"
_CLAIMS: Final = "SELECT seq, claim FROM ledger_claims WHERE seq"


class Book:
    """The entries as one transaction sees them.

    Parameters
    ----------
    connection : sqlalchemy Connection
        In a transaction; of a writer, for `append`.
    now : int
        UTC, seconds since 1970.
    """

    def __init__(self, connection: Connection, *, now: int) -> None:
        self._db = connection
        self.now = now
        self.dialect = connection.dialect.name

    def rows(self, sql: str, **values: object) -> Sequence[Any]:
        """Run one statement with named values and return its rows."""
        from sqlalchemy import text

        return self._db.execute(text(sql), values).fetchall()

    def last(self) -> tuple[Head, int] | None:
        """Return the head and the time of the last entry; None in an empty book."""
        found = self.rows("SELECT seq, hash, at FROM ledger_entries ORDER BY seq DESC LIMIT 1")
        if not found:
            return None
        seq, digest = _whole(found[0].seq), found[0].hash
        if not isinstance(digest, str) or not DIGEST.fullmatch(digest):
            raise _damaged(seq, "its hash is none")
        return Head(seq=seq, hash=digest), _whole(found[0].at)

    def find(self, key: str) -> Entry | None:
        """Return the entry of a key."""
        found = self.rows(f"SELECT {_COLUMNS} FROM ledger_entries WHERE key = :key", key=key)
        return next(iter(self._entries(found)), None)

    def history(self, subject: str) -> tuple[Entry, ...]:
        """Return all entries about one escrow or stake, in order."""
        return tuple(
            self._entries(
                self.rows(
                    f"SELECT {_COLUMNS} FROM ledger_entries WHERE subject = :subject ORDER BY seq",
                    subject=subject,
                )
            )
        )

    def state(self, subject: str) -> State | None:
        """Return what an escrow or a stake has come to; None before its first entry."""
        state: State | None = None
        for entry in self.history(subject):
            state = step(state, entry.draft, at=entry.at)
        return state

    def balance(self, account: str) -> int:
        """Return an account's micro-credits; 0 for one that nobody has used."""
        found = self.rows(
            "SELECT balance FROM ledger_postings WHERE account = :account"
            " ORDER BY seq DESC LIMIT 1",
            account=account,
        )
        return _whole(found[0].balance) if found else 0

    def balances(self) -> dict[str, int]:
        """Return the balance of every account that was ever used, sorted by name."""
        found = self.rows(
            "SELECT p.account, p.balance FROM ledger_postings p JOIN (SELECT account,"
            " MAX(seq) AS seq FROM ledger_postings GROUP BY account) l"
            " ON p.account = l.account AND p.seq = l.seq"
        )
        return dict(sorted((str(row.account), _whole(row.balance)) for row in found))

    def counts(self) -> tuple[int, int, int]:
        """Return how many entries, postings and claims there are rows of."""
        tables = ("ledger_entries", "ledger_postings", "ledger_claims")
        found = [self.rows(f"SELECT COUNT(*) AS n FROM {table}")[0].n for table in tables]
        return found[0], found[1], found[2]

    def is_intact(self) -> bool:
        """Whether SQLite finds its file whole; True elsewhere.

        Entries are verified by their hashes; but by an index that lacks a row, an escrow that
        was released would look open.
        """
        if self.dialect != "sqlite":
            return True
        return [tuple(row) for row in self.rows("PRAGMA integrity_check(1)")] == [("ok",)]

    def append(self, draft: Draft) -> Entry:
        """Write a draft as the last entry; the same draft again changes nothing.

        Returns
        -------
        entry : Entry
            The one that was written, now or before.

        Raises
        ------
        LedgerError
            If the key stands for something else, an account would be overdrawn, or the
            entry is not allowed now.
        """
        known = self.find(draft.key)
        if known is not None:
            if known.draft != draft:
                raise LedgerError(
                    "this key stands for another entry",
                    hint="a key is used once; the same key again must say the same",
                )
            return known
        head, last_at = self.last() or (None, 0)
        at = max(self.now, last_at)
        state = self.state(draft.subject) if draft.subject else None
        # By the clock as well: one entry from a clock that was ahead for a moment must not
        # bring every deadline forward.
        for moment in {self.now, at}:
            step(state, draft, at=moment)
        balances = {account: self.balance(account) for account in draft.amounts}
        for account, amount in draft.amounts.items():
            if account != EXTERNAL and amount < 0 and balances[account] + amount < 0:
                raise LedgerError(
                    f"an account holds {balances[account]} micro-credits and would pay {-amount}",
                    hint="deposit first",
                )
        entry = Entry.chained(draft, after=head, at=at, balances=balances)
        self._insert(entry)
        return entry

    def page(self, after: int = 0) -> Iterator[Entry]:
        """Return the next entries after a place, some hundred; none at the end of the book.

        Rows are read now and decoded one by one, so that all those before a damaged one are
        seen first.

        Raises
        ------
        LedgerError
            While iterating, at a row that is no entry; names it.
        """
        found = self.rows(
            f"SELECT {_COLUMNS} FROM ledger_entries WHERE seq > :after ORDER BY seq LIMIT {_PAGE}",
            after=after,
        )
        if not found:
            return iter(())
        span = {"low": _whole(found[0].seq), "high": _whole(found[-1].seq)}
        parts = _by_entry(self.rows(f"{_POSTINGS} BETWEEN :low AND :high", **span))
        claims = _by_entry(self.rows(f"{_CLAIMS} BETWEEN :low AND :high", **span))
        return (_decoded(row, parts.get(row.seq, ()), claims.get(row.seq, ())) for row in found)

    def _entries(self, rows: Sequence[Any]) -> Iterator[Entry]:
        for row in rows:
            seq = _whole(row.seq)
            parts = self.rows(f"{_POSTINGS} = :seq", seq=seq)
            yield _decoded(row, parts, self.rows(f"{_CLAIMS} = :seq", seq=seq))

    def _insert(self, entry: Entry) -> None:
        from sqlalchemy import text

        draft = entry.draft
        self._db.execute(
            text(
                f"INSERT INTO ledger_entries ({_COLUMNS}) VALUES"
                " (:seq, :at, :kind, :key, :subject, :memo, :previous, :hash)"
            ),
            {
                "seq": entry.seq,
                "at": entry.at,
                "kind": draft.kind,
                "key": draft.key,
                "subject": draft.subject,
                "memo": canonical_bytes(dict(draft.memo)).decode(),
                "previous": entry.previous,
                "hash": entry.hash,
            },
        )
        postings = [
            {"seq": entry.seq, "account": p.account, "amount": p.amount, "balance": p.balance}
            for p in entry.postings
        ]
        claims = [{"claim": claim, "seq": entry.seq} for claim in draft.claims]
        if postings:
            self._db.execute(
                text(
                    "INSERT INTO ledger_postings (seq, account, amount, balance)"
                    " VALUES (:seq, :account, :amount, :balance)"
                ),
                postings,
            )
        if claims:
            self._db.execute(
                text("INSERT INTO ledger_claims (claim, seq) VALUES (:claim, :seq)"), claims
            )


def _by_entry(rows: Sequence[Any]) -> Mapping[int, list[Any]]:
    found: dict[int, list[Any]] = {}
    for row in rows:
        found.setdefault(row.seq, []).append(row)
    return found


def _decoded(row: Any, postings: Sequence[Any], claims: Sequence[Any]) -> Entry:
    texts = {name: getattr(row, name) for name in ("kind", "key", "subject", "previous", "hash")}
    if not all(isinstance(value, str) for value in (*texts.values(), row.memo)):
        raise _damaged(row.seq, "a text is none")
    try:
        parts = tuple(
            sorted(
                (
                    Posting(account=p.account, amount=_whole(p.amount), balance=_whole(p.balance))
                    for p in postings
                ),
                key=lambda p: p.account,
            )
        )
        memo = json.loads(row.memo)
        if not isinstance(memo, dict) or canonical_bytes(memo).decode() != row.memo:
            raise _damaged(row.seq, "its memo is not in its one form")
        draft = Draft(
            kind=texts["kind"],
            key=texts["key"],
            subject=texts["subject"],
            amounts={p.account: p.amount for p in parts},
            memo=memo,
            claims=[str(c.claim) for c in claims],
        )
    except InvalidValueError as exc:
        raise _damaged(row.seq, exc.message) from None
    # JSON that is none, or brackets nested beyond reason; values that cannot be compared.
    except (ValueError, RecursionError, TypeError):
        raise _damaged(row.seq, "a value is of another type") from None
    return Entry(
        seq=row.seq,
        at=_whole(row.at),
        draft=draft,
        postings=parts,
        previous=texts["previous"],
        hash=texts["hash"],
    )


def _whole(value: object) -> int:
    if type(value) is not int:
        raise LedgerError("a number in the ledger is none", hint="verify the ledger")
    return value


def _damaged(seq: int, what: str) -> LedgerError:
    return LedgerError(f"row {seq} of the ledger is damaged: {what}", hint="verify the ledger")
