"""What must hold of bytes before the native HE library reads them.

TenSEAL parses what it is given and takes the parts of a message at their word. Bytes from
another role must be checked before the native library reads them, whoever sent them: this
gate walks the message with bounded readers, in Python, and lets exactly one form pass.

The gate decides on structure alone. It does not authenticate the sender, and a ciphertext of
anything whatever passes: homomorphic encryption is malleable. The envelope authenticates;
the querier checks the range of what it decrypts.

Forms (protocol buffers of TenSEAL 0.3, fields in this order, nothing else)::

    ciphertext  1: sizes (packed, one entry)   2: SEAL object   3: scale (CKKS only)
    public key  1: SEAL object (parameters)    2: { 1: SEAL object (key)  2: flags  3: scale }
"""

from __future__ import annotations

import struct
from collections.abc import Iterator

from fedinfer_flower.errors import InvalidCiphertextError

__all__ = ["check_ciphertext", "check_public_key", "public_key_has_secret"]

# Wire types of protocol buffers.
_VARINT, _FIXED64, _BYTES = 0, 1, 2

# seal::Serialization::SEALHeader: magic, header size, version (2), compression, reserved (2),
# length of the whole object (8).
_SEAL_MAGIC = b"\x5e\xa1\x10"
_SEAL_HEADER = struct.Struct("<3sBBBHQ")
_SEAL_COMPRESSIONS = 3

_DOUBLE = struct.Struct("<d")
_MAX_VARINT_BYTES = 5
"""Lengths, tags and sizes all stay below 2^35."""

Field = tuple[int, int, memoryview]


def _varint(data: memoryview, start: int) -> tuple[int, int]:
    """Read a bounded, minimal varint; return its value and the offset behind it."""
    value = 0
    for count in range(_MAX_VARINT_BYTES):
        if start + count >= len(data):
            break
        byte = data[start + count]
        value |= (byte & 0x7F) << (7 * count)
        if not byte & 0x80:
            if byte == 0 and count:  # one number, one encoding
                break
            return value, start + count + 1
    raise InvalidCiphertextError("a number in the message is malformed")


def _fields(data: memoryview) -> Iterator[Field]:
    """Walk a message; yield (field, wire type, content), never past its end."""
    at = 0
    while at < len(data):
        tag, at = _varint(data, at)
        field, wire = tag >> 3, tag & 7
        if wire == _BYTES:
            length, at = _varint(data, at)
            end = at + length
        elif wire == _FIXED64:
            end = at + _DOUBLE.size
        elif wire == _VARINT:
            _, end = _varint(data, at)
        else:
            raise InvalidCiphertextError("the message has a field of a foreign type")
        if end > len(data):
            raise InvalidCiphertextError("the message ends within a field")
        yield field, wire, data[at:end]
        at = end


def _expect(data: memoryview, form: tuple[tuple[int, int], ...]) -> list[memoryview]:
    """Return the contents of a message that has exactly these fields, in this order."""
    contents = []
    found = []
    for field, wire, content in _fields(data):
        found.append((field, wire))
        contents.append(content)
        if len(found) > len(form):
            break
    if tuple(found) != form:
        raise InvalidCiphertextError("the message does not have exactly the agreed fields")
    return contents


def _check_seal_object(content: memoryview, most_bytes: int) -> None:
    """Check the header of a SEAL object, and that its length is the real one."""
    if not _SEAL_HEADER.size <= len(content) <= most_bytes:
        raise InvalidCiphertextError("an object in the message has an impossible size")
    magic, _, _, compression, reserved, length = _SEAL_HEADER.unpack_from(content)
    if (
        magic != _SEAL_MAGIC
        or compression >= _SEAL_COMPRESSIONS
        or reserved != 0
        or length != len(content)
    ):
        raise InvalidCiphertextError("an object in the message has a malformed header")


def _check_scale(content: memoryview, scale: float) -> None:
    if _DOUBLE.unpack(content)[0] != scale:
        raise InvalidCiphertextError("the message has another scale than agreed")


def check_ciphertext(
    message: bytes | memoryview, *, n_values: int, scale: float | None, most_bytes: int
) -> None:
    """Let pass exactly one serialised vector of one ciphertext.

    Parameters
    ----------
    message : bytes
    n_values : int
        Values that the ciphertext must say it holds; worked out by the receiver from its
        own batch, never read from the message.
    scale : float, optional
        Agreed CKKS scale; None for BFV, whose messages have none.
    most_bytes : int
        Largest size of the ciphertext in it.

    Raises
    ------
    InvalidCiphertextError
        If the message has any other form.

    Examples
    --------
    >>> check_ciphertext(b"", n_values=1, scale=None, most_bytes=64)  # doctest: +ELLIPSIS
    Traceback (most recent call last):
    ...
    fedinfer_flower.errors.InvalidCiphertextError: FI307 ...
    """
    form: tuple[tuple[int, int], ...] = ((1, _BYTES), (2, _BYTES))
    if scale is not None:
        form = (*form, (3, _FIXED64))
    contents = _expect(memoryview(message), form)
    size, end = _varint(contents[0], 0)
    if size != n_values or end != len(contents[0]):
        raise InvalidCiphertextError("a ciphertext holds another number of values than agreed")
    _check_seal_object(contents[1], most_bytes)
    if scale is not None:
        _check_scale(contents[2], scale)


def public_key_has_secret(message: bytes | memoryview) -> bool:
    """Tell whether a serialised context has a private part, without loading it.

    Raises
    ------
    InvalidCiphertextError
        If the message cannot be walked.
    """
    return any(field == 3 for field, _, _ in _fields(memoryview(message)))


def check_public_key(message: bytes | memoryview, *, scale: float, most_bytes: int) -> None:
    """Let pass a serialised context of parameters and a public key, and nothing more.

    Private parts, evaluation keys and a symmetric context are all refused.

    Parameters
    ----------
    message : bytes
    scale : float
        Agreed scale; TenSEAL writes -1.0 for BFV.
    most_bytes : int
        Largest size of the public key in it.

    Raises
    ------
    InvalidCiphertextError
        If the message has any other form.

    Examples
    --------
    >>> check_public_key(b"", scale=-1.0, most_bytes=64)  # doctest: +ELLIPSIS
    Traceback (most recent call last):
    ...
    fedinfer_flower.errors.InvalidCiphertextError: FI307 ...
    """
    parameters, public = _expect(memoryview(message), ((1, _BYTES), (2, _BYTES)))
    # Parameters of two primes take about 100 bytes, compressed or not.
    _check_seal_object(parameters, 512)
    key, _, written_scale = _expect(public, ((1, _BYTES), (2, _VARINT), (3, _FIXED64)))
    _check_seal_object(key, most_bytes)
    _check_scale(written_scale, scale)
