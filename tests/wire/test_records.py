from __future__ import annotations

import hashlib

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, ConfigRecord, MetricRecord, RecordDict

from fedinfer_flower.errors import EnvelopeError, ProtocolError, SizeLimitError
from fedinfer_flower.wire.actions import ACTIONS, PREFIX, message_type
from fedinfer_flower.wire.envelope import Envelope, Kind, WireLimits, encode
from fedinfer_flower.wire.records import content_digest, pack, unpack

ENVELOPE = Envelope(kind=Kind.ANSWER, run_id=7, sections=(("scores", b"abc"),))


def array(data: bytes, *, stype: str = "fedinfer.envelope") -> Array:
    return Array(dtype="uint8", shape=(len(data),), stype=stype, data=data)


@pytest.mark.parametrize(("size", "record"), [(10, ConfigRecord), (2 << 20, ArrayRecord)])
def test_pack_makes_one_record_with_one_value(size, record):
    envelope = Envelope(kind=Kind.ANSWER, run_id=7, sections=(("scores", bytes(size)),))
    content = pack(envelope)
    assert list(content.keys()) == ["fedinfer"]
    assert isinstance(content["fedinfer"], record)
    assert list(content["fedinfer"].keys()) == ["envelope"]
    assert unpack(content) == envelope


def test_digest_is_of_the_envelope_however_it_is_packed():
    in_array = RecordDict({"fedinfer": ArrayRecord({"envelope": array(GOOD)})})
    assert content_digest(in_array) == content_digest(pack(ENVELOPE))
    assert content_digest(in_array) == hashlib.sha256(GOOD).digest()


GOOD = encode(ENVELOPE)
BAD = {
    "nothing": RecordDict(),
    "other record name": RecordDict({"other": ArrayRecord({"envelope": array(GOOD)})}),
    "other array name": RecordDict({"fedinfer": ArrayRecord({"other": array(GOOD)})}),
    "no array": RecordDict({"fedinfer": ArrayRecord()}),
    "two arrays": RecordDict(
        {"fedinfer": ArrayRecord({"envelope": array(GOOD), "more": array(GOOD)})}
    ),
    "two records": RecordDict(
        {"fedinfer": ArrayRecord({"envelope": array(GOOD)}), "more": ArrayRecord()}
    ),
    "config beside it": RecordDict(
        {"fedinfer": ArrayRecord({"envelope": array(GOOD)}), "config": ConfigRecord()}
    ),
    "config with text": RecordDict({"fedinfer": ConfigRecord({"envelope": GOOD.hex()})}),
    "config with parts": RecordDict({"fedinfer": ConfigRecord({"envelope": [GOOD, GOOD]})}),
    "config with more": RecordDict({"fedinfer": ConfigRecord({"envelope": GOOD, "more": 1})}),
    "config truncated": RecordDict({"fedinfer": ConfigRecord({"envelope": GOOD[:-1]})}),
    "metric record": RecordDict({"fedinfer": MetricRecord({"envelope": 1})}),
    "stype of numpy": RecordDict(
        {"fedinfer": ArrayRecord({"envelope": array(GOOD, stype="numpy.ndarray")})}
    ),
    "a real numpy array": RecordDict({"fedinfer": ArrayRecord({"envelope": Array(np.zeros(3))})}),
    "empty array": RecordDict({"fedinfer": ArrayRecord({"envelope": array(b"")})}),
    "truncated": RecordDict({"fedinfer": ArrayRecord({"envelope": array(GOOD[:-1])})}),
}


@pytest.mark.parametrize("content", BAD.values(), ids=BAD)
def test_unpack_of_other_content_raises_typed_error(content):
    with pytest.raises(ProtocolError):
        unpack(content)


def test_unpack_trusts_neither_shape_nor_dtype_of_the_array():
    lying = Array(dtype="float64", shape=(2**40,), stype="fedinfer.envelope", data=GOOD)
    assert unpack(RecordDict({"fedinfer": ArrayRecord({"envelope": lying})})) == ENVELOPE


def test_unpack_above_limits_raises_size_limit():
    with pytest.raises(SizeLimitError):
        unpack(pack(ENVELOPE), limits=WireLimits(max_payload_bytes=2))


def test_unpack_error_does_not_quote_the_content():
    with pytest.raises(EnvelopeError) as caught:
        unpack(RecordDict({"CANARY": ConfigRecord({"x": "CANARY"})}))
    assert "CANARY" not in str(caught.value)


def test_message_types_are_what_flower_accepts():
    for action in ACTIONS:
        kind, _, name = message_type(action).partition(".")
        assert kind == "query"
        assert name.isidentifier()
        assert message_type(action).startswith(PREFIX)
