"""A ledger as text: CSV for a spreadsheet, JSON to verify elsewhere."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterable, Iterator
from typing import Final

from fedinfer_flower.errors import EnvelopeError, InvalidValueError, LedgerError
from fedinfer_flower.incentives.ledger.entry import Draft, Entry, Posting
from fedinfer_flower.receipts.canonical import canonical_bytes, parse_object
from fedinfer_flower.wire import fields as read
from fedinfer_flower.wire.envelope import Json

__all__ = ["FORMS", "exported", "read_export"]

FORMS: Final = ("csv", "json")
_MAX_EXPORT_BYTES: Final = 1 << 30
_CSV_COLUMNS: Final = (
    *("seq", "at", "kind", "key", "subject", "account", "amount", "balance", "memo", "hash"),
)


def exported(entries: Iterable[Entry], form: str) -> Iterator[str]:
    r"""Yield the entries as lines of text.

    Parameters
    ----------
    entries : iterable of Entry
    form : str
        ``"csv"``: a line a posting, amounts in micro-credits, for people; hashes cannot be
        checked, for claims are left out. ``"json"``: a line an entry, whole;
        `read_export` reads it.

    Raises
    ------
    InvalidValueError
        For another form.

    Examples
    --------
    >>> next(exported([], "csv"))
    'seq,at,kind,key,subject,account,amount,balance,memo,hash\r\n'
    """
    if form not in FORMS:
        raise InvalidValueError(f"an export is one of {', '.join(FORMS)}")
    return _csv(entries) if form == "csv" else _json(entries)


def _json(entries: Iterable[Entry]) -> Iterator[str]:
    for entry in entries:
        yield canonical_bytes(entry.to_dict()).decode() + "\n"


def _csv(entries: Iterable[Entry]) -> Iterator[str]:
    yield _line(_CSV_COLUMNS)
    for entry in entries:
        draft = entry.draft
        memo = json.dumps(dict(draft.memo), sort_keys=True, ensure_ascii=False)
        start = (entry.seq, entry.at, draft.kind, draft.key, draft.subject)
        for part in entry.postings or (None,):
            money = ("", "", "") if part is None else (part.account, part.amount, part.balance)
            yield _line((*start, *money, memo, entry.hash))


def _line(cells: Iterable[object]) -> str:
    out = io.StringIO()
    csv.writer(out).writerow(cells)
    return out.getvalue()


def read_export(lines: Iterable[bytes]) -> Iterator[Entry]:
    """Read the JSON form, a line at a time; believe nothing of it before `verify_entries`.

    Raises
    ------
    LedgerError
        At a line that is no entry; names it.
    """
    for number, line in enumerate(lines, start=1):
        try:
            yield _entry(line)
        except (EnvelopeError, InvalidValueError) as exc:
            raise LedgerError(f"line {number} is no entry: {exc.message}") from None


def _entry(line: bytes) -> Entry:
    plain = parse_object(line, max_bytes=_MAX_EXPORT_BYTES, what="entry")
    names = ("version", "seq", "at", "kind", "key", "subject", "postings", "memo", "claims")
    read.exactly(plain, *names, "previous", "hash")
    read.whole(plain, "version", low=1, high=1)
    memo, claims = plain["memo"], plain["claims"]
    if not isinstance(memo, dict) or not isinstance(claims, list):
        raise EnvelopeError("memo or claims have another type")
    postings = tuple(_posting(item) for item in _lists(plain["postings"]))
    if len({p.account for p in postings}) != len(postings):
        raise EnvelopeError("an account comes twice")
    return Entry(
        seq=read.whole(plain, "seq", low=1, high=2**62),
        at=read.whole(plain, "at", low=0, high=2**62),
        draft=Draft(
            kind=read.text(plain, "kind"),
            key=read.text(plain, "key"),
            subject=read.text(plain, "subject"),
            amounts={p.account: p.amount for p in postings},
            memo=memo,
            claims=[read.text({"claim": claim}, "claim") for claim in claims],
        ),
        postings=postings,
        previous=read.text(plain, "previous"),
        hash=read.text(plain, "hash"),
    )


def _lists(value: Json) -> list[list[Json]]:
    if not isinstance(value, list) or not all(isinstance(i, list) and len(i) == 3 for i in value):
        raise EnvelopeError("postings are lists of account, amount and balance")
    return value


def _posting(item: list[Json]) -> Posting:
    plain = dict(zip(("account", "amount", "balance"), item, strict=True))
    most = 2**62
    return Posting(
        account=read.text(plain, "account"),
        amount=read.whole(plain, "amount", low=-most, high=most),
        balance=read.whole(plain, "balance", low=-most, high=most),
    )
