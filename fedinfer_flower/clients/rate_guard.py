"""How often a site may be asked: counters in its home, for all its processes.

Two windows. *A minute* is exact: queries that were counted in the last 60 seconds. *A day* is
the present hour and the 24 before it, so it is between 24 and 25 hours long: in no 24 hours
are there more rows than the limit, and room comes back hour by hour, UTC.

A query is counted before its id is used up and before the model sees it, and stays counted
whatever becomes of it: a crash can lose room, never win any. The same query id is counted once
for as long as it is in the window, so a coordinator that sends a querier's message again does
not use up that querier's room.
"""

from __future__ import annotations

import hashlib
import sqlite3
import time
from collections.abc import Callable
from pathlib import Path
from typing import Final

from fedinfer_flower.clients.policy_tables import LimitRules
from fedinfer_flower.errors import InvalidValueError, PolicyRefusedError
from fedinfer_flower.privacy.row_digest import MemoryFile, key_fingerprint

__all__ = ["EVERYONE", "RateGuard"]

EVERYONE: Final = ""
"""Account of all queriers together."""

_KIND: Final = 0x4649524C  # "FIRL"
_SCHEMA: Final = """
CREATE TABLE counted (
    account TEXT NOT NULL,
    name TEXT NOT NULL,
    at REAL NOT NULL,
    rows INTEGER NOT NULL,
    PRIMARY KEY (account, name)
) WITHOUT ROWID;
CREATE INDEX counted_by ON counted (account, at);
CREATE INDEX counted_at ON counted (at);
CREATE TABLE hours (
    account TEXT NOT NULL,
    hour INTEGER NOT NULL,
    rows INTEGER NOT NULL,
    PRIMARY KEY (account, hour)
) WITHOUT ROWID;
"""
_MINUTE_S: Final = 60.0
_HOUR_S: Final = 3600
_HOURS: Final = 25


class RateGuard:
    """Counters of one site.

    Parameters
    ----------
    path : Path
        Made at first use, for its owner alone.
    limits : LimitRules
        Those of now: counts of before are held against them.
    clock : callable
        Seconds since 1970. Set back, it keeps counts longer; set forward, it drops them.

    Raises
    ------
    ConfigError
        If the file is damaged, of another kind or can be read by others. Nothing is started
        afresh in its place. Not noticed: a file that was deleted.

    Privacy
    -------
    The file says who asked how many rows in which hour. It stays at the site. A refusal for
    `rows_per_day_in_all` tells a querier that others asked.

    Examples
    --------
    >>> import tempfile
    >>> folder = tempfile.TemporaryDirectory()
    >>> guard = RateGuard(Path(folder.name) / "limits.sqlite", LimitRules(rows_per_day=10))
    >>> guard.count(querier="ab", query_id="q-0", n_rows=8)
    >>> guard.count(querier="ab", query_id="q-0", n_rows=8)
    >>> guard.count(querier="ab", query_id="q-1", n_rows=8)  # doctest: +ELLIPSIS
    Traceback (most recent call last):
    ...
    fedinfer_flower.errors.PolicyRefusedError: FI322 ...
    >>> folder.cleanup()
    """

    def __init__(
        self, path: Path, limits: LimitRules, *, clock: Callable[[], float] = time.time
    ) -> None:
        self._limits, self._clock = limits, clock
        key = hashlib.sha256(b"fedinfer/v1/limits").digest()
        self._file = MemoryFile(
            path, kind=_KIND, schema=_SCHEMA, key_id=key_fingerprint(key), must_exist=False
        )

    def count(self, *, querier: str, query_id: str, n_rows: int) -> None:
        """Count a query, on disk when this returns; or refuse it, and count nothing.

        Parameters
        ----------
        querier : str
            Key id, or another fixed name where nobody signed; not empty.
        query_id : str
            What is counted once. Asked again with more rows, the surplus counts.
        n_rows : int

        Raises
        ------
        PolicyRefusedError
            Naming the limit.
        ConfigError
            If the file cannot be written.
        """
        if not querier or n_rows < 0:
            raise InvalidValueError("a query is counted for somebody, with its rows")
        now = self._clock()
        with self._file.transaction() as db:
            _forget(db, now)
            before = _counted(db, querier, query_id)
            fresh = n_rows if before is None else max(0, n_rows - before)
            self._require_minute(db, querier, now, is_new=before is None)
            self._require_day(db, querier, now, fresh)
            db.execute(
                "INSERT INTO counted VALUES (?, ?, ?, ?) ON CONFLICT (account, name)"
                " DO UPDATE SET rows = max(rows, excluded.rows)",
                (querier, query_id, now, n_rows),
            )
            for account in (querier, EVERYONE):
                db.execute(
                    "INSERT INTO hours VALUES (?, ?, ?) ON CONFLICT (account, hour)"
                    " DO UPDATE SET rows = rows + excluded.rows",
                    (account, _hour(now), fresh),
                )

    def rows_of_day(self, querier: str = EVERYONE) -> int:
        """Return how many rows are counted in the window of a day."""
        with self._file.transaction(writes=False) as db:
            return _of_day(db, querier, self._clock())

    def _require_minute(
        self, db: sqlite3.Connection, querier: str, now: float, *, is_new: bool
    ) -> None:
        most = self._limits.queries_per_minute
        if not (most and is_new):
            return
        asked = "SELECT count(*) FROM counted WHERE account = ? AND at > ?"
        if int(db.execute(asked, (querier, now - _MINUTE_S)).fetchone()[0]) >= most:
            raise PolicyRefusedError(
                f"this site answers {most} queries of one querier a minute"
                " ([limits] queries-per-minute)",
                hint="ask again in a minute, or more rows at a time",
            )

    def _require_day(self, db: sqlite3.Connection, querier: str, now: float, fresh: int) -> None:
        most = self._limits.rows_per_day
        used = _of_day(db, querier, now) if most else 0
        if most and used + fresh > most:
            raise PolicyRefusedError(
                f"this site answers {most} rows of one querier a day; {max(0, most - used)} are"
                " left ([limits] rows-per-day)",
                hint="ask fewer rows, or tomorrow",
            )
        most = self._limits.rows_per_day_in_all
        if most and _of_day(db, EVERYONE, now) + fresh > most:
            # How much others asked is not this querier's affair.
            raise PolicyRefusedError(
                "this site has answered its rows of today ([limits] rows-per-day-in-all)",
                hint="ask fewer rows, or tomorrow",
            )


def _hour(now: float) -> int:
    return int(now // _HOUR_S)


def _forget(db: sqlite3.Connection, now: float) -> None:
    oldest = _hour(now) - _HOURS + 1
    db.execute("DELETE FROM counted WHERE at < ?", (oldest * _HOUR_S,))
    db.execute("DELETE FROM hours WHERE hour < ?", (oldest,))


def _counted(db: sqlite3.Connection, account: str, name: str) -> int | None:
    sql = "SELECT rows FROM counted WHERE account = ? AND name = ?"
    row = db.execute(sql, (account, name)).fetchone()
    return None if row is None else int(row[0])


def _of_day(db: sqlite3.Connection, account: str, now: float) -> int:
    sql = "SELECT coalesce(sum(rows), 0) FROM hours WHERE account = ? AND hour > ?"
    return int(db.execute(sql, (account, _hour(now) - _HOURS)).fetchone()[0])
