"""The envelope: what goes in comes out, and nothing else comes out but typed errors."""

from __future__ import annotations

import hashlib
import json
import random
import struct
import tracemalloc

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedinfer_flower.errors import (
    EnvelopeError,
    ProtocolError,
    SizeLimitError,
    UnsupportedVersionError,
)
from fedinfer_flower.wire.envelope import MAGIC, VERSION, Envelope, Kind, WireLimits, decode, encode

PREFIX = struct.Struct(">4sHHIQ")
U64 = st.integers(0, 2**64 - 1)
JSON = st.recursive(
    st.none() | st.booleans() | U64 | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=8,
)
ENVELOPES = st.builds(
    Envelope,
    kind=st.sampled_from(Kind),
    run_id=U64,
    query_id=st.from_regex(r"[0-9a-zA-Z_-]{0,64}", fullmatch=True),
    key_id=st.from_regex(r"([0-9a-f]{64})?", fullmatch=True),
    sender=U64,
    shape=st.lists(U64, max_size=8).map(tuple),
    codec=st.from_regex(r"[a-z0-9-]{0,32}", fullmatch=True),
    meta=st.dictionaries(st.text(max_size=8), JSON, max_size=4),
    sections=st.dictionaries(
        st.from_regex(r"[a-z][a-z0-9-]{0,31}", fullmatch=True), st.binary(max_size=64), max_size=4
    ).map(lambda sections: tuple(sections.items())),
)
HEADER = {
    "kind": "ping",
    "run": 7,
    "query": "",
    "key": "",
    "sender": 0,
    "shape": [],
    "codec": "",
    "meta": {},
    "sections": [],
}


def raw(header: object, payload: bytes = b"", **prefix: int) -> bytes:
    """Put together an envelope by hand; `header` is bytes or a JSON value."""
    if isinstance(header, dict) and header.keys() >= HEADER.keys():
        header = {"digest": hashlib.sha256(payload).hexdigest()} | header
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return (
        PREFIX.pack(
            MAGIC,
            prefix.get("version", VERSION),
            prefix.get("reserved", 0),
            prefix.get("header_bytes", len(text)),
            prefix.get("payload_bytes", len(payload)),
        )
        + text
        + payload
    )


def sample() -> bytes:
    return encode(
        Envelope(
            kind=Kind.ANSWER,
            run_id=2**63,
            query_id="ab-0",
            key_id="0f" * 32,
            sender=1000,
            shape=(5, 3),
            codec="plain",
            meta={"commitment": "c" * 64, "deep": {"list": [1, 2.5, None, True, "x"]}},
            sections=(("scores", bytes(range(60))), ("more", b"")),
        )
    )


@settings(max_examples=100, deadline=None, derandomize=True)
@given(ENVELOPES)
def test_envelope_after_a_round_trip_is_the_same(envelope):
    data = encode(envelope)

    for form in (data, memoryview(data), bytearray(data)):
        assert decode(form) == envelope
    assert encode(decode(data)) == data


def test_decode_of_large_payload_copies_nothing():
    data = encode(Envelope(kind=Kind.ANSWER, sections=(("scores", bytes(8 << 20)),)))
    tracemalloc.start()
    try:
        envelope = decode(data)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()

    assert len(envelope.section("scores")) == 8 << 20
    assert peak < 1 << 20  # an eighth of the payload: a copy would show


@settings(max_examples=300, deadline=None, derandomize=True)
@given(st.binary(max_size=200))
def test_decode_of_random_bytes_raises_typed_error(data):
    for form in (data, MAGIC + data, raw(data)):
        with pytest.raises(ProtocolError):
            decode(form)


def test_decode_of_truncation_at_every_length_raises_typed_error():
    good = sample()
    for length in range(len(good)):
        with pytest.raises(EnvelopeError):
            decode(good[:length])


def test_decode_of_extended_bytes_raises_typed_error():
    good = sample()
    for extra in (b"\0", b" ", good):
        with pytest.raises(EnvelopeError):
            decode(good + extra)
        with pytest.raises(ProtocolError):
            decode(extra + good)


def test_decode_of_every_single_bit_flip_is_an_error_or_another_envelope():
    good = sample()
    original = decode(good)
    payload_at = good.index(bytes(range(60)))
    for bit in range(8 * len(good)):
        bad = bytearray(good)
        bad[bit // 8] ^= 1 << bit % 8
        try:
            seen = decode(bytes(bad))
        except ProtocolError:
            continue
        assert bit // 8 < payload_at  # the digest notices every flip of the payload
        assert seen != original


def test_decode_of_many_random_damages_raises_only_typed_errors():
    rng = random.Random(20260)  # noqa: S311 - reproducible, not secret
    good = sample()
    n_read = 0
    for _ in range(3000):
        bad = bytearray(good)
        for _ in range(rng.randint(1, 6)):
            at = rng.randrange(len(bad))
            match rng.randrange(3):
                case 0:
                    bad[at] = rng.randrange(256)
                case 1:
                    del bad[at : at + rng.randint(1, 5)]
                case _:
                    bad[at:at] = rng.randbytes(rng.randint(1, 5))
        try:
            decode(bytes(bad))
            n_read += 1
        except ProtocolError:
            pass
    assert n_read < 1000  # damage inside the payload only is read; most of it is not there


@pytest.mark.parametrize("version", [0, 2, 255, 65_535])
def test_decode_of_another_version_raises_unsupported_version(version):
    with pytest.raises(UnsupportedVersionError) as caught:
        decode(raw(HEADER, version=version))
    assert str(version) in caught.value.message


def test_decode_of_reserved_bits_raises_typed_error():
    with pytest.raises(EnvelopeError):
        decode(raw(HEADER, reserved=1))


@pytest.mark.parametrize(
    ("header_bytes", "payload_bytes"), [(2**32 - 1, 0), (10, 2**64 - 1), (2**32 - 1, 2**64 - 1)]
)
def test_decode_of_huge_declared_length_raises_before_allocating(header_bytes, payload_bytes):
    data = raw(HEADER, header_bytes=header_bytes, payload_bytes=payload_bytes)
    tracemalloc.start()
    try:
        with pytest.raises(SizeLimitError):
            decode(data)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 1 << 20  # declared: from 4 GiB up


def test_decode_above_own_limits_raises_size_limit():
    header = Envelope(kind=Kind.PING, meta={"long": "x" * 2000})
    payload = Envelope(kind=Kind.PING, sections=(("s", bytes(2000)),))
    limits = WireLimits(max_header_bytes=1000, max_payload_bytes=1000)
    for envelope in (header, payload):
        assert decode(encode(envelope)) == envelope
        with pytest.raises(SizeLimitError):
            decode(encode(envelope), limits=limits)


def test_decode_of_too_many_sections_raises_typed_error():
    data = encode(Envelope(kind=Kind.PING, sections=tuple((f"s{i}", b"") for i in range(5))))
    assert len(decode(data, limits=WireLimits(max_sections=5)).sections) == 5
    with pytest.raises(EnvelopeError):
        decode(data, limits=WireLimits(max_sections=4))


BAD_TEXTS = {
    "empty": b"",
    "duplicate field": json.dumps(HEADER).encode()[:-1] + b', "run": 7}',
    "duplicate meta key": json.dumps(HEADER)
    .replace('"meta": {}', '"meta": {"a": 1, "a": 2}')
    .encode(),
    "NaN": json.dumps(HEADER | {"meta": {"x": float("nan")}}).encode(),
    "Infinity": json.dumps(HEADER | {"meta": {"x": [-float("inf")]}}).encode(),
    "deep list": b"[" * 100_000,
    "deep and closed": b"[" * 100_000 + b"]" * 100_000,
    "deep meta": json.dumps(HEADER)
    .replace('"meta": {}', '"meta": {"a": ' + "[" * 50_000 + "]" * 50_000 + "}")
    .encode(),
    "integer of 5000 digits": json.dumps(HEADER)
    .replace('"run": 7', '"run": ' + "9" * 5000)
    .encode(),
    "not UTF-8": b"\xff\xfe\xfa",
    "two values": json.dumps(HEADER).encode() + b"{}",
}


@pytest.mark.parametrize("text", BAD_TEXTS.values(), ids=BAD_TEXTS)
def test_decode_of_bad_header_text_raises_typed_error_without_quoting_it(text):
    with pytest.raises(EnvelopeError) as caught:
        decode(raw(text))
    assert caught.value.__cause__ is None
    assert caught.value.message == "the header is not JSON"


BAD_HEADERS = {
    "list": [],
    "text": "x",
    "null": None,
    "missing field": {k: v for k, v in HEADER.items() if k != "key"},
    "unknown field": HEADER | {"extra": 1},
    "kind unknown": HEADER | {"kind": "pong"},
    "kind name": HEADER | {"kind": "PING"},
    "kind number": HEADER | {"kind": 1},
    "kind list": HEADER | {"kind": ["ping"]},
    "run negative": HEADER | {"run": -1},
    "run too large": HEADER | {"run": 2**64},
    "run float": HEADER | {"run": 7.0},
    "run true": HEADER | {"run": True},
    "run text": HEADER | {"run": "7"},
    "run null": HEADER | {"run": None},
    "sender too large": HEADER | {"sender": 10**30},
    "query too long": HEADER | {"query": "a" * 65},
    "query with newline": HEADER | {"query": "a\n"},
    "query surrogate": HEADER | {"query": "\ud800"},
    "query fullwidth digit": HEADER | {"query": "\uff11"},
    "query list": HEADER | {"query": []},
    "key short": HEADER | {"key": "0f"},
    "key upper case": HEADER | {"key": "0F" * 32},
    "shape number": HEADER | {"shape": 3},
    "shape long": HEADER | {"shape": [1] * 9},
    "shape negative": HEADER | {"shape": [-1]},
    "shape float": HEADER | {"shape": [1.0]},
    "codec upper case": HEADER | {"codec": "Plain"},
    "codec null": HEADER | {"codec": None},
    "meta list": HEADER | {"meta": []},
    "meta null": HEADER | {"meta": None},
    "sections object": HEADER | {"sections": {}},
    "sections of numbers": HEADER | {"sections": [1]},
    "section of three": HEADER | {"sections": [["a", 0, 0]]},
    "section name number": HEADER | {"sections": [[1, 0]]},
    "section name empty": HEADER | {"sections": [["", 0]]},
    "section length negative": HEADER | {"sections": [["a", -1], ["b", 1]]},
    "section length text": HEADER | {"sections": [["a", "0"]]},
    "section twice": HEADER | {"sections": [["a", 0], ["a", 0]]},
}


@pytest.mark.parametrize("header", BAD_HEADERS.values(), ids=BAD_HEADERS)
def test_decode_of_bad_header_value_raises_typed_error(header):
    assert decode(raw(HEADER)).run_id == 7
    with pytest.raises(EnvelopeError):
        decode(raw(header))


@pytest.mark.parametrize(
    "sections",
    [
        [["a", 5]],  # one byte more than there is
        [["a", 3]],  # one byte that belongs to nobody
        [["a", 4], ["b", 4]],  # both would be the same bytes
        [["a", 2**64 - 1]],
        [["a", 2**63], ["b", 2**63 + 4]],  # the sum is 4 in 64-bit arithmetic
        [],
    ],
)
def test_decode_of_sections_that_do_not_fill_the_payload_raises_typed_error(sections):
    good = raw(HEADER | {"sections": [["a", 1], ["b", 3]]}, b"wxyz")
    assert bytes(decode(good).section("b")) == b"xyz"
    with pytest.raises(EnvelopeError):
        decode(raw(HEADER | {"sections": sections}, b"wxyz"))


def test_section_that_is_missing_raises_typed_error():
    with pytest.raises(EnvelopeError, match="'scores'"):
        Envelope(kind=Kind.ANSWER).section("scores")


def test_require_sections_with_one_too_many_raises_typed_error():
    envelope = Envelope(kind=Kind.ANSWER, sections=(("a", b""), ("b", b"")))
    envelope.require_sections("a", "b")
    for names in ((), ("a",), ("b", "a"), ("a", "b", "c")):
        with pytest.raises(EnvelopeError):
            envelope.require_sections(*names)
