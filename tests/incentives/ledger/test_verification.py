"""Hands in the database: what triggers refuse, and what verification finds all the same."""

# ruff: noqa: S608 - the statements are those of a hostile owner of the database
from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from fedinfer_flower.errors import LedgerError
from fedinfer_flower.incentives.ledger import Head, Ledger, read_export, verify_entries

from .conftest import FEE, Opened

TABLES = ("ledger_entries", "ledger_postings", "ledger_claims")


@pytest.fixture
def book(escrow) -> Opened:
    """Five entries: first, deposit, open-escrow (with claims), two payments."""
    for number in (1, 2):
        escrow.ledger.post("fee", f"f{number}", {"clinic": -5, "north": 5}, {"month": number})
    return escrow.opened


@pytest.mark.parametrize("table", TABLES)
@pytest.mark.parametrize("what", ["UPDATE {} SET seq = seq", "DELETE FROM {}", "TRUNCATE {}"])
def test_database_refuses_edits(book: Opened, table: str, what: str) -> None:
    if book.dialect == "sqlite" and what.startswith("TRUNCATE"):
        pytest.skip("SQLite has no TRUNCATE")
    cascade = " CASCADE" if what.startswith("TRUNCATE") else ""
    before = book.sql(f"SELECT * FROM {table}")
    with pytest.raises(Exception, match="append-only"):
        book.sql(what.format(table) + cascade)
    assert book.sql(f"SELECT * FROM {table}") == before


@pytest.mark.parametrize(
    "statement",
    [
        # Rows that collide with one that is there, and rows that do not come last.
        "INSERT OR REPLACE INTO ledger_entries SELECT seq, 0, kind, key, subject, memo, previous,"
        " hash FROM ledger_entries WHERE seq = 4",
        "INSERT OR REPLACE INTO ledger_entries SELECT 6, at, kind, key, subject, memo, previous,"
        " hash FROM ledger_entries WHERE seq = 4",
        "INSERT OR REPLACE INTO ledger_postings SELECT seq, account, 9, balance FROM"
        " ledger_postings WHERE seq = 5",
        "INSERT OR REPLACE INTO ledger_claims SELECT claim, 5 FROM ledger_claims",
        "INSERT INTO ledger_postings VALUES (2, 'eve', 5, 5)",
        "INSERT INTO ledger_claims VALUES ('open:other', 1)",
        "INSERT INTO ledger_entries VALUES (9, 0, 'a', 'b', '', '{}', 'c', 'd')",
    ],
)
def test_sqlite_refuses_inserts_that_would_edit(book: Opened, statement: str) -> None:
    if book.dialect != "sqlite":
        pytest.skip("INSERT OR REPLACE is SQLite's")
    with pytest.raises(Exception, match="append-only"):
        book.sql(statement)
    assert book.ledger.verify().ok


def test_database_refuses_a_second_claim_and_a_negative_balance(book: Opened) -> None:
    entry = (
        "INSERT INTO ledger_entries VALUES (6, 2000000000, 'refund', 'x', 'escrow:job', '{}',"
        " 'p', 'h')"
    )
    book.sql(entry)
    for row in (
        "INSERT INTO ledger_claims VALUES ('asked:job-0', 6)",
        "INSERT INTO ledger_postings VALUES (6, 'north', -11, -1)",
        "INSERT INTO ledger_postings VALUES (6, 'north', 0, 10)",
    ):
        with pytest.raises(Exception, match=r"(?i)append-only|unique|check"):
            book.sql(row)


# One edit for each column of each table; the row that verification must name.
EDITS = [
    ("UPDATE ledger_entries SET at = at + 1 WHERE seq = 4", 4),
    ("UPDATE ledger_entries SET kind = 'bonus' WHERE seq = 4", 4),
    ("UPDATE ledger_entries SET kind = 'Not One' WHERE seq = 4", 4),
    ("UPDATE ledger_entries SET key = 'f9' WHERE seq = 4", 4),
    ("UPDATE ledger_entries SET subject = 'escrow:job' WHERE seq = 4", 4),
    ("UPDATE ledger_entries SET memo = '{\"month\":9}' WHERE seq = 4", 4),
    ("UPDATE ledger_entries SET memo = '{\"month\": 1}' WHERE seq = 4", 4),
    ("UPDATE ledger_entries SET memo = '[]' WHERE seq = 4", 4),
    ("UPDATE ledger_entries SET memo = 'x' WHERE seq = 4", 4),
    ("UPDATE ledger_entries SET previous = 'x' WHERE seq = 4", 4),
    ("UPDATE ledger_entries SET hash = 'x' WHERE seq = 4", 4),
    ("UPDATE ledger_postings SET amount = 6, balance = 6 WHERE seq = 4 AND amount > 0", 4),
    ("UPDATE ledger_postings SET amount = amount * 2 WHERE seq = 4", 4),
    ("UPDATE ledger_postings SET balance = balance + 1 WHERE seq = 4 AND amount > 0", 4),
    ("UPDATE ledger_postings SET account = 'eve' WHERE seq = 4 AND account = 'north'", 4),
    ("UPDATE ledger_postings SET account = ' ' WHERE seq = 4 AND account = 'north'", 4),
    ("DELETE FROM ledger_postings WHERE seq = 4", 4),
    ("INSERT INTO ledger_postings VALUES (4, 'eve', 7, 7)", 4),
    ("DELETE FROM ledger_claims WHERE claim = 'asked:job-1'", 3),
    ("UPDATE ledger_claims SET claim = 'asked:job-7' WHERE claim = 'asked:job-1'", 3),
    ("UPDATE ledger_claims SET seq = 4 WHERE claim = 'asked:job-1'", 3),
    # A row that is gone is seen at the one after it.
    ("DELETE FROM ledger_postings WHERE seq = 4; DELETE FROM ledger_entries WHERE seq = 4", 5),
    ("UPDATE ledger_entries SET seq = 9 WHERE seq = 5", 9),
]


@pytest.mark.parametrize(("edit", "seq"), EDITS)
def test_verification_names_the_row_that_was_edited(book: Opened, edit: str, seq: int) -> None:
    book.unguard()
    if "seq = 9" in edit:
        # Its postings would keep the foreign key from being changed.
        book.sql("DELETE FROM ledger_postings WHERE seq = 5")
    book.sql(*edit.split("; "))
    found = book.ledger.verify()
    assert not found.ok
    assert found.first_bad.seq == seq
    with pytest.raises(LedgerError, match=f"row {seq}"):
        found.require_ok()


@pytest.mark.parametrize(
    ("edit", "seq"),
    [
        ("UPDATE ledger_entries SET memo = CAST(x'ff41' AS TEXT) WHERE seq = 4", 4),
        ("UPDATE ledger_entries SET memo = x'7b7d' WHERE seq = 4", 4),
        ("UPDATE ledger_entries SET at = 'noon' WHERE seq = 4", 4),
        ("UPDATE ledger_entries SET at = 0.5 WHERE seq = 4", 4),
        ("UPDATE ledger_postings SET amount = 'much' WHERE seq = 4", 4),
        ("UPDATE ledger_postings SET account = x'00' WHERE seq = 4 AND amount > 0", 4),
        ("UPDATE ledger_claims SET claim = x'00' WHERE claim = 'asked:job-0'", 3),
        ("INSERT INTO ledger_postings VALUES (77, 'eve', 5, 5)", 5),
    ],
)
def test_values_that_sqlite_does_not_type_are_named_too(book: Opened, edit: str, seq: int) -> None:
    if book.dialect != "sqlite":
        pytest.skip("PostgreSQL has types and enforces foreign keys")
    book.unguard()
    book.sql(edit)
    found = book.ledger.verify()
    assert not found.ok
    assert found.first_bad.seq == seq


def test_rehashed_edit_is_seen_at_the_next_row(book: Opened) -> None:
    # The editor knows the format and mends the row's own hash.
    entries = {e.seq: e for e in book.ledger.entries()}
    text = json.dumps(entries[4].to_dict()).replace('"month": 1', '"month": 8')
    forged = next(read_export([text.encode()]))
    book.unguard()
    book.sql(
        f"UPDATE ledger_entries SET memo = '{{\"month\":8}}', hash = '{forged.hash_now()}'"
        " WHERE seq = 4"
    )
    assert book.ledger.verify().first_bad.seq == 5


def test_missing_trigger_is_said(book: Opened) -> None:
    book.unguard()
    found = book.ledger.verify()
    assert "trigger" in found.first_bad.what


def test_rows_deleted_at_the_end_are_seen_against_a_published_head_only(book: Opened) -> None:
    head = book.ledger.head()
    assert book.ledger.verify(head).ok
    book.ledger.post("fee", "f3", {"clinic": -5, "north": 5})
    assert book.ledger.verify(head).ok, "a book that grew still contains its head"

    # Only foreign keys and triggers are in the way; an owner puts the triggers back.
    guards = _guards(book)
    book.unguard()
    for table in ("ledger_postings", "ledger_entries"):
        book.sql(f"DELETE FROM {table} WHERE seq >= 5")
    book.sql(*guards)

    assert book.ledger.verify().ok, "nothing in the book tells that it was longer"
    found = book.ledger.verify(head)
    assert found.first_bad.seq == 4
    assert "the last rows were deleted" in found.first_bad.what


def test_book_written_anew_is_seen_against_a_published_head(
    sqlite_opened: Opened, tmp_path: Path
) -> None:
    head = sqlite_opened.ledger.head()
    path = Path(sqlite_opened.url.removeprefix("sqlite:///"))
    path.unlink()
    other = Ledger(sqlite_opened.url)
    other.migrate()
    other.deposit("clinic", 10 * FEE, key="first")
    assert other.verify().ok
    found = other.verify(head)
    assert found.first_bad.seq == 2
    assert "head that was published" in found.first_bad.what


def _guards(book: Opened) -> list[str]:
    if book.dialect == "sqlite":
        return [row[0] for row in book.sql("SELECT sql FROM sqlite_master WHERE type = 'trigger'")]
    return [f"ALTER TABLE {table} ENABLE TRIGGER ALL" for table in TABLES]


# -- exports -----------------------------------------------------------------------------


def exported(book: Opened) -> list[bytes]:
    return [line.encode() for line in book.ledger.export("json")]


def test_export_verifies_without_a_database(book: Opened) -> None:
    found = verify_entries(read_export(exported(book)), head=book.ledger.head())
    assert found.ok
    assert found == book.ledger.verify()
    assert list(read_export(exported(book))) == list(book.ledger.entries())


def test_every_altered_digit_or_letter_of_an_export_is_found(sqlite_opened: Opened) -> None:
    sqlite_opened.ledger.post("fee", "f1", {"clinic": -5, "north": 5}, {"month": 5})
    lines = exported(sqlite_opened)
    whole = b"".join(lines)
    head = sqlite_opened.ledger.head()
    places = [m.start() for m in re.finditer(rb"[0-9a-z]", whole)]
    for place in places:
        was = whole[place : place + 1]
        altered = whole[:place] + (b"1" if was != b"1" else b"2") + whole[place + 1 :]
        try:
            found = verify_entries(read_export(altered.splitlines(keepends=True)), head=head)
        except LedgerError:
            continue
        assert not found.ok, altered[max(0, place - 20) : place + 20]


@pytest.mark.parametrize(
    "line",
    [
        b"",
        b"[]",
        b"{}",
        b'{"seq":1}',
        b"\xff",
        b"[" * 100_000,
        b'{"version":1,"seq":1e400}',
    ],
)
def test_export_that_is_none_is_a_typed_error(line: bytes) -> None:
    with pytest.raises(LedgerError, match="line 1"):
        list(read_export([line]))


def test_head_reads_what_it_writes_and_nothing_else(sqlite_opened: Opened) -> None:
    head = sqlite_opened.ledger.head()
    assert Head.from_text(str(head)) == head
    for text in (
        "",
        "1",
        "1:",
        ":" + head.hash,
        f"-1:{head.hash}",
        f"²:{head.hash}",
        "0:" + "0" * 64,
    ):
        with pytest.raises(ValueError, match="head"):
            Head.from_text(text)
