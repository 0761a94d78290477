"""Codecs: what comes back, how far off it may be, and how many bytes it takes."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fedinfer_flower.errors import CacheError, InvalidValueError, UnknownNameError
from fedinfer_flower.kv.bit_packing import pack_symbols, packed_bytes, unpack_symbols
from fedinfer_flower.kv.compress import (
    CODECS,
    CodecKind,
    PayloadLimits,
    StaticScales,
    compression_report,
    decode_entries,
    encode_entries,
)
from fedinfer_flower.kv.layout import CacheEntries, CacheLayout
from fedinfer_flower.kv.quantiser import matrix_bytes
from fedinfer_flower.kv.token_matrix import TokenShape

LIMITS = PayloadLimits()
GROUPED = [name for name, codec in CODECS.items() if codec.kind is CodecKind.GROUPED]
STATIC = [name for name, codec in CODECS.items() if codec.kind is CodecKind.STATIC]
ROUNDED = {"fp32": 0.0, "bf16": 2.0**-8, "fp16": 2.0**-11}


def layout_of(*, head_size=16, layers=2, heads=2, hidden_size=24):
    return CacheLayout(
        layers=layers,
        heads=heads,
        head_size=head_size,
        hidden_size=hidden_size,
        window=512,
        rope="{}",
        architecture="llama",
        tokenizer_digest="0" * 64,
        model_digest="1" * 64,
    )


def cache(layout, counts, *, width=None, hidden=False, seed=0, channels_seed=7):
    """Left-padded entries; each channel has its own mean and spread, as real keys have."""
    width = max(counts) if width is None else width
    random = torch.Generator().manual_seed(seed)
    fixed = torch.Generator().manual_seed(channels_seed)

    def numbers(*shape, lines):
        spread = torch.randn(*lines, generator=fixed).exp()
        mean = 3 * torch.randn(*lines, generator=fixed)
        return mean + spread * torch.randn(*shape, generator=random)

    shape = (len(counts), layout.heads, width, layout.head_size)
    lines = (1, layout.heads, 1, layout.head_size)
    return CacheEntries(
        keys=tuple(numbers(*shape, lines=lines) for _ in range(layout.layers)),
        values=tuple(numbers(*shape, lines=lines) for _ in range(layout.layers)),
        mask=torch.tensor([[0] * (width - n) + [1] * n for n in counts]),
        layout=layout,
        hidden=numbers(len(counts), width, layout.hidden_size, lines=(1, 1, layout.hidden_size))
        if hidden
        else None,
    )


def there_and_back(entries, codec, *, scales=None, squeeze=True):
    data = encode_entries(entries, codec=codec, scales=scales, squeeze=squeeze)
    return decode_entries(data, limits=LIMITS, scales=scales)


def assert_same_frame(found, entries):
    """The same model, prompts and mask; float32; padding is 0."""
    assert found.layout == entries.layout
    assert torch.equal(found.mask, entries.mask)
    padding = entries.mask == 0
    for x in (*found.keys, *found.values):
        assert x.dtype == torch.float32
        assert not x.transpose(1, 2)[padding].any()
    assert (found.hidden is None) == (entries.hidden is None)
    if found.hidden is not None:
        assert found.hidden.dtype == torch.float32
        assert not found.hidden[padding].any()


def pairs(found, entries):
    """Return what came back and what was sent, real tokens only, one pair a tensor."""
    real = entries.mask.bool()
    out = [
        (a.transpose(1, 2)[real], b.transpose(1, 2)[real])
        for a, b in zip((*found.keys, *found.values), (*entries.keys, *entries.values), strict=True)
    ]
    if entries.hidden is not None:
        out.append((found.hidden[real], entries.hidden[real]))
    return out


def half_step(x, dims, levels):
    """Return the most that a group may be off, over `dims`.

    Half a step; the step is the range, plus what rounding the least value down to fp16
    (11 bits) adds to it, over the levels, itself rounded up to fp16 (at least 2**-24).
    """
    low, high = x.amin(dims, keepdim=True), x.amax(dims, keepdim=True)
    step = (high - low + low.abs() * 2.0**-10 + 2.0**-24) / levels
    step = step * (1 + 2.0**-10) + 2.0**-24
    return 0.5 * step + 1e-6 * x.abs().amax(dims, keepdim=True)  # float32 arithmetic


batches = st.fixed_dictionaries(
    {
        "head_size": st.sampled_from([16, 32, 64, 80, 128]),
        "layers": st.integers(1, 3),
        "heads": st.integers(1, 3),
        "hidden_size": st.integers(1, 300),
        "counts": st.lists(st.integers(0, 40), min_size=1, max_size=4),
        "extra": st.integers(0, 3),
        "hidden": st.booleans(),
        "seed": st.integers(0, 1000),
        "squeeze": st.booleans(),
    }
)


def drawn(case):
    sizes = {name: case[name] for name in ("head_size", "layers", "heads", "hidden_size")}
    width = max(1, max(case["counts"]) + case["extra"])
    return cache(
        layout_of(**sizes), case["counts"], width=width, hidden=case["hidden"], seed=case["seed"]
    )


@pytest.mark.parametrize("codec", ROUNDED)
@settings(max_examples=30)
@given(case=batches)
def test_float_codecs_are_off_by_their_rounding_alone(codec, case):
    entries = drawn(case)
    found = there_and_back(entries, codec, squeeze=case["squeeze"])
    assert_same_frame(found, entries)
    for ours, true in pairs(found, entries):
        # Half a unit in the last place; below 2**-14 fp16 has a fixed step of 2**-24.
        off = 2.0**-25 if codec == "fp16" else 0.0
        assert ((ours - true).abs() <= true.abs() * ROUNDED[codec] + off).all()


@pytest.mark.parametrize("codec", GROUPED)
@settings(max_examples=40)
@given(case=batches)
def test_grouped_codecs_are_off_by_half_a_step(codec, case):
    entries = drawn(case)
    found = there_and_back(entries, codec, squeeze=case["squeeze"])
    assert_same_frame(found, entries)
    levels = 2 ** CODECS[codec].bits - 1
    size = entries.layout.head_size
    for row, count in enumerate(case["counts"]):
        real = slice(entries.tokens - count, None)
        if not count:
            continue
        by_channel = count >= min(size, 32)
        for ours, true in zip(found.keys, entries.keys, strict=True):
            a, b = ours[row, :, real], true[row, :, real]
            assert ((a - b).abs() <= half_step(b, (1 if by_channel else 2,), levels)).all()
        for ours, true in zip(found.values, entries.values, strict=True):
            a, b = ours[row, :, real], true[row, :, real]
            assert ((a - b).abs() <= half_step(b, (2,), levels)).all()
        if entries.hidden is not None:
            for a, b in zip(
                found.hidden[row, real].split(128, -1),
                entries.hidden[row, real].split(128, -1),
                strict=True,
            ):
                assert ((a - b).abs() <= half_step(b, (1,), levels)).all()


@pytest.mark.parametrize("codec", STATIC)
@settings(max_examples=30)
@given(case=batches)
def test_static_codecs_are_off_by_half_a_step_within_their_range(codec, case):
    entries = drawn(case)
    public = cache(entries.layout, [60, 60], hidden=case["hidden"], seed=case["seed"] + 5000)
    scales = StaticScales.fit(public, bits=CODECS[codec].bits)
    found = there_and_back(entries, codec, scales=scales, squeeze=case["squeeze"])
    assert_same_frame(found, entries)
    step, middle = torch.from_numpy(scales.step), torch.from_numpy(scales.middle)
    ours, true = (
        torch.cat([x.flatten(1) for x in side], 1)
        for side in zip(*pairs(found, entries), strict=True)
    )
    half = 2 ** (CODECS[codec].bits - 1)
    inside = (true - middle).abs() < half * step
    slack = 1e-5 * (true.abs() + middle.abs() + half * step)  # float32 arithmetic
    assert ((ours - true).abs() <= step / 2 + slack)[inside].all()
    # Beyond the range the nearest symbol stands for the number.
    edge = middle + torch.sign(true - middle) * (half - 0.5) * step
    assert ((ours - edge).abs() <= slack)[~inside].all()


def test_constant_and_tiny_and_large_groups_come_back():
    # fp16 scales: subnormal ranges and offsets far larger than the range.
    layout = layout_of(layers=1, heads=1, head_size=16)
    for offset, spread in ((0.0, 0.0), (5.0, 0.0), (0.0, 1e-9), (1000.0, 1e-3), (6e4, 10.0)):
        x = offset + spread * torch.linspace(-1, 1, 16).reshape(1, 1, 1, 16)
        entries = CacheEntries(
            keys=(x,), values=(-x,), mask=torch.ones(1, 1, dtype=torch.long), layout=layout
        )
        for codec in GROUPED:
            found = there_and_back(entries, codec)
            levels = 2 ** CODECS[codec].bits - 1
            assert ((found.keys[0] - x).abs() <= half_step(x, (3,), levels)).all()


def test_one_large_channel_spoils_no_other_in_a_long_prompt():
    # Why keys have a scale a channel: by token, one channel of 100 would cost every other
    # channel its precision (half of 200 / 15 is 6.7).
    entries = cache(layout_of(head_size=64), [48])
    for keys in entries.keys:
        keys[:, :, :, 0] = 100 * torch.sign(keys[:, :, :, 0])
    found = there_and_back(entries, "int4")
    for ours, true in zip(found.keys, entries.keys, strict=True):
        error = (ours - true)[..., 1:].square().mean().sqrt()
        assert error < 0.15 * true[..., 1:].square().mean().sqrt()


@pytest.mark.parametrize("codec", CODECS)
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("where", ["keys", "values", "hidden"])
def test_numbers_that_are_not_finite_are_refused(codec, bad, where):
    entries = cache(layout_of(), [3, 5], hidden=True)
    scales = StaticScales.fit(cache(entries.layout, [9], hidden=True), bits=_bits(codec))
    part = getattr(entries, where)
    (part if where == "hidden" else part[1])[1, -1, -1] = bad
    with pytest.raises(CacheError, match="not finite"):
        encode_entries(entries, codec=codec, scales=scales)


def test_padding_may_hold_anything_and_does_not_travel():
    entries = cache(layout_of(), [3, 5])
    clean = encode_entries(entries, codec="int4")
    entries.keys[0][0, :, 0] = float("nan")
    assert encode_entries(entries, codec="int4") == clean


@pytest.mark.parametrize("codec", ["fp16", "int8", "int4"])
def test_numbers_beyond_half_precision_are_refused_with_a_way_out(codec):
    entries = cache(layout_of(), [3])
    entries.values[0][0, 0, 0, 0] = -1e6
    with pytest.raises(CacheError, match="bf16") as caught:
        encode_entries(entries, codec=codec)
    assert "1000000" not in str(caught.value)
    assert there_and_back(entries, "bf16").values[0][0, 0, 0, 0] == pytest.approx(-1e6, rel=2**-8)


def test_bf16_overflow_is_refused():
    entries = cache(layout_of(), [3])
    entries.values[0][0, 0, 0, 0] = torch.finfo(torch.float32).max
    with pytest.raises(CacheError, match="range"):
        encode_entries(entries, codec="bf16")


def test_mask_of_other_values_is_refused():
    entries = cache(layout_of(), [3])
    with pytest.raises(CacheError, match="mask"):
        encode_entries(dataclasses.replace(entries, mask=2 * entries.mask), codec="fp32")


def test_unknown_codec_and_missing_scales_are_refused():
    entries = cache(layout_of(), [3])
    with pytest.raises(UnknownNameError, match="int4"):
        encode_entries(entries, codec="int5")
    with pytest.raises(InvalidValueError, match="scales"):
        encode_entries(entries, codec="static4")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_other_dtypes_travel(dtype):
    entries = cache(layout_of(), [3, 2], hidden=True)
    cast = dataclasses.replace(
        entries,
        keys=tuple(k.to(dtype) for k in entries.keys),
        values=tuple(v.to(dtype) for v in entries.values),
        hidden=entries.hidden.to(dtype),
    )
    for ours, true in pairs(there_and_back(cast, "fp32"), cast):
        assert torch.equal(ours, true.float())


@pytest.mark.parametrize("head_size", [16, 32, 64, 128])
@pytest.mark.parametrize("hidden", [False, True])
def test_static_scales_keep_the_ratio_that_scales_in_the_message_lose(head_size, hidden):
    # One prompt token and one decoded token.
    layout = layout_of(head_size=head_size, hidden_size=128)
    scales = StaticScales.fit(cache(layout, [64], hidden=hidden))
    entries = cache(layout, [2], hidden=hidden, seed=1)
    int4, static4 = compression_report(entries, ["int4", "static4"], scales=scales)
    assert static4.ratio == 4.0
    assert static4.ratio >= 3.5
    if not hidden:
        assert int4.ratio == pytest.approx(16 / (4 + 32 / head_size))
    # Scales in the message reach 3.5 at head size 64 and above only.
    assert (int4.ratio >= 3.5) == (head_size >= 64)


def test_report_orders_codecs_by_what_they_lose():
    layout = layout_of(head_size=32)
    scales = StaticScales.fit(cache(layout, [100, 100], hidden=True))
    rows = compression_report(cache(layout, [40, 33], hidden=True, seed=1), scales=scales)
    by_name = {row.codec: row for row in rows}
    assert list(by_name) == [name for name in CODECS if name != "static8"]
    assert by_name["fp16"].ratio == 1.0
    assert by_name["fp32"].key_error == by_name["fp32"].value_error == 0.0
    for part in ("key_error", "value_error", "hidden_error"):
        errors = [getattr(by_name[n], part) for n in ("fp32", "fp16", "bf16", "int8", "int4")]
        assert errors == sorted(errors)
        # 200 Gaussian numbers reach about 2.8 deviations each way: a step of 0.35, of which
        # the root mean square error is 0.10 of a deviation; the mean adds to the power.
        assert 0.001 < getattr(by_name["static4"], part) < 0.2
    assert by_name["int4"].message_bytes < by_name["int8"].message_bytes


def test_report_leaves_out_static_codecs_without_scales():
    rows = compression_report(cache(layout_of(), [4]))
    assert [row.codec for row in rows] == ["fp32", "bf16", "fp16", "int8", "int4"]
    assert rows[0].hidden_error is None
    with pytest.raises(InvalidValueError):
        compression_report(cache(layout_of(), [4]), ["static4"])


@settings(max_examples=50)
@given(st.lists(st.integers(0, 15), max_size=40), st.sampled_from([4, 8]))
def test_symbols_round_trip(symbols, bits):
    array = np.array(symbols, np.uint8)
    data = pack_symbols(array, bits)
    assert len(data) == packed_bytes(len(symbols), bits)
    assert unpack_symbols(memoryview(data), len(symbols), bits).tolist() == symbols


@settings(max_examples=50)
@given(case=batches)
def test_scale_count_is_what_the_groups_hold(case):
    layout = layout_of(
        **{name: case[name] for name in ("head_size", "layers", "heads", "hidden_size")}
    )
    shape = TokenShape(layout=layout, counts=tuple(case["counts"]), hidden=case["hidden"])
    channels, n = layout.layers * layout.heads * layout.head_size, sum(case["counts"])
    per_token = layout.layers * layout.heads
    keys = sum(
        channels if count >= min(layout.head_size, 32) else count * per_token
        for count in case["counts"]
        if count
    )
    hidden = n * -(-layout.hidden_size // 128) if case["hidden"] else 0
    assert shape.scales() == keys + n * per_token + hidden
    assert matrix_bytes(shape, CODECS["int8"]) == 4 * shape.scales() + n * shape.width


def _bits(codec):
    return CODECS[codec].bits if codec in STATIC else 4
