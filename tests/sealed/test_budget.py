"""Budgets through the whole stack: caps, repeats, cohorts, restarts, two queriers."""

from __future__ import annotations

import numpy as np
import pytest

from fedinfer_flower import InferenceMod, Querier
from fedinfer_flower.clients.remembered import UNSIGNED
from fedinfer_flower.errors import InvalidValueError, QuorumNotMetError
from fedinfer_flower.privacy.secagg_dp import SecAggDP
from fedinfer_flower.privacy.site_budget import BudgetPolicy, SiteBudget
from fedinfer_flower.wire.identity import Identity

from .conftest import ROWS

ONE_ROW = ROWS[:1]
PROTECTION = SecAggDP(epsilon=8.0)


def policy(per_querier: float = 14.0, everyone: float = 100.0) -> BudgetPolicy:
    return BudgetPolicy(epsilon_per_querier=per_querier, epsilon_global=everyone)


def spent(home, querier: str | None, partition: int = 0) -> float:
    path = home / f"partition-{partition}" / "budget.sqlite"
    return SiteBudget.inspect(path).spent(querier)[0]


def fresh_row(number: int) -> np.ndarray:
    return np.random.default_rng(1000 + number).standard_normal((1, ROWS.shape[1]))


def ask_until_refused(federation, identity: Identity, most: int = 20) -> int:
    strategy = federation.strategy(PROTECTION)
    for number in range(most):
        try:
            federation.ask(strategy, fresh_row(number), identity=identity)
        except QuorumNotMetError as error:
            if "FI315" not in error.message:
                raise
            return number
    raise AssertionError("the budget was never used up")


def test_queries_end_when_the_budget_is_used_up(make_federation, home):
    federation = make_federation(home=home, budget=policy())
    me = Identity.generate()
    n_answered = ask_until_refused(federation, me)

    assert n_answered >= 2
    used = spent(home, me.key_id)
    assert 12.0 <= used <= 14.0 + 1e-6
    assert "FI315" in federation.grid.errors()
    # A refusal costs nothing, and smaller questions are refused as well.
    asked = len(federation.seen_inputs)
    with pytest.raises(QuorumNotMetError, match="FI315"):
        federation.ask(federation.strategy(PROTECTION), fresh_row(999), identity=me)
    assert spent(home, me.key_id) == used
    assert len(federation.seen_inputs) == asked


def test_repeats_cost_nothing_and_give_the_same_noise(make_federation, home):
    federation = make_federation(n_sites=3, home=home, budget=policy())
    me, strategy = Identity.generate(), federation.strategy(PROTECTION)
    answers = []
    for _ in range(50):
        querier, _, result = federation.ask(strategy, ONE_ROW, identity=me)
        answers.append(querier.totals(result.combined))
    exact = federation.probabilities(ONE_ROW).sum(axis=0)
    once = np.abs(answers[0] - exact).max()
    assert all(np.array_equal(answers[0], later) for later in answers[1:])
    assert np.abs(np.mean(answers, axis=0) - exact).max() == once
    assert spent(home, me.key_id) == pytest.approx(8.0, rel=0.05)


def test_averaging_fifty_repeats_converges_without_a_home(make_federation):
    """The attack that the test above stops."""
    federation = make_federation(n_sites=3)
    strategy = federation.strategy(PROTECTION)
    answers = []
    for _ in range(50):
        querier, _, result = federation.ask(strategy, ONE_ROW)
        answers.append(querier.totals(result.combined))
    spread = np.std(answers, axis=0, ddof=1).mean()
    error = np.abs(np.mean(answers, axis=0) - federation.probabilities(ONE_ROW).sum(axis=0)).max()
    assert spread > 0.0
    # The mean of 50 has a standard deviation of spread / 7: six of them, once in 1e8 runs.
    assert error < 6.0 * spread / np.sqrt(50)


def test_the_same_row_twice_in_one_batch_has_one_draw(make_federation, home):
    federation = make_federation(home=home, budget=policy())
    me = Identity.generate()
    querier, _, result = federation.ask(
        federation.strategy(PROTECTION), np.repeat(ONE_ROW, 4, axis=0), identity=me
    )
    totals = querier.totals(result.combined)
    assert all(np.array_equal(totals[0], row) for row in totals)
    assert spent(home, me.key_id) == pytest.approx(8.0, rel=0.05)


@pytest.mark.parametrize("change", ["cohort", "epsilon", "rule", "classes"])
def test_another_cohort_or_other_terms_are_charged_as_fresh(make_federation, home, change):
    federation = make_federation(home=home, budget=policy(per_querier=60.0))
    me = Identity.generate()
    federation.ask(federation.strategy(PROTECTION), ONE_ROW, identity=me)
    before = spent(home, me.key_id)
    options = {
        "cohort": {"only": tuple(f"site-{k}" for k in range(4))},
        "epsilon": {},
        "rule": {"rule": "majority-vote"},
        "classes": {"classes": ("c", "b", "a")},
    }[change]
    protection = SecAggDP(epsilon=7.5) if change == "epsilon" else PROTECTION
    federation.ask(federation.strategy(protection), ONE_ROW, identity=me, **options)
    assert spent(home, me.key_id) > 1.2 * before


def test_other_model_is_charged_as_fresh(make_federation, home):
    federation = make_federation(home=home, budget=policy(per_querier=60.0))
    me, strategy = Identity.generate(), federation.strategy(PROTECTION)
    federation.ask(strategy, ONE_ROW, identity=me)
    before = spent(home, me.key_id)
    federation.versions = dict.fromkeys(range(5), 1)
    federation.restart()
    federation.ask(strategy, ONE_ROW, identity=me)
    assert spent(home, me.key_id) > 1.2 * before


def test_restart_keeps_keys_budget_answers_and_query_ids(make_federation, home):
    federation = make_federation(home=home, budget=policy())
    me, strategy = Identity.generate(), federation.strategy(PROTECTION)
    keys = strategy.directory(federation.grid).roster.key_ids
    querier, _, result = federation.ask(strategy, ONE_ROW, identity=me)
    before, one = spent(home, me.key_id), querier.totals(result.combined)

    federation.restart()
    federation.forget_contexts()
    assert federation.strategy(PROTECTION).directory(federation.grid).roster.key_ids == keys
    again, _, result = federation.ask(federation.strategy(PROTECTION), ONE_ROW, identity=me)
    np.testing.assert_array_equal(again.totals(result.combined), one)
    assert spent(home, me.key_id) == before
    ask_until_refused(federation, me)


def test_two_queriers_have_caps_of_their_own_and_one_together(make_federation, home):
    federation = make_federation(home=home, budget=policy(14.0, 14.0))
    one, two = Identity.generate(), Identity.generate()
    strategy = federation.strategy(PROTECTION)
    first, _, result = federation.ask(strategy, ONE_ROW, identity=one)
    # The second gets the answer that is there: charged to it, not to all together.
    second, _, again = federation.ask(strategy, ONE_ROW, identity=two)
    np.testing.assert_array_equal(first.totals(result.combined), second.totals(again.combined))
    assert spent(home, two.key_id) == spent(home, one.key_id) == spent(home, None)
    # Fresh rows under new names are held up by the cap on all together.
    federation.ask(strategy, fresh_row(0), identity=Identity.generate())
    third = Identity.generate()
    with pytest.raises(QuorumNotMetError, match="FI315"):
        federation.ask(strategy, fresh_row(1), identity=third)
    assert spent(home, None) <= 14.0 + 1e-6
    assert spent(home, third.key_id) == 0.0


def test_clear_queries_share_the_account_of_those_that_nobody_signed(make_federation, home):
    federation = make_federation(home=home, budget=policy())
    strategy = federation.strategy(PROTECTION)
    for number in range(2):
        job = Querier(protection=PROTECTION).ask(fresh_row(number), clear=True)
        strategy.start(federation.grid, job)
    (_, *lines) = SiteBudget.inspect(home / "partition-0" / "budget.sqlite").status()
    assert [line.querier for line in lines] == [UNSIGNED]
    assert lines[0].n_queries == 2
    assert spent(home, UNSIGNED) > 8.0


def test_name_of_the_unsigned_account_is_no_key_id():
    assert len(UNSIGNED) != 64


@pytest.mark.parametrize("protection", ["plain", "secagg", "he"])
def test_exact_answers_are_refused_under_a_budget_unless_named(make_federation, home, protection):
    federation = make_federation(home=home / "a", budget=policy())
    with pytest.raises(QuorumNotMetError, match="FI308"):
        federation.ask(federation.strategy(protection))
    assert federation.seen_inputs == []
    federation.grid.close()

    named = make_federation(home=home / "b", budget=policy(), protections=[protection])
    querier, _, result = named.ask(named.strategy(protection))
    assert len(querier.open(result.combined)) == len(ROWS)


def test_model_that_fails_keeps_the_charge(make_federation, home):
    federation = make_federation(home=home, budget=policy())
    me = Identity.generate()
    with pytest.raises(QuorumNotMetError, match="FI404"):
        federation.ask(federation.strategy(PROTECTION), np.zeros((1, 9)), identity=me)
    assert spent(home, me.key_id) > 0.0
    assert spent(home, None) > 0.0


def test_row_that_overflows_the_model_is_answered_with_noise_and_charged(make_federation, home):
    """Otherwise errors would measure the weights exactly, row by row, for nothing."""
    federation = make_federation(home=home, budget=policy())
    me = Identity.generate()
    rows = np.full((1, ROWS.shape[1]), 1e308)
    querier, _, result = federation.ask(federation.strategy(PROTECTION), rows, identity=me)
    assert not result.degraded
    assert np.isfinite(querier.totals(result.combined)).all()
    assert spent(home, me.key_id) > 0.0


def test_one_site_without_budget_left_is_made_good_for(make_federation, home):
    # A third of five sites is one.
    federation = make_federation(
        home=home,
        budget=policy(),
        per_site={2: {"budget": BudgetPolicy(epsilon_per_querier=0.1, epsilon_global=0.1)}},
    )
    querier, _, result = federation.ask(federation.strategy(PROTECTION), ONE_ROW)
    (dropped,) = [s for s in result.reports[0].sites if s.status.value == "failed"]
    assert (dropped.name, dropped.error_code) == ("site-2", "FI315")
    assert len(querier.open(result.combined)) == 1
    assert result.degraded


def test_budget_without_a_home_ends_the_run_before_anything_is_asked(make_federation):
    federation = make_federation(budget=policy())
    with pytest.raises(QuorumNotMetError, match="FI200 a privacy budget needs a folder"):
        federation.ask(federation.strategy(PROTECTION))
    assert federation.seen_inputs == []


def test_home_may_come_from_the_node_config(make_federation, home):
    federation = make_federation(budget=policy())
    for context in federation.grid._contexts.values():
        context.node_config["fedinfer-home"] = str(home)
    me = Identity.generate()
    federation.ask(federation.strategy(PROTECTION), ONE_ROW, identity=me)
    assert spent(home, me.key_id, partition=3) > 0.0


def test_option_given_as_one_text_is_refused():
    for option in ("protections", "querier_key_ids", "peer_key_ids"):
        with pytest.raises(InvalidValueError):
            InferenceMod(lambda context: None, **{option: "secagg"})
