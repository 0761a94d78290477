"""What each codec makes of a cache: bytes, and what it loses.

Axes: N real tokens of the batch.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from fedinfer_flower.kv.layout import CacheEntries
from fedinfer_flower.kv.payload import (
    PayloadLimits,
    decode_entries,
    encode_entries,
    payload_bytes,
)
from fedinfer_flower.kv.quantiser import (
    CODECS,
    Codec,
    CodecKind,
    matrix_bytes,
)
from fedinfer_flower.kv.static_scales import StaticScales
from fedinfer_flower.kv.token_matrix import Matrix, TokenShape, matrix_of

__all__ = [
    "CODECS",
    "Codec",
    "CodecKind",
    "CompressionRow",
    "PayloadLimits",
    "StaticScales",
    "compression_report",
    "decode_entries",
    "encode_entries",
    "payload_bytes",
]


@dataclass(frozen=True, kw_only=True)
class CompressionRow:
    """What one codec does to one cache.

    Parameters
    ----------
    codec : str
    message_bytes : int
        As sent, header and mask included, after `zlib` where that is smaller.
    entries_bytes : int
        Scales and symbols, before `zlib`.
    ratio : float
        fp16 numbers over `entries_bytes`.
    sent_ratio : float
        The message in fp16 without `zlib` over `message_bytes`.
    key_error, value_error : float
        Root mean square of the error over that of the numbers; 0 is exact.
    hidden_error : float, optional
        None if the hidden state does not travel.
    """

    codec: str
    message_bytes: int
    entries_bytes: int
    ratio: float
    sent_ratio: float
    key_error: float
    value_error: float
    hidden_error: float | None


def compression_report(
    entries: CacheEntries,
    codecs: Iterable[str] = CODECS,
    *,
    scales: StaticScales | None = None,
) -> tuple[CompressionRow, ...]:
    """Encode and decode a cache with each codec, and compare.

    Parameters
    ----------
    entries : CacheEntries
    codecs : iterable of str
        Default all; static ones are left out where `scales` are not for them.
    scales : StaticScales, optional

    Raises
    ------
    CacheError, InvalidValueError, UnknownNameError
        As `encode_entries`.

    Examples
    --------
    >>> import torch
    >>> from fedinfer_flower.kv.layout import CacheLayout
    >>> layout = CacheLayout(layers=1, heads=1, head_size=16, hidden_size=4, window=64,
    ...                      rope="{}", architecture="llama",
    ...                      tokenizer_digest="0" * 64, model_digest="1" * 64)
    >>> x = torch.linspace(-1, 1, 64).reshape(1, 1, 4, 16)
    >>> entries = CacheEntries(keys=(x,), values=(x,), layout=layout,
    ...                        mask=torch.ones(1, 4, dtype=torch.long))
    >>> [(row.codec, round(row.ratio, 2)) for row in compression_report(entries, ["fp32", "int4"])]
    [('fp32', 0.5), ('int4', 2.67)]
    """
    matrix, shape, mask = matrix_of(entries)
    # Its own sender's bytes: limits are against others'.
    limits = PayloadLimits(
        max_bytes=1 << 62, max_rows=1 << 62, max_tokens=1 << 62, max_entries_bytes=1 << 62
    )
    counted = {
        "tokens": shape.counts,
        "hidden": shape.hidden,
        "width": mask.shape[1],
    }
    rows = []
    for name in codecs:
        if codecs is CODECS and not _fits(CODECS[name], scales):
            continue
        data = encode_entries(entries, codec=name, scales=scales)
        back = matrix_of(decode_entries(data, limits=limits, scales=scales))[0]
        size = matrix_bytes(shape, CODECS[name])
        key, value, hidden = _errors(back, matrix, shape)
        rows.append(
            CompressionRow(
                codec=name,
                message_bytes=len(data),
                entries_bytes=size,
                ratio=matrix_bytes(shape, CODECS["fp16"]) / max(size, 1),
                sent_ratio=payload_bytes(entries.layout, codec="fp16", **counted) / len(data),
                key_error=key,
                value_error=value,
                hidden_error=hidden if shape.hidden else None,
            )
        )
    return tuple(rows)


def _fits(codec: Codec, scales: StaticScales | None) -> bool:
    return codec.kind is not CodecKind.STATIC or (scales is not None and scales.bits == codec.bits)


def _errors(found: Matrix, true: Matrix, shape: TokenShape) -> tuple[float, float, float]:
    """Return the relative error of keys, values and hidden state."""
    edges = (shape.channels, 2 * shape.channels)
    pairs = zip(np.split(found, edges, 1), np.split(true, edges, 1), strict=True)
    errors = []
    for ours, theirs in pairs:
        wide = theirs.astype(np.float64)
        error, power = np.square(ours - wide).sum(), np.square(wide).sum()
        errors.append(float(np.sqrt(error / power)) if power else float(error > 0))
    return errors[0], errors[1], errors[2]
