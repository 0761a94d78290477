"""The SQLite file under a site budget: how it is made, opened, and known to be the same.

One file in rollback-journal mode, one connection a transaction. Totals are whole numbers of
10^-18, rounded up, so that adding and taking back is exact.
"""

from __future__ import annotations

import json
import math
import os
import secrets
import sqlite3
from collections.abc import Iterator
from contextlib import closing, contextmanager, suppress
from fractions import Fraction
from pathlib import Path
from typing import Any, Final

from fedinfer_flower.errors import ConfigError, ReplayError
from fedinfer_flower.privacy.charge import Charge, rounded_up

__all__ = [
    "NOTHING",
    "BudgetFile",
    "Units",
    "add_to_account",
    "close_reservation",
    "damaged",
    "is_used",
    "parsed_units",
    "sum_of",
    "to_charge",
    "to_units",
    "total_of",
]

_APPLICATION_ID: Final = 0x46494247
_VERSION: Final = 1
_UNIT: Final = 10**18
_BUSY_S: Final = 30.0

_SCHEMA: Final = f"""
PRAGMA application_id = {_APPLICATION_ID};
PRAGMA user_version = {_VERSION};
CREATE TABLE file (id TEXT NOT NULL, sequence INTEGER NOT NULL, policy TEXT NOT NULL);
CREATE TABLE accounts (
    querier TEXT PRIMARY KEY, total TEXT NOT NULL, queries INTEGER NOT NULL
) WITHOUT ROWID;
CREATE TABLE reservations (
    querier TEXT NOT NULL, query_id TEXT NOT NULL,
    state TEXT NOT NULL CHECK (state IN ('open', 'committed', 'cancelled')),
    charge_querier TEXT NOT NULL, charge_global TEXT NOT NULL,
    PRIMARY KEY (querier, query_id)
) WITHOUT ROWID;
CREATE INDEX open_reservations ON reservations (querier) WHERE state = 'open';
"""

_MARKS: Final = {"application_id": _APPLICATION_ID, "user_version": _VERSION}

Units = dict[str, int]
"""The sums of a `Charge`, by name, in 10^-18; `n_rows` as it is."""


class BudgetFile:
    """One budget file as one process sees it, for all its threads.

    Parameters
    ----------
    path : Path

    Raises
    ------
    ConfigError
        If the file is missing or can be read by others; later, from a transaction, if it is
        damaged, not a budget, or replaced since this process first saw it.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._seen = ("", 0)
        if not path.exists():
            raise ConfigError(
                f"there is no budget file {path.name!r}",
                hint="restore it; a new one would forget everything that was spent",
            )
        if os.name == "posix" and path.stat().st_mode & 0o077:
            raise ConfigError(
                f"the budget file {path.name!r} can be read or changed by others",
                hint=f"chmod 600 {path.name}",
            )

    @staticmethod
    def create(path: Path, *, policy: str) -> None:
        """Make an empty budget at `path`, unless another process is faster.

        Made whole under another name and linked into place, so that an empty or half-made
        file at `path` is always damage and never a fresh start.
        """
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        draft = path.with_name(f".{path.name}.{os.getpid()}.{secrets.token_hex(4)}")
        os.close(os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600))
        try:
            with closing(sqlite3.connect(draft, isolation_level=None)) as db:
                db.executescript(_SCHEMA)
                db.execute("INSERT INTO file VALUES (?, 0, ?)", (secrets.token_hex(16), policy))
            with suppress(FileExistsError):
                os.link(draft, path)
        finally:
            draft.unlink()
        _sync_folder(path.parent)

    @contextmanager
    def transaction(self, *, write: bool = False) -> Iterator[sqlite3.Connection]:
        """Run one transaction: on disk when the block ends, undone if it raises.

        A connection for each: none is carried over a fork or shared by threads, and a file
        that was replaced is noticed.

        Raises
        ------
        ConfigError
            If the file cannot be used, or is not the one, or older, than seen before.
        """
        seen = self._seen
        try:
            with closing(_connect(self.path)) as db:
                db.execute("BEGIN IMMEDIATE" if write else "BEGIN")
                known = db.execute("SELECT id, sequence FROM file").fetchone()
                if known is None or not isinstance(known[1], int):
                    raise damaged(self.path)
                if seen[0] and (known[0] != seen[0] or known[1] < seen[1]):
                    raise ConfigError(
                        f"the budget file {self.path.name!r} was replaced, or set back to an"
                        " older state, while in use",
                        hint="put the newer file back, or restart the site if that is meant",
                    )
                yield db
                if write:
                    db.execute("UPDATE file SET sequence = sequence + 1")
                db.execute("COMMIT")
                self._seen = max(self._seen, (known[0], known[1] + write))
        except (sqlite3.Error, UnicodeDecodeError) as exc:
            raise _unusable(self.path, exc) from None


def _connect(path: Path) -> sqlite3.Connection:
    # Mode rw: a deleted file is an error, not a fresh start.
    uri = f"{path.absolute().as_uri()}?mode=rw"
    db = sqlite3.connect(uri, uri=True, isolation_level=None, timeout=_BUSY_S)
    try:
        # EXTRA also syncs the folder, without which a transaction that ended by deleting its
        # journal could be rolled back after a power failure.
        db.execute("PRAGMA synchronous = EXTRA")
        found = [db.execute(f"PRAGMA {name}").fetchone()[0] for name in _MARKS]
        if found != list(_MARKS.values()):
            raise damaged(path)
    except BaseException:
        db.close()
        raise
    return db


def _sync_folder(folder: Path) -> None:
    # Without it a power failure could forget that the file was ever made.
    if os.name == "posix":
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def sum_of(one: Units, other: Units) -> Units:
    """Add two totals, exactly."""
    return {name: value + other[name] for name, value in one.items()}


def to_units(charge: Charge) -> Units:
    """Return the sums of a charge in units, rounded up."""
    return {
        name: math.ceil(Fraction(value) * (1 if name == "n_rows" else _UNIT))
        for name, value in charge.to_dict().items()
    }


def to_charge(units: Units) -> Charge:
    """Return a total as a charge, rounded up."""
    sums: dict[str, Any] = {
        name: value if name == "n_rows" else rounded_up(Fraction(value, _UNIT))
        for name, value in units.items()
    }
    return Charge(**sums)


NOTHING: Final = to_units(Charge())


def parsed_units(text: str) -> Units:
    """Read units from JSON.

    Raises
    ------
    sqlite3.DatabaseError
        If they are none, as for any other damage of the file.
    """
    try:
        units = json.loads(text)
    except (TypeError, ValueError):
        units = None
    whole = isinstance(units, dict) and all(type(value) is int for value in units.values())
    if not whole or set(units) != set(NOTHING):
        raise sqlite3.DatabaseError("a charge that is none")
    return dict(units)


def is_used(db: sqlite3.Connection, querier: str, query_id: str) -> bool:
    """Return whether there is a reservation of that name, in any state."""
    found = db.execute(
        "SELECT 1 FROM reservations WHERE querier = ? AND query_id = ?", (querier, query_id)
    ).fetchone()
    return found is not None


def close_reservation(db: sqlite3.Connection, key: tuple[str, str], state: str) -> tuple[str, str]:
    """Take an open reservation (querier, query_id) to its last state; return its charges.

    Raises
    ------
    ReplayError
        If it is not open.
    """
    found = db.execute(
        "SELECT state, charge_querier, charge_global FROM reservations"
        " WHERE querier = ? AND query_id = ?",
        key,
    ).fetchone()
    if found is None or found[0] != "open":
        raise ReplayError(
            f"a reservation can become {state} once; this one is"
            f" {found[0] if found else 'not in the file'}",
            hint="its answer must not leave now",
        )
    db.execute(
        "UPDATE reservations SET state = ? WHERE querier = ? AND query_id = ?", (state, *key)
    )
    return found[1], found[2]


def total_of(db: sqlite3.Connection, account: str) -> Units:
    """Return the total of an account, which may not exist yet."""
    found = db.execute("SELECT total FROM accounts WHERE querier = ?", (account,)).fetchone()
    return NOTHING if found is None else parsed_units(found[0])


def add_to_account(db: sqlite3.Connection, account: str, units: Units, *, n_queries: int) -> None:
    """Add units, negative ones to take back, to an account."""
    total = json.dumps(sum_of(total_of(db, account), units))
    db.execute(
        "INSERT INTO accounts VALUES (?1, ?2, ?3) ON CONFLICT (querier)"
        " DO UPDATE SET total = ?2, queries = queries + ?3",
        (account, total, n_queries),
    )


def damaged(path: Path) -> ConfigError:
    """Return the error for a file whose content is not that of a budget."""
    return ConfigError(
        f"{path.name!r} is no budget file, or damaged",
        hint="restore it from a copy; a fresh file would forget everything that was spent",
    )


def _unusable(path: Path, exc: Exception) -> ConfigError:
    name = getattr(exc, "sqlite_errorname", "")
    if isinstance(exc, sqlite3.OperationalError) and name:
        return ConfigError(
            f"the budget file {path.name!r} cannot be used: {name}",
            hint="check that it exists, its disk has room, and this user may write there",
        )
    return damaged(path)
