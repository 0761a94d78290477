"""An envelope as Flower content: one RecordDict with one packed raw Array.

One Array and not one per tensor: every Array is several objects and HTTP requests, and
two hundred small ones take twenty times as long as their bytes in one.
"""

from __future__ import annotations

import hashlib
from typing import Final

from flwr.app import Array, ArrayRecord, RecordDict

from fedinfer_flower.errors import EnvelopeError
from fedinfer_flower.wire.envelope import DEFAULT_LIMITS, Envelope, WireLimits, decode, encode

__all__ = ["content_digest", "pack", "unpack"]

_RECORD: Final = "fedinfer"
_ARRAY: Final = "envelope"
_STYPE: Final = "fedinfer.envelope"


def pack(envelope: Envelope) -> RecordDict:
    """Return Flower content that carries the envelope.

    Examples
    --------
    >>> from fedinfer_flower.wire.envelope import Kind
    >>> unpack(pack(Envelope(kind=Kind.PING, run_id=7))).run_id
    7
    """
    data = encode(envelope)
    array = Array(dtype="uint8", shape=(len(data),), stype=_STYPE, data=data)
    return RecordDict({_RECORD: ArrayRecord({_ARRAY: array})})


def content_digest(content: RecordDict) -> bytes:
    """Return the SHA-256 of what `pack` made: the same at both ends of a message.

    Raises
    ------
    EnvelopeError
        If it is no packed envelope.
    """
    if _RECORD not in content.array_records or _ARRAY not in content.array_records[_RECORD]:
        raise EnvelopeError("the message is no packed envelope")
    return hashlib.sha256(content.array_records[_RECORD][_ARRAY].data).digest()


def unpack(content: RecordDict, *, limits: WireLimits = DEFAULT_LIMITS) -> Envelope:
    """Return the envelope in Flower content.

    Raises
    ------
    ProtocolError
        If the content is anything but one packed Array with one valid envelope.
    """
    if set(content.keys()) != {_RECORD} or set(content.array_records.keys()) != {_RECORD}:
        raise EnvelopeError("the message does not have exactly one record, 'fedinfer'")
    record = content.array_records[_RECORD]
    if list(record.keys()) != [_ARRAY]:
        raise EnvelopeError("the record does not have exactly one array, 'envelope'")
    array = record[_ARRAY]
    if array.stype != _STYPE:
        raise EnvelopeError("the array is not a packed envelope")
    return decode(array.data, limits=limits)
