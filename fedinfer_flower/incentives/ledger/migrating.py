"""Run the migrations that the package carries; no file of settings is needed."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Final

from fedinfer_flower.errors import ConfigError, LedgerError

if TYPE_CHECKING:
    from alembic.config import Config
    from sqlalchemy import Connection

    from fedinfer_flower.incentives.ledger.book import Book

__all__ = ["NEWEST", "migrate_to", "missing_triggers", "require_newest", "revision_of"]

NEWEST: Final = "002"
"""Revision that this release works with."""

_FOLDER: Final = Path(__file__).parent / "migrations"
_VERSION_TABLE: Final = "fedinfer_ledger_version"


def revision_of(connection: Connection) -> str:
    """Return the revision of a database's tables; empty if there are none."""
    from sqlalchemy import inspect, text

    if not inspect(connection).has_table(_VERSION_TABLE):
        return ""
    found = connection.execute(text(f"SELECT version_num FROM {_VERSION_TABLE}")).fetchall()  # noqa: S608
    return str(found[0][0]) if found else ""


def require_newest(connection: Connection) -> None:
    """Require tables as this release makes them.

    Raises
    ------
    LedgerError
        If there are none, or older or newer ones.
    """
    revision = revision_of(connection)
    if revision == NEWEST:
        return
    if revision > NEWEST:
        raise LedgerError(
            f"the ledger is of revision {revision}, which a newer release made",
            hint="install that release of fedinfer-flower",
        )
    what = f"the ledger is of revision {revision}" if revision else "there is no ledger there yet"
    raise LedgerError(what, hint="call Ledger(...).migrate() once")


def migrate_to(connection: Connection, revision: str = NEWEST) -> None:
    """Take the tables to a revision, forwards or back, inside an open transaction.

    Raises
    ------
    LedgerError
        If that would delete entries.
    ConfigError
        If a newer release made the tables.
    """
    from alembic import command
    from alembic.util import CommandError

    now = revision_of(connection)
    config = _config(connection)
    try:
        if revision in ("", "base") or (now and revision < now):
            command.downgrade(config, revision or "base")
        else:
            command.upgrade(config, revision)
    except CommandError:
        raise ConfigError(
            "the ledger's tables are of a revision that this release does not know",
            hint="install the release that made them",
        ) from None


def _config(connection: Connection) -> Config:
    from alembic.config import Config

    config = Config()
    # Config reads % as the start of a name.
    config.set_main_option("script_location", str(_FOLDER).replace("%", "%%"))
    config.set_main_option("path_separator", "os")
    config.attributes["connection"] = connection
    return config


def missing_triggers(book: Book) -> tuple[str, ...]:
    """Return the names of triggers that the tables should have and have not, or disabled."""
    from fedinfer_flower.incentives.ledger.migrations.versions.v002_append_only import (
        trigger_names,
    )

    if book.dialect == "sqlite":
        sql = "SELECT name FROM sqlite_master WHERE type = 'trigger'"
    else:
        # Only those of the tables that this connection would write to, and not switched off.
        sql = (
            "SELECT tgname AS name FROM pg_trigger WHERE tgenabled IN ('O', 'A')"
            " AND tgrelid IN (to_regclass('ledger_entries'), to_regclass('ledger_postings'),"
            " to_regclass('ledger_claims'))"
        )
    there = {str(row.name) for row in book.rows(sql)}
    return tuple(name for name in trigger_names(book.dialect) if name not in there)
