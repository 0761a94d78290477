"""What sets the payment rules apart."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedinfer_flower.errors import InvalidValueError
from fedinfer_flower.incentives.payments import MICRO, make_payment

thorough = settings(max_examples=50, derandomize=True, deadline=None)
FEE = 12 * MICRO


@pytest.mark.parametrize("name", ["base-bonus", "individually-rational"])
@thorough
@given(own=st.floats(-3, 3), others=st.lists(st.floats(-3, 3), min_size=3, max_size=3))
def test_pay_does_not_depend_on_the_others(name, own, others):
    rule = make_payment(name)

    mine = rule.pay(np.array([own, *others]), fee=FEE, stakes=(FEE,) * 4).paid[0]
    alike = rule.pay(np.array([own, 0.0, 0.0, 0.0]), fee=FEE, stakes=(FEE,) * 4).paid[0]

    assert mine == alike


@pytest.mark.parametrize("name", ["base-bonus", "budget-balanced"])
@thorough
@given(low=st.floats(-1, 1), high=st.floats(-1, 1))
def test_pay_is_affine_in_the_score(name, low, high):
    rule, rest = make_payment(name), [0.1, -0.2]

    def paid(own):
        return rule.pay(np.array([own, *rest]), fee=FEE, stakes=(FEE,) * 3).paid[0]

    # Each of the three amounts is rounded by less than a micro-credit.
    assert abs(paid((low + high) / 2) - (paid(low) + paid(high)) / 2) <= 2


def test_base_bonus_charges_the_stake_and_no_more():
    rule = make_payment("base-bonus", {"base_share": 0.0})
    scores = np.array([-1.0, -1.0, 0.0])

    staked = rule.pay(scores, fee=300, stakes=(1000, 40, 0))
    unstaked = rule.pay(scores, fee=300)

    assert staked.paid == (-100, -40, 0)
    assert staked.refund == 440
    assert unstaked.paid == (0, 0, 0)


@pytest.mark.parametrize("name", ["base-bonus", "individually-rational"])
@thorough
@given(scores=st.lists(st.floats(-1e6, 1e6), min_size=1, max_size=6))
def test_fee_bounds_what_the_querier_can_owe(name, scores):
    payout = make_payment(name).pay(np.array(scores), fee=FEE)

    assert payout.refund >= 0
    assert max(payout.paid) <= FEE // len(scores)


def test_nobody_is_paid_for_nothing_only_where_money_may_go_back():
    idle = np.zeros(3)

    assert make_payment("individually-rational").pay(idle, fee=300).refund == 300
    # What "the whole fee, always" comes to.
    assert make_payment("proportional").pay(idle, fee=300).paid == (100, 100, 100)


def test_budget_balanced_pays_free_riders_a_part():
    paid = make_payment("budget-balanced").pay(np.array([1.0, 1.0, 0.0]), fee=300).paid

    assert 100 > paid[2] > 0


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("base-bonus", {"base_share": 1.5}),
        ("base-bonus", {"full_score": 0.0}),
        ("budget-balanced", {"spread": 0.6}),
        ("individually-rational", {"full_score": -1.0}),
    ],
)
def test_options_that_break_a_promise_are_refused_when_built(name, options):
    with pytest.raises(InvalidValueError):
        make_payment(name, options)
