"""The SQLite file of API keys as one process sees it, for all its threads."""

from __future__ import annotations

import os
import sqlite3
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

from fedinfer_flower.errors import DeploymentError

__all__ = ["KeyFile"]

_APPLICATION_ID: Final = 0x4649474B
_VERSION: Final = 1
_BUSY_S: Final = 10.0
_SCHEMA: Final = f"""
BEGIN IMMEDIATE;
CREATE TABLE IF NOT EXISTS keys (
    key_id TEXT PRIMARY KEY, name TEXT NOT NULL, digest BLOB NOT NULL,
    earlier_digest BLOB, earlier_until REAL NOT NULL DEFAULT 0,
    scopes TEXT NOT NULL, models TEXT, rows_per_minute INTEGER NOT NULL,
    rows_per_day INTEGER NOT NULL, concurrent INTEGER NOT NULL,
    created_at REAL NOT NULL, expires_at REAL NOT NULL, revoked_at REAL NOT NULL DEFAULT 0
) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS days (
    key_id TEXT NOT NULL, day INTEGER NOT NULL, n_rows INTEGER NOT NULL,
    PRIMARY KEY (key_id, day)
) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS uses (
    key_id TEXT NOT NULL, use_id TEXT NOT NULL, job_id TEXT NOT NULL, at REAL NOT NULL,
    PRIMARY KEY (key_id, use_id)
) WITHOUT ROWID;
PRAGMA application_id = {_APPLICATION_ID};
PRAGMA user_version = {_VERSION};
COMMIT;
"""


class KeyFile:
    """One file of API keys.

    Parameters
    ----------
    path : Path
        Made at first use with mode 0600.

    Raises
    ------
    DeploymentError
        If others can read the file, or it is something else.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._lock = threading.Lock()
        try:
            if not path.exists():
                os.close(os.open(path, os.O_WRONLY | os.O_CREAT, 0o600))
            if os.name == "posix" and path.stat().st_mode & 0o077:
                raise DeploymentError(
                    f"the key file {path.name!r} can be read or changed by others",
                    hint=f"chmod 600 {path.name}",
                )
            self._db = sqlite3.connect(
                path, isolation_level=None, timeout=_BUSY_S, check_same_thread=False
            )
            self._prepare()
        except (OSError, sqlite3.Error) as exc:
            raise self._unusable(exc) from None

    def _prepare(self) -> None:
        mark = self._db.execute("PRAGMA application_id").fetchone()[0]
        if mark not in (0, _APPLICATION_ID):
            self._db.close()
            raise DeploymentError(f"{self.path.name!r} is not a file of API keys")
        self._db.execute("PRAGMA journal_mode = WAL")
        self._db.execute("PRAGMA synchronous = FULL")
        if mark == 0:
            self._db.executescript(_SCHEMA)

    def close(self) -> None:
        """Close the file."""
        with self._lock:
            self._db.close()

    @contextmanager
    def reading(self) -> Iterator[sqlite3.Connection]:
        """Read while no other thread uses the connection."""
        with self._lock:
            try:
                yield self._db
            except sqlite3.Error as exc:
                raise self._unusable(exc) from None

    @contextmanager
    def transaction(self) -> Iterator[sqlite3.Connection]:
        """Run one transaction: on disk when the block ends, undone if it raises."""
        with self._lock:
            try:
                self._db.execute("BEGIN IMMEDIATE")
                try:
                    yield self._db
                except BaseException:
                    self._db.execute("ROLLBACK")
                    raise
                self._db.execute("COMMIT")
            except sqlite3.Error as exc:
                raise self._unusable(exc) from None

    def _unusable(self, exc: Exception) -> DeploymentError:
        return DeploymentError(
            f"the key file {self.path.name!r} cannot be used: {type(exc).__name__}"
        )
