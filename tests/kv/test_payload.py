"""The payload: exact lengths, limits before allocation, and typed errors only."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import random
import struct
import tracemalloc
import zlib

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fedinfer_flower.errors import (
    CacheError,
    InvalidValueError,
    SizeLimitError,
    UnknownNameError,
    UnsupportedVersionError,
)
from fedinfer_flower.kv.layout import CacheEntries, CacheLayout
from fedinfer_flower.kv.payload import (
    PayloadLimits,
    decode_entries,
    encode_entries,
    payload_bytes,
)
from fedinfer_flower.kv.quantiser import CODECS, CodecKind
from fedinfer_flower.kv.static_scales import StaticScales

LIMITS = PayloadLimits(max_bytes=1 << 20, max_rows=8, max_tokens=64, max_entries_bytes=1 << 20)
TYPED = (CacheError, SizeLimitError, UnsupportedVersionError)
PREFIX = 20
LAYOUT = CacheLayout(
    layers=2,
    heads=2,
    head_size=16,
    hidden_size=24,
    window=512,
    rope='{"rope_theta":10000.0}',
    architecture="llama",
    tokenizer_digest="0" * 64,
    model_digest="1" * 64,
)


def cache(counts, *, width=None, layout=LAYOUT, hidden=False, seed=0, levels=None):
    width = max(counts) if width is None else width
    draw = torch.Generator().manual_seed(seed)

    def numbers(*shape):
        x = torch.randn(*shape, generator=draw)
        return x if levels is None else (x * levels).round() / levels

    shape = (len(counts), layout.heads, width, layout.head_size)
    return CacheEntries(
        keys=tuple(numbers(*shape) for _ in range(layout.layers)),
        values=tuple(numbers(*shape) for _ in range(layout.layers)),
        mask=torch.tensor([[0] * (width - n) + [1] * n for n in counts]),
        layout=layout,
        hidden=numbers(len(counts), width, layout.hidden_size) if hidden else None,
    )


ENTRIES = cache([3, 5], hidden=True)
SCALES = {
    name: StaticScales.fit(cache([40, 40], hidden=True, seed=3), bits=codec.bits)
    for name, codec in CODECS.items()
    if codec.kind is CodecKind.STATIC
}


def encoded(codec, entries=ENTRIES, *, squeeze=False):
    return encode_entries(entries, codec=codec, scales=SCALES.get(codec), squeeze=squeeze)


def decoded(data, codec="", *, limits=LIMITS):
    return decode_entries(data, limits=limits, scales=SCALES.get(codec))


def header_of(data):
    length = struct.unpack_from(">I", data, 8)[0]
    return json.loads(data[PREFIX : PREFIX + length]), PREFIX + length


def with_header(data, **changes):
    """Return the message with another header, lengths made to fit."""
    values, end = header_of(data)
    header = json.dumps({**values, **changes}, sort_keys=True, separators=(",", ":")).encode()
    return data[:8] + struct.pack(">I", len(header)) + data[12:PREFIX] + header + data[end:]


def with_body(data, body):
    """Return the message with another body, its length made to fit."""
    values, end = header_of(data)
    end += (values["rows"] * values["tokens"] + 7) // 8
    return data[:12] + struct.pack(">Q", len(body)) + data[PREFIX:end] + body


# -- lengths and bytes -------------------------------------------------------------------


@pytest.mark.parametrize("codec", CODECS)
@settings(max_examples=30)
@given(
    counts=st.lists(st.integers(0, 40), min_size=1, max_size=5),
    extra=st.integers(0, 9),
    hidden=st.booleans(),
    head_size=st.sampled_from([16, 32, 64, 80, 128]),
    layers=st.integers(1, 12),
)
def test_length_is_what_the_formula_says(codec, counts, extra, hidden, head_size, layers):
    layout = dataclasses.replace(LAYOUT, head_size=head_size, layers=layers)
    width = max(1, max(counts) + extra)
    entries = cache(counts, width=width, layout=layout, hidden=hidden)
    scales = None
    if codec in SCALES:
        public = cache([2], layout=layout, hidden=hidden)
        scales = StaticScales.fit(public, bits=CODECS[codec].bits)
    data = encode_entries(entries, codec=codec, scales=scales, squeeze=False)
    assert len(data) == payload_bytes(layout, counts, codec, hidden, width=width)


def test_formula_takes_one_prompt_or_several():
    assert payload_bytes(LAYOUT, 5, "int4") == payload_bytes(LAYOUT, [5], "int4")
    assert len(encoded("fp16")) == payload_bytes(LAYOUT, [3, 5], "fp16", True)
    for tokens, width in (([], None), (0, None), ([-1, 3], None), ([5], 4)):
        with pytest.raises(InvalidValueError):
            payload_bytes(LAYOUT, tokens, "fp16", width=width)
    with pytest.raises(UnknownNameError):
        payload_bytes(LAYOUT, 1, "fp17")


@pytest.mark.parametrize("codec", CODECS)
@pytest.mark.parametrize("squeeze", [False, True])
def test_same_cache_gives_the_same_bytes(codec, squeeze):
    data = encoded(codec, squeeze=squeeze)
    assert encoded(codec, cache([3, 5], hidden=True), squeeze=squeeze) == data
    again = encode_entries(
        decoded(data, codec), codec=codec, scales=SCALES.get(codec), squeeze=squeeze
    )
    if CODECS[codec].kind is CodecKind.FLOAT:
        assert again == data


def test_bytes_of_version_1_are_what_they_were():
    # Whole numbers over 4: exact in every codec used here, on any machine.
    steps = torch.arange(2 * 2 * 3 * 16).reshape(2, 2, 3, 16) % 15 / 4
    entries = CacheEntries(
        keys=(steps, steps + 1),
        values=(-steps, steps * 2),
        mask=torch.tensor([[0, 1, 1], [1, 1, 1]]),
        layout=LAYOUT,
    )
    found = {
        codec: hashlib.sha256(encode_entries(entries, codec=codec, squeeze=False)).hexdigest()[:16]
        for codec in ("fp32", "bf16", "fp16", "int8", "int4")
    }
    assert found == {
        "fp32": "2adb87e845d7f4e2",
        "bf16": "c1075813a6975a60",
        "fp16": "ed2ec430da591539",
        "int8": "6973f9d9975068c7",
        "int4": "5b080db34646096f",
    }


def test_zlib_is_applied_only_where_it_makes_the_message_smaller():
    random_, regular = cache([5]), cache([5], levels=1)
    for entries, smaller in ((random_, False), (regular, True)):
        plain = encode_entries(entries, codec="int8", squeeze=False)
        squeezed = encode_entries(entries, codec="int8")
        assert header_of(squeezed)[0]["squeezed"] is smaller
        assert (len(squeezed) < len(plain)) is smaller
        for a, b in zip(decoded(plain).keys, decoded(squeezed).keys, strict=True):
            assert torch.equal(a, b)


def test_padding_takes_a_bit_a_token():
    narrow = encoded("fp16", cache([5]))
    wide = encoded("fp16", cache([5], width=61))
    # 61 bits are 7 bytes more than 5 bits, and the header has one digit more.
    assert len(wide) - len(narrow) == 7 + 1


def test_empty_rows_travel():
    entries = cache([0, 4], hidden=True)
    for codec in CODECS:
        assert decoded(encoded(codec, entries), codec).mask.tolist() == [[0] * 4, [1] * 4]
    nobody = cache([0, 0], width=3)
    assert not decoded(encoded("int4", nobody)).mask.any()


def test_cache_without_tokens_is_refused():
    with pytest.raises(CacheError, match="without"):
        encode_entries(ENTRIES.cut(0, 0), codec="fp16")
    with pytest.raises(CacheError, match="without"):
        encode_entries(ENTRIES.select([]), codec="fp16")


def test_mask_may_be_of_any_pattern():
    mask = torch.tensor([[1, 0, 1, 1, 0], [0, 1, 0, 0, 1]])
    entries = dataclasses.replace(cache([5, 5]), mask=mask)
    found = decoded(encoded("fp32", entries))
    assert torch.equal(found.mask, mask)
    real = mask.bool()
    for ours, true in zip(found.keys, entries.keys, strict=True):
        assert torch.equal(ours.transpose(1, 2)[real], true.transpose(1, 2)[real])


# -- what is refused ---------------------------------------------------------------------


def test_limits_are_kept():
    data = encoded("int4")
    decoded(data)
    floats = 4 * 2 * 5 * LAYOUT.floats_per_token(hidden=True)
    for limits in (
        {"max_bytes": len(data) - 1},
        {"max_rows": 1},
        {"max_tokens": 4},
        {"max_entries_bytes": floats - 1},
    ):
        decoded(data, limits=PayloadLimits(**{k: v + 1 for k, v in limits.items()}))
        with pytest.raises(SizeLimitError):
            decoded(data, limits=PayloadLimits(**limits))
    for bad in (0, -1, 1.5, True):
        with pytest.raises(InvalidValueError):
            PayloadLimits(max_rows=bad)


def test_other_versions_are_refused():
    data = encoded("int4")
    with pytest.raises(UnsupportedVersionError):
        decoded(data[:4] + b"\0\2" + data[6:])
    layout = {**header_of(data)[0]["layout"], "version": 2}
    with pytest.raises(UnsupportedVersionError):
        decoded(with_header(data, layout=layout))


@pytest.mark.parametrize(
    "changes",
    [
        {"codec": "int5"},
        {"codec": 4},
        {"codec": []},
        {"hidden": 1},
        {"hidden": False},
        {"squeezed": 0},
        {"squeezed": True},
        {"rows": 0},
        {"rows": -1},
        {"rows": True},
        {"rows": 2.0},
        {"rows": "2"},
        {"rows": None},
        {"rows": 1},
        {"tokens": 0},
        {"tokens": 9},
        {"scales": "0" * 64},
        {"scales": None},
        {"layout": None},
        {"layout": {}},
        {"layout": "{}"},
        {"more": 1},
        {"rows": 10**400},
    ],
)
def test_header_that_lies_is_refused(changes):
    with pytest.raises(TYPED):
        decoded(with_header(encoded("int4"), **changes))


@pytest.mark.parametrize(
    "changes",
    [
        {"layers": 3},
        {"layers": 1024, "heads": 1024, "head_size": 65536},
        {"heads": True},
        {"head_size": 0},
        {"hidden_size": 25},
        {"version": "x" * 1000},
        {"version": 10**300},
        {"version": True},
        {"version": 1.0},
        {"model_digest": "Z" * 64},
        {"rope": None},
        {"rope": "\ud800" * 5000},
        {"more": 1},
    ],
)
def test_layout_that_lies_is_refused(changes):
    data = encoded("int4")
    layout = {**header_of(data)[0]["layout"], **changes}
    with pytest.raises(TYPED) as caught:
        decoded(with_header(data, layout=layout))
    assert len(str(caught.value)) < 400


def test_header_in_another_form_is_refused():
    data = encoded("int4")
    values, end = header_of(data)
    for text in (
        json.dumps(values),
        json.dumps(values, separators=(",", ":"))[:-1] + ',"rows":2}',
        "[" * 60_000,
        "null",
        "",
        '{"rows":' + "9" * 5000 + "}",
    ):
        raw = text.encode()
        bad = data[:8] + struct.pack(">I", len(raw)) + data[12:PREFIX] + raw + data[end:]
        with pytest.raises(CacheError):
            decoded(bad)
    raw = b"\xff\xfe" + data[PREFIX + 2 : end]
    with pytest.raises(CacheError):
        decoded(data[:PREFIX] + raw + data[end:])


@pytest.mark.parametrize("codec", ["fp32", "bf16", "fp16"])
def test_numbers_that_are_not_finite_are_refused(codec):
    data = encoded(codec)
    # Sign 0, exponent all ones, mantissa 0: infinity.
    infinity = {"fp32": b"\0\0\x80\x7f", "bf16": b"\x80\x7f", "fp16": b"\0\x7c"}[codec]
    for bad in (infinity, infinity[:-2] + b"\xff\x7f"):
        with pytest.raises(CacheError, match="not finite"):
            decoded(data[: -len(bad)] + bad)


@pytest.mark.parametrize("bad", [b"\0\x7c", b"\xff\x7f", b"\0\xfc"])
@pytest.mark.parametrize("codec", ["int8", "int4"])
def test_scales_that_are_not_finite_are_refused(codec, bad):
    data = encoded(codec)
    start = header_of(data)[1] + 2  # 10 bits of mask
    for at in (start, start + 2):  # least value, step
        with pytest.raises(CacheError, match="scales"):
            decoded(data[:at] + bad + data[at + 2 :])


def test_negative_step_is_refused():
    data = encoded("int4")
    at = header_of(data)[1] + 4
    with pytest.raises(CacheError, match="negative"):
        decoded(data[:at] + b"\0\xbc" + data[at + 2 :])


def test_bits_after_the_mask_and_after_the_last_symbol_are_refused():
    data = encoded("int4")
    at = header_of(data)[1] + 1
    with pytest.raises(CacheError, match="mask"):
        decoded(data[:at] + bytes([data[at] | 0x80]) + data[at + 1 :])
    odd = dataclasses.replace(LAYOUT, layers=1, heads=1, head_size=16, hidden_size=1)
    data = encode_entries(cache([1], layout=odd, hidden=True), codec="int4", squeeze=False)
    with pytest.raises(CacheError, match="last symbol"):
        decoded(data[:-1] + bytes([data[-1] | 0x10]))


@pytest.mark.parametrize("codec", CODECS)
@pytest.mark.parametrize("squeeze", [False, True])
def test_every_truncation_and_every_added_byte_is_refused(codec, squeeze):
    data = encoded(codec, cache([3, 5], hidden=True, levels=1), squeeze=squeeze)
    for stop in (*range(min(len(data), 900)), *range(900, len(data), 37), len(data) - 1):
        with pytest.raises(TYPED):
            decoded(data[:stop], codec)
    with pytest.raises(TYPED):
        decoded(data + b"\0", codec)


# -- bombs -------------------------------------------------------------------------------


def peak_of(call):
    tracemalloc.start()
    try:
        with pytest.raises(TYPED):
            call()
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


def test_zlib_bomb_is_stopped_at_the_length_that_the_header_implies():
    squeezed = encoded("int8", cache([3, 5], levels=1), squeeze=True)
    assert header_of(squeezed)[0]["squeezed"]
    bomb = zlib.compress(bytes(100 << 20), 9)
    assert len(bomb) < 200_000
    for body in (bomb, bomb[:-9]):
        assert peak_of(lambda body=body: decoded(with_body(squeezed, body))) < 1 << 20


def test_body_that_zlib_does_not_end_at_is_refused():
    plain = encoded("int8", cache([3, 5], levels=1))
    squeezed = encoded("int8", cache([3, 5], levels=1), squeeze=True)
    raw = plain[header_of(plain)[1] + 2 :]
    good = zlib.compress(raw, 6)
    assert with_body(squeezed, good) == squeezed
    for body in (
        good + b"\0",
        good[:-1],
        zlib.compress(raw + b"\0"),
        zlib.compress(raw[:-1]),
        zlib.compress(raw, 0),  # longer than it was
        raw,
        b"",
    ):
        with pytest.raises(CacheError):
            decoded(with_body(squeezed, body))


def test_claim_of_a_huge_cache_is_refused_before_it_is_allocated():
    # All padding: a mask of zeros and an empty body stand for gigabytes.
    wide = dataclasses.replace(LAYOUT, layers=1024, heads=1024, head_size=1024)
    empty = encoded("int4", cache([0], width=64))
    layout = json.loads(wide.to_json())
    for limits in (LIMITS, PayloadLimits()):
        bomb = with_header(empty, layout=layout)
        assert peak_of(lambda bomb=bomb, limits=limits: decoded(bomb, limits=limits)) < 1 << 20
    for rows, tokens in ((1 << 40, 1), (1, 1 << 40), (8, 64), (1024, 8192)):
        bomb = with_header(empty, rows=rows, tokens=tokens)
        assert peak_of(lambda bomb=bomb: decoded(bomb, limits=PayloadLimits())) < 1 << 20


@pytest.mark.parametrize("codec", CODECS)
def test_decoding_takes_a_few_times_the_cache(codec):
    entries = cache([30] * 8, width=40, hidden=True)
    data = encoded(codec, entries)
    size = 4 * 8 * 40 * LAYOUT.floats_per_token(hidden=True)
    tracemalloc.start()
    try:
        decoded(data, codec)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 4 * size


# -- random damage -----------------------------------------------------------------------


def damaged(good, draw):
    """Return a message with one of the faults that a bad sender or line makes."""
    data = bytearray(good)
    kind = draw.randrange(6)
    if kind == 0:  # bits
        for _ in range(draw.choice((1, 1, 2, 16))):
            data[draw.randrange(len(data))] ^= 1 << draw.randrange(8)
    elif kind == 1:  # the front, where lengths and header are
        for _ in range(draw.choice((1, 2, 4))):
            data[draw.randrange(min(len(data), 600))] = draw.randrange(256)
    elif kind == 2:
        del data[draw.randrange(len(data)) :]
    elif kind == 3:
        data += draw.randbytes(draw.randrange(1, 40))
    elif kind == 4:  # a lie about a length
        at, size = draw.choice(((8, 4), (12, 8)))
        data[at : at + size] = draw.randbytes(size)
    else:  # a piece moved
        a, b = draw.randrange(len(data)), draw.randrange(len(data))
        data[a : a + 16] = data[b : b + 16]
    return bytes(data)


def test_12000_damaged_messages_raise_typed_errors_only():
    draw = random.Random(20)  # noqa: S311 - repeatable damage
    small = cache([1, 2], hidden=True, levels=1)
    messages = [(c, encoded(c, small, squeeze=s)) for c in CODECS for s in (False, True)]
    largest = LIMITS.max_entries_bytes // 4
    refused = accepted = 0  # a refusal counts if its text is short
    tracemalloc.start()
    try:
        for number in range(12_000):
            codec, good = messages[number % len(messages)]
            try:
                found = decoded(damaged(good, draw), codec)
            except TYPED as error:
                refused += len(str(error)) < 600
            else:
                # Damage that makes another valid cache is for the seal to notice.
                accepted += 1
                found.require_finite()
                assert found.rows * found.tokens * LAYOUT.entry_floats <= largest
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert refused + accepted == 12_000
    assert refused > 8_000
    assert accepted > 100
    # No message made the decoder take more than the limits allow for one cache.
    assert peak < 4 * LIMITS.max_entries_bytes


def test_random_bytes_are_refused():
    draw = random.Random(21)  # noqa: S311
    for _ in range(500):
        noise = draw.randbytes(draw.randrange(200))
        for data in (noise, b"FIKV" + noise, b"FIKV\0\1\0\0" + noise):
            with pytest.raises(TYPED):
                decoded(data)


def test_error_texts_carry_no_number_of_the_cache():
    entries = cache([3, 5])
    entries.keys[1][0, 0, -1, 3] = -123456.75
    for codec in ("fp16", "int4"):
        with pytest.raises(CacheError) as caught:
            encode_entries(entries, codec=codec)
        assert "123" not in caught.value.message
