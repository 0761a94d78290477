"""A small job with real keys: five batches of nothing but what receipts need."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from fedinfer_flower.privacy.accountant import Accountant
from fedinfer_flower.privacy.charge import Charge
from fedinfer_flower.receipts.batches import BatchRecord, CohortMember, Dropout
from fedinfer_flower.receipts.receipt import Receipt
from fedinfer_flower.receipts.statement import SiteStatement, cohort_digest
from fedinfer_flower.wire.identity import Identity

NOW = 1_900_000_000
DELTA = 1e-5
NAMES = ("east", "north", "west")


def make_statement(identity, *, site, keys, number=0, job="job", charge=None, **changes):
    """Return an honest statement under `dp`, or with `changes`."""
    charge = Charge.gaussian(0.2, 4) if charge is None else charge
    values = {
        "query_id": f"{job}-{number}",
        "run_id": 7,
        "site": site,
        "site_key_id": identity.key_id,
        "querier_key_id": "ab" * 32,
        "session_key_id": "12" * 32,
        "query_sealed": True,
        "protection": "dp",
        "protection_options": {"mechanism": "gaussian", "epsilon": 1.0, "delta": DELTA},
        "rule": "mean-probability",
        "rule_options": {"floor": 0.5},
        "n_rows": 4,
        "n_fresh_rows": charge.n_rows,
        "n_sites_asked": len(keys),
        "cohort_digest": cohort_digest(keys),
        "min_cohort": 2,
        "epsilon": Accountant(composition="gaussian").epsilon(charge, DELTA),
        "delta": DELTA,
        "charge": charge,
        "profile_commitment": "cd" * 32,
        "model_digest": "ef" * 32,
        "record_epsilon": 8.0,
        "record_delta": 1e-6,
        "payload_digest": f"{number:064x}",
        "issued_at": NOW - 60,
    }
    return SiteStatement(**(values | changes))


def make_job(*, job="job", n_batches=2, dropped=True, **changes):
    """Return everything of a job of three sites, of which one drops out of batch 1."""
    sites = {name: Identity.generate() for name in NAMES}
    keys = [identity.key_id for identity in sites.values()]
    statements, batches = [], []
    for number in range(n_batches):
        out = ("west",) if dropped and number == 1 else ()
        answered = tuple(name for name in NAMES if name not in out)
        statements += [
            make_statement(sites[name], site=name, keys=keys, number=number, job=job, **changes)
            for name in answered
        ]
        batches.append(
            BatchRecord(
                query_id=f"{job}-{number}",
                n_rows=4,
                answered=answered,
                dropped=tuple(Dropout(site=s, status="failed", error_code="FI404") for s in out),
            )
        )
    return SimpleNamespace(
        sites=sites,
        pins={name: identity.key_id for name, identity in sites.items()},
        queriers={"registry": "ab" * 32},
        cohort=tuple(CohortMember(name=n, key_id=i.key_id) for n, i in sites.items()),
        batches=tuple(batches),
        statements=tuple(s.sign(sites[s.site]) for s in statements),
        coordinator=Identity.generate(),
    )


def receipt_of(job, *, signed=True, **changes):
    """Return the receipt of a job from `make_job`."""
    values = {
        "statements": job.statements,
        "cohort": job.cohort,
        "batches": job.batches,
        "issued_at": NOW,
        "coordinator": job.coordinator if signed else None,
    }
    return Receipt.for_job(**(values | changes))


@pytest.fixture(scope="session")
def job():
    return make_job()
