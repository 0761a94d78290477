"""A cache as one byte string: what a sharer replies.

Layout (prefix big-endian, numbers little-endian)::

    offset    bytes  field
    0         4      magic  b"FIKV"
    4         2      version
    6         2      reserved, zero
    8         4      H, length of the header
    12        8      P, length of the body
    20        H      header: canonical JSON with exactly the fields of `PayloadHeader`
    20+H      M      mask: B x T bits, first bit lowest, rest of the last byte zero
    20+H+M    P      body: scales and symbols of the real tokens; `zlib` if the header says so

Padding does not travel. The body's length follows from header and mask, so a decoder knows
before it allocates what it will hold, and compares it with its limits. Nothing that a
sender writes is run, and no number of a cache is in an error text.

`zlib` is used because every Python has it; it is applied only where it makes the body
smaller, and undone only up to the length that the header implies.

Axes: B prompts, T tokens, padding included.

Privacy
-------
These are clear bytes: whoever has them has the prompt (at 4 bits too). Seal them. The length
tells whoever relays them how many tokens each batch has, and with ``squeeze`` a little of
how the numbers are spread: with ``squeeze=False`` it depends on the shape alone.
"""

from __future__ import annotations

import zlib
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from fedinfer_flower.errors import (
    CacheError,
    InvalidValueError,
    UnknownNameError,
)
from fedinfer_flower.kv.layout import CacheEntries, CacheLayout
from fedinfer_flower.kv.payload_header import (
    PAYLOAD_VERSION,
    PREFIX_BYTES,
    PayloadHeader,
    PayloadLimits,
    packed_prefix,
    read_header,
)
from fedinfer_flower.kv.quantiser import (
    CODECS,
    Codec,
    CodecKind,
    decode_matrix,
    encode_matrix,
    matrix_bytes,
)
from fedinfer_flower.kv.static_scales import StaticScales
from fedinfer_flower.kv.token_matrix import TokenShape, entries_of, matrix_of

__all__ = [
    "PAYLOAD_VERSION",
    "PayloadLimits",
    "decode_entries",
    "encode_entries",
    "payload_bytes",
]


def encode_entries(
    entries: CacheEntries,
    *,
    codec: str,
    scales: StaticScales | None = None,
    squeeze: bool = True,
) -> bytes:
    """Return a cache as one byte string.

    Parameters
    ----------
    entries : CacheEntries
        Of any float dtype, on any device.
    codec : str
        A name in `CODECS`.
    scales : StaticScales, optional
        Needed by the static codecs, ignored by the others.
    squeeze : bool
        Whether to apply `zlib` where that makes the message smaller.

    Raises
    ------
    CacheError
        If a number of a real token is not finite or beyond the codec's range, the mask has
        other values than 0 and 1, or the scales are another model's.
    InvalidValueError
        If a static codec lacks its scales, or they are for other bits.
    UnknownNameError

    Notes
    -----
    The same cache gives the same bytes, given the same release of `zlib`.

    Examples
    --------
    >>> import torch
    >>> layout = CacheLayout(layers=1, heads=1, head_size=4, hidden_size=4, window=64,
    ...                      rope="{}", architecture="llama",
    ...                      tokenizer_digest="0" * 64, model_digest="1" * 64)
    >>> ones = torch.ones(1, 1, 2, 4)
    >>> entries = CacheEntries(keys=(ones,), values=(ones,), layout=layout,
    ...                        mask=torch.tensor([[0, 1]]))
    >>> data = encode_entries(entries, codec="int8")
    >>> decode_entries(data, limits=PayloadLimits()).keys[0][0, 0].tolist()
    [[0.0, 0.0, 0.0, 0.0], [1.0, 1.0, 1.0, 1.0]]
    """
    if codec not in CODECS:
        raise UnknownNameError(
            f"no codec of the name {codec[:32]!r}", hint=f"one of: {', '.join(CODECS)}"
        )
    if entries.rows < 1 or entries.tokens < 1:
        raise CacheError("a cache without a prompt or without a token")
    how = CODECS[codec]
    matrix, shape, mask = matrix_of(entries)
    static, digest = None, ""
    if how.kind is CodecKind.STATIC and scales is not None:
        if scales.layout != entries.layout:
            raise CacheError(
                "a cache and static scales of different models",
                hint="scales belong to one revision of the sharer's model: fit them again",
            )
        static, digest = _columns(scales, shape, how), scales.digest
    body = encode_matrix(matrix, shape, how, static)
    small = zlib.compress(body, 6) if squeeze else body
    squeezed = len(small) < len(body)
    header = PayloadHeader(
        codec=how,
        hidden=shape.hidden,
        layout=entries.layout,
        rows=entries.rows,
        scales=digest,
        squeezed=squeezed,
        tokens=entries.tokens,
    ).to_bytes()
    if squeezed:
        body = small
    prefix = packed_prefix(len(header), len(body))
    return b"".join([prefix, header, np.packbits(mask, bitorder="little").tobytes(), body])


def payload_bytes(
    layout: CacheLayout,
    tokens: int | Sequence[int],
    codec: str,
    hidden: bool = False,
    *,
    width: int | None = None,
) -> int:
    """Return the exact length of a message that `zlib` was not applied to.

    Parameters
    ----------
    layout : CacheLayout
    tokens : int or sequence of int
        Real tokens of the prompt, or of each prompt of a batch.
    codec : str
    hidden : bool
    width : int, optional
        Tokens of a prompt with padding; default those of the longest.

    Raises
    ------
    InvalidValueError
        If there is no prompt, or one longer than `width`.
    UnknownNameError

    Examples
    --------
    >>> layout = CacheLayout(layers=28, heads=8, head_size=128, hidden_size=1024, window=4096,
    ...                      rope="{}", architecture="qwen3",
    ...                      tokenizer_digest="0" * 64, model_digest="1" * 64)
    >>> payload_bytes(layout, 2, "fp16") - payload_bytes(layout, 1, "fp16")
    114688
    """
    if codec not in CODECS:
        raise UnknownNameError(
            f"no codec of the name {codec[:32]!r}", hint=f"one of: {', '.join(CODECS)}"
        )
    counts = (tokens,) if isinstance(tokens, int) else tuple(tokens)
    wide = max(counts, default=0) if width is None else width
    if wide < 1 or not counts or min(counts) < 0 or max(counts) > wide:
        raise InvalidValueError("tokens that fit no batch of prompts")
    how = CODECS[codec]
    header = PayloadHeader(
        codec=how,
        hidden=hidden,
        layout=layout,
        rows=len(counts),
        scales="0" * 64 if how.kind is CodecKind.STATIC else "",
        squeezed=False,
        tokens=wide,
    )
    shape = TokenShape(layout=layout, counts=counts, hidden=hidden)
    return PREFIX_BYTES + len(header.to_bytes()) + header.mask_bytes + matrix_bytes(shape, how)


def decode_entries(
    data: bytes, *, limits: PayloadLimits, scales: StaticScales | None = None
) -> CacheEntries:
    """Read a cache.

    Parameters
    ----------
    data : bytes
        Of a sender who is not trusted.
    limits : PayloadLimits
    scales : StaticScales, optional
        Those of the fuser; ignored if the message does not need them.

    Returns
    -------
    entries : CacheEntries
        In float32, padding 0. Whose model it is says its layout: compare it
        (`CacheLayout.require_model`).

    Raises
    ------
    CacheError
        If the bytes are not exactly one valid message, a scale or number is not finite, or
        the message needs other scales.
    SizeLimitError
        If it is larger than the limits allow, or would be when decoded.
    UnsupportedVersionError
    """
    header, at = read_header(data, limits)
    view = memoryview(data)
    mask = _read_mask(view[at : at + header.mask_bytes], header)
    shape = TokenShape(
        layout=header.layout, counts=tuple(int(n) for n in mask.sum(1)), hidden=header.hidden
    )
    static = _static_columns(header, shape, scales)
    body = view[at + header.mask_bytes :]
    want = matrix_bytes(shape, header.codec)
    if header.squeezed:
        body = _unsqueezed(body, want)
    if len(body) != want:
        raise CacheError("a cache payload whose body has another length than its header says")
    return entries_of(decode_matrix(body, shape, header.codec, static), shape, mask)


def _columns(
    scales: StaticScales, shape: TokenShape, codec: Codec
) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.float32]]:
    if scales.bits != codec.bits:
        raise InvalidValueError(f"static scales for {scales.bits} bits with {codec.name!r}")
    return scales.columns(hidden=shape.hidden)


# -- reading -----------------------------------------------------------------------------


def _read_mask(data: memoryview, header: PayloadHeader) -> npt.NDArray[np.bool_]:
    bits = np.unpackbits(np.frombuffer(data, np.uint8), bitorder="little")
    count = header.rows * header.tokens
    if bits[count:].any():
        raise CacheError("a cache payload with bits after its mask")
    return bits[:count].astype(np.bool_).reshape(header.rows, header.tokens)


def _static_columns(
    header: PayloadHeader, shape: TokenShape, scales: StaticScales | None
) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.float32]] | None:
    if header.codec.kind is not CodecKind.STATIC:
        if header.scales:
            raise CacheError("a cache payload that names scales, of a codec without them")
        return None
    if scales is None or (scales.digest, scales.layout) != (header.scales, header.layout):
        raise CacheError(
            "a cache payload whose static scales are not the ones held here",
            hint="sharer and receiver must hold the same fuser: send its scales with the request",
        )
    if scales.bits != header.codec.bits:
        raise CacheError("a cache payload whose static scales are for other bits")
    return scales.columns(hidden=shape.hidden)


def _unsqueezed(body: memoryview, want: int) -> memoryview:
    """Undo `zlib`, up to one byte more than is wanted and never beyond."""
    stream = zlib.decompressobj()
    try:
        raw = stream.decompress(body, want + 1)
    except zlib.error:
        raise CacheError("a cache payload whose body does not decompress") from None
    if len(raw) != want or not stream.eof or stream.unused_data or want <= len(body):
        raise CacheError("a cache payload whose body has another length than its header says")
    return memoryview(raw)
