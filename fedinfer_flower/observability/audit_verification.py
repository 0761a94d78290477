"""Whether an audit log is as it was written."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, Final

from fedinfer_flower.errors import AuditLogError, InvalidValueError
from fedinfer_flower.observability.audit_files import locked, rotated_files
from fedinfer_flower.observability.audit_lines import (
    MAX_LINE_BYTES,
    NO_HASH,
    AuditEntry,
    read_line,
)

__all__ = ["AuditVerification", "verify_audit_log"]

_HEAD: Final = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True, kw_only=True)
class AuditVerification:
    """What was found of an audit log.

    Parameters
    ----------
    ok : bool
    n_entries : int
        Entries that fit, from the first on.
    head : str
        Hash of the last of them; zeros without any.
    first_bad : int or None
        Index of the first entry that does not fit; None if all do.
    words : str
        What was found, and where: file and line.
    """

    ok: bool
    n_entries: int
    head: str
    first_bad: int | None
    words: str


def verify_audit_log(path: Path, *, head: str | None = None) -> AuditVerification:
    """Check every line of a log and of the full files beside it.

    Parameters
    ----------
    path : Path
        The file that is written on; ``NAME-000001.jsonl`` and so on are found beside it.
    head : str, optional
        Hash of an entry that was noted earlier, 64 hex digits. The log must hold it; entries
        after it are fine.

    Returns
    -------
    AuditVerification

    Raises
    ------
    AuditLogError
        If a file cannot be read, or `head` is none.

    Privacy
    -------
    Finds any line that was changed, taken out, put in or moved. There is no key: a chain
    that its owner made anew, and lines missing at the *end*, show only against a `head` that
    somebody else keeps. Nothing shows that an entry is *true*.
    """
    if head is not None and not _HEAD.fullmatch(head):
        raise AuditLogError("a head is 64 lower-case hex digits, as an earlier check printed it")
    with ExitStack() as stack:
        try:
            files = _opened(path, stack)
            return _found(files, head=head)
        except OSError as exc:
            raise AuditLogError(
                f"the audit log {path.name!r} cannot be read: {type(exc).__name__}",
                hint="give the path of the file that is written on",
            ) from None


def _opened(path: Path, stack: ExitStack) -> list[tuple[str, BinaryIO, int]]:
    """Return name, file and size of each file, as they are at one moment."""
    with ExitStack() as lock:
        with suppress(OSError):  # of a copy there may be no lock, and nobody writes it
            lock.enter_context(locked(path, shared=True))
        files: list[tuple[str, BinaryIO, int]] = []
        for each in (*rotated_files(path), path):
            file = stack.enter_context(each.open("rb"))
            files.append((each.name, file, os.fstat(file.fileno()).st_size))
        return files


def _found(files: list[tuple[str, BinaryIO, int]], *, head: str | None) -> AuditVerification:
    last: AuditEntry | None = None
    seen_head = head == NO_HASH
    for name, number, line in _lines(files):
        expected = 0 if last is None else last.index + 1
        try:
            entry = _following(line, last, expected)
        except InvalidValueError as exc:
            return AuditVerification(
                ok=False,
                n_entries=expected,
                head=NO_HASH if last is None else last.hash,
                first_bad=expected,
                words=f"{name} line {number} {exc.message}",
            )
        last = entry
        seen_head = seen_head or entry.hash == head
    n_entries = 0 if last is None else last.index + 1
    words = f"{n_entries} entries, each bound to the one before"
    if head is None:
        words += "; whether the last ones are missing shows only against a head noted elsewhere"
    elif not seen_head:
        words = "no entry has the head that was noted: the end is missing, or all was made anew"
    ok = head is None or seen_head
    return AuditVerification(
        ok=ok,
        n_entries=n_entries,
        head=NO_HASH if last is None else last.hash,
        first_bad=None if ok else n_entries,
        words=words,
    )


def _following(line: bytes, last: AuditEntry | None, index: int) -> AuditEntry:
    if not line.endswith(b"\n"):
        raise InvalidValueError("is not whole: a write was cut short, or the line is too long")
    entry = read_line(line[:-1], role="" if last is None else last.role)
    if entry.index != index:
        raise InvalidValueError(f"is entry {entry.index}, and not {index}: some are missing")
    if entry.previous != (NO_HASH if last is None else last.hash):
        raise InvalidValueError("does not follow the entry before it")
    return entry


def _lines(files: list[tuple[str, BinaryIO, int]]) -> Iterator[tuple[str, int, bytes]]:
    for name, file, size in files:
        number = 0
        while file.tell() < size:
            number += 1
            yield name, number, file.readline(min(MAX_LINE_BYTES + 1, size - file.tell()))
