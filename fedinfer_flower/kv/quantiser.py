"""Codecs: the numbers of a cache's real tokens as bytes, and back.

=========  ====  =========================================================================
codec      bits  scales
=========  ====  =========================================================================
`fp32`     32    none; exact
`bf16`     16    none
`fp16`     16    none; refuses numbers beyond 65,504
`int8`     8     two fp16 a group, in the message
`int4`     4     two fp16 a group, in the message
`static4`  4     none in the message: a `StaticScales` that both sides hold
`static8`  8     as `static4`
=========  ====  =========================================================================

Groups of `int8` and `int4`: values by token and head; keys by channel over the tokens of a
prompt, because keys have a few large channels (KIVI, arXiv 2402.02750), and by
token and head where a prompt is so short that a scale a channel would cost more than that
gains; the hidden state by token in pieces of 128 channels.

Axes: N real tokens of the batch, W floats a token.

Privacy
-------
None of this protects: at 4 bits every token of a full cache can still be read off it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from types import MappingProxyType
from typing import Final

import numpy as np
import numpy.typing as npt
import torch

from fedinfer_flower.errors import CacheError, InvalidValueError
from fedinfer_flower.kv.bit_packing import pack_symbols, packed_bytes, unpack_symbols
from fedinfer_flower.kv.token_matrix import Matrix, TokenShape

__all__ = [
    "CODECS",
    "Codec",
    "CodecKind",
    "decode_matrix",
    "encode_matrix",
    "matrix_bytes",
]

_SCALE_BYTES: Final = 4  # two fp16: the least value, and the step


class CodecKind(StrEnum):
    """Where the scales of a codec are."""

    FLOAT = "none"
    GROUPED = "in the message"
    STATIC = "at both sides"


@dataclass(frozen=True, kw_only=True)
class Codec:
    """How one number becomes bits.

    Parameters
    ----------
    name : str
    bits : int
        Of one number, without scales.
    kind : CodecKind
    """

    name: str
    bits: int
    kind: CodecKind


CODECS: Final[Mapping[str, Codec]] = MappingProxyType(
    {
        name: Codec(name=name, bits=bits, kind=kind)
        for name, bits, kind in (
            ("fp32", 32, CodecKind.FLOAT),
            ("bf16", 16, CodecKind.FLOAT),
            ("fp16", 16, CodecKind.FLOAT),
            ("int8", 8, CodecKind.GROUPED),
            ("int4", 4, CodecKind.GROUPED),
            ("static4", 4, CodecKind.STATIC),
            ("static8", 8, CodecKind.STATIC),
        )
    }
)
"""The codecs of this version of the payload: a table, because both sides must know them."""


def matrix_bytes(shape: TokenShape, codec: Codec) -> int:
    """Return the exact bytes of scales and symbols, before `zlib`.

    Examples
    --------
    >>> from fedinfer_flower.kv.layout import CacheLayout
    >>> layout = CacheLayout(layers=2, heads=1, head_size=16, hidden_size=8, window=16,
    ...                      rope="{}", architecture="llama",
    ...                      tokenizer_digest="0" * 64, model_digest="1" * 64)
    >>> shape = TokenShape(layout=layout, counts=(2,), hidden=False)
    >>> [matrix_bytes(shape, CODECS[name]) for name in ("fp16", "int4", "static4")]
    [256, 96, 64]
    """
    scales = _SCALE_BYTES * shape.scales() if codec.kind is CodecKind.GROUPED else 0
    return scales + packed_bytes(shape.tokens * shape.width, codec.bits)


# -- codecs ------------------------------------------------------------------------------


def encode_matrix(
    matrix: Matrix, shape: TokenShape, codec: Codec, static: tuple[Matrix, Matrix] | None
) -> bytes:
    """Return scales and symbols.

    Parameters
    ----------
    matrix : float32 array (N, W)
    shape : TokenShape
    codec : Codec
    static : (middle, step), float32 arrays (W,), optional
        For the static codecs; numbers beyond their range are clipped.

    Raises
    ------
    CacheError
        If a number is beyond the codec's range.
    InvalidValueError
        If a static codec lacks its scales.
    """
    with np.errstate(over="ignore", invalid="ignore"):
        if codec.kind is CodecKind.FLOAT:
            return _encode_float(matrix, codec)
        if codec.kind is CodecKind.GROUPED:
            return _encode_grouped(matrix, shape, codec)
        middle, step = _required(static, codec)
        half = 1 << (codec.bits - 1)
        # As many steps above the middle as below; half a step stands for all of it.
        steps = np.floor((matrix - middle) / step).clip(-half, half - 1) + half
        return pack_symbols(steps.astype(np.uint8), codec.bits)


def decode_matrix(
    data: memoryview, shape: TokenShape, codec: Codec, static: tuple[Matrix, Matrix] | None
) -> Matrix:
    """Undo `encode_matrix`; `data` has `matrix_bytes(shape, codec)` bytes.

    Raises
    ------
    CacheError
        If a scale or a number is not finite, or a scale is negative.
    """
    with np.errstate(over="ignore", invalid="ignore"):
        if codec.kind is CodecKind.FLOAT:
            matrix = _decode_float(data, codec).reshape(shape.tokens, shape.width)
        elif codec.kind is CodecKind.GROUPED:
            matrix = _decode_grouped(data, shape, codec)
        else:
            middle, step = _required(static, codec)
            symbols = unpack_symbols(data, shape.tokens * shape.width, codec.bits)
            steps = symbols.reshape(shape.tokens, shape.width).astype(np.float32)
            steps -= np.float32((1 << (codec.bits - 1)) - 0.5)
            matrix = steps * step + middle
    if not np.isfinite(matrix).all():
        raise CacheError("a cache payload with numbers that are not finite")
    return matrix


def _required(static: tuple[Matrix, Matrix] | None, codec: Codec) -> tuple[Matrix, Matrix]:
    if static is None:
        raise InvalidValueError(
            f"the codec {codec.name!r} without its scales",
            hint="pass the scales of the fuser, or use the codec 'int4'",
        )
    return static


def _beyond_range(codec: Codec) -> CacheError:
    return CacheError(
        f"a cache with numbers beyond the range of the codec {codec.name!r}",
        hint="use the codec 'bf16'",
    )


def _encode_float(matrix: Matrix, codec: Codec) -> bytes:
    if codec.name == "bf16":
        short = torch.from_numpy(matrix).to(torch.bfloat16)
        if not bool(torch.isfinite(short).all()):
            raise _beyond_range(codec)
        return short.view(torch.int16).numpy().astype("<i2").tobytes()
    numbers = matrix.astype("<f2" if codec.name == "fp16" else "<f4")
    if not np.isfinite(numbers).all():
        raise _beyond_range(codec)
    return numbers.tobytes()


def _decode_float(data: memoryview, codec: Codec) -> Matrix:
    if codec.name == "bf16":
        high = np.frombuffer(data, "<u2").astype(np.uint32)
        return (high << np.uint32(16)).view(np.float32)
    return np.frombuffer(data, "<f2" if codec.name == "fp16" else "<f4").astype(np.float32)


def _encode_grouped(matrix: Matrix, shape: TokenShape, codec: Codec) -> bytes:
    symbols = np.empty(matrix.shape, np.uint8)
    scales = []
    for lines, columns, size in shape.groups():
        block = matrix[lines, columns]
        if size:
            starts = np.arange(0, block.shape[1], size)
            low = np.minimum.reduceat(block, starts, axis=1)
            high = np.maximum.reduceat(block, starts, axis=1)
        else:
            low, high = block.min(0, keepdims=True), block.max(0, keepdims=True)
        pair = _rounded_outwards(low, high, (1 << codec.bits) - 1)
        if not np.isfinite(pair).all():
            raise _beyond_range(codec)
        scales.append(pair.tobytes())
        least, step = _spread(pair, size, block.shape[1])
        # A group of equal numbers has the step 0: every symbol is 0.
        steps = np.rint((block - least) / np.where(step > 0, step, 1))
        symbols[lines, columns] = steps.clip(0, (1 << codec.bits) - 1).astype(np.uint8)
    return b"".join([*scales, pack_symbols(symbols, codec.bits)])


def _rounded_outwards(low: Matrix, high: Matrix, levels: int) -> npt.NDArray[np.float16]:
    """Return least values and steps in fp16, rounded so that no number lies outside.

    Then the error is half a step, nowhere more.
    """
    least = low.astype(np.float16)
    least = np.where(least > low, np.nextafter(least, np.float16(-np.inf)), least)
    width = (high - least.astype(np.float32)) / np.float32(levels)
    step = width.astype(np.float16)
    step = np.where(step < width, np.nextafter(step, np.float16(np.inf)), step)
    return np.stack([least, step], -1).astype("<f2")


def _spread(pair: npt.NDArray[np.float16], size: int, width: int) -> tuple[Matrix, Matrix]:
    """Return scales in the shape of their block, or one line for all of it."""
    full = pair.astype(np.float32)
    if size:
        full = np.repeat(full, size, axis=1)[:, :width]
    return full[..., 0], full[..., 1]


def _decode_grouped(data: memoryview, shape: TokenShape, codec: Codec) -> Matrix:
    at = _SCALE_BYTES * shape.scales()
    pairs = np.frombuffer(data[:at], "<f2").reshape(-1, 2)
    if not np.isfinite(pairs).all() or (pairs[:, 1] < 0).any():
        raise CacheError("a cache payload with scales that are negative or not finite")
    count = shape.tokens * shape.width
    symbols = unpack_symbols(data[at:], count, codec.bits).reshape(shape.tokens, shape.width)
    matrix = np.empty(symbols.shape, np.float32)
    start = 0
    for lines, columns, size in shape.groups():
        n, width = lines.stop - lines.start, columns.stop - columns.start
        groups = (n, -(-width // size)) if size else (1, width)
        stop = start + groups[0] * groups[1]
        least, step = _spread(pairs[start:stop].reshape(*groups, 2), size, width)
        matrix[lines, columns] = symbols[lines, columns] * step + least
        start = stop
    return matrix
