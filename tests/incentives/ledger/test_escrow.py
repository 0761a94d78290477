"""A fee in escrow: paid once against a receipt, or given back once, never both."""

from __future__ import annotations

import hashlib

import pytest

from fedinfer_flower.errors import (
    InvalidValueError,
    LedgerError,
    ReceiptError,
    SignatureError,
    UntrustedKeyError,
)
from fedinfer_flower.incentives.ledger import Escrow, Ledger, Outcome, Payee, Stakes, Status
from fedinfer_flower.wire.identity import Identity

from .conftest import (
    COORDINATOR,
    FEE,
    NAMES,
    NOW,
    QUERIER_KEY,
    SHARES,
    SITES,
    make_receipt,
    payees,
    payout_of,
)


def release(escrow, receipt=None, payout=SHARES, to=None):
    return escrow.service.release("job", payout, receipt or make_receipt(), payees=to or payees())


def status(escrow) -> Status:
    return escrow.service.state("job").status


def test_release_pays_each_site_and_gives_the_rest_back(escrow) -> None:
    receipt = make_receipt()
    entry = release(escrow, receipt)
    assert escrow.ledger.balances() == {
        "clinic": 9 * FEE + 100_000,
        "east": 500_000,
        "escrow:job": 0,
        "external": -10 * FEE,
        "north": 300_000,
        "west": 100_000,
    }
    assert entry.draft.memo["receipt_digest"] == hashlib.sha256(receipt.to_bytes()).hexdigest()
    assert status(escrow) is Status.RELEASED
    assert escrow.ledger.verify().ok


def test_release_again_changes_nothing_and_another_one_is_refused(escrow) -> None:
    receipt = make_receipt()
    first = release(escrow, receipt)
    assert release(escrow, receipt) == first
    with pytest.raises(LedgerError):
        release(escrow, receipt, payout_of(FEE, 0, 0))
    assert escrow.ledger.balance("east") == 500_000


def test_refund_is_for_after_the_deadline_and_ends_it(escrow) -> None:
    with pytest.raises(LedgerError, match="can be refunded from"):
        escrow.service.refund("job")
    escrow.clock.now = NOW + 60
    first = escrow.service.refund("job")
    assert escrow.service.refund("job") == first
    assert escrow.ledger.balance("clinic") == 10 * FEE
    with pytest.raises(LedgerError, match="refunded already"):
        release(escrow)
    assert escrow.ledger.verify().ok


def test_released_fee_is_not_refunded(escrow) -> None:
    release(escrow)
    escrow.clock.now = NOW + 60
    with pytest.raises(LedgerError, match="released already"):
        escrow.service.refund("job")
    with pytest.raises(LedgerError, match="released already"):
        escrow.service.dispute("job", reason_code="too-late", by="clinic")


def test_open_again_changes_nothing_and_another_escrow_is_refused(escrow) -> None:
    same = {
        "fee": FEE,
        "deadline": NOW + 60,
        "query_ids": ["job-1", "job-0"],
        "querier_key_id": QUERIER_KEY,
        "arbiter": "board",
    }
    escrow.service.open("job", "clinic", **same)
    assert escrow.ledger.balance("escrow:job") == FEE
    for change in ({"fee": 2}, {"query_ids": ["job-0"]}, {"arbiter": ""}, {"deadline": 0}):
        with pytest.raises(LedgerError, match="another entry"):
            escrow.service.open("job", "clinic", **(same | change))


def test_escrow_needs_money(escrow) -> None:
    with pytest.raises(LedgerError, match="holds"):
        escrow.service.open("poor", "north", fee=1, deadline=NOW, query_ids=["poor-0"])
    assert escrow.service.state("poor") is None


@pytest.mark.parametrize(
    "change",
    [
        {"job_id": "a job"},
        {"query_ids": []},
        {"query_ids": ["other-0"]},
        {"query_ids": ["new"]},
        {"query_ids": ["new-0", "new-0"]},
        {"fee": 0},
        {"fee": 0.5},
        {"deadline": -1},
        {"deadline": 1.5},
        {"querier": "external"},
        {"querier": "escrow:job"},
        {"arbiter": "stake:a"},
        {"querier_key_id": "ab"},
    ],
)
def test_escrow_of_wrong_values_is_refused(escrow, change: dict) -> None:
    values = {
        "job_id": "new",
        "querier": "clinic",
        "fee": 1,
        "deadline": NOW,
        "query_ids": ["new-0"],
    } | change
    with pytest.raises(InvalidValueError):
        escrow.service.open(values.pop("job_id"), values.pop("querier"), **values)


# -- receipts that must not be paid ------------------------------------------------------


@pytest.mark.parametrize(
    ("receipt", "error"),
    [
        (lambda: make_receipt(coordinator=None), UntrustedKeyError),
        (lambda: make_receipt(coordinator=Identity.generate()), UntrustedKeyError),
        (lambda: make_receipt(now=NOW + 7_000), ReceiptError),
        (lambda: make_receipt("other"), LedgerError),
        (lambda: make_receipt(querier_key_id="cd" * 32), LedgerError),
        (lambda: make_receipt(answered=(NAMES,) * 3), LedgerError),
    ],
    ids=["unsigned", "other coordinator", "from the future", "other job", "other querier", "batch"],
)
def test_receipt_that_does_not_fit_pays_nobody(escrow, receipt, error) -> None:
    with pytest.raises(error):
        release(escrow, receipt())
    assert escrow.ledger.balance("escrow:job") == FEE
    assert status(escrow) is Status.OPEN


def test_altered_receipt_pays_nobody(escrow) -> None:
    import dataclasses

    receipt = make_receipt()
    signed = dataclasses.replace(receipt.statements[0], signature=bytes(64))
    for altered in (
        dataclasses.replace(receipt, statements=(signed, *receipt.statements[1:])),
        dataclasses.replace(receipt, issued_at=NOW - 1),
    ):
        with pytest.raises(SignatureError):
            release(escrow, altered)
    assert escrow.ledger.balance("escrow:job") == FEE


def test_site_of_another_key_than_pinned_pays_nobody(escrow) -> None:
    pins = {name: site.key_id for name, site in SITES.items()}
    pinned = Escrow(escrow.ledger, coordinator_key_id=COORDINATOR.key_id, site_pins=pins)
    wrong = Escrow(
        escrow.ledger,
        coordinator_key_id=COORDINATOR.key_id,
        site_pins=pins | {"east": "0" * 64},
    )
    with pytest.raises(UntrustedKeyError):
        wrong.release("job", SHARES, make_receipt(), payees=payees())
    pinned.release("job", SHARES, make_receipt(), payees=payees())


def test_site_that_did_not_answer_is_not_paid(escrow) -> None:
    receipt = make_receipt(answered=(("east", "north"), ("east", "north")))
    with pytest.raises(LedgerError, match="signed no answer"):
        release(escrow, receipt)
    release(escrow, receipt, payout_of(600_000, 400_000, 0))
    assert escrow.ledger.balance("west") == 0


def test_site_whose_answer_was_late_is_not_paid_for_its_statement(escrow) -> None:
    import dataclasses

    full = make_receipt(answered=(NAMES,))
    missing = make_receipt(answered=(("east", "north"),))
    # Its statement arrived; the coordinator lists it as dropped.
    late = dataclasses.replace(
        missing,
        statements=full.statements,
        totals=full.totals,
        coordinator=None,
        signature=b"",
    ).signed_by(COORDINATOR)
    with pytest.raises(LedgerError, match="signed no answer"):
        release(escrow, late)


def test_stranger_is_neither_paid_nor_charged(escrow) -> None:
    stranger = Payee(key_id="0" * 64, account="eve")
    to = [*payees("east", "north"), stranger]
    with pytest.raises(LedgerError, match="signed no answer"):
        release(escrow, to=to)
    Stakes(escrow.ledger).lock("clinic", 1_000_000, key="s", until=NOW)
    victim = Payee(key_id="0" * 64, account="clinic")
    with pytest.raises(LedgerError, match="was not asked"):
        release(escrow, payout=payout_of(FEE + 5, -5), to=[*payees("east"), victim])


@pytest.mark.parametrize(
    ("payout", "to"),
    [
        (payout_of(500_000, 300_000, 100_001, refund=100_000), payees()),
        (payout_of(500_000, 300_000, 100_000), payees()),
        (payout_of(FEE, 100, 100, refund=-200), payees()),
        (payout_of(FEE), payees()),
        (payout_of(500_000, 500_000), payees("east", "east")),
    ],
    ids=["more than the fee", "less than the fee", "deficit", "one amount", "twice"],
)
def test_payout_that_is_not_of_this_fee_is_refused(escrow, payout, to) -> None:
    with pytest.raises(LedgerError):
        release(escrow, payout=payout, to=to)
    assert escrow.ledger.balance("escrow:job") == FEE


def test_sites_of_one_owner_share_an_account(escrow) -> None:
    to = [Payee(key_id=SITES[n].key_id, account="owner") for n in NAMES]
    release(escrow, to=to)
    assert escrow.ledger.balance("owner") == 900_000


def test_site_is_charged_from_its_stake(escrow) -> None:
    escrow.ledger.deposit("west", 200_000, key="w")
    Stakes(escrow.ledger).lock("west", 200_000, key="s", until=NOW)
    with pytest.raises(LedgerError, match="holds 200000"):
        release(escrow, payout=payout_of(FEE, 300_000, -300_000))
    release(escrow, payout=payout_of(800_000, 350_000, -150_000))
    assert escrow.ledger.balance("stake:west") == 50_000
    assert escrow.ledger.verify().ok


# -- disputes ----------------------------------------------------------------------------


def dispute(escrow, by="clinic"):
    return escrow.service.dispute("job", reason_code="wrong-score", by=by)


def test_dispute_holds_the_fee(escrow) -> None:
    assert dispute(escrow) == dispute(escrow)
    escrow.clock.now = NOW + 60
    for act in (lambda: release(escrow), lambda: escrow.service.refund("job")):
        with pytest.raises(LedgerError, match="disputed"):
            act()
    assert status(escrow) is Status.DISPUTED
    dispute(escrow, by="east")
    assert escrow.ledger.verify().ok


def test_dispute_resolved_for_the_sites(escrow) -> None:
    dispute(escrow)
    escrow.clock.now = NOW + 90
    escrow.service.resolve("job", by="board", outcome=Outcome.RELEASE, deadline=NOW + 200)
    with pytest.raises(LedgerError, match="can be refunded from"):
        escrow.service.refund("job")
    with pytest.raises(LedgerError, match="was resolved"):
        dispute(escrow, by="east")
    release(escrow)
    assert escrow.ledger.verify().ok


def test_dispute_resolved_for_the_querier(escrow) -> None:
    dispute(escrow)
    escrow.service.resolve("job", by="board", outcome=Outcome.REFUND)
    with pytest.raises(LedgerError, match="for the querier"):
        release(escrow)
    escrow.service.refund("job")
    assert escrow.ledger.balance("clinic") == 10 * FEE
    assert escrow.ledger.verify().ok


def test_only_the_arbiter_resolves_and_only_what_is_disputed(escrow) -> None:
    with pytest.raises(LedgerError, match="not disputed"):
        escrow.service.resolve("job", by="board", outcome=Outcome.REFUND)
    dispute(escrow)
    with pytest.raises(LedgerError, match="arbiter"):
        escrow.service.resolve("job", by="clinic", outcome=Outcome.REFUND)
    with pytest.raises(LedgerError):
        escrow.service.resolve("job", by="board", outcome=Outcome.RELEASE, deadline=NOW)


def test_no_arbiter_no_dispute(escrow) -> None:
    escrow.service.open("bare", "clinic", fee=1, deadline=NOW, query_ids=["bare-0"])
    with pytest.raises(LedgerError, match="no arbiter"):
        escrow.service.dispute("bare", reason_code="wrong-score", by="clinic")


def test_reason_is_a_code_and_no_free_text(escrow) -> None:
    with pytest.raises(InvalidValueError):
        escrow.service.dispute("job", reason_code="The patient in bed 4 ...", by="clinic")


@pytest.mark.parametrize("act", ["refund", "dispute", "resolve", "release"])
def test_job_without_escrow_is_a_typed_error(escrow, act: str) -> None:
    acts = {
        "refund": lambda: escrow.service.refund("none"),
        "dispute": lambda: escrow.service.dispute("none", reason_code="a", by="clinic"),
        "resolve": lambda: escrow.service.resolve("none", by="board", outcome=Outcome.REFUND),
        "release": lambda: escrow.service.release(
            "none", SHARES, make_receipt("none"), payees=payees()
        ),
    }
    with pytest.raises(LedgerError, match="no escrow"):
        acts[act]()


# -- stakes ------------------------------------------------------------------------------


def test_stake_is_locked_until_its_latest_time(escrow) -> None:
    stakes = Stakes(escrow.ledger)
    escrow.ledger.deposit("north", 100, key="n")
    stakes.lock("north", 60, key="1", until=NOW + 50)
    stakes.lock("north", 40, key="2", until=NOW + 10)
    assert (stakes.held("north"), stakes.locked_until("north")) == (100, NOW + 50)
    escrow.clock.now = NOW + 49
    with pytest.raises(LedgerError, match="locked until"):
        stakes.give_back("north", 1, key="3")
    escrow.clock.now = NOW + 50
    stakes.give_back("north", 90, key="3")
    assert stakes.give_back("north", 90, key="3").draft.amounts["north"] == 90
    with pytest.raises(LedgerError, match="holds 10"):
        stakes.give_back("north", 11, key="4")
    assert escrow.ledger.balance("north") == 90
    assert escrow.ledger.verify().ok


def test_slashing_goes_to_somebody_else(escrow) -> None:
    stakes = Stakes(escrow.ledger)
    escrow.ledger.deposit("north", 100, key="n")
    stakes.lock("north", 100, key="1", until=NOW + 50)
    stakes.slash("north", 30, to="fund", key="2", reason_code="bad-receipt")
    assert escrow.ledger.balance("fund") == 30
    with pytest.raises(InvalidValueError):
        stakes.slash("north", 30, to="north", key="3", reason_code="bad-receipt")
    with pytest.raises(LedgerError, match="holds 70"):
        stakes.slash("north", 71, to="fund", key="3", reason_code="bad-receipt")


def test_stake_cannot_go_around_its_lock_past_the_service(escrow) -> None:
    from fedinfer_flower.incentives.ledger.entry import Draft

    escrow.ledger.deposit("north", 100, key="n")
    Stakes(escrow.ledger).lock("north", 100, key="1", until=NOW + 50)
    for draft in (
        Draft(kind="fee", key="x", amounts={"stake:north": -1, "north": 1}),
        Draft(
            kind="slash-stake",
            key="slash-stake:x",
            subject="stake:north",
            amounts={"stake:north": -1, "north": 1},
            memo={"reason_code": "a"},
        ),
    ):
        with pytest.raises(LedgerError), escrow.ledger.writing() as book:
            book.append(draft)


def test_state_is_the_same_to_another_process(escrow) -> None:
    release(escrow)
    other = Escrow(Ledger(escrow.opened.url), coordinator_key_id=COORDINATOR.key_id)
    assert other.state("job") == escrow.service.state("job")


def test_database_alone_refuses_what_the_rules_would_let_pass(escrow, monkeypatch) -> None:
    from fedinfer_flower.incentives.ledger import book as module
    from fedinfer_flower.incentives.ledger.entry import Draft

    release(escrow)
    monkeypatch.setattr(module, "step", lambda state, draft, at: state)
    for draft, words in (
        # Money that is not there, then a query id that was settled before.
        (Draft(kind="refund", key="a", amounts={"escrow:job": -1, "clinic": 1}), "holds 0"),
        (Draft(kind="refund", key="b", claims=["settled:job-0"]), "refuses the row"),
    ):
        with pytest.raises(LedgerError, match=words), escrow.ledger.writing() as book:
            book.append(draft)
    # An entry that got in all the same is named.
    with escrow.ledger.writing() as book:
        book.append(Draft(kind="refund", key="c", subject="escrow:job", memo={"job_id": "job"}))
    assert escrow.ledger.verify().first_bad.seq == 5
