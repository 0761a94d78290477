"""What Alembic runs: the revisions, in the transaction that `migrating` has opened."""

from __future__ import annotations

__all__: list[str] = []


def _run() -> None:
    from alembic import context

    context.configure(
        connection=context.config.attributes["connection"],
        # A name of its own: the database may be one that other programs migrate as well.
        version_table="fedinfer_ledger_version",
    )
    context.run_migrations()


# Alembic loads this file under a name of its own; imported as a module it does nothing.
if not __name__.startswith("fedinfer_flower"):
    _run()
