"""What a child prints, in a file of bounded size that only its owner can read."""

from __future__ import annotations

import contextlib
import os
import threading
from pathlib import Path
from typing import BinaryIO, Final

from fedinfer_flower.errors import InvalidValueError

__all__ = ["OutputFile", "follow"]

_CHUNK_BYTES: Final = 1 << 16


class OutputFile:
    """A log file that starts anew when it is full.

    Parameters
    ----------
    path : Path
        ``worker.log``; older ones are ``worker.log.1``, ``worker.log.2``, ...
    max_bytes : int
        A file that has reached this is put aside.
    keep : int
        How many older files are kept.

    Notes
    -----
    Files are made with mode 0600. A disk that is full, or a folder that is gone, loses lines;
    it never stops the child that prints them.
    """

    def __init__(self, path: Path, *, max_bytes: int = 8 << 20, keep: int = 4) -> None:
        if max_bytes < 1 or keep < 0:
            raise InvalidValueError("max_bytes is at least 1, keep not negative")
        self.path = path
        self.max_bytes = max_bytes
        self.keep = keep
        self.lost_bytes = 0
        self._lock = threading.Lock()

    def write(self, data: bytes) -> None:
        """Append, and put the file aside when it is full."""
        with self._lock:
            try:
                self._append(data)
            except OSError:
                self.lost_bytes += len(data)

    def _append(self, data: bytes) -> None:
        flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT | getattr(os, "O_NOFOLLOW", 0)
        handle = os.open(self.path, flags, 0o600)
        try:
            os.write(handle, data)
            size = os.fstat(handle).st_size
        finally:
            os.close(handle)
        if size >= self.max_bytes:
            self._rotate()

    def _rotate(self) -> None:
        for number in range(self.keep - 1, 0, -1):
            with contextlib.suppress(FileNotFoundError):
                self._older(number).replace(self._older(number + 1))
        if self.keep:
            self.path.replace(self._older(1))
        else:
            self.path.unlink()

    def _older(self, number: int) -> Path:
        return self.path.with_name(f"{self.path.name}.{number}")


def follow(stream: BinaryIO, file: OutputFile, *, name: str) -> threading.Thread:
    """Copy a child's output into a file until the child closes it; returns the thread."""

    def copy() -> None:
        with stream:
            while data := os.read(stream.fileno(), _CHUNK_BYTES):
                file.write(data)

    thread = threading.Thread(target=copy, name=f"output-{name}", daemon=True)
    thread.start()
    return thread
