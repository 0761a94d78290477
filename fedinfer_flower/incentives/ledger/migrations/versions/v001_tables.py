"""Entries, their postings, and what may be claimed once."""

from __future__ import annotations

from typing import Final

__all__ = ["downgrade", "upgrade"]

revision: Final = "001"
down_revision: Final = None
branch_labels: Final = None
depends_on: Final = None


def upgrade() -> None:
    """Make the tables."""
    import sqlalchemy as sa
    from alembic import op

    op.create_table(
        "ledger_entries",
        sa.Column("seq", sa.BigInteger, primary_key=True, autoincrement=False, nullable=False),
        sa.Column("at", sa.BigInteger, nullable=False),
        sa.Column("kind", sa.Text, nullable=False),
        sa.Column("key", sa.Text, nullable=False, unique=True),
        sa.Column("subject", sa.Text, nullable=False),
        sa.Column("memo", sa.Text, nullable=False),
        sa.Column("previous", sa.Text, nullable=False, unique=True),
        sa.Column("hash", sa.Text, nullable=False, unique=True),
    )
    op.create_index("ledger_entries_subject", "ledger_entries", ["subject", "seq"])
    entry = ["ledger_entries.seq"]
    op.create_table(
        "ledger_postings",
        sa.Column("seq", sa.BigInteger, nullable=False),
        sa.Column("account", sa.Text, nullable=False),
        sa.Column("amount", sa.BigInteger, nullable=False),
        sa.Column("balance", sa.BigInteger, nullable=False),
        sa.PrimaryKeyConstraint("seq", "account"),
        sa.ForeignKeyConstraint(["seq"], entry),
        sa.CheckConstraint("amount <> 0", name="ledger_amount_moves"),
        sa.CheckConstraint(
            "balance >= 0 OR account = 'external'", name="ledger_balance_not_negative"
        ),
    )
    op.create_index("ledger_postings_account", "ledger_postings", ["account", "seq"])
    op.create_table(
        "ledger_claims",
        sa.Column("claim", sa.Text, primary_key=True, nullable=False),
        sa.Column("seq", sa.BigInteger, nullable=False),
        sa.ForeignKeyConstraint(["seq"], entry),
    )
    op.create_index("ledger_claims_seq", "ledger_claims", ["seq"])


def downgrade() -> None:
    """Drop the tables, if nothing was ever written."""
    import sqlalchemy as sa
    from alembic import op

    from fedinfer_flower.errors import LedgerError

    if op.get_bind().execute(sa.text("SELECT 1 FROM ledger_entries LIMIT 1")).fetchall():
        raise LedgerError(
            "a ledger with entries is not taken back to nothing",
            hint="export it, and drop the database by hand if that is meant",
        )
    for table in ("ledger_claims", "ledger_postings", "ledger_entries"):
        op.drop_table(table)
