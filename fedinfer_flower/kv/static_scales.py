"""Scales that both sides hold, so that none travel: a middle and a step a channel.

Fitted once on public prompts, kept with the fuser of a pair, bound to the sharer's model.
A payload of one or two tokens then takes 4 bits a number and nothing else, at any head
size; scales in the message would take up to as much as the numbers.

Axes: N real tokens, W floats a token (keys of all layers, values, hidden state).
"""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Final

import numpy as np
import numpy.typing as npt

from fedinfer_flower.errors import (
    CacheError,
    InvalidValueError,
    SizeLimitError,
    UnsupportedVersionError,
)
from fedinfer_flower.kv.layout import CacheEntries, CacheLayout
from fedinfer_flower.kv.token_matrix import matrix_of

__all__ = ["SCALES_VERSION", "StaticScales"]

SCALES_VERSION: Final = 1
_MAGIC: Final = b"FIKS"
_PREFIX: Final = struct.Struct(">4sHBBI")
_BITS: Final = (4, 8)
_MAX_BYTES: Final = 64 << 20
_MAX_LAYOUT_BYTES: Final = 64 << 10


@dataclass(frozen=True, eq=False, kw_only=True)
class StaticScales:
    """Middle and step of every channel of one sharer's cache.

    Parameters
    ----------
    layout : CacheLayout
        Of the sharer, with the digest of its model.
    bits : int
        4 or 8.
    hidden : bool
        Whether the hidden state has scales too.
    middle, step : float32 arrays (W,)
        Half of the 2**bits steps lie below the middle. Steps are positive.

    Raises
    ------
    CacheError
        If lengths do not fit the layout, or a number is not finite.

    Privacy
    -------
    Middles and steps are the least and largest numbers of the prompts that they were fitted
    on, and everybody who holds the fuser reads them: fit on public prompts only.

    Examples
    --------
    >>> import torch
    >>> layout = CacheLayout(layers=1, heads=1, head_size=4, hidden_size=4, window=64,
    ...                      rope="{}", architecture="llama",
    ...                      tokenizer_digest="0" * 64, model_digest="1" * 64)
    >>> spread = torch.linspace(-1, 1, 32).reshape(2, 1, 4, 4)
    >>> entries = CacheEntries(keys=(spread,), values=(spread,), layout=layout,
    ...                        mask=torch.ones(2, 4, dtype=torch.long))
    >>> scales = StaticScales.fit(entries)
    >>> scales.step.shape, StaticScales.from_bytes(scales.to_bytes()).digest == scales.digest
    ((8,), True)
    """

    layout: CacheLayout
    bits: int
    hidden: bool
    middle: npt.NDArray[np.float32] = field(repr=False)
    step: npt.NDArray[np.float32] = field(repr=False)

    def __post_init__(self) -> None:
        if self.bits not in _BITS:
            raise InvalidValueError("static scales are for 4 or 8 bits")
        want = (self.layout.floats_per_token(hidden=self.hidden),)
        for numbers in (self.middle, self.step):
            if numbers.shape != want or numbers.dtype != np.float32:
                raise CacheError("static scales of another shape than their layout says")
            if not np.isfinite(numbers).all():
                raise CacheError("static scales with numbers that are not finite")
        if not (self.step > 0).all():
            raise CacheError("static scales with a step that is not positive")

    @classmethod
    def fit(cls, entries: CacheEntries | Sequence[CacheEntries], bits: int = 4) -> StaticScales:
        """Fit scales to caches of public prompts.

        Parameters
        ----------
        entries : CacheEntries, or a sequence of them
            Of one model, cut to the tokens that will travel (a last token differs from the
            others); a few hundred tokens or more.
        bits : int
            4 or 8.

        Notes
        -----
        The steps cover the range that was seen; what lies outside it later is clipped. A
        narrower range with less squared error made a model's own next token worse: the few
        large numbers are what attention goes by.

        Raises
        ------
        CacheError
            If a number is not finite, or the caches are of different models.
        InvalidValueError
            If there are fewer than two tokens.
        """
        if bits not in _BITS:
            raise InvalidValueError("static scales are for 4 or 8 bits")
        parts = [entries] if isinstance(entries, CacheEntries) else list(entries)
        if not parts:
            raise InvalidValueError("static scales need caches to be fitted on")
        found = [matrix_of(part)[:2] for part in parts]
        first = found[0][1]
        if any((s.layout, s.hidden) != (first.layout, first.hidden) for _, s in found):
            raise CacheError("caches of different models, or only some with the hidden state")
        if sum(len(matrix) for matrix, _ in found) < 2:
            raise InvalidValueError("static scales need two tokens at least, better hundreds")
        low = np.min([matrix.min(0) for matrix, _ in found if len(matrix)], 0).astype(np.float64)
        high = np.max([matrix.max(0) for matrix, _ in found if len(matrix)], 0)
        middle = (low + high) / 2
        # A channel that never changes still needs a positive step.
        width = np.maximum(high - low, 1e-6 * np.abs(middle) + 1e-8)
        return cls(
            layout=first.layout,
            bits=bits,
            hidden=first.hidden,
            middle=middle.astype(np.float32),
            step=(width / (1 << bits)).astype(np.float32),
        )

    @cached_property
    def digest(self) -> str:
        """SHA-256 of `to_bytes`, in hex: a payload names the scales that it needs."""
        return hashlib.sha256(self.to_bytes()).hexdigest()

    def columns(self, *, hidden: bool) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.float32]]:
        """Return middle and step of the numbers that travel.

        Raises
        ------
        CacheError
            If the hidden state travels, and these scales have none for it.
        """
        if hidden and not self.hidden:
            raise CacheError(
                "static scales without the hidden state, for a cache with it",
                hint="fit them on caches exported with hidden=True",
            )
        width = self.layout.floats_per_token(hidden=hidden)
        return self.middle[:width], self.step[:width]

    def to_bytes(self) -> bytes:
        """Return the canonical bytes."""
        layout = self.layout.to_json().encode()
        prefix = _PREFIX.pack(_MAGIC, SCALES_VERSION, self.bits, self.hidden, len(layout))
        numbers = [x.astype("<f4").tobytes() for x in (self.middle, self.step)]
        return b"".join([prefix, layout, *numbers])

    @classmethod
    def from_bytes(cls, data: bytes, *, max_bytes: int = _MAX_BYTES) -> StaticScales:
        """Read scales.

        Raises
        ------
        CacheError
            If the bytes are not exactly one valid form.
        SizeLimitError
            If there are more than `max_bytes`.
        UnsupportedVersionError
        """
        if len(data) > max_bytes:
            raise SizeLimitError(f"static scales of {len(data)} bytes; the limit is {max_bytes}")
        if len(data) < _PREFIX.size or data[:4] != _MAGIC:
            raise CacheError("bytes that are no static scales")
        _, version, bits, hidden, layout_bytes = _PREFIX.unpack_from(data)
        if version != SCALES_VERSION:
            raise UnsupportedVersionError(
                f"static scales of version {version}, this release reads {SCALES_VERSION}",
                hint="install the same release of fedinfer-flower at every role",
            )
        start = _PREFIX.size + layout_bytes
        if bits not in _BITS or hidden > 1 or layout_bytes > _MAX_LAYOUT_BYTES or start > len(data):
            raise CacheError("static scales with a malformed header")
        try:
            text = bytes(data[_PREFIX.size : start]).decode()
        except UnicodeDecodeError:
            raise CacheError("static scales whose layout is not text") from None
        layout = CacheLayout.from_json(text)
        width = layout.floats_per_token(hidden=bool(hidden))
        if layout.to_json() != text or len(data) != start + 8 * width:
            raise CacheError("static scales of another length than their layout says")
        numbers = np.frombuffer(data, "<f4", offset=start).astype(np.float32)
        return cls(
            layout=layout,
            bits=bits,
            hidden=bool(hidden),
            middle=numbers[:width],
            step=numbers[width:],
        )
