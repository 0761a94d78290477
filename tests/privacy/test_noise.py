"""Distribution of the noise. Significance 1e-6 a test: noise has no seed."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import stats

from fedinfer_flower.errors import InvalidValueError
from fedinfer_flower.privacy import noise

SIGNIFICANCE = 1e-6


@pytest.mark.parametrize("std", [0.7, 3.0, 500.0])
def test_gaussian_integers_have_the_shape_of_rounded_gaussians(std: float) -> None:
    draws = noise.gaussian_integers((200_000,), std)

    # Bins of whole integers, each expected at least 20 times.
    width = max(1, int(std / 4))
    edges = np.arange(-int(2.5 * std) - 1, int(2.5 * std) + 2, width) - 0.5
    edges = np.concatenate([[-np.inf], edges, [np.inf]])
    seen = np.histogram(draws, edges)[0]
    expected = np.diff(stats.norm.cdf(edges / std)) * draws.size
    assert expected.min() > 20
    assert stats.chisquare(seen, expected).pvalue > SIGNIFICANCE


def test_gaussian_integers_have_the_standard_deviation_asked_for() -> None:
    std, count = 15_000.0, 300_000
    draws = noise.gaussian_integers((count,), std)

    # Rounding adds 1/12 to a variance of 2e8: nothing.
    statistic = float((draws.astype(float) ** 2).sum()) / std**2
    assert stats.chi2.sf(statistic, count) > SIGNIFICANCE / 2
    assert stats.chi2.cdf(statistic, count) > SIGNIFICANCE / 2
    assert abs(draws.mean()) < 4.9 * std / np.sqrt(count)


def test_tails_are_there_and_finite(monkeypatch: pytest.MonkeyPatch) -> None:
    def extreme(count: int) -> np.ndarray:
        words = np.zeros(count, dtype=np.uint64)
        words[0] = np.uint64(2**63)  # sign bit alone
        words[1] = np.uint64(2**63 - 1)
        words[2] = np.uint64(2**64 - 1)
        return words

    monkeypatch.setattr(noise, "random_words", extreme)
    draws = noise.gaussian_integers((4,), 1000.0)

    assert draws.tolist() == [-13161, 0, 0, 13161]  # 1000 * ndtri(2**-130)


def test_noise_does_not_follow_numpy_seed() -> None:
    drawn = []
    for _ in range(2):
        np.random.seed(1)  # noqa: NPY002  what must have no effect
        drawn.append(noise.gaussian_integers((100,), 1e6))
    assert not np.array_equal(*drawn)


def test_words_are_fresh_each_time_and_uniform() -> None:
    one, other = noise.random_words(4096), noise.random_words(4096)
    assert one.dtype == np.uint64
    assert np.intersect1d(one, other).size == 0
    # Each bit is set in about half of the words: 64 tests against 6 deviations (2e-9 each).
    bits = np.unpackbits(one.view(np.uint8)).reshape(-1, 64).sum(axis=0, dtype=np.int64)
    assert np.abs(bits - 2048).max() < 6 * 32


@pytest.mark.parametrize("limit", [1, 2, 3, 10, 999])
def test_uniform_below_is_uniform(limit: int) -> None:
    draws = noise.uniform_below(100_000, limit)

    assert draws.min() >= 0
    assert draws.max() < limit
    if limit > 1:
        seen = np.bincount(draws, minlength=limit)
        assert stats.chisquare(seen).pvalue > SIGNIFICANCE


def test_uniform_below_redraws_the_incomplete_last_block(monkeypatch: pytest.MonkeyPatch) -> None:
    replies = [np.array([2**64 - 1, 7], dtype=np.uint64), np.array([5], dtype=np.uint64)]
    monkeypatch.setattr(noise, "random_words", lambda count: replies.pop(0))

    # 2**64 - 1 is divisible by 3: the word of that value is one too many.
    assert noise.uniform_below(2, 3).tolist() == [2, 1]
    assert not replies


@pytest.mark.parametrize("probability", [1e-3, 0.25, 0.999])
def test_coins_fall_as_often_as_asked(probability: float) -> None:
    count = 100_000
    heads = int(noise.coin_flips(count, probability).sum())
    assert stats.binomtest(heads, count, probability).pvalue > SIGNIFICANCE


def test_a_coin_of_tiny_probability_can_still_fall(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(noise, "random_words", lambda count: np.arange(count, dtype=np.uint64))
    assert noise.coin_flips(3, 1e-28).tolist() == [True, False, False]


def test_nonsense_is_refused() -> None:
    for std in (0.0, -1.0, float("nan"), float("inf"), 2.0**41):
        with pytest.raises(InvalidValueError):
            noise.gaussian_integers((1,), std)
    for probability in (0.0, 1.0, -0.1, float("nan")):
        with pytest.raises(InvalidValueError):
            noise.coin_flips(1, probability)
    for limit in (0, 2**32 + 1):
        with pytest.raises(InvalidValueError):
            noise.uniform_below(1, limit)
