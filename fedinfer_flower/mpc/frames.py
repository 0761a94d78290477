"""Frames between a site's handler and its party process: a length, then one envelope."""

from __future__ import annotations

import struct
from typing import IO, Final

from fedinfer_flower.errors import EnvelopeError
from fedinfer_flower.wire.envelope import Envelope, decode, encode

__all__ = ["read_frame", "write_frame"]

_LENGTH: Final = struct.Struct(">Q")


def write_frame(stream: IO[bytes], envelope: Envelope) -> None:
    """Write one frame and flush.

    Examples
    --------
    >>> import io
    >>> from fedinfer_flower.wire.envelope import Kind
    >>> pipe = io.BytesIO()
    >>> write_frame(pipe, Envelope(kind=Kind.PING))
    >>> _ = pipe.seek(0)
    >>> read_frame(pipe).kind, read_frame(pipe)
    (<Kind.PING: 'ping'>, None)
    """
    data = encode(envelope)
    stream.write(_LENGTH.pack(len(data)))
    stream.write(data)
    stream.flush()


def read_frame(stream: IO[bytes]) -> Envelope | None:
    """Read one frame; None at the end of the stream.

    Raises
    ------
    EnvelopeError
        If the stream ends within a frame.
    """
    head = stream.read(_LENGTH.size)
    if not head:
        return None
    if len(head) < _LENGTH.size:
        raise EnvelopeError("a frame that breaks off")
    (length,) = _LENGTH.unpack(head)
    data = stream.read(length)
    if len(data) != length:
        raise EnvelopeError("a frame that breaks off")
    return decode(data)
