"""Triggers that refuse to change or delete what was written."""

# ruff: noqa: S608 - statements are put together from constants
from __future__ import annotations

from collections.abc import Iterator
from typing import Final

__all__ = ["TABLES", "downgrade", "trigger_names", "upgrade"]

revision: Final = "002"
down_revision: Final = "001"
branch_labels: Final = None
depends_on: Final = None

TABLES: Final = ("ledger_entries", "ledger_postings", "ledger_claims")

_LAST: Final = "(SELECT COALESCE(MAX(seq), 0) FROM ledger_entries)"
_ENTRY_FITS: Final = f"NEW.seq = {_LAST} + 1"
_PART_FITS: Final = f"NEW.seq = {_LAST}"
# SQLite deletes what an INSERT OR REPLACE collides with, and fires no trigger for that.
_COLLIDES: Final = {
    "ledger_entries": "seq = NEW.seq OR key = NEW.key OR previous = NEW.previous"
    " OR hash = NEW.hash",
    "ledger_postings": "seq = NEW.seq AND account = NEW.account",
    "ledger_claims": "claim = NEW.claim",
}


def trigger_names(dialect: str) -> tuple[str, ...]:
    """Return the names of all triggers of a dialect."""
    events = ("insert", "update", "delete", *(("truncate",) if dialect == "postgresql" else ()))
    return tuple(f"{table}_{event}" for table in TABLES for event in events)


def _sqlite() -> Iterator[str]:
    refuse = "SELECT RAISE(ABORT, 'the ledger is append-only')"
    for table in TABLES:
        for event in ("update", "delete"):
            yield (
                f"CREATE TRIGGER {table}_{event} BEFORE {event.upper()} ON {table}"
                f" BEGIN {refuse}; END"
            )
        fits = _ENTRY_FITS if table == "ledger_entries" else _PART_FITS
        yield (
            f"CREATE TRIGGER {table}_insert BEFORE INSERT ON {table} WHEN NOT ({fits})"
            f" OR EXISTS (SELECT 1 FROM {table} WHERE {_COLLIDES[table]}) BEGIN {refuse}; END"
        )


def _postgresql() -> Iterator[str]:
    refuse = (
        "RAISE EXCEPTION 'the ledger is append-only'"
        " USING ERRCODE = 'integrity_constraint_violation'"
    )
    yield (
        "CREATE FUNCTION fedinfer_ledger_refuse() RETURNS trigger LANGUAGE plpgsql AS"
        f" $$ BEGIN {refuse}; END $$"
    )
    for table in TABLES:
        for event in ("update", "delete", "truncate"):
            yield (
                f"CREATE TRIGGER {table}_{event} BEFORE {event.upper()} ON {table}"
                " FOR EACH STATEMENT EXECUTE FUNCTION fedinfer_ledger_refuse()"
            )
        fits = "newest + 1" if table == "ledger_entries" else "newest"
        # With the schema by name: a writer's temporary table of the same name counts for
        # nothing.
        yield (
            f"CREATE FUNCTION fedinfer_{table}_last() RETURNS trigger LANGUAGE plpgsql AS"
            " $$ DECLARE newest bigint; BEGIN EXECUTE format('SELECT COALESCE(MAX(seq), 0)"
            " FROM %I.ledger_entries', TG_TABLE_SCHEMA) INTO newest;"
            f" IF NEW.seq <> {fits} THEN {refuse}; END IF; RETURN NEW; END $$"
        )
        yield (
            f"CREATE TRIGGER {table}_insert BEFORE INSERT ON {table}"
            f" FOR EACH ROW EXECUTE FUNCTION fedinfer_{table}_last()"
        )


def upgrade() -> None:
    """Make the triggers."""
    from alembic import op

    dialect = op.get_bind().dialect.name
    for statement in _sqlite() if dialect == "sqlite" else _postgresql():
        op.execute(statement)


def downgrade() -> None:
    """Drop the triggers; every entry stays."""
    from alembic import op

    dialect = op.get_bind().dialect.name
    for name in trigger_names(dialect):
        table = name.rpartition("_")[0]
        op.execute(f"DROP TRIGGER {name}" + ("" if dialect == "sqlite" else f" ON {table}"))
    if dialect != "sqlite":
        op.execute("DROP FUNCTION fedinfer_ledger_refuse()")
        for table in TABLES:
            op.execute(f"DROP FUNCTION fedinfer_{table}_last()")
