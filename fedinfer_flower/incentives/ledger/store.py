"""The database under a ledger: SQLite in a file, or PostgreSQL; one writer at a time.

A connection a transaction: none is carried over a fork or shared by threads. Whatever
happens inside a transaction happens whole or not at all, also when the process is killed.
"""

from __future__ import annotations

import os
import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from fedinfer_flower.errors import (
    ConfigError,
    FedInferError,
    InvalidValueError,
    LedgerError,
    MissingExtraError,
)

if TYPE_CHECKING:
    from sqlalchemy import URL, Connection, Engine
    from sqlalchemy.exc import DBAPIError

__all__ = ["POSTGRES", "SQLITE", "Store"]

SQLITE: Final = "sqlite"
POSTGRES: Final = "postgresql"

_WAIT_S: Final = 30
_CONNECT_S: Final = 10
_WRITER_LOCK: Final = 0x46494C45  # any constant: writers of a database agree on it


class Store:
    """Transactions on one database.

    Parameters
    ----------
    url : str
        ``sqlite:///PATH``, or ``postgresql://...``.

    Raises
    ------
    InvalidValueError
        For another kind of URL. The text never repeats it: it may hold a password.
    MissingExtraError
        For PostgreSQL without the extra ``postgres``.
    """

    def __init__(self, url: str) -> None:
        from sqlalchemy import create_engine, event, make_url
        from sqlalchemy.exc import ArgumentError, NoSuchModuleError
        from sqlalchemy.pool import NullPool

        try:
            parsed = make_url(url)
            self.dialect = parsed.get_backend_name()
        except (ArgumentError, NoSuchModuleError):
            raise _bad_url() from None
        self.path: Path | None = None
        options: dict[str, Any] = {"poolclass": NullPool, "hide_parameters": True}
        if self.dialect == SQLITE:
            self.path = _sqlite_path(parsed)
            options["creator"] = self._connect_sqlite
            parsed = make_url("sqlite://")
        elif self.dialect == POSTGRES:
            parsed = parsed.set(drivername="postgresql+psycopg")
            options["connect_args"] = {"connect_timeout": _CONNECT_S}
            # Otherwise every new connection asks the server for a type that is not used here.
            options["use_native_hstore"] = False
        else:
            raise _bad_url()
        try:
            self.engine: Engine = create_engine(parsed, **options)
        except ImportError:
            raise MissingExtraError(
                "psycopg is not installed", hint="pip install 'fedinfer-flower[postgres]'"
            ) from None
        event.listen(self.engine, "begin", self._begin)

    @contextmanager
    def transaction(self, *, write: bool = False) -> Iterator[Connection]:
        """Run one transaction: on disk when the block ends, undone if it raises.

        Writers wait for each other, readers see the book as it was at one moment.

        Raises
        ------
        LedgerError
            If the database refuses a row: a key or claim that is used, an edit.
        ConfigError
            If the database cannot be used.
        """
        from sqlalchemy.exc import DBAPIError, SQLAlchemyError

        try:
            with self.engine.connect() as plain:
                connection = plain.execution_options(ledger_write=write)
                with connection.begin():
                    yield connection
        except FedInferError:
            raise
        except DBAPIError as exc:
            raise self._typed(exc) from None
        except SQLAlchemyError as exc:
            raise ConfigError(f"the ledger cannot be used: {type(exc).__name__}") from None

    def create_file(self) -> None:
        """Make an empty file for its owner alone, where SQLite has none yet."""
        if self.path is None or self.path.exists():
            return
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
            os.close(os.open(self.path, os.O_WRONLY | os.O_CREAT, 0o600))
        except OSError as exc:
            raise ConfigError(
                f"the ledger {self.path.name!r} cannot be made: {type(exc).__name__}"
            ) from None

    def _connect_sqlite(self) -> sqlite3.Connection:
        assert self.path is not None  # noqa: S101 - for the type checker: SQLite has a path
        # Mode rw: a deleted file is an error, not a fresh book.
        uri = f"{self.path.absolute().as_uri()}?mode=rw"
        db = sqlite3.connect(uri, uri=True, isolation_level=None, timeout=_WAIT_S)
        # Bytes that are no text are read, so that the row that holds them can be named.
        db.text_factory = lambda raw: raw.decode("utf-8", "surrogateescape")
        # EXTRA also syncs the folder: a committed entry outlives a power failure.
        for pragma in ("synchronous = EXTRA", "foreign_keys = ON", "trusted_schema = OFF"):
            db.execute(f"PRAGMA {pragma}")
        return db

    def _begin(self, connection: Connection) -> None:
        write = connection.get_execution_options().get("ledger_write", False)
        if self.dialect == SQLITE:
            connection.exec_driver_sql("BEGIN IMMEDIATE" if write else "BEGIN")
        elif write:
            # Each statement after the lock sees all that was committed before it was held.
            connection.exec_driver_sql(f"SET LOCAL lock_timeout = '{_WAIT_S}s'")
            connection.exec_driver_sql(f"SELECT pg_advisory_xact_lock({_WRITER_LOCK})")
        else:
            connection.exec_driver_sql("SET TRANSACTION ISOLATION LEVEL REPEATABLE READ READ ONLY")

    def _typed(self, exc: DBAPIError) -> FedInferError:
        from sqlalchemy.exc import IntegrityError

        # Neither statement nor parameters nor the server's words: they may quote an account.
        original = exc.orig
        reason = getattr(original, "sqlite_errorname", "") or type(original).__name__
        if isinstance(exc, IntegrityError):
            return LedgerError(
                f"the database refuses the row ({reason}): what it says was said before, or it"
                " edits what was written",
                hint="verify the ledger",
            )
        return ConfigError(
            f"the ledger cannot be used: {reason}",
            hint="check that the database exists, has room, and lets this user write",
        )


def _sqlite_path(url: URL) -> Path:
    if not url.database or url.database == ":memory:" or url.database.startswith("file:"):
        raise InvalidValueError(
            "a ledger in SQLite is a file", hint="write the URL as sqlite:///PATH"
        )
    return Path(url.database)


def _bad_url() -> InvalidValueError:
    return InvalidValueError(
        "a ledger's URL is sqlite:///PATH or postgresql://...", hint="check the URL"
    )
