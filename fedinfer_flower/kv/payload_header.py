"""Prefix and header of a cache payload: lengths first, then a strict, canonical JSON.

The layout of the bytes is in `fedinfer_flower.kv.payload`.
"""

from __future__ import annotations

import json
import struct
from dataclasses import dataclass
from typing import Any, Final

from fedinfer_flower.errors import (
    CacheError,
    InvalidValueError,
    SizeLimitError,
    UnsupportedVersionError,
)
from fedinfer_flower.kv.layout import CacheLayout
from fedinfer_flower.kv.quantiser import CODECS, Codec

__all__ = [
    "PAYLOAD_VERSION",
    "PREFIX_BYTES",
    "PayloadHeader",
    "PayloadLimits",
    "packed_prefix",
    "read_header",
]

PAYLOAD_VERSION: Final = 1
_MAGIC: Final = b"FIKV"
_PREFIX: Final = struct.Struct(">4sHHIQ")
PREFIX_BYTES: Final = _PREFIX.size
_MAX_HEADER_BYTES: Final = 64 << 10
_FIELDS: Final = {"codec", "hidden", "layout", "rows", "scales", "squeezed", "tokens"}


@dataclass(frozen=True, kw_only=True)
class PayloadLimits:
    """Largest sizes that a receiver accepts.

    Parameters
    ----------
    max_bytes : int
        Of the message.
    max_rows : int
        Prompts.
    max_tokens : int
        Tokens of a prompt, padding included.
    max_entries_bytes : int
        Of the cache as float32 with its padding; decoding takes about three times that at
        its peak.

    Examples
    --------
    >>> PayloadLimits(max_rows=16).max_rows
    16
    """

    max_bytes: int = 64 << 20
    max_rows: int = 1024
    max_tokens: int = 8192
    max_entries_bytes: int = 512 << 20

    def __post_init__(self) -> None:
        for name in self.__dataclass_fields__:
            value = getattr(self, name)
            if type(value) is not int or value < 1:
                raise InvalidValueError(f"{name} must be a positive whole number")


@dataclass(frozen=True, kw_only=True)
class PayloadHeader:
    """What a payload says of itself.

    Parameters
    ----------
    codec : Codec
    hidden : bool
        Whether the hidden state is in it.
    layout : CacheLayout
    rows, tokens : int
        Prompts, and tokens of a prompt with padding.
    scales : str
        Digest of the static scales that it needs; empty without.
    squeezed : bool
        Whether `zlib` was applied to the body.
    """

    codec: Codec
    hidden: bool
    layout: CacheLayout
    rows: int
    scales: str
    squeezed: bool
    tokens: int

    def to_bytes(self) -> bytes:
        """Return the canonical JSON."""
        layout = json.loads(self.layout.to_json())
        values = {**self.__dict__, "codec": self.codec.name, "layout": layout}
        return json.dumps(values, sort_keys=True, separators=(",", ":")).encode()

    @property
    def mask_bytes(self) -> int:
        """Length of the mask."""
        return (self.rows * self.tokens + 7) // 8

    @property
    def entries_bytes(self) -> int:
        """Length of the cache as float32 with its padding."""
        return 4 * self.rows * self.tokens * self.layout.floats_per_token(hidden=self.hidden)


def packed_prefix(header_bytes: int, body_bytes: int) -> bytes:
    """Return the first bytes of a payload."""
    return _PREFIX.pack(_MAGIC, PAYLOAD_VERSION, 0, header_bytes, body_bytes)


def read_header(data: bytes, limits: PayloadLimits) -> tuple[PayloadHeader, int]:
    """Return the header and where the mask starts.

    Raises
    ------
    CacheError
        If lengths do not add up, or the header is not canonical.
    SizeLimitError
        If the cache would be larger than the limits allow.
    UnsupportedVersionError
    """
    if len(data) > limits.max_bytes:
        raise SizeLimitError(
            f"a cache payload of {len(data)} bytes; the limit is {limits.max_bytes}"
        )
    if len(data) < _PREFIX.size or bytes(data[:4]) != _MAGIC:
        raise CacheError("bytes that are no cache payload")
    _, version, reserved, header_bytes, body_bytes = _PREFIX.unpack_from(data)
    if version != PAYLOAD_VERSION:
        raise UnsupportedVersionError(
            f"a cache payload of version {version}, this release reads {PAYLOAD_VERSION}",
            hint="install the same release of fedinfer-flower at every role",
        )
    start = _PREFIX.size + header_bytes
    if reserved or header_bytes > _MAX_HEADER_BYTES or start > len(data):
        raise CacheError("a cache payload with a malformed prefix")
    header = _parsed(bytes(data[_PREFIX.size : start]))
    for what, found, most in (
        ("prompts", header.rows, limits.max_rows),
        ("tokens", header.tokens, limits.max_tokens),
        ("bytes when decoded", header.entries_bytes, limits.max_entries_bytes),
    ):
        if found > most:
            raise SizeLimitError(f"a cache payload of too many {what}; the limit is {most}")
    if len(data) != start + header.mask_bytes + body_bytes:
        raise CacheError("a cache payload of another length than its prefix says")
    return header, start


def _parsed(raw: bytes) -> PayloadHeader:
    try:
        values: Any = json.loads(raw)
    except (ValueError, RecursionError):  # also what is not UTF-8
        raise CacheError("a cache payload whose header is not JSON") from None
    if not isinstance(values, dict) or values.keys() != _FIELDS:
        raise CacheError("a cache payload whose header lacks a field or has an unknown one")
    layout, codec, scales = values["layout"], values["codec"], values["scales"]
    # The version is shown in an error text: a number of any length or a text is not.
    if not isinstance(layout, dict) or type(layout.get("version")) is not int:
        raise CacheError("a cache payload without a layout")
    if not 0 <= layout["version"] < 1 << 16:
        raise CacheError("a cache payload whose layout has no version")
    if not isinstance(codec, str) or codec not in CODECS:
        raise CacheError(
            "a cache payload with an unknown codec",
            hint="install the same release of fedinfer-flower at every role",
        )
    if any(type(values[name]) is not bool for name in ("hidden", "squeezed")):
        raise CacheError("a cache payload whose header has a flag that is none")
    if any(type(values[name]) is not int or values[name] < 1 for name in ("rows", "tokens")):
        raise CacheError("a cache payload without a prompt or without a token")
    if not isinstance(scales, str):
        raise CacheError("a cache payload whose header names no scales")
    parsed = PayloadHeader(
        codec=CODECS[codec],
        hidden=values["hidden"],
        layout=CacheLayout.from_json(json.dumps(layout)),
        rows=values["rows"],
        scales=scales,
        squeezed=values["squeezed"],
        tokens=values["tokens"],
    )
    if parsed.to_bytes() != raw:
        raise CacheError("a cache payload whose header is not in its canonical form")
    return parsed
