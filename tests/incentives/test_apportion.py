"""Money is split to the last micro-credit, whatever the weights and however much it is."""

from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from fedinfer_flower.errors import InvalidValueError
from fedinfer_flower.incentives.payments import apportion

thorough = settings(max_examples=150, derandomize=True, deadline=None)
weights = arrays(
    np.float64,
    st.integers(1, 12),
    elements=st.floats(0.0, 1.7e308, allow_subnormal=True) | st.floats(0.0, 1.0),
)
amounts = st.integers(0, 1000) | st.integers(0, 10**60)


@thorough
@given(weights=weights, amount=amounts)
def test_parts_sum_exactly_and_are_within_one_of_their_due(weights, amount):
    paid = apportion(weights, amount)

    assert sum(paid) == amount
    assert all(type(part) is int and part >= 0 for part in paid)
    exact = [Fraction(float(w)) for w in weights]
    exact = exact if any(exact) else [Fraction(1)] * len(exact)
    due = [amount * w / sum(exact) for w in exact]
    assert all(abs(part - d) < 1 for part, d in zip(paid, due, strict=True))


@thorough
@given(weights=weights, amount=amounts)
def test_larger_weight_never_gets_less(weights, amount):
    paid = apportion(weights, amount)

    for i in range(len(weights)):
        for j in range(len(weights)):
            assert not weights[i] > weights[j] or paid[i] >= paid[j]


@thorough
@given(weights=weights, amount=amounts)
def test_zero_weight_gets_nothing_beside_others(weights, amount):
    paid = apportion(weights, amount)

    if weights.any():
        # A part of zero has no remainder to be rounded up for.
        assert all(part == 0 for part, w in zip(paid, weights, strict=True) if w == 0.0)


def test_amounts_beyond_a_float_keep_their_last_digit():
    amount = 2**80 + 1

    assert apportion(np.array([1.0, 1.0]), amount) == (2**79 + 1, 2**79)
    assert apportion(np.zeros(3), 4) == (2, 1, 1)


def test_vanishing_and_huge_weights_keep_their_ratio():
    assert apportion(np.array([5e-324, 1.5e-323]), 100) == (25, 75)
    assert apportion(np.array([1.7e308, 1.7e308]), 3) == (2, 1)
    assert apportion(np.array([1e308, 5e-324]), 10) == (10, 0)


@pytest.mark.parametrize(
    ("weights", "amount"),
    [
        (np.array([]), 1),
        (np.ones((1, 1)), 1),
        (np.array([-1.0, 2.0]), 1),
        (np.array([np.nan]), 1),
        (np.array([np.inf]), 1),
        (np.array([1.0]), -1),
    ],
)
def test_what_cannot_be_split_is_refused(weights, amount):
    with pytest.raises(InvalidValueError):
        apportion(weights, amount)
