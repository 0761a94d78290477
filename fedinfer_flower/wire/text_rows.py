"""Questions and the texts written so far, as rows of an ordinary query.

A query carries an array with a row for each question. A row of text holds the UTF-8 bytes of
the question, a zero, those of the text so far, and zeros up to the width of the array.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

import numpy as np
import numpy.typing as npt

from fedinfer_flower.errors import InvalidValueError, ShapeError, SizeLimitError

__all__ = ["MAX_ROW_BYTES", "read_text_rows", "text_rows"]

MAX_ROW_BYTES: Final = 1 << 16
_QUANTUM: Final = 128
"""Widths are multiples of this: the length of a message says less, and a row that is asked
again among others mostly has the same bytes."""


def text_rows(questions: Sequence[str], texts: Sequence[str]) -> npt.NDArray[np.uint8]:
    """Write questions and texts as rows.

    Parameters
    ----------
    questions, texts : sequence of n_queries str
        `texts` is what is written so far; empty at the start.

    Returns
    -------
    rows : uint8 array of shape (n_queries, width)

    Raises
    ------
    InvalidValueError
        If there is nothing to ask, or a text that cannot be written: one with a zero in it.
    SizeLimitError
        If a row is longer than `MAX_ROW_BYTES`.

    Examples
    --------
    >>> rows = text_rows(["why ?"], ["so"])
    >>> rows.shape, read_text_rows(rows)
    ((1, 128), [('why ?', 'so')])
    """
    if not len(questions) or len(questions) != len(texts):
        raise InvalidValueError("questions and texts are as many, and at least one")
    coded = [_coded(question, text) for question, text in zip(questions, texts, strict=True)]
    longest = max(map(len, coded))
    if longest > MAX_ROW_BYTES:
        raise SizeLimitError(
            f"a question of {longest} bytes; {MAX_ROW_BYTES} travel", hint="shorten it"
        )
    rows = np.zeros((len(coded), -(-longest // _QUANTUM) * _QUANTUM), dtype=np.uint8)
    for row, data in zip(rows, coded, strict=True):
        row[: len(data)] = np.frombuffer(data, dtype=np.uint8)
    return rows


def read_text_rows(rows: npt.NDArray[np.generic]) -> list[tuple[str, str]]:
    """Return (question, text so far) of each row.

    Raises
    ------
    ShapeError
        If the array does not hold text.
    """
    if rows.ndim != 2 or rows.dtype != np.uint8 or not 0 < rows.shape[1] <= MAX_ROW_BYTES:
        raise ShapeError(
            f"rows of text are bytes of shape (n_queries, width), not {rows.dtype} of"
            f" {rows.ndim} axes",
            hint="ask with FedDecode, or make the rows with text_rows",
        )
    return [_read(row.tobytes()) for row in rows]


def _coded(question: str, text: str) -> bytes:
    try:
        parts = [question.encode(), text.encode()]
    except UnicodeEncodeError:
        raise InvalidValueError("a question that is not valid Unicode") from None
    if not parts[0] or any(b"\0" in part for part in parts):
        raise InvalidValueError("a question is not empty, and has no zero character in it")
    return b"\0".join(parts)


def _read(data: bytes) -> tuple[str, str]:
    parts = data.rstrip(b"\0").split(b"\0")
    try:
        question, text = (part.decode() for part in (*parts, b"")[:2])
    except UnicodeDecodeError:
        raise ShapeError("a row that is not valid UTF-8") from None
    if not question or len(parts) > 2:
        raise ShapeError("a row of text holds a question and one text")
    return question, text
