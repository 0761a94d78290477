"""Bodies of requests: how large, how slow, how nested; and from bytes to arrays."""

from __future__ import annotations

import asyncio
import json
import math
import re
from typing import Any, Final, NoReturn

import numpy as np
import numpy.typing as npt
from fastapi import Request
from starlette.concurrency import run_in_threadpool
from starlette.types import Message, Receive

from fedinfer_flower.errors import (
    EnvelopeError,
    InvalidValueError,
    ShapeError,
    SizeLimitError,
    UnavailableError,
)
from fedinfer_flower.serving.problem import HttpProblem
from fedinfer_flower.wire.arrays import DTYPES

__all__ = [
    "BodyRoom",
    "LimitedBody",
    "array_of_json",
    "array_of_npy",
    "parse_json",
    "read_json",
]

_MAX_ITEMS: Final = 1_000_000
"""Values in a JSON body: as Python objects they take up to 40 times the room of its text."""

_MAX_DICTS: Final = 20_000
_MAX_DEPTH: Final = 32
_MAX_DIMS: Final = 16
_SMALL_BYTES: Final = 1 << 16
_MAX_HEADER: Final = 4096
_NPY: Final = re.compile(
    rb"\{'descr': '([<>|=]?)([biuf])(\d{1,2})', 'fortran_order': (True|False),"
    rb" 'shape': \(((?:\d{1,15}, ?)*(?:\d{1,15})?)\), \} *\n"
)


class BodyRoom:
    """Bytes of bodies that the gateway holds at a time, over all requests; one event loop.

    Parameters
    ----------
    most_bytes : int
    """

    def __init__(self, most_bytes: int) -> None:
        self._left = most_bytes

    def take(self, n_bytes: int) -> None:
        """Take room.

        Raises
        ------
        UnavailableError
            If there is not enough.
        """
        if n_bytes > self._left:
            raise UnavailableError("the gateway is reading too many queries at once")
        self._left -= n_bytes

    def give_back(self, n_bytes: int) -> None:
        """Give room back."""
        self._left += n_bytes


class LimitedBody:
    """The `receive` of one request, which ends when the body is too large or too slow.

    Parameters
    ----------
    receive : callable
        That of the server.
    most_bytes : int
    timeout_s : float
        From the first call until the whole body is there.
    room : BodyRoom
    """

    def __init__(
        self, receive: Receive, *, most_bytes: int, timeout_s: float, room: BodyRoom
    ) -> None:
        self._receive = receive
        self._most = most_bytes
        self._timeout_s = timeout_s
        self._room = room
        self._deadline: float | None = None
        self._n_bytes = 0
        self.whole = False

    async def __call__(self) -> Message:
        """Return the next message.

        Raises
        ------
        HttpProblem
            With status 413 beyond `most_bytes`, with 408 beyond `timeout_s`.
        UnavailableError
            If the gateway is reading too many bodies.
        """
        if self.whole:  # what comes now is the end of the connection, at any time
            return await self._receive()
        loop = asyncio.get_running_loop()
        if self._deadline is None:
            self._deadline = loop.time() + self._timeout_s
        try:
            async with asyncio.timeout_at(self._deadline):
                message = await self._receive()
        except TimeoutError:
            raise HttpProblem(
                EnvelopeError("the body of the request did not arrive in time"), status=408
            ) from None
        if message["type"] == "http.request":
            n_bytes = len(message.get("body", b""))
            if self._n_bytes + n_bytes > self._most:
                raise too_large(self._most)
            self._room.take(n_bytes)
            self._n_bytes += n_bytes
            self.whole = not message.get("more_body", False)
        return message

    def release(self) -> None:
        """Give the room of the body back."""
        self._room.give_back(self._n_bytes)
        self._n_bytes = 0


def too_large(most_bytes: int) -> HttpProblem:
    """Return the error for a body beyond the limit."""
    return HttpProblem(
        SizeLimitError(
            f"the body of the request has more than {most_bytes} bytes",
            hint="ask in smaller parts",
        )
    )


# -- JSON --------------------------------------------------------------------------------------


async def read_json(request: Request) -> Any:
    """Read a request's body as strict JSON; large ones in a thread.

    Raises
    ------
    EnvelopeError, SizeLimitError
        As `parse_json`.
    """
    data = await request.body()
    if len(data) <= _SMALL_BYTES:
        return parse_json(data)
    return await run_in_threadpool(parse_json, data)


def parse_json(data: bytes) -> Any:
    """Read strict JSON: no NaN, no Infinity, no key twice, UTF-8, and not too much of it.

    Raises
    ------
    EnvelopeError
        If it is not JSON, or nested too deeply.
    SizeLimitError
        If it has too many values.

    Examples
    --------
    >>> parse_json(b'{"inputs": [[1.5, 2]]}')
    {'inputs': [[1.5, 2]]}
    >>> parse_json(b'[NaN]')
    Traceback (most recent call last):
    ...
    fedinfer_flower.errors.EnvelopeError: FI301 EnvelopeError: NaN and Infinity are not JSON
    """
    # Counted before anything is made: commas, and brackets of empty lists.
    if data.count(b",") + data.count(b"[") > _MAX_ITEMS or data.count(b"{") > _MAX_DICTS:
        raise SizeLimitError(
            f"the JSON body has more than {_MAX_ITEMS} values",
            hint="send a .npy as application/octet-stream",
        )
    try:
        text = data.decode("utf-8")
        value = json.loads(text, parse_constant=_no_constant, object_pairs_hook=_once)
        if "\\u" in text:
            # Half a surrogate pair cannot be written as UTF-8 again.
            json.dumps(value, ensure_ascii=False).encode()
    except EnvelopeError:
        raise
    except (ValueError, RecursionError):
        raise EnvelopeError("the body of the request is not JSON") from None
    if _depth(value) > _MAX_DEPTH:
        raise EnvelopeError(f"the JSON body is nested deeper than {_MAX_DEPTH}")
    return value


def array_of_json(values: Any, *, dtype: str = "float32") -> npt.NDArray[np.generic]:
    """Return nested lists of numbers as an array of a dtype of `DTYPES`.

    Raises
    ------
    InvalidValueError
        If the dtype is unknown, or a number does not fit it.
    ShapeError
        If the lists are ragged, empty, or of something else.

    Examples
    --------
    >>> array_of_json([[1, 2], [3, 4]]).shape
    (2, 2)
    """
    if dtype not in DTYPES:
        raise InvalidValueError(f"dtype is one of {', '.join(DTYPES)}")
    try:
        found = np.asarray(values)
    except (ValueError, OverflowError):
        raise ShapeError("inputs are lists of equal length") from None
    if found.dtype.kind not in "biuf":
        raise ShapeError("inputs are lists of numbers of equal length")
    _require_shape(found.shape)
    if found.dtype.kind == "f" and not np.isfinite(found).all():
        raise InvalidValueError("inputs are finite numbers")
    with np.errstate(all="ignore"):
        array = found.astype(dtype)
        fits = np.isfinite(array).all() if array.dtype.kind == "f" else (array == found).all()
    if not fits:
        raise InvalidValueError(f"inputs do not fit into {dtype}")
    return array


def array_of_npy(data: bytes) -> npt.NDArray[np.generic]:
    """Return an array from the bytes of a ``.npy`` file; reads what `numpy.save` writes.

    The header is matched, not evaluated: no objects, no structures, nothing but numbers.

    Raises
    ------
    EnvelopeError
        If it is something else.
    InvalidValueError
        If its dtype does not travel, or a value is not finite.
    ShapeError
        If the bytes do not fill the shape exactly, or it is empty.

    Examples
    --------
    >>> import io
    >>> file = io.BytesIO()
    >>> np.save(file, np.eye(2, dtype=np.float32), allow_pickle=False)
    >>> array_of_npy(file.getvalue()).shape
    (2, 2)
    """
    if data[:6] != b"\x93NUMPY" or len(data) < 12 or data[6] not in (1, 2, 3) or data[7] != 0:
        raise EnvelopeError("the body of the request is not a .npy file")
    start = 10 if data[6] == 1 else 12
    n_header = int.from_bytes(data[8:start], "little")
    header = data[start : start + n_header]
    found = _NPY.fullmatch(header) if len(header) == n_header <= _MAX_HEADER else None
    if found is None:
        raise EnvelopeError("the .npy file is not a plain array of numbers")
    order, kind, size, fortran, shape_text = (part.decode() for part in found.groups())
    shape = tuple(int(part) for part in shape_text.replace(",", " ").split())
    try:
        dtype = np.dtype(f"{order}{kind}{size}")
    except TypeError:
        raise EnvelopeError("the .npy file is not a plain array of numbers") from None
    if dtype.name not in DTYPES:
        raise InvalidValueError(f"dtype is one of {', '.join(DTYPES)}")
    _require_shape(shape)
    n_values = len(data) - start - n_header
    if math.prod(shape) * dtype.itemsize != n_values:
        raise ShapeError("the .npy file does not fill its shape exactly")
    flat: npt.NDArray[np.generic] = np.frombuffer(data, dtype=dtype, offset=start + n_header)
    array = flat.reshape(shape, order="F" if fortran == "True" else "C")
    if array.dtype.kind == "f" and not np.isfinite(array).all():
        raise InvalidValueError("inputs are finite numbers")
    return array


def _require_shape(shape: tuple[int, ...]) -> None:
    if not 1 <= len(shape) <= _MAX_DIMS or 0 in shape:
        raise ShapeError(
            f"inputs have 1 to {_MAX_DIMS} dimensions, the first of which counts queries,"
            " and none is empty"
        )


def _no_constant(_: str) -> NoReturn:
    raise EnvelopeError("NaN and Infinity are not JSON")


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise EnvelopeError("a key is twice in the JSON body")
    return found


def _depth(value: Any) -> int:
    level, depth = [value], 0
    while level:
        inner = []
        for item in level:
            if isinstance(item, dict):
                inner += [v for v in item.values() if isinstance(v, list | dict)]
            elif isinstance(item, list):
                inner += [v for v in item if isinstance(v, list | dict)]
        level = inner
        depth += 1
        if depth > _MAX_DEPTH + 1:
            break
    return depth
