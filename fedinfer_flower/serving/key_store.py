"""API keys in one SQLite file: their hashes, their rights, and what they asked today."""

from __future__ import annotations

import hashlib
import hmac
import json
import secrets
import sqlite3
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from fedinfer_flower.errors import InvalidValueError
from fedinfer_flower.serving.auth import SCOPES, Caller
from fedinfer_flower.serving.key_file import KeyFile
from fedinfer_flower.serving.row_counts import RowCounts

__all__ = ["ApiKey", "KeyStore"]

_FRESH_S: Final = 0.5
_COLUMNS: Final = (
    "key_id, name, scopes, models, rows_per_minute, rows_per_day, concurrent,"
    " created_at, expires_at, revoked_at, digest, earlier_digest, earlier_until"
)


@dataclass(frozen=True, kw_only=True)
class ApiKey:
    """What is known of an API key. Not its secret: only a hash of that is stored.

    Parameters
    ----------
    key_id : str
        8 hex digits; public.
    name : str
    scopes : frozenset of str
        Of `auth.SCOPES`.
    models : frozenset of str, optional
        None for all.
    rows_per_minute, rows_per_day, concurrent : int
        0 for no limit; days are those of UTC.
    created_at, expires_at, revoked_at : float
        Seconds since 1970; 0.0 for never.
    earlier_until : float
        Until when the secret before the last rotation is good, too.
    """

    key_id: str
    name: str
    scopes: frozenset[str]
    models: frozenset[str] | None
    rows_per_minute: int
    rows_per_day: int
    concurrent: int
    created_at: float
    expires_at: float = 0.0
    revoked_at: float = 0.0
    earlier_until: float = 0.0

    def is_good(self, now: float) -> bool:
        """Whether it is neither revoked nor expired."""
        return not self.revoked_at and not (self.expires_at and now >= self.expires_at)

    def caller(self) -> Caller:
        """Return whom it stands for."""
        return Caller(
            key_id=self.key_id,
            name=self.name,
            scopes=self.scopes,
            models=self.models,
            rows_per_minute=self.rows_per_minute,
            rows_per_day=self.rows_per_day,
            concurrent=self.concurrent,
        )


class KeyStore:
    """The API keys of a gateway; the command line and the gateway may both have it open.

    Parameters
    ----------
    path : Path
        SQLite file, made at first use with mode 0600.
    clock : callable
        Seconds since 1970.

    Attributes
    ----------
    rows : RowCounts

    Raises
    ------
    DeploymentError
        If others can read the file, or it is something else.

    Privacy
    -------
    Holds SHA-256 of secrets of 256 random bits, which nobody can guess from it. Whoever can
    write the file can make keys.

    Examples
    --------
    >>> import tempfile
    >>> folder = tempfile.TemporaryDirectory()
    >>> keys = KeyStore(Path(folder.name) / "keys.db")
    >>> text = keys.create("lab", scopes=["query"])
    >>> keys.authenticate(text).name, keys.authenticate(text[:-1] + "_") is None
    ('lab', True)
    >>> keys.close(); folder.cleanup()
    """

    def __init__(self, path: Path, *, clock: Callable[[], float] = time.time) -> None:
        self._clock = clock
        self._file = KeyFile(path)
        self.rows = RowCounts(self._file, clock=clock)
        self._lock = threading.Lock()
        self._read_at = float("-inf")
        self._known: dict[str, tuple[ApiKey, bytes, bytes]] = {}

    def close(self) -> None:
        """Close the file."""
        self._file.close()

    # -- keys --------------------------------------------------------------------------------

    def create(
        self,
        name: str,
        *,
        scopes: Iterable[str],
        models: Iterable[str] | None = None,
        rows_per_minute: int = 0,
        rows_per_day: int = 0,
        concurrent: int = 0,
        expires_at: float = 0.0,
    ) -> str:
        """Make a key and return its text, which cannot be had again.

        Raises
        ------
        InvalidValueError
            If a scope does not exist, or a limit is negative.
        """
        wanted = sorted(set(scopes))
        if not wanted or set(wanted) - set(SCOPES):
            raise InvalidValueError(f"scopes of a key are one or more of {', '.join(SCOPES)}")
        if not name or len(name) > 64 or not name.isprintable():
            raise InvalidValueError("a key has a name of 1 to 64 printable characters")
        if min(rows_per_minute, rows_per_day, concurrent) < 0 or expires_at < 0.0:
            raise InvalidValueError("limits of a key are not negative; 0 is for none")
        allowed = None if models is None else json.dumps(sorted(set(models)))
        secret, digest = _new_secret()
        with self._changing() as db:
            key_id = secrets.token_hex(4)
            while db.execute("SELECT 1 FROM keys WHERE key_id = ?", (key_id,)).fetchone():
                key_id = secrets.token_hex(4)
            db.execute(
                "INSERT INTO keys (key_id, name, digest, scopes, models, rows_per_minute,"
                " rows_per_day, concurrent, created_at, expires_at)"
                " VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?)",
                (
                    *(key_id, name, digest, json.dumps(wanted), allowed),
                    *(rows_per_minute, rows_per_day, concurrent, self._clock(), expires_at),
                ),
            )
        return f"fik_{key_id}_{secret}"

    def rotate(self, key_id: str, *, grace_s: float = 0.0) -> str:
        """Give a key a new secret and return its text; the old one is good for `grace_s` more.

        Raises
        ------
        InvalidValueError
            If there is no such key, or it was revoked.
        """
        secret, digest = _new_secret()
        until = self._clock() + max(0.0, grace_s)
        with self._changing() as db:
            changed = db.execute(
                "UPDATE keys SET earlier_digest = digest, earlier_until = ?, digest = ?"
                " WHERE key_id = ? AND revoked_at = 0",
                (until if grace_s > 0.0 else 0.0, digest, key_id),
            ).rowcount
        self._require(changed)
        return f"fik_{key_id}_{secret}"

    def revoke(self, key_id: str) -> None:
        """End a key, its earlier secret included.

        Raises
        ------
        InvalidValueError
            If there is no such key, or it was revoked.
        """
        with self._changing() as db:
            changed = db.execute(
                "UPDATE keys SET revoked_at = ? WHERE key_id = ? AND revoked_at = 0",
                (self._clock(), key_id),
            ).rowcount
        self._require(changed)

    def list(self) -> tuple[ApiKey, ...]:
        """Return all keys, revoked ones included, oldest first."""
        with self._lock:
            self._read()
            found = [key for key, _, _ in self._known.values()]
        return tuple(sorted(found, key=lambda key: (key.created_at, key.key_id)))

    def authenticate(self, text: str) -> Caller | None:
        """Return whom a key's text stands for, or None; what changed counts within a second."""
        parts = text.split("_", 2)
        key_id, secret = (parts[1], parts[2]) if len(parts) == 3 else ("", "")
        digest = hashlib.sha256(secret.encode()).digest()
        with self._lock:
            if not 0.0 <= self._clock() - self._read_at < _FRESH_S:
                self._read()
            key, current, earlier = self._known.get(key_id, (None, b"\0" * 32, b"\0" * 32))
        now = self._clock()
        is_current = hmac.compare_digest(digest, current)
        is_earlier = hmac.compare_digest(digest, earlier)
        if key is None or not key.is_good(now):
            return None
        return key.caller() if is_current or (is_earlier and now < key.earlier_until) else None

    # -- inside ------------------------------------------------------------------------------

    @contextmanager
    def _changing(self) -> Iterator[sqlite3.Connection]:
        with self._file.transaction() as db:
            yield db
        with self._lock:
            self._read_at = float("-inf")

    def _read(self) -> None:
        with self._file.reading() as db:
            rows = db.execute(f"SELECT {_COLUMNS} FROM keys").fetchall()  # noqa: S608
        self._known = {str(row[0]): _as_key(row) for row in rows}
        self._read_at = self._clock()

    @staticmethod
    def _require(changed: int) -> None:
        if not changed:
            raise InvalidValueError("there is no such key, or it was revoked")


def _as_key(row: tuple[object, ...]) -> tuple[ApiKey, bytes, bytes]:
    (key_id, name, scopes, models, minute, day, concurrent, created, expires, revoked) = row[:10]
    digest, earlier, until = row[10:]
    key = ApiKey(
        key_id=str(key_id),
        name=str(name),
        scopes=frozenset(json.loads(str(scopes))),
        models=None if models is None else frozenset(json.loads(str(models))),
        rows_per_minute=int(str(minute)),
        rows_per_day=int(str(day)),
        concurrent=int(str(concurrent)),
        created_at=float(str(created)),
        expires_at=float(str(expires)),
        revoked_at=float(str(revoked)),
        earlier_until=float(str(until)),
    )
    return key, _digest(digest), _digest(earlier)


def _digest(value: object) -> bytes:
    return value if isinstance(value, bytes) else b"\0" * 32


def _new_secret() -> tuple[str, bytes]:
    secret = secrets.token_urlsafe(32)
    return secret, hashlib.sha256(secret.encode()).digest()
