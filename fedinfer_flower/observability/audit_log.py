"""A log to which lines are only ever added, each bound to the one before it.

Roles: a site writes one of what it answered and refused, a gateway of what it accepted and
how that ended. Anyone with the file can verify it; see `verify_audit_log`.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Final

from fedinfer_flower.errors import AuditLogError, InvalidValueError
from fedinfer_flower.observability.audit_files import (
    locked,
    read_tail,
    rotated_files,
    rotation_name,
    set_aside,
    sync_folder,
)
from fedinfer_flower.observability.audit_lines import (
    MAX_LINE_BYTES,
    NO_HASH,
    AuditEntry,
    read_line,
)
from fedinfer_flower.observability.audit_verification import AuditVerification, verify_audit_log
from fedinfer_flower.observability.fact_names import Fact, checked_facts

__all__ = ["AuditEntry", "AuditLog", "AuditVerification", "verify_audit_log"]

_ROLES: Final = ("site", "gateway", "coordinator", "querier")
_Seen = tuple[int, int, int]
"""Device, inode and size of the file as this process left it."""


class AuditLog:
    """An audit log of one role, for any number of threads and processes.

    One line an entry, hash-chained, on disk when `append` returns. At `max_file_bytes` the
    file is renamed, ``audit.jsonl`` to ``audit-000001.jsonl``, and the chain goes on in a new
    one. A line that a crash cut short is moved to a ``.torn`` file, and an entry
    ``recovered`` says so.

    Parameters
    ----------
    path : Path
        The file that is written on, ``*.jsonl``; made, with its folder, if it is not there.
        Nobody else may read it.
    role : {"site", "gateway", "coordinator", "querier"}
    max_file_bytes : int
        Size at which another file is begun; at least 64 KiB.
    clock : callable
        Seconds since 1970.

    Raises
    ------
    AuditLogError
        If the file can be read by others, cannot be written, or does not end in an entry
        that fits.

    Privacy
    -------
    Entries hold ids, names, amounts and error codes of `FACT_NAMES`: who asked a site, when,
    how many rows, at what cost. Inputs, answers and secrets have no name there and are
    refused. The chain shows that a line was changed, taken out or put in; it has no key, so
    whoever may write the file can also make a whole new chain, or drop the last lines: that
    shows only against a `head` that was noted elsewhere.

    Examples
    --------
    >>> from tempfile import TemporaryDirectory
    >>> with TemporaryDirectory() as folder:
    ...     log = AuditLog(Path(folder) / "audit.jsonl", role="site")
    ...     entry = log.append("answered", query_id="q1", n_rows=3)
    ...     verify_audit_log(log.path, head=entry.hash).ok
    True
    """

    def __init__(
        self,
        path: Path,
        *,
        role: str,
        max_file_bytes: int = 64 * 1024**2,
        clock: Callable[[], float] = time.time,
    ) -> None:
        if role not in _ROLES or max_file_bytes < 4 * MAX_LINE_BYTES or path.suffix != ".jsonl":
            raise InvalidValueError(
                f"an audit log is a *.jsonl file of one of {', '.join(_ROLES)}, with"
                f" max_file_bytes from {4 * MAX_LINE_BYTES}"
            )
        self.path = path
        self._role, self._max_bytes, self._clock = role, max_file_bytes, clock
        self._seen: _Seen = (0, 0, -1)
        self._last: AuditEntry | None = None
        try:
            path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
            with locked(path):
                file = self._open()
                try:
                    self._take_up(file)
                finally:
                    os.close(file)
        except OSError as exc:
            raise self._failed("cannot be opened", exc) from None

    @property
    def head(self) -> str:
        """Hash of the last entry that this object wrote or read, in hex; zeros before any.

        Noted elsewhere, it proves later that nothing up to it was changed or dropped.
        """
        return NO_HASH if self._last is None else self._last.hash

    def append(self, event: str, **facts: Fact) -> AuditEntry:
        """Write an entry; it is on disk when this returns.

        Parameters
        ----------
        event : str
            What happened, kebab-case: ``"answered"``, ``"refused"``.
        **facts
            Of `FACT_NAMES`: short texts, finite numbers, truth values.

        Returns
        -------
        AuditEntry

        Raises
        ------
        AuditLogError
            If the entry is not on disk for certain, or a fact may not be written: the
            caller must then not do what the entry would have told.
        """
        try:
            checked = checked_facts(facts)
        except InvalidValueError as exc:
            raise AuditLogError(
                f"an entry of the audit log is refused: {exc.message}", hint=exc.hint
            ) from None
        try:
            with locked(self.path):
                file = self._open()
                try:
                    self._take_up(file)
                    file = self._with_room(file)
                    return self._write(file, event, checked)
                finally:
                    os.close(file)
        except OSError as exc:
            self._seen = (0, 0, -1)
            raise self._failed("cannot be written", exc) from None

    # -- under the lock ------------------------------------------------------------------

    def _open(self) -> int:
        is_new = not self.path.exists()
        flags = os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC | os.O_NOFOLLOW
        file = os.open(self.path, flags, 0o600)
        if is_new:
            sync_folder(self.path.parent)
        if os.fstat(file).st_mode & 0o077:
            os.close(file)
            raise AuditLogError(
                f"the audit log {self.path.name!r} can be read or changed by others",
                hint=f"chmod 600 {self.path.name}",
            )
        return file

    def _take_up(self, file: int) -> None:
        """Know the last entry; only read when another process wrote since."""
        if _state(file) == self._seen:
            return
        before = self._last
        last_line, torn = read_tail(file)
        if not last_line and (older := rotated_files(self.path)):
            # A crash between the renaming of one file and the first line of the next.
            with older[-1].open("rb") as rotated:
                last_line, torn_before = read_tail(rotated.fileno())
            if torn_before or not last_line:
                raise AuditLogError(f"the audit log {older[-1].name!r} has no whole last line")
        try:
            last = read_line(last_line, role=self._role) if last_line else None
        except InvalidValueError as exc:
            raise self._altered(f"its last line {exc.message}") from None
        if before is not None and (
            last is None
            or last.index < before.index
            or (last.index == before.index and last.hash != before.hash)
        ):
            raise self._altered("it was set back to an older state while in use")
        self._last = last
        if torn:
            set_aside(file, torn, self.path, index=0 if last is None else last.index + 1)
            self._write(file, "recovered", {"torn_bytes": len(torn)})
        self._seen = _state(file)

    def _with_room(self, file: int) -> int:
        """Return the file to write on: another one if this one is full."""
        if os.fstat(file).st_size + MAX_LINE_BYTES <= self._max_bytes:
            return file
        os.rename(self.path, rotation_name(self.path))
        fresh = self._open()
        # The caller closes what it opened: the new file takes the number of the old one.
        os.dup2(fresh, file, inheritable=False)
        os.close(fresh)
        return file

    def _write(self, file: int, event: str, facts: dict[str, Fact]) -> AuditEntry:
        last = self._last
        entry = AuditEntry.make(
            index=0 if last is None else last.index + 1,
            at=self._clock(),
            role=self._role,
            event=event,
            facts=facts,
            previous=NO_HASH if last is None else last.hash,
        )
        line = entry.to_line()
        size = os.fstat(file).st_size
        try:
            if os.write(file, line) != len(line):
                raise OSError("a write was cut short")
            os.fsync(file)
        except OSError:
            # Best effort: what is left of the line is found, and moved aside, later.
            os.ftruncate(file, size)
            raise
        self._last, self._seen = entry, _state(file)
        return entry

    def _failed(self, what: str, exc: OSError) -> AuditLogError:
        return AuditLogError(
            f"the audit log {self.path.name!r} {what}: {type(exc).__name__}"
            f"{f' {exc.errno}' if exc.errno else ''}",
            hint="see to room on the disk and the folder's owner; nothing is answered until then",
        )

    def _altered(self, what: str) -> AuditLogError:
        return AuditLogError(
            f"the audit log {self.path.name!r} cannot be written on: {what}",
            hint=f"fedinfer verify {self.path.name}, then move its files elsewhere to begin anew",
        )


def _state(file: int) -> _Seen:
    found = os.fstat(file)
    return found.st_dev, found.st_ino, found.st_size
