"""The receipt of a sealed job verifies, and says what happened."""

from __future__ import annotations

import pytest

from fedinfer_flower import FedEnsemble, Querier
from fedinfer_flower.errors import ReceiptError
from fedinfer_flower.privacy.site_budget import BudgetPolicy
from fedinfer_flower.receipts.verification import verify
from fedinfer_flower.strategies.settling import receipt_of
from fedinfer_flower.wire.identity import Identity

from .conftest import CLASSES, PROTECTIONS, ROWS


def pins_of(directory) -> dict[str, str]:
    return {card.profile.name: card.key_id for card in directory.cards}


@pytest.mark.parametrize("protection", PROTECTIONS)
def test_receipt_verifies_with_pins(make_federation, protection):
    federation = make_federation()
    me, strategy = Identity.generate(), federation.strategy(protection)
    _, _, result = federation.ask(strategy, identity=me, batch_size=4)
    pins = pins_of(strategy.directory(federation.grid))

    found = verify(result.receipt.to_bytes(), pins=pins, queriers={"me": me.key_id})
    found.require_ok()
    assert [check.name for check in found.not_checked] == ["coordinator"]
    receipt = found.receipt
    assert (receipt.query_sealed, receipt.querier_key_id) == (True, me.key_id)
    assert [batch.n_rows for batch in receipt.batches] == [4, 2]
    assert len(receipt.statements) == 10
    # One process holds all roles here: under he the receipt says so.
    assert receipt.key_at_coordinator == (protection == "he")


def test_receipt_does_not_verify_with_other_pins(make_federation):
    federation = make_federation()
    strategy = federation.strategy("secagg")
    _, _, result = federation.ask(strategy)
    pins = pins_of(strategy.directory(federation.grid))
    data = result.receipt.to_bytes()
    swapped = verify(data, pins=pins | {"site-2": "0" * 64})
    assert [(check.name, check.code) for check in swapped.failed] == [("site pins", "FI311")]
    stranger = verify(data, pins=pins, queriers={"other": "0" * 64})
    assert [check.name for check in stranger.failed] == ["querier pin"]


def test_receipt_of_a_clear_query_says_that_nobody_signed_it(make_federation):
    federation = make_federation()
    result = federation.strategy("plain").start(federation.grid, ROWS)
    receipt = result.receipt
    assert (receipt.query_sealed, receipt.querier_key_id) == (False, "")
    verify(receipt.to_bytes()).require_ok()


def test_receipt_tells_fresh_rows_from_repeats(make_federation, home):
    policy = BudgetPolicy(epsilon_per_querier=400.0, epsilon_global=400.0)
    federation = make_federation(home=home, budget=policy)
    me, strategy = Identity.generate(), federation.strategy("secagg+dp")
    fresh = []
    for _ in range(2):
        _, _, result = federation.ask(strategy, identity=me)
        verify(result.receipt.to_bytes()).require_ok()
        (said,) = {s.statement.n_fresh_rows for s in result.receipt.statements}
        fresh.append(said)
        epsilon = {s.statement.epsilon for s in result.receipt.statements}
        assert (epsilon == {0.0}) == (said == 0)
    assert fresh == [len(ROWS), 0]


def test_no_receipt_where_sites_sign_nothing(make_federation):
    federation = make_federation(receipts=False)
    querier, _, result = federation.ask(federation.strategy("secagg"))
    assert result.receipt is None
    assert len(querier.open(result.combined)) == len(ROWS)


def test_statement_by_some_sites_only_does_not_pass_for_all(make_federation):
    federation = make_federation(per_site={1: {"receipts": False}})
    _, _, result = federation.ask(federation.strategy("secagg"))
    found = verify(result.receipt.to_bytes())
    assert [check.name for check in found.failed] == ["who answered"]
    with pytest.raises(ReceiptError, match="site-1"):
        found.require_ok()


def test_node_that_was_never_asked_is_not_in_the_receipt(make_federation):
    def wrap(action, place, message, context, handle):
        if place == 2:
            raise RuntimeError("down")
        return handle(message, context)

    federation = make_federation(wrap=wrap)
    result = federation.strategy("plain").start(federation.grid, ROWS)
    assert result.degraded
    verify(result.receipt.to_bytes()).require_ok()
    assert len(result.receipt.cohort) == 4


def test_site_of_the_roster_that_is_gone_is_listed_by_its_key(make_federation):
    gone: set[int] = set()

    def wrap(action, place, message, context, handle):
        if place in gone:
            raise RuntimeError("gone")
        return handle(message, context)

    federation = make_federation(wrap=wrap)
    directory = federation.strategy("secagg").directory(federation.grid)
    job = Querier(protection="secagg").ask(ROWS, directory=directory, rule="mean-probability")
    gone.add(3)
    result = federation.strategy("secagg").start(federation.grid, job)
    cards = dict(enumerate(directory.cards))
    by_name = {card.profile.name: card for k, card in cards.items() if k not in gone}
    receipt = receipt_of(
        result.receipt.statements,
        result.reports,
        {s.site_id: by_name[s.name] for s in result.reports[0].sites if s.name in by_name},
        key_at_coordinator=False,
        roster=job.roster,
    )
    verify(receipt.to_bytes()).require_ok()
    (missing,) = [m for m in receipt.cohort if m.name.startswith("key ")]
    assert missing.key_id == cards[3].key_id
    assert [d.site for d in receipt.batches[0].dropped] == [missing.name]


def test_two_sites_of_one_name_get_an_answer_and_no_receipt(make_federation, caplog):
    federation = make_federation(name="hospital")
    querier, _, result = federation.ask(federation.strategy("secagg"))
    assert result.receipt is None
    assert "two sites have the same name" in caplog.text
    assert querier.open(result.combined).classes == CLASSES
    assert isinstance(federation.strategy("secagg"), FedEnsemble)
