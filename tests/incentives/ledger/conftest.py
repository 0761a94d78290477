"""Ledgers on both databases, a clock that tests set, and jobs with real signatures."""

from __future__ import annotations

import sqlite3
from contextlib import closing
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path
from types import SimpleNamespace

import pytest

from fedinfer_flower.incentives.ledger import Escrow, Ledger, Payee
from fedinfer_flower.incentives.payments.base import Payout
from fedinfer_flower.receipts.batches import BatchRecord, CohortMember, Dropout
from fedinfer_flower.receipts.receipt import Receipt
from fedinfer_flower.receipts.statement import SiteStatement, cohort_digest
from fedinfer_flower.wire.identity import Identity

from .cluster import cluster, new_schema, why_not

NOW = 1_900_000_000
FEE = 1_000_000
NAMES = ("east", "north", "west")
SITES = {name: Identity.generate() for name in NAMES}
COORDINATOR = Identity.generate()
QUERIER_KEY = "ab" * 32


@dataclass
class Clock:
    """Seconds since 1970, as a test wants them."""

    now: float = NOW

    def __call__(self) -> float:
        return self.now


@dataclass
class Opened:
    """A ledger with what is needed to look at it from outside."""

    url: str
    clock: Clock = field(default_factory=Clock)

    def __post_init__(self) -> None:
        self.ledger = Ledger(self.url, clock=self.clock)

    @property
    def dialect(self) -> str:
        return self.url.partition(":")[0]

    def sql(self, *statements: str) -> list[tuple]:
        """Run statements as somebody who owns the database, past this package."""
        if self.dialect == "sqlite":
            path = self.url.removeprefix("sqlite:///")
            with closing(sqlite3.connect(path, isolation_level=None)) as db:
                return [row for s in statements for row in db.execute(s).fetchall()]
        import psycopg

        rows: list[tuple] = []
        with psycopg.connect(self.url, autocommit=True) as db:
            for statement in statements:
                found = db.execute(statement)
                rows += found.fetchall() if found.description else []
        return rows

    def unguard(self) -> None:
        """Drop every trigger, as an owner can."""
        if self.dialect == "sqlite":
            names = self.sql("SELECT name FROM sqlite_master WHERE type = 'trigger'")
            self.sql(*(f"DROP TRIGGER {name}" for (name,) in names))
        else:
            tables = ("ledger_entries", "ledger_postings", "ledger_claims")
            self.sql(*(f"ALTER TABLE {table} DISABLE TRIGGER ALL" for table in tables))


@pytest.fixture(scope="session")
def postgres():
    """Makes the URL of an empty ledger on a private PostgreSQL, time and again."""
    reason = why_not()
    if reason:
        pytest.skip(reason)
    with cluster() as socket:
        numbers = count()
        yield lambda: new_schema(socket, f"ledger{next(numbers)}")


@pytest.fixture
def sqlite_url(tmp_path: Path) -> str:
    return f"sqlite:///{tmp_path}/ledger.db"


@pytest.fixture(params=["sqlite", "postgresql"])
def url(request) -> str:
    """URL of an empty database of each kind."""
    if request.param == "sqlite":
        return request.getfixturevalue("sqlite_url")
    return request.getfixturevalue("postgres")()


@pytest.fixture
def opened(url: str) -> Opened:
    """A ledger on each kind of database, in which a clinic has ten credits."""
    made = Opened(url)
    made.ledger.migrate()
    made.ledger.deposit("clinic", 10 * FEE, key="first")
    return made


@pytest.fixture
def sqlite_opened(sqlite_url: str) -> Opened:
    """The same on SQLite alone."""
    made = Opened(sqlite_url)
    made.ledger.migrate()
    made.ledger.deposit("clinic", 10 * FEE, key="first")
    return made


def make_receipt(job="job", *, answered=(NAMES, NAMES), now=NOW, coordinator=COORDINATOR, **more):
    """Return the receipt of a job under `plain`: one batch for each tuple of sites."""
    keys = [site.key_id for site in SITES.values()]
    statements, batches = [], []
    for number, names in enumerate(answered):
        said = {
            "query_id": f"{job}-{number}",
            "run_id": 7,
            "querier_key_id": QUERIER_KEY,
            "query_sealed": True,
            "protection": "plain",
            "rule": "mean-probability",
            "n_rows": 4,
            "n_fresh_rows": 4,
            "n_sites_asked": len(keys),
            "cohort_digest": cohort_digest(keys),
            "min_cohort": 1,
            "profile_commitment": "cd" * 32,
            "payload_digest": f"{number:064x}",
            "issued_at": now - 60,
        }
        statements += [
            SiteStatement(**(said | {"site": n, "site_key_id": SITES[n].key_id} | more)).sign(
                SITES[n]
            )
            for n in names
        ]
        out = tuple(
            Dropout(site=n, status="failed", error_code="FI404") for n in NAMES if n not in names
        )
        batches.append(
            BatchRecord(query_id=f"{job}-{number}", n_rows=4, answered=tuple(names), dropped=out)
        )
    return Receipt.for_job(
        statements,
        cohort=[CohortMember(name=n, key_id=SITES[n].key_id) for n in NAMES],
        batches=batches,
        issued_at=now,
        coordinator=coordinator,
    )


def payees(*names):
    return [Payee(key_id=SITES[n].key_id, account=n) for n in names or NAMES]


def payout_of(*paid, refund=0):
    return Payout(paid=paid, refund=refund, fee=sum(paid) + refund)


SHARES = payout_of(500_000, 300_000, 100_000, refund=100_000)


@pytest.fixture
def escrow(opened: Opened) -> SimpleNamespace:
    """An escrow of one credit for a job of two batches, due in a minute."""
    service = Escrow(opened.ledger, coordinator_key_id=COORDINATOR.key_id)
    service.open(
        "job",
        "clinic",
        fee=FEE,
        deadline=NOW + 60,
        query_ids=["job-0", "job-1"],
        querier_key_id=QUERIER_KEY,
        arbiter="board",
    )
    return SimpleNamespace(service=service, ledger=opened.ledger, clock=opened.clock, opened=opened)
