"""Every registered payment rule passes the same checks."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from fedinfer_flower.errors import InvalidValueError
from fedinfer_flower.incentives.payments import PAYMENTS, Payout, make_payment

NAMES = PAYMENTS.names()
thorough = settings(max_examples=60, derandomize=True, deadline=None)
scores = arrays(
    np.float64,
    st.integers(1, 12),
    elements=st.floats(-1e300, 1e300, allow_subnormal=True) | st.floats(-1.0, 1.0),
)
fees = st.integers(0, 10**9) | st.integers(0, 10**40)


@pytest.mark.parametrize("name", NAMES)
@thorough
@given(values=scores, fee=fees, data=st.data())
def test_payment_is_whole_and_pays_out_what_was_paid_in(name, values, fee, data):
    stakes = tuple(data.draw(st.integers(0, 10**9)) for _ in values)
    rule = make_payment(name)

    for given_stakes in (None, stakes):
        payout = rule.pay(values, fee=fee, stakes=given_stakes)

        assert all(type(amount) is int for amount in (*payout.paid, payout.refund))
        assert len(payout.paid) == len(values)
        assert sum(payout.paid) + payout.refund == fee
        # A refund below zero would be a claim on the querier beyond the fee.
        assert payout.refund >= 0
        floor = given_stakes or (0,) * len(values)
        assert all(p >= -stake for p, stake in zip(payout.paid, floor, strict=True))
        assert rule.pay(values, fee=fee, stakes=given_stakes) == payout


@pytest.mark.parametrize("name", NAMES)
@thorough
@given(values=scores, fee=fees)
def test_payment_keeps_what_it_declares(name, values, fee):
    rule = make_payment(name)

    payout = rule.pay(values, fee=fee, stakes=(5,) * len(values))

    if rule.budget_balanced:
        assert payout.refund == 0
    if rule.individually_rational:
        assert min(payout.paid) >= 0


@pytest.mark.parametrize("name", NAMES)
@thorough
@given(values=scores, fee=fees)
def test_payment_never_pays_a_better_site_less(name, values, fee):
    paid = make_payment(name).pay(values, fee=fee).paid

    for i in range(len(values)):
        for j in range(len(values)):
            # One micro-credit: equal exact shares are told apart by place.
            assert not values[i] > values[j] or paid[i] >= paid[j] - 1


@pytest.mark.parametrize("name", NAMES)
def test_payment_goes_with_the_site_and_not_with_its_place(name):
    values, fee = np.array([0.7, -0.2, 0.1]), 10**6
    rule = make_payment(name)

    paid = rule.pay(values, fee=fee, stakes=(1, 2, 3)).paid
    turned = rule.pay(values[::-1].copy(), fee=fee, stakes=(3, 2, 1)).paid

    assert np.abs(np.array(paid) - np.array(turned)[::-1]).max() <= 1


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(
    ("values", "fee", "stakes"),
    [
        (np.array([]), 1, None),
        (np.array([[1.0]]), 1, None),
        (np.array([np.nan]), 1, None),
        (np.array([np.inf, 0.0]), 1, None),
        (np.array([1.0]), -1, None),
        (np.array([1.0]), 1, (1, 2)),
        (np.array([1.0]), 1, (-1,)),
    ],
)
def test_payment_refuses_what_nobody_can_be_paid_by(name, values, fee, stakes):
    with pytest.raises(InvalidValueError):
        make_payment(name).pay(values, fee=fee, stakes=stakes)


@pytest.mark.parametrize("name", NAMES)
def test_payment_rule_is_made_again_from_its_options(name):
    rule = make_payment(name)

    assert make_payment(name, rule.options()) == rule
    with pytest.raises(InvalidValueError, match="no option"):
        make_payment(name, {"no-such": 1})


def test_payout_that_loses_money_is_refused():
    with pytest.raises(InvalidValueError):
        Payout(paid=(1, 2), refund=0, fee=4)
