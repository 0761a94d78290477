"""Files of an audit log: the lock, the tail, the names of full files."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from fedinfer_flower.errors import AuditLogError
from fedinfer_flower.observability.audit_lines import MAX_LINE_BYTES

__all__ = ["locked", "read_tail", "rotated_files", "rotation_name", "set_aside", "sync_folder"]


@contextmanager
def locked(path: Path, *, shared: bool = False) -> Iterator[None]:
    """Hold the log's lock, against threads and processes.

    The lock is on a file of its own, as the log itself is renamed when it is full; it is
    opened each time, so that neither a thread nor a forked child shares it. It goes with the
    process that dies.

    Raises
    ------
    AuditLogError
        Where there are no such locks.
    """
    try:
        import fcntl
    except ImportError:
        raise AuditLogError("an audit log needs a POSIX system, for its lock") from None
    name = path.with_name(f".{path.name}.lock")
    flags = os.O_RDONLY if shared else os.O_RDWR | os.O_CREAT
    lock = os.open(name, flags | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    try:
        fcntl.flock(lock, fcntl.LOCK_SH if shared else fcntl.LOCK_EX)
        yield
    finally:
        os.close(lock)


def read_tail(file: int) -> tuple[bytes, bytes]:
    """Return (last whole line without its end, what stands after it).

    Raises
    ------
    AuditLogError
        If more than a line stands after the last whole line, or that is too long.
    """
    size = os.fstat(file).st_size
    start = max(0, size - 2 * MAX_LINE_BYTES)
    tail = os.pread(file, size - start, start)
    whole, end, torn = tail.rpartition(b"\n")
    _, before, line = whole.rpartition(b"\n")
    if len(torn) > MAX_LINE_BYTES or (end and not before and start > 0):
        raise AuditLogError("an audit log ends in something that is no line of it")
    return line, torn


def set_aside(file: int, torn: bytes, path: Path, *, index: int) -> None:
    """Move what a crash left of a line to ``NAME.INDEX.torn``, on disk before it goes."""
    aside = path.with_name(f"{path.stem}.{index}.torn")
    flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC | os.O_NOFOLLOW
    copy = os.open(aside, flags, 0o600)
    try:
        os.write(copy, torn)
        os.fsync(copy)
    finally:
        os.close(copy)
    sync_folder(path.parent)
    os.ftruncate(file, os.fstat(file).st_size - len(torn))


def rotated_files(path: Path) -> list[Path]:
    """Return the full files of a log, oldest first."""
    return [found for _, found in _numbered(path)]


def rotation_name(path: Path) -> Path:
    """Return the name that the full file gets."""
    numbers = [number for number, _ in _numbered(path)]
    return path.with_name(f"{path.stem}-{max(numbers, default=0) + 1:06d}{path.suffix}")


def sync_folder(folder: Path) -> None:
    """Put a folder's entries on disk: a new or renamed file is one."""
    handle = os.open(folder, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _numbered(path: Path) -> list[tuple[int, Path]]:
    form = re.compile(rf"{re.escape(path.stem)}-(\d{{6,9}}){re.escape(path.suffix)}")
    found = [(form.fullmatch(name), name) for name in os.listdir(path.parent)]
    return sorted((int(match[1]), path.with_name(name)) for match, name in found if match)
