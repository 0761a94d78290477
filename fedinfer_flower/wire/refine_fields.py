"""Parts that several documents of a refinement have: texts, evidence, choices, media.

Axes: B questions, J sharers.
"""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Mapping, Sequence
from types import UnionType
from typing import Final

import numpy as np
import numpy.typing as npt

from fedinfer_flower.errors import EnvelopeError, InvalidValueError, SizeLimitError
from fedinfer_flower.wire import fields
from fedinfer_flower.wire.arrays import array_from_bytes
from fedinfer_flower.wire.envelope import Envelope, Json, Kind

__all__ = [
    "HOSTS",
    "MAX_CHARS",
    "MAX_QUESTIONS",
    "MAX_ROUNDS",
    "MAX_SHARERS",
    "MEDIA",
    "Evidence",
    "Span",
    "bits_from_bytes",
    "bits_to_bytes",
    "codes",
    "decoding_options",
    "evidence_from_bytes",
    "evidence_to_bytes",
    "key_id",
    "key_ids",
    "medium_of",
    "objects",
    "one_of",
    "query_id_of",
    "require_verb",
    "round_of",
    "some_of",
    "spans_from_bytes",
    "spans_to_bytes",
    "texts_from_bytes",
    "texts_to_bytes",
]

MEDIA: Final = ("cache", "full-cache", "text")
"""What a sharer can give: entries of the last tokens, entries of all, notes in text."""

HOSTS: Final = ("receiver", "coordinator")
"""Where fusers run."""

MAX_QUESTIONS: Final = 4096
MAX_CHARS: Final = 65_536
MAX_SHARERS: Final = 256
MAX_ROUNDS: Final = 16
_EVIDENCE: Final = 4
_DECODING: Final[Mapping[str, tuple[type | UnionType, float, float]]] = {
    "max_new_tokens": (int, 1, 32_768),
    "temperature": (int | float, 0, 100),
    "top_k": (int, 0, 1 << 31),
    "top_p": (int | float, 0, 1),
    "seed": (int, 0, (1 << 63) - 1),
    "stop": (list, 0, 0),
}
"""Settings of a ``Decoding``: type and range. That class itself needs torch."""
_MAX_SPANS: Final = 1 << 20
_MAX_SPANS_BYTES: Final = 24 * _MAX_SPANS
_MAX_TEXTS_BYTES: Final = 16 << 20
"""JSON of nothing but brackets takes twenty times its length in memory once it is read."""
_FEW_TOKENS: Final = 8
"""A share of more last tokens than these counts as a full cache: most prompts are short."""
_CODE: Final = re.compile(r"FI[0-9]{3}")
_KEY_ID: Final = re.compile(r"[0-9a-f]{64}")

Span = tuple[int, int]
"""Characters [start, stop)."""

Evidence = npt.NDArray[np.float32]
"""float32 (B, 4): see `fedinfer_flower.language.confidence`."""


def medium_of(share: Mapping[str, Json]) -> str:
    """Return which consent a share needs: ``"cache"``, or ``"full-cache"``.

    Parameters
    ----------
    share : mapping
        As ``ShareSpec.to_dict`` gives it.

    Examples
    --------
    >>> medium_of({"last": 1, "decode": 1}), medium_of({"last": 0}), medium_of({"last": 4096})
    ('cache', 'full-cache', 'full-cache')
    """
    last = share.get("last")
    few = type(last) is int and 1 <= last <= _FEW_TOKENS
    return "cache" if few else "full-cache"


def decoding_options(given: object) -> dict[str, Json]:
    """Return settings of decoding, checked where they are made and not at every site.

    Raises
    ------
    InvalidValueError
        If one is unknown, or a value that no site takes.

    Examples
    --------
    >>> decoding_options({"max_new_tokens": 8})
    {'max_new_tokens': 8}
    """
    if not isinstance(given, Mapping):
        raise InvalidValueError("decoding is a mapping from settings to values")
    for name, value in given.items():
        if name not in _DECODING:
            near = difflib.get_close_matches(str(name), _DECODING, n=1)
            raise InvalidValueError(
                f"decoding has no {str(name)[:64]!r}",
                hint=f"did you mean {near[0]!r}?" if near else f"known: {', '.join(_DECODING)}",
            )
        if name == "stop":
            continue
        kind, low, high = _DECODING[name]
        number = isinstance(value, kind) and not isinstance(value, bool)
        if not number or not low <= value <= high:
            raise InvalidValueError(f"{name} of decoding is a number in [{low}, {high}]")
    return dict(given)


def texts_to_bytes(texts: Sequence[str]) -> bytes:
    """Return texts as one section.

    Examples
    --------
    >>> texts_from_bytes(texts_to_bytes(["a", "b"]))
    ('a', 'b')
    """
    try:
        return json.dumps(list(texts), ensure_ascii=False, separators=(",", ":")).encode()
    except (TypeError, UnicodeEncodeError):
        raise InvalidValueError("questions and notes are lists of valid text") from None


def texts_from_bytes(
    data: bytes | memoryview, *, max_items: int = MAX_QUESTIONS, max_chars: int = MAX_CHARS
) -> tuple[str, ...]:
    """Read what `texts_to_bytes` wrote. Errors never quote it.

    Raises
    ------
    EnvelopeError
        If it is anything but a list of texts.
    SizeLimitError
        If there are more of them, or longer ones, than the limits.
    """
    if len(data) > _MAX_TEXTS_BYTES:
        raise SizeLimitError(f"a section of texts of more than {_MAX_TEXTS_BYTES} bytes")
    try:
        values: Json = json.loads(bytes(data))
    except (ValueError, RecursionError):
        raise EnvelopeError("a section of texts that is not JSON") from None
    if not isinstance(values, list) or not all(isinstance(v, str) for v in values):
        raise EnvelopeError("a section of texts that is not a list of texts")
    if len(values) > max_items or any(len(v) > max_chars for v in values):
        raise SizeLimitError(
            f"more than {max_items} texts, or one of more than {max_chars} characters"
        )
    return tuple(fields.text({"texts": v}, "texts", max_chars=max_chars) for v in values)


def spans_to_bytes(rows: Sequence[Sequence[Span]]) -> bytes:
    """Return spans, one list of them a row, as one section; empty for none."""
    return json.dumps([list(row) for row in rows], separators=(",", ":")).encode() if rows else b""


def spans_from_bytes(data: bytes | memoryview) -> tuple[tuple[Span, ...], ...]:
    """Read what `spans_to_bytes` wrote.

    Raises
    ------
    EnvelopeError

    Examples
    --------
    >>> spans_from_bytes(spans_to_bytes([[(0, 2), (2, 5)]]))
    (((0, 2), (2, 5)),)
    """
    if not len(data):
        return ()
    if len(data) > _MAX_SPANS_BYTES:
        raise SizeLimitError("more spans of tokens than a batch has")
    try:
        rows: Json = json.loads(bytes(data))
    except (ValueError, RecursionError):
        rows = None
    if not isinstance(rows, list) or not all(isinstance(row, list) for row in rows):
        raise EnvelopeError("spans of tokens that are not lists")
    if sum(len(row) for row in rows) > _MAX_SPANS:
        raise SizeLimitError("more spans of tokens than a batch has")
    return tuple(tuple(_span(pair) for pair in row) for row in rows)


def _span(pair: Json) -> Span:
    ends = pair if isinstance(pair, list) and len(pair) == 2 else [None, None]
    start, stop = ends
    if type(start) is not int or type(stop) is not int or not 0 <= start <= stop < 1 << 32:
        raise EnvelopeError("a span that is no range of characters")
    return start, stop


def evidence_to_bytes(evidence: Evidence | None) -> bytes:
    """Return evidence as one section; empty for none."""
    if evidence is None:
        return b""
    values = np.asarray(evidence, dtype="<f4")
    if values.ndim != 2 or values.shape[1] != _EVIDENCE:
        raise InvalidValueError("evidence has the shape (B, 4)")
    return values.tobytes()


def evidence_from_bytes(data: bytes | memoryview, *, rows: int | None = None) -> Evidence | None:
    """Read evidence; finite, and of exactly `rows` rows where that is given.

    Raises
    ------
    ProtocolError
    """
    if not len(data):
        return None
    n = len(data) // (4 * _EVIDENCE) if rows is None else rows
    array = array_from_bytes(data, dtype="float32", shape=(n, _EVIDENCE))
    return array.astype(np.float32)


def bits_to_bytes(used: npt.NDArray[np.generic]) -> bytes:
    """Return a (B, J) array of 0 and 1 as one section."""
    values = np.asarray(used, dtype=np.uint8)
    if values.ndim != 2 or values.max(initial=0) > 1:
        raise InvalidValueError("choices are (B, J) zeros and ones")
    return values.tobytes()


def bits_from_bytes(data: bytes | memoryview, *, rows: int, sharers: int) -> npt.NDArray[np.uint8]:
    """Read a (B, J) array of 0 and 1."""
    if not sharers and not len(data):
        return np.zeros((rows, 0), np.uint8)
    array = array_from_bytes(data, dtype="uint8", shape=(rows, sharers)).astype(np.uint8)
    if array.max() > 1:
        raise EnvelopeError("a choice that is neither 0 nor 1")
    return array


def require_verb(envelope: Envelope, kind: Kind, verb: str) -> None:
    """Require an envelope of this kind that carries the document `verb`."""
    if envelope.kind is not kind or envelope.meta.get("verb") != verb:
        raise EnvelopeError(f"expected the document {verb!r}")


def one_of(meta: Mapping[str, Json], name: str, allowed: Sequence[str]) -> str:
    """Read a text that is one of a few."""
    value = fields.text(meta, name, max_chars=32)
    if value not in allowed:
        raise EnvelopeError(f"field {name!r} is unknown to this release")
    return value


def some_of(meta: Mapping[str, Json], name: str, allowed: Sequence[str]) -> tuple[str, ...]:
    """Read a list of distinct texts, each one of a few."""
    values = fields.texts(meta, name, max_items=len(allowed))
    if len(set(values)) != len(values) or not set(values) <= set(allowed):
        raise EnvelopeError(f"field {name!r} has an entry twice, or an unknown one")
    return values


def key_id(meta: Mapping[str, Json], name: str, *, empty: bool = False) -> str:
    """Read a key id: 64 hex digits, or nothing where that is allowed."""
    value = fields.text(meta, name, max_chars=64)
    if not (_KEY_ID.fullmatch(value) or (empty and not value)):
        raise EnvelopeError(f"field {name!r} is no key id")
    return value


def key_ids(meta: Mapping[str, Json], name: str) -> tuple[str, ...]:
    """Read a list of distinct key ids."""
    values = fields.texts(meta, name, max_items=MAX_SHARERS)
    if len(set(values)) != len(values) or not all(_KEY_ID.fullmatch(v) for v in values):
        raise EnvelopeError(f"field {name!r} has an entry twice, or one that is no key id")
    return values


def codes(meta: Mapping[str, Json], name: str) -> dict[str, str]:
    """Read an object from key ids to error codes."""
    value = meta.get(name)
    if not isinstance(value, dict) or len(value) > MAX_SHARERS:
        raise EnvelopeError(f"field {name!r} is not a short object")
    for key, code in value.items():
        if not _KEY_ID.fullmatch(key) or not isinstance(code, str) or not _CODE.fullmatch(code):
            raise EnvelopeError(f"field {name!r} has something else than error codes of sites")
    return dict(value)


def objects(meta: Mapping[str, Json], name: str, *names: str) -> list[dict[str, Json]]:
    """Read a list of objects, each with exactly the fields `names`."""
    values = meta.get(name)
    if not isinstance(values, list) or len(values) > MAX_SHARERS:
        raise EnvelopeError(f"field {name!r} is not a list of at most {MAX_SHARERS}")
    for value in values:
        if not isinstance(value, dict):
            raise EnvelopeError(f"field {name!r} has an entry that is no object")
        fields.exactly(value, *names)
    return values


def round_of(meta: Mapping[str, Json]) -> int:
    """Read the number of the round, from 1."""
    return fields.whole(meta, "round", low=1, high=MAX_ROUNDS)


def query_id_of(envelope: Envelope) -> str:
    """Return the query id, which must not be empty."""
    if not envelope.query_id:
        raise EnvelopeError("a request without a query id")
    return envelope.query_id
