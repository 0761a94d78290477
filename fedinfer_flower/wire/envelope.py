"""The envelope: one byte string a message, bound to its run, query, key, sender and shape.

Layout (big-endian)::

    offset  bytes  field
    0       4      magic  b"FIEV"
    4       2      version
    6       2      reserved, zero
    8       4      H, length of the header
    12      8      P, length of the payload
    20      H      header: JSON object with exactly the fields of `Envelope`
    20+H    P      payload: the sections, one after another

The header holds the payload's SHA-256, so that a damaged payload is noticed even where its
bits happen to be other valid scores. That is no signature: a site can always send other
scores than its model's.

A decoder reads lengths first, compares them with its limits and with the number of bytes
it holds, and only then looks at the content. It copies nothing: sections are views.
"""

from __future__ import annotations

import hashlib
import json
import re
import struct
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any, Final, TypeAlias

from fedinfer_flower.errors import EnvelopeError, SizeLimitError, UnsupportedVersionError

__all__ = [
    "DEFAULT_LIMITS",
    "VERSION",
    "Envelope",
    "Json",
    "Kind",
    "WireLimits",
    "decode",
    "encode",
]

Json: TypeAlias = Any
"""A JSON value. What it may be is checked where it is read (`wire.fields`)."""

MAGIC: Final = b"FIEV"
VERSION: Final = 1
_PREFIX: Final = struct.Struct(">4sHHIQ")
_QUERY_ID = re.compile(r"[0-9a-zA-Z_-]{0,64}")
_KEY_ID = re.compile(r"([0-9a-f]{64})?")
_SECTION = re.compile(r"[a-z][a-z0-9-]{0,31}")
_CODEC = re.compile(r"[a-z0-9+-]{0,32}")


class Kind(StrEnum):
    """What an envelope carries."""

    HELLO = "hello"
    PROFILE = "profile"
    QUERY = "query"
    ANSWER = "answer"
    ERROR = "error"
    PING = "ping"
    JOB = "job"
    COMBINED = "combined"
    SEALED_QUERY = "sealed-query"
    SEALED_JOB = "sealed-job"
    RECOVER = "recover"
    RECOVERED = "recovered"
    DIRECTORY = "directory"
    SETTLEMENT_REQUEST = "settlement-request"
    SETTLEMENT_REPLY = "settlement-reply"
    SETTLEMENT_ROWS = "settlement-rows"
    SETTLEMENT_SUMS = "settlement-sums"
    SETTLEMENT = "settlement"


@dataclass(frozen=True, kw_only=True)
class WireLimits:
    """Largest sizes that a receiver accepts.

    Parameters
    ----------
    max_header_bytes, max_payload_bytes : int
    max_sections : int
    max_rows : int
        Queries in one batch.
    """

    max_header_bytes: int = 4 << 20
    max_payload_bytes: int = 1 << 30
    max_sections: int = 1024
    max_rows: int = 1_000_000


DEFAULT_LIMITS: Final = WireLimits()


@dataclass(frozen=True, kw_only=True)
class Envelope:
    """A message before and after its journey.

    Parameters
    ----------
    kind : Kind
    run_id : int
        Flower's run.
    query_id : str
        Of the batch; empty in an onboarding message.
    key_id : str
        Fingerprint of the querier's public key in hex; empty without one.
    sender : int
        Flower's node id of the author; 0 for the coordinator and the querier.
    shape : tuple of int
        Shape of the array that the payload stands for.
    codec : str
        How the payload encodes it.
    meta : mapping
        Further JSON values; each kind has its own, checked by `wire.messages`.
    sections : tuple of (str, bytes)
        Named parts of the payload.
    """

    kind: Kind
    run_id: int = 0
    query_id: str = ""
    key_id: str = ""
    sender: int = 0
    shape: tuple[int, ...] = ()
    codec: str = ""
    meta: Mapping[str, Json] = field(default_factory=dict)
    sections: tuple[tuple[str, bytes | memoryview], ...] = ()

    def section(self, name: str) -> bytes | memoryview:
        """Return one section.

        Raises
        ------
        EnvelopeError
            If there is none of that name.
        """
        for title, data in self.sections:
            if title == name:
                return data
        raise EnvelopeError(f"a {self.kind.value} envelope lacks the section {name!r}")

    def require_sections(self, *names: str) -> None:
        """Require exactly these sections, in this order.

        Raises
        ------
        EnvelopeError
            If one is missing, or there is one more.
        """
        if tuple(title for title, _ in self.sections) != names:
            raise EnvelopeError(f"a {self.kind.value} envelope lacks a section or has one too many")


_FIELDS: Final = frozenset(
    {"kind", "run", "query", "key", "sender", "shape", "codec", "meta", "sections", "digest"}
)


def encode(envelope: Envelope) -> bytes:
    """Return the bytes of an envelope.

    Examples
    --------
    >>> decode(encode(Envelope(kind=Kind.PING, run_id=7))).run_id
    7
    """
    digest = hashlib.sha256()
    for _, data in envelope.sections:
        digest.update(data)
    header = json.dumps(
        {
            "digest": digest.hexdigest(),
            "kind": envelope.kind.value,
            "run": envelope.run_id,
            "query": envelope.query_id,
            "key": envelope.key_id,
            "sender": envelope.sender,
            "shape": list(envelope.shape),
            "codec": envelope.codec,
            "meta": dict(envelope.meta),
            "sections": [[name, len(data)] for name, data in envelope.sections],
        },
        sort_keys=True,
        separators=(",", ":"),
        allow_nan=False,
    ).encode()
    payload_bytes = sum(len(data) for _, data in envelope.sections)
    prefix = _PREFIX.pack(MAGIC, VERSION, 0, len(header), payload_bytes)
    return b"".join([prefix, header, *(data for _, data in envelope.sections)])


def decode(data: bytes | memoryview, *, limits: WireLimits = DEFAULT_LIMITS) -> Envelope:
    """Return the envelope that `data` holds; its sections are views of `data`.

    Raises
    ------
    EnvelopeError
        If the bytes are not exactly one well-formed envelope.
    UnsupportedVersionError
        If the version is not `VERSION`.
    SizeLimitError
        If a length exceeds `limits`.
    """
    view = memoryview(data)
    header_bytes, payload_bytes = _read_prefix(view, limits)
    start = _PREFIX.size
    header = _parse_header(bytes(view[start : start + header_bytes]))
    payload = view[start + header_bytes :]
    sections = _split(payload, header["sections"], payload_bytes, limits)
    # Last: hashing is the only work here that grows with the payload.
    if hashlib.sha256(payload).hexdigest() != header["digest"]:
        raise EnvelopeError("the payload is not the one that the header describes")
    return Envelope(
        kind=_kind(header["kind"]),
        run_id=_unsigned(header["run"], "run"),
        query_id=_text(header["query"], "query", _QUERY_ID),
        key_id=_text(header["key"], "key", _KEY_ID),
        sender=_unsigned(header["sender"], "sender"),
        shape=_shape(header["shape"]),
        codec=_text(header["codec"], "codec", _CODEC),
        meta=_object(header["meta"], "meta"),
        sections=sections,
    )


def _read_prefix(view: memoryview, limits: WireLimits) -> tuple[int, int]:
    if len(view) < _PREFIX.size:
        raise EnvelopeError(f"{len(view)} bytes are too few for an envelope")
    magic, version, reserved, header_bytes, payload_bytes = _PREFIX.unpack_from(view)
    if magic != MAGIC or reserved != 0:
        raise EnvelopeError("the bytes do not start like an envelope")
    if version != VERSION:
        raise UnsupportedVersionError(
            f"envelope version {version}, this release reads {VERSION}",
            hint="install the same release of fedinfer-flower at every role",
        )
    if header_bytes > limits.max_header_bytes or payload_bytes > limits.max_payload_bytes:
        raise SizeLimitError(
            f"header of {header_bytes} and payload of {payload_bytes} bytes; the limits are"
            f" {limits.max_header_bytes} and {limits.max_payload_bytes}"
        )
    if len(view) != _PREFIX.size + header_bytes + payload_bytes:
        raise EnvelopeError("the envelope's length differs from what it declares")
    return header_bytes, payload_bytes


def _parse_header(raw: bytes) -> dict[str, Json]:
    try:
        header = json.loads(raw, parse_constant=_refuse_constant, object_pairs_hook=_no_duplicates)
    # RecursionError: brackets nested a thousand deep are valid JSON. UnicodeDecodeError
    # and JSONDecodeError are ValueErrors.
    except (ValueError, RecursionError):
        # The cause quotes the text, which may hold anything: it is not chained.
        raise EnvelopeError("the header is not JSON") from None
    if not isinstance(header, dict) or header.keys() != _FIELDS:
        raise EnvelopeError("the header lacks a field or has an unknown one")
    return header


def _refuse_constant(_: str) -> Json:
    raise ValueError


def _no_duplicates(pairs: list[tuple[str, Json]]) -> dict[str, Json]:
    if len({key for key, _ in pairs}) != len(pairs):
        raise ValueError
    return dict(pairs)


def _split(
    payload: memoryview, titles: Json, payload_bytes: int, limits: WireLimits
) -> tuple[tuple[str, memoryview], ...]:
    if not isinstance(titles, list) or len(titles) > limits.max_sections:
        raise EnvelopeError("the header's sections are not a short list")
    sections: list[tuple[str, memoryview]] = []
    offset = 0
    for title in titles:
        if not isinstance(title, list) or len(title) != 2:
            raise EnvelopeError("a section is not a name with a length")
        name = _text(title[0], "section", _SECTION)
        length = _unsigned(title[1], "section length")
        if offset + length > payload_bytes:
            raise EnvelopeError("the sections are longer than the payload")
        sections.append((name, payload[offset : offset + length]))
        offset += length
    if offset != payload_bytes or len({name for name, _ in sections}) != len(sections):
        raise EnvelopeError("the sections do not fill the payload, or a name comes twice")
    return tuple(sections)


def _kind(value: Json) -> Kind:
    if not isinstance(value, str) or value not in Kind.__members__.values():
        raise EnvelopeError("an envelope of unknown kind")
    return Kind(value)


def _text(value: Json, name: str, pattern: re.Pattern[str]) -> str:
    if not isinstance(value, str) or not pattern.fullmatch(value):
        raise EnvelopeError(f"the header's {name} is malformed")
    return value


def _unsigned(value: Json, name: str) -> int:
    if type(value) is not int or not 0 <= value < 2**64:
        raise EnvelopeError(f"the header's {name} is not an unsigned 64-bit integer")
    return value


def _shape(value: Json) -> tuple[int, ...]:
    if not isinstance(value, list) or len(value) > 8:
        raise EnvelopeError("the header's shape is not a short list")
    return tuple(_unsigned(n, "shape") for n in value)


def _object(value: Json, name: str) -> dict[str, Json]:
    if not isinstance(value, dict):
        raise EnvelopeError(f"the header's {name} is not an object")
    return value
