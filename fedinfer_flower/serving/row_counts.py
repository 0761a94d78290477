"""How many rows an API key asked today: on disk, and once for each job."""

from __future__ import annotations

import sqlite3
from collections.abc import Callable
from typing import Final

from fedinfer_flower.errors import QuotaExceededError
from fedinfer_flower.serving.key_file import KeyFile
from fedinfer_flower.serving.problem import HttpProblem

__all__ = ["RowCounts"]

_DAY_S: Final = 86_400
_KEEP_DAYS: Final = 32


class RowCounts:
    """Rows by key and day of UTC.

    Parameters
    ----------
    file : KeyFile
    clock : callable
        Seconds since 1970.
    """

    def __init__(self, file: KeyFile, *, clock: Callable[[], float]) -> None:
        self._file = file
        self._clock = clock

    def count(
        self, key_id: str, n_rows: int, *, limit: int = 0, use: str = "", stale: str = ""
    ) -> bool:
        """Count rows of today, on disk; return False if `use` was counted before.

        Parameters
        ----------
        limit : int
            Most rows of the day; 0 for none.
        use : str
            Name under which they are counted once; empty for none.
        stale : str
            Job under `use` that is no more: the rows are counted again.

        Raises
        ------
        HttpProblem
            With `QuotaExceededError`, if they are more than are left.
        """
        now = self._clock()
        day = int(now // _DAY_S)
        with self._file.transaction() as db:
            if use:
                row = db.execute(
                    "SELECT job_id FROM uses WHERE key_id = ? AND use_id = ?", (key_id, use)
                ).fetchone()
                if row is not None and (not stale or row[0] != stale):
                    return False
            left_s = (day + 1) * _DAY_S - now
            if limit and _rows(db, key_id, day) + n_rows > limit:
                raise HttpProblem(
                    QuotaExceededError(
                        f"the API key has {limit} rows a day, which do not cover this query",
                        hint="days end at midnight UTC",
                    ),
                    retry_after_s=left_s,
                )
            db.execute(
                "INSERT INTO days VALUES (?, ?, ?)"
                " ON CONFLICT DO UPDATE SET n_rows = n_rows + excluded.n_rows",
                (key_id, day, n_rows),
            )
            if use:
                db.execute("INSERT OR REPLACE INTO uses VALUES (?, ?, '', ?)", (key_id, use, now))
            db.execute("DELETE FROM days WHERE day < ?", (day - _KEEP_DAYS,))
            db.execute("DELETE FROM uses WHERE at < ?", (now - 2 * _DAY_S,))
        return True

    def uncount(self, key_id: str, n_rows: int, *, use: str = "") -> None:
        """Take back a count of today: the job was not accepted."""
        day = int(self._clock() // _DAY_S)
        with self._file.transaction() as db:
            db.execute(
                "UPDATE days SET n_rows = max(0, n_rows - ?) WHERE key_id = ? AND day = ?",
                (n_rows, key_id, day),
            )
            db.execute("DELETE FROM uses WHERE key_id = ? AND use_id = ?", (key_id, use))

    def settle(self, key_id: str, use: str, job_id: str) -> None:
        """Note which job the rows under `use` are for."""
        with self._file.transaction() as db:
            db.execute(
                "INSERT OR REPLACE INTO uses VALUES (?, ?, ?, ?)",
                (key_id, use, job_id, self._clock()),
            )

    def earlier(self, key_id: str, use: str) -> str:
        """Return the job that was counted under `use`; empty for none."""
        with self._file.reading() as db:
            row = db.execute(
                "SELECT job_id FROM uses WHERE key_id = ? AND use_id = ?", (key_id, use)
            ).fetchone()
        return str(row[0]) if row else ""

    def today(self, key_id: str) -> int:
        """Return how many rows were counted today."""
        with self._file.reading() as db:
            return _rows(db, key_id, int(self._clock() // _DAY_S))


def _rows(db: sqlite3.Connection, key_id: str, day: int) -> int:
    row = db.execute(
        "SELECT n_rows FROM days WHERE key_id = ? AND day = ?", (key_id, day)
    ).fetchone()
    return int(row[0]) if row else 0
