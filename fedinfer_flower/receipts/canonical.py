"""One byte form for a JSON value, and a strict reader for values that came from elsewhere."""

from __future__ import annotations

import json
from typing import Any

from fedinfer_flower.errors import EnvelopeError, SizeLimitError
from fedinfer_flower.wire.envelope import Json

__all__ = ["canonical_bytes", "parse_object"]


def canonical_bytes(value: Json) -> bytes:
    """Return the bytes that are signed and hashed for a JSON value.

    Keys sorted, no spaces, ASCII only. Floats are written by `repr`, the shortest text that
    reads back as the same IEEE 754 double, so the bytes do not depend on the platform. NaN
    and infinities are refused: JSON has none.

    Raises
    ------
    ValueError
        If there is a number that is not finite.

    Examples
    --------
    >>> canonical_bytes({"b": 0.1, "a": [1, None]})
    b'{"a":[1,null],"b":0.1}'
    """
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return text.encode("ascii")


def parse_object(data: bytes | memoryview, *, max_bytes: int, what: str) -> dict[str, Json]:
    """Read bytes that are exactly one JSON object in UTF-8.

    Parameters
    ----------
    max_bytes : int
        More are refused before they are read.
    what : str
        Names the object in errors.

    Raises
    ------
    SizeLimitError
        If there are more than `max_bytes`.
    EnvelopeError
        If it is anything else, or a key comes twice. The text never quotes the content.

    Examples
    --------
    >>> parse_object(b'{"a": 1}', max_bytes=10, what="note")
    {'a': 1}
    """
    if len(data) > max_bytes:
        raise SizeLimitError(f"a {what} of {len(data)} bytes; the limit is {max_bytes}")
    try:
        value = json.loads(
            bytes(data).decode("utf-8"),
            parse_constant=_refuse_constant,
            object_pairs_hook=_no_duplicates,
        )
    # UnicodeDecodeError, JSONDecodeError and integers of too many digits are ValueErrors;
    # brackets nested a thousand deep are valid JSON and end the reader's recursion.
    except (ValueError, RecursionError):
        raise EnvelopeError(f"the {what} is not JSON, or names a field twice") from None
    if not isinstance(value, dict):
        raise EnvelopeError(f"the {what} is not a JSON object")
    return value


def _refuse_constant(_: str) -> Any:
    raise ValueError


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    if len({key for key, _ in pairs}) != len(pairs):
        raise ValueError
    return dict(pairs)
