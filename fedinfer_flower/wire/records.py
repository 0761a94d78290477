"""An envelope as Flower content: one RecordDict with one packed value.

Every object in a message is a request or two at each hop, and they are what a small query
costs: a value in a ConfigRecord is three objects, an Array five, two hundred small Arrays
twenty times the time of their bytes in one. A large one is an Array all the same, because
Flower cuts Arrays into chunks and serialises them several times as fast.
"""

from __future__ import annotations

import hashlib
from typing import Final

from flwr.app import Array, ArrayRecord, ConfigRecord, RecordDict

from fedinfer_flower.errors import EnvelopeError
from fedinfer_flower.wire.envelope import DEFAULT_LIMITS, Envelope, WireLimits, decode, encode

__all__ = ["content_digest", "pack", "packed_bytes", "unpack"]

_RECORD: Final = "fedinfer"
_VALUE: Final = "envelope"
_STYPE: Final = "fedinfer.envelope"
_SMALL_BYTES: Final = 1 << 20


def pack(envelope: Envelope) -> RecordDict:
    """Return Flower content that carries the envelope.

    Examples
    --------
    >>> from fedinfer_flower.wire.envelope import Kind
    >>> unpack(pack(Envelope(kind=Kind.PING, run_id=7))).run_id
    7
    """
    data = encode(envelope)
    if len(data) <= _SMALL_BYTES:
        return RecordDict({_RECORD: ConfigRecord({_VALUE: data})})
    array = Array(dtype="uint8", shape=(len(data),), stype=_STYPE, data=data)
    return RecordDict({_RECORD: ArrayRecord({_VALUE: array})})


def packed_bytes(content: RecordDict) -> bytes:
    """Return the bytes of an envelope in Flower content, unread.

    Raises
    ------
    EnvelopeError
        If the content is anything but one packed value.
    """
    if set(content.keys()) != {_RECORD}:
        raise EnvelopeError("the message does not have exactly one record, 'fedinfer'")
    record = content[_RECORD]
    if list(record.keys()) != [_VALUE]:
        raise EnvelopeError("the record does not have exactly one value, 'envelope'")
    value: object = record[_VALUE]
    if isinstance(value, Array) and value.stype == _STYPE:
        value = value.data
    if not isinstance(value, bytes):
        raise EnvelopeError("the record does not hold a packed envelope")
    return value


def content_digest(content: RecordDict) -> bytes:
    """Return the SHA-256 of what `pack` made: the same at both ends of a message.

    Raises
    ------
    EnvelopeError
        If it is no packed envelope.
    """
    return hashlib.sha256(packed_bytes(content)).digest()


def unpack(content: RecordDict, *, limits: WireLimits = DEFAULT_LIMITS) -> Envelope:
    """Return the envelope in Flower content.

    Raises
    ------
    ProtocolError
        If the content is anything but one packed value with one valid envelope.
    """
    return decode(packed_bytes(content), limits=limits)
