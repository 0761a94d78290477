"""Static scales: how they are fitted, and whose they are."""

from __future__ import annotations

import dataclasses
import random

import numpy as np
import pytest
import torch

from fedinfer_flower.errors import (
    CacheError,
    InvalidValueError,
    SizeLimitError,
    UnsupportedVersionError,
)
from fedinfer_flower.kv.layout import CacheEntries, CacheLayout
from fedinfer_flower.kv.payload import PayloadLimits, decode_entries, encode_entries
from fedinfer_flower.kv.static_scales import StaticScales
from fedinfer_flower.kv.token_matrix import matrix_of

LIMITS = PayloadLimits()
LAYOUT = CacheLayout(
    layers=2,
    heads=2,
    head_size=16,
    hidden_size=24,
    window=512,
    rope="{}",
    architecture="llama",
    tokenizer_digest="0" * 64,
    model_digest="1" * 64,
)
OTHER = dataclasses.replace(LAYOUT, model_digest="2" * 64)


def cache(rows, tokens, *, layout=LAYOUT, hidden=False, seed=0):
    random_ = torch.Generator().manual_seed(seed)
    shape = (rows, layout.heads, tokens, layout.head_size)

    def numbers(*shape):
        return torch.randn(*shape, generator=random_)

    return CacheEntries(
        keys=tuple(numbers(*shape) for _ in range(layout.layers)),
        values=tuple(numbers(*shape) for _ in range(layout.layers)),
        mask=torch.ones(rows, tokens, dtype=torch.long),
        layout=layout,
        hidden=numbers(rows, tokens, layout.hidden_size) if hidden else None,
    )


PUBLIC = cache(8, 50, hidden=True)
SCALES = StaticScales.fit(PUBLIC)


@pytest.mark.parametrize("bits", [4, 8])
def test_numbers_that_were_fitted_are_never_clipped(bits):
    scales = StaticScales.fit(PUBLIC, bits=bits)
    codec = f"static{bits}"
    data = encode_entries(PUBLIC, codec=codec, scales=scales)
    found = decode_entries(data, limits=LIMITS, scales=scales)
    numbers, back = matrix_of(PUBLIC)[0], matrix_of(found)[0]
    # Half a step; 1e-5 for float32 arithmetic on numbers below 6.
    assert (np.abs(back - numbers) <= scales.step / 2 + 1e-5).all()


def test_steps_cover_the_range_and_no_more():
    numbers = matrix_of(PUBLIC)[0]
    np.testing.assert_allclose(16 * SCALES.step, np.ptp(numbers, 0), rtol=1e-5)
    np.testing.assert_allclose(SCALES.middle - 8 * SCALES.step, numbers.min(0), atol=1e-5)


def test_numbers_beyond_the_range_become_its_ends():
    entries = cache(1, 1, seed=4)
    entries.keys[0].fill_(1e30)
    data = encode_entries(entries, codec="static4", scales=SCALES)
    found = decode_entries(data, limits=LIMITS, scales=SCALES)
    channels = LAYOUT.heads * LAYOUT.head_size
    ends = (SCALES.middle + 7.5 * SCALES.step)[:channels]
    np.testing.assert_allclose(found.keys[0].flatten().numpy(), ends, rtol=1e-5)


def test_channel_that_never_changes_has_a_positive_step():
    entries = cache(2, 5)
    for values in entries.values:
        values.fill_(7.0)
    scales = StaticScales.fit(entries)
    assert (scales.step > 0).all()
    data = encode_entries(entries, codec="static4", scales=scales)
    found = decode_entries(data, limits=LIMITS, scales=scales)
    assert (found.values[0] - 7.0).abs().max() < 1e-4


def test_padding_does_not_count():
    entries = cache(2, 6)
    padded = dataclasses.replace(
        entries,
        keys=tuple(torch.cat([99 * torch.ones_like(k), k], 2) for k in entries.keys),
        values=tuple(torch.cat([99 * torch.ones_like(v), v], 2) for v in entries.values),
        mask=torch.cat([torch.zeros_like(entries.mask), entries.mask], 1),
    )
    assert StaticScales.fit(padded).digest == StaticScales.fit(entries).digest


def test_several_caches_are_one_sample():
    whole = cache(4, 6)
    parts = [whole.select([0, 1]), whole.select([2, 3])]
    assert StaticScales.fit(parts).digest == StaticScales.fit(whole).digest


def test_caches_of_different_models_are_refused():
    with pytest.raises(CacheError, match="different models"):
        StaticScales.fit([cache(2, 3), cache(2, 3, layout=OTHER)])
    with pytest.raises(CacheError, match="hidden"):
        StaticScales.fit([cache(2, 3), cache(2, 3, hidden=True)])


def test_too_few_tokens_and_other_bits_are_refused():
    for entries in ([], cache(1, 1)):
        with pytest.raises(InvalidValueError):
            StaticScales.fit(entries)
    with pytest.raises(InvalidValueError, match="4 or 8"):
        StaticScales.fit(PUBLIC, bits=5)


def test_caches_that_are_not_finite_are_refused():
    entries = cache(2, 3)
    entries.keys[0][0, 0, 0, 0] = float("nan")
    with pytest.raises(CacheError):
        StaticScales.fit(entries)


def test_digest_names_numbers_bits_and_model():
    others = [
        StaticScales.fit(PUBLIC, bits=8),
        StaticScales.fit(PUBLIC.without_hidden()),
        StaticScales.fit(dataclasses.replace(PUBLIC, layout=OTHER)),
        StaticScales.fit(cache(8, 50, hidden=True, seed=1)),
    ]
    digests = {scales.digest for scales in (SCALES, *others)}
    assert len(digests) == 5
    assert StaticScales.fit(PUBLIC).digest == SCALES.digest


def test_other_scales_are_refused_on_both_sides():
    entries = cache(1, 2, seed=9)
    data = encode_entries(entries, codec="static4", scales=SCALES)
    for scales in (
        None,
        StaticScales.fit(cache(8, 50, hidden=True, seed=1)),
        StaticScales.fit(dataclasses.replace(PUBLIC, layout=OTHER)),
        StaticScales.fit(PUBLIC, bits=8),
    ):
        with pytest.raises(CacheError, match="same fuser"):
            decode_entries(data, limits=LIMITS, scales=scales)
    with pytest.raises(CacheError, match="different models"):
        encode_entries(dataclasses.replace(entries, layout=OTHER), codec="static4", scales=SCALES)
    with pytest.raises(InvalidValueError, match="8 bits"):
        encode_entries(
            entries, codec="static4", scales=StaticScales.fit(PUBLIC.without_hidden(), bits=8)
        )


def test_scales_with_the_hidden_state_serve_caches_without_it_but_not_the_reverse():
    entries = cache(1, 2, hidden=True, seed=9)
    data = encode_entries(entries.without_hidden(), codec="static4", scales=SCALES)
    assert decode_entries(data, limits=LIMITS, scales=SCALES).hidden is None
    with pytest.raises(CacheError, match="hidden"):
        encode_entries(entries, codec="static4", scales=StaticScales.fit(PUBLIC.without_hidden()))


@pytest.mark.parametrize("bits", [4, 8])
def test_bytes_round_trip(bits):
    scales = StaticScales.fit(PUBLIC, bits=bits)
    there = StaticScales.from_bytes(scales.to_bytes())
    assert (there.layout, there.bits, there.hidden) == (LAYOUT, bits, True)
    assert there.digest == scales.digest
    assert np.array_equal(there.middle, scales.middle)
    assert np.array_equal(there.step, scales.step)


def test_malformed_scales_are_refused():
    good = SCALES.to_bytes()
    width = LAYOUT.floats_per_token(hidden=True)
    nan, zero = np.float32("nan").tobytes(), bytes(4)
    for bad in (
        b"",
        good[:-1],
        good + b"\0",
        b"X" + good[1:],
        good[:6] + b"\5" + good[7:],  # bits
        good[:7] + b"\2" + good[8:],  # hidden
        good[:8] + b"\xff" * 4 + good[12:],  # length of the layout
        good[: -8 * width] + nan + good[-8 * width + 4 :],  # middle
        good[:-4] + nan,
        good[:-4] + zero,  # step
        good[:-4] + np.float32(-1).tobytes(),
        good.replace(b'"heads":2', b'"heads":3'),
        good.replace(b'"heads":2,', b'"heads": 2,'),
    ):
        with pytest.raises(CacheError):
            StaticScales.from_bytes(bad)
    with pytest.raises(UnsupportedVersionError):
        StaticScales.from_bytes(good[:4] + b"\0\2" + good[6:])
    with pytest.raises(SizeLimitError):
        StaticScales.from_bytes(good, max_bytes=len(good) - 1)


def test_random_damage_raises_typed_errors_only():
    good, draw = SCALES.to_bytes(), random.Random(1)  # noqa: S311 - repeatable damage
    refused = 0
    for _ in range(2000):
        bad = bytearray(good)
        for _ in range(draw.choice((1, 1, 2, 8))):
            bad[draw.randrange(len(bad) if draw.random() < 0.3 else 500)] = draw.randrange(256)
        del bad[draw.choice((len(bad), draw.randrange(len(bad)))) :]
        try:
            found = StaticScales.from_bytes(bytes(bad))
        except (CacheError, SizeLimitError, UnsupportedVersionError):
            refused += 1
        else:
            # Another number is another set of scales, unless nothing was changed.
            assert (found.digest == SCALES.digest) == (bytes(bad) == good)
    assert refused > 1000
