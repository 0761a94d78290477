"""Sharing: exact, uniform, and silent about what is shared.

Statistical tests have a significance of 1e-6: the shares have no seed.
"""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from fedinfer_flower.errors import (
    BindingError,
    InvalidScoresError,
    InvalidValueError,
    ShapeError,
)
from fedinfer_flower.mpc.shares import (
    MAX_MAGNITUDE,
    decode_integers,
    decode_reals,
    encode_reals,
    held_from_bytes,
    held_to_bytes,
    join,
    split,
    zero_masks,
)

SIGNIFICANCE = 1e-6
WORDS = st.lists(st.integers(0, 2**64 - 1), min_size=1, max_size=20)


@given(WORDS)
def test_join_returns_what_was_split(words: list[int]) -> None:
    array = np.array(words, dtype=np.uint64)

    held = [held_from_bytes(held_to_bytes(h), array.shape) for h in split(array)]

    np.testing.assert_array_equal(join(held), array)


@given(st.lists(st.floats(-MAX_MAGNITUDE, MAX_MAGNITUDE), min_size=1, max_size=20))
@settings(deadline=None)
def test_reals_come_back_to_half_a_step(values: list[float]) -> None:
    array = np.array(values)

    # Rounding to the nearest multiple of 2^-18.
    assert np.abs(decode_reals(encode_reals(array)) - array).max() <= 2.0**-19


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf, 1.01 * MAX_MAGNITUDE])
def test_value_that_cannot_be_shared_is_refused(bad: float) -> None:
    with pytest.raises(InvalidValueError):
        encode_reals(np.array([0.0, bad]))


@pytest.mark.parametrize("value", [0.0, 1.0, -MAX_MAGNITUDE])
@pytest.mark.parametrize("party", [0, 1, 2])
def test_what_one_party_holds_is_uniform(party: int, value: float) -> None:
    held = split(encode_reals(np.full(50_000, value)))[party]

    for part in (held[:, 0], held[:, 1]):
        for shift in (0, 24, 56):  # low, middle and high byte
            seen = np.bincount((part >> np.uint64(shift)).astype(np.uint8), minlength=256)
            assert stats.chisquare(seen).pvalue > SIGNIFICANCE
    # The two parts are uniform together, too: 16 x 16 cells of their highest four bits.
    high = (held >> np.uint64(60)).astype(np.int64)
    cells = np.bincount(16 * high[:, 0] + high[:, 1], minlength=256)
    assert stats.chisquare(cells).pvalue > SIGNIFICANCE


def test_two_parties_hold_the_value() -> None:
    # What the honest majority is needed for, as a test: the boundary of the guarantee.
    values = np.array([3.25, -1.0])
    held = split(encode_reals(values))

    together = held[0][:, 0] + held[0][:, 1] + held[1][:, 1]

    np.testing.assert_array_equal(decode_reals(together), values)


def test_shares_are_fresh_every_time() -> None:
    words = encode_reals(np.ones(4))
    assert not np.array_equal(split(words)[0], split(words)[0])


@pytest.mark.parametrize("party", [0, 1, 2])
@pytest.mark.parametrize("part", [0, 1])
def test_altered_result_of_one_party_is_noticed(party: int, part: int) -> None:
    held = [h.copy() for h in split(encode_reals(np.arange(3.0)))]
    held[party][1, part] += np.uint64(1)
    with pytest.raises(BindingError, match="different copies"):
        join(held)


def test_masked_shares_are_fresh_and_add_up_to_the_same() -> None:
    held = split(encode_reals(np.arange(6.0).reshape(2, 3)))
    seed = bytes(range(32))
    masked = [
        [h + m for h, m in zip(held, zero_masks(seed, number, (2, 3)), strict=True)]
        for number in (0, 1)
    ]
    for each in masked:
        np.testing.assert_array_equal(decode_reals(join(each)), np.arange(6.0).reshape(2, 3))
    for one, other, raw in zip(*masked, held, strict=True):
        assert not (one == other).any()
        assert not (one == raw).any()


def test_masks_are_uniform() -> None:
    for held in zero_masks(bytes(32), 5, (50_000,)):
        seen = np.bincount((held[:, 0] >> np.uint64(56)).astype(np.uint8), minlength=256)
        assert stats.chisquare(seen).pvalue > SIGNIFICANCE


def test_wrong_shapes_are_refused() -> None:
    held = split(encode_reals(np.zeros(3)))
    with pytest.raises(ShapeError):
        join(held[:2])
    with pytest.raises(ShapeError):
        held_from_bytes(held_to_bytes(held[0]), (4,))


def test_integer_outside_its_range_is_refused() -> None:
    words = np.array([0, 2, -1], dtype=np.int64).view(np.uint64)
    with pytest.raises(InvalidScoresError):
        decode_integers(words, low=0, high=2)
    assert decode_integers(words[:2], low=0, high=2).tolist() == [0, 2]


# -- attack ------------------------------------------------------------------------------


def _attack(train: np.ndarray, test: np.ndarray, digits: tuple) -> float:
    """Accuracy of the label that logistic regression reads off one party's share."""
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    train_labels, test_labels = digits
    attacker = make_pipeline(StandardScaler(), LogisticRegression(max_iter=200))
    return float(attacker.fit(train, train_labels).score(test, test_labels))


def test_classifier_reads_gaussian_shares_and_not_ours() -> None:
    from sklearn.datasets import load_digits

    images, labels = load_digits(return_X_y=True)
    images = images / 16.0
    first, second = slice(0, 1200), slice(1200, None)
    truth = (labels[first], labels[second])
    n_test = len(truth[1])
    rng = np.random.default_rng(0)

    # Additive shares of three parties with Gaussian randomness, over the reals: the third
    # is x - g1 - g2, and its noise does not hide x.
    noisy = images - rng.normal(size=images.shape) - rng.normal(size=images.shape)
    gaussian = _attack(noisy[first], noisy[second], truth)
    held = split(encode_reals(images))
    ours = [
        # The party's own view, as real numbers in [-1, 1): both parts, side by side.
        h.view(np.int64).reshape(len(images), -1) * 2.0**-63
        for h in held
    ]
    accuracies = [_attack(view[first], view[second], truth) for view in ours]

    # Chance is a tenth. Both bounds are the binomial's at 1e-6 for 597 test images.
    bound = stats.binom.isf(SIGNIFICANCE, n_test, 0.11) / n_test
    assert gaussian > bound
    assert max(accuracies) <= bound
