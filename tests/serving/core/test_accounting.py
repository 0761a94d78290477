"""Money: set aside, moved on or back, each once, whenever the process dies."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedinfer_flower.errors import LedgerError, QuotaExceededError, UnavailableError
from fedinfer_flower.incentives.ledger.ledger import Ledger
from fedinfer_flower.serving.accounting import HELD, Accounts, Money, account_of_site
from fedinfer_flower.serving.jobs import JobState
from fedinfer_flower.serving.outbox import Outbox

CREDIT = 1_000_000
PRICES = (0.5, 0.25, 0.0)


class Killed(Exception):
    """The process is dead from here on: nothing more reaches the disk."""


@pytest.fixture
def url(tmp_path) -> str:
    url = f"sqlite:///{tmp_path}/ledger.db"
    ledger = Ledger(url)
    ledger.migrate()
    ledger.deposit("key:alice", 100 * CREDIT, key="invoice")
    return url


def books(url: str) -> tuple[int, int, int]:
    """Return micro-credits of (the caller, all sites, on hold) after checking the ledger."""
    ledger = Ledger(url)
    assert ledger.verify().ok
    balances = ledger.balances()
    sites = sum(v for name, v in balances.items() if name.startswith("site:"))
    return balances["key:alice"], sites, balances.get(HELD, 0)


@pytest.mark.parametrize("price", [None, 2.0], ids=["sites-prices", "own-price"])
def test_answered_job_is_charged_and_paid_once(bed, rows, url, price):
    tables = {"models": {"m": {} if price is None else {"price": price}}}
    core = bed.core(bed.sites(prices=PRICES), gateway={"ledger": url}, **tables)

    job = bed.ended(core, core.submit(bed.request(rows)))

    fee = round((0.75 if price is None else price) * len(rows) * CREDIT)
    assert job.state is JobState.DONE, job.error
    assert job.provenance["credits"] == fee / CREDIT
    bed.until(lambda: books(url) == (100 * CREDIT - fee, fee, 0))
    shown = {r["site"]: r["credits"] for r in core.status()["rewards"]}
    if price is None:
        assert shown["site-0"] == pytest.approx(2 * shown["site-1"])
        assert "site-2" not in shown
    else:
        assert list(shown.values()) == pytest.approx([price * len(rows) / 3] * 3, abs=1e-5)


def test_sites_without_prices_share_the_operator_s_price_evenly(bed, rows, url):
    core = bed.core(bed.sites(), gateway={"ledger": url}, models={"m": {"price": 3.0}})
    bed.ended(core, core.submit(bed.request(rows)))
    bed.until(lambda: books(url)[2] == 0)
    assert {r["credits"] for r in core.status()["rewards"]} == {5.0}


def test_failed_and_cancelled_jobs_cost_nothing(bed, rows, url):
    sites = bed.sites(prices=PRICES)
    core = bed.core(sites, gateway={"ledger": url}, models={"m": {"quorum": 3}})
    sites.instead = sites.hang
    failed = core.submit(bed.request(rows, timeout_s=0.4))
    cancelled = core.submit(bed.request(rows, timeout_s=20.0))
    core.cancel(cancelled.job_id, owner="alice")

    assert bed.ended(core, failed).state is JobState.FAILED

    bed.until(lambda: books(url) == (100 * CREDIT, 0, 0))


def test_caller_without_cover_is_refused_and_leaves_nothing_behind(bed, rows, url):
    core = bed.core(bed.sites(), gateway={"ledger": url}, models={"m": {"price": 1000.0}})
    for _ in range(2):  # the idempotency key is free again
        with pytest.raises(QuotaExceededError, match="does not cover"):
            core.submit(bed.request(rows, key="k"))
    assert books(url) == (100 * CREDIT, 0, 0)
    assert core.drain(0.1)


def test_without_sites_there_is_no_price_and_nothing_is_for_free(bed, rows, url):
    core = bed.core(bed.sites(), gateway={"ledger": url}, start=False)
    with pytest.raises(UnavailableError, match="price"):
        core.submit(bed.request(rows))
    assert core.drain(0.1)


STEPS = (
    (Outbox, "add"),
    (Accounts, "reserve"),
    (Outbox, "set_money"),
    (Outbox, "mark_asking"),
    (Outbox, "end"),
    (Accounts, "post"),
)


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("dies_at", range(1, 8))
def test_killed_anywhere_nothing_is_charged_or_paid_twice(
    bed, rows, url, monkeypatch, dies_at, when
):
    sites = bed.sites(prices=PRICES)
    count, dead = [0], [False]

    def dying(step):
        def act(*args, **kwargs):
            if dead[0]:
                raise Killed
            count[0] += 1
            dead[0] = count[0] == dies_at
            if dead[0] and when == "before":
                raise Killed
            result = step(*args, **kwargs)
            if dead[0]:
                raise Killed
            return result

        return act

    core = bed.core(sites, gateway={"ledger": url})
    with monkeypatch.context() as patched:
        for owner, name in STEPS:
            patched.setattr(owner, name, dying(getattr(owner, name)))
        job = None
        try:
            job = core.submit(bed.request(rows, key="k"))
        except Killed:
            assert dies_at <= 3
        bed.until(lambda: dead[0])
        core.close()
    assert count[0] == dies_at

    second = bed.core(sites, gateway={"ledger": url})
    job = second.submit(bed.request(rows, key="k")) if job is None else job
    ended = bed.ended(second, job)

    fee = round(0.75 * len(rows) * CREDIT)
    if ended.state is JobState.DONE:
        bed.until(lambda: books(url) == (100 * CREDIT - fee, fee, 0))
    else:  # the caller was never told that it had been accepted
        assert dies_at <= 3
        assert ended.error["code"] == "FI417"
        bed.until(lambda: books(url) == (100 * CREDIT, 0, 0))


def test_ledger_that_is_away_at_the_end_is_posted_to_later(bed, rows, url, monkeypatch):
    core = bed.core(bed.sites(prices=PRICES), gateway={"ledger": url})

    def away(self, money):
        raise LedgerError("the database is away")

    with monkeypatch.context() as patched:
        patched.setattr(Accounts, "post", away)
        job = bed.ended(core, core.submit(bed.request(rows)))
        bed.until(lambda: any(e["code"] == "FI412" for e in core.status()["errors"]))
    assert job.state is JobState.DONE
    assert books(url)[2] > 0

    core._tidy()

    assert books(url)[2] == 0


@given(
    fee=st.integers(1, 10**12),
    earned=st.dictionaries(
        st.sampled_from(["aa" * 32, "bb" * 32, "cc" * 32]), st.floats(0.0, 1e5), max_size=3
    ),
    priced=st.booleans(),
)
def test_never_more_is_paid_than_was_taken(fee, earned, priced):
    money = Money(job_id="j", account="key:a", fee=fee, priced=priced).settled(earned)
    assert 0 <= money.cost <= fee
    assert all(amount > 0 for amount in money.paid.values())
    assert set(money.paid) <= {account_of_site(key_id) for key_id in earned}
    if priced and earned:
        assert money.cost == fee
    assert Money.from_json(money.to_json()) == money
