"""What a KV cache is outside its model: a descriptor, and position-free entries.

Axes: B prompts, H key-value heads, T tokens, D head size, E hidden size.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Final

import torch
from torch import Tensor

from fedinfer_flower.errors import CacheError, UnsupportedVersionError

__all__ = ["LAYOUT_VERSION", "CacheEntries", "CacheLayout"]

LAYOUT_VERSION: Final = 1
_MAX_LAYERS: Final = 1024
_MAX_HEADS: Final = 1024
_MAX_SIZE: Final = 65_536
_MAX_TEXT: Final = 4096
_HEX: Final = frozenset("0123456789abcdef")


@dataclass(frozen=True, kw_only=True)
class CacheLayout:
    """Which model a cache comes from, and its shape: the versioned descriptor.

    Parameters
    ----------
    layers, heads, head_size : int
        Of the cache: key-value heads, not query heads.
    hidden_size : int
        Width of the model's final hidden state.
    window : int
        Most positions that the model takes.
    rope : str
        The rotary parameters as canonical JSON.
    architecture : str
        Model type as transformers knows it.
    tokenizer_digest, model_digest : str
        SHA-256 in hex.
    version : int

    Examples
    --------
    >>> layout = CacheLayout(layers=2, heads=1, head_size=4, hidden_size=8, window=16,
    ...                      rope="{}", architecture="llama",
    ...                      tokenizer_digest="0" * 64, model_digest="1" * 64)
    >>> layout.floats_per_token(hidden=False), CacheLayout.from_json(layout.to_json()) == layout
    (16, True)
    """

    layers: int
    heads: int
    head_size: int
    hidden_size: int
    window: int
    rope: str
    architecture: str
    tokenizer_digest: str
    model_digest: str
    version: int = LAYOUT_VERSION

    def __post_init__(self) -> None:
        if type(self.version) is not int or not 0 <= self.version < 1 << 16:
            raise CacheError("a cache layout without a version")
        if self.version != LAYOUT_VERSION:
            raise UnsupportedVersionError(
                f"cache layout of version {self.version}, this release reads {LAYOUT_VERSION}",
                hint="install the same release of fedinfer-flower at every role",
            )
        bounds = {
            "layers": _MAX_LAYERS,
            "heads": _MAX_HEADS,
            "head_size": _MAX_SIZE,
            "hidden_size": _MAX_SIZE,
            "window": 1 << 32,
        }
        for name, most in bounds.items():
            value = getattr(self, name)
            if type(value) is not int or not 1 <= value <= most:
                raise CacheError(f"a cache layout whose {name} is not in [1, {most}]")
        for name in ("tokenizer_digest", "model_digest"):
            value = getattr(self, name)
            if not isinstance(value, str) or len(value) != 64 or not set(value) <= _HEX:
                raise CacheError(f"a cache layout whose {name} is no SHA-256 in hex")
        for name in ("rope", "architecture"):
            value = getattr(self, name)
            if not isinstance(value, str) or len(value) > _MAX_TEXT:
                raise CacheError(f"a cache layout whose {name} is no short text")

    @property
    def entry_floats(self) -> int:
        """Numbers that one layer keeps of one token: keys and values."""
        return 2 * self.heads * self.head_size

    def floats_per_token(self, *, hidden: bool) -> int:
        """Return the numbers that stand for one token."""
        return self.layers * self.entry_floats + (self.hidden_size if hidden else 0)

    def to_json(self) -> str:
        """Return the canonical JSON."""
        return json.dumps(asdict(self), sort_keys=True, separators=(",", ":"))

    @classmethod
    def from_json(cls, text: str) -> CacheLayout:
        """Read a descriptor.

        Raises
        ------
        CacheError
            If it lacks a field, has another one, or a value out of its range.
        UnsupportedVersionError
        """
        try:
            values: Any = json.loads(text)
        except (ValueError, RecursionError):
            raise CacheError("a cache layout that is not JSON") from None
        if not isinstance(values, dict) or values.keys() != cls.__dataclass_fields__.keys():
            raise CacheError("a cache layout that lacks a field or has an unknown one")
        return cls(**values)

    def require_model(self, model_digest: str) -> None:
        """Require that caches of this layout are of the model that a fuser was made for.

        Raises
        ------
        CacheError
        """
        if self.model_digest != model_digest:
            raise CacheError(
                f"a cache of model {self.model_digest[:12]}, expected {model_digest[:12]}",
                hint="a fuser belongs to one revision of both models: train it again",
            )


@dataclass(frozen=True, eq=False, kw_only=True)
class CacheEntries:
    """Position-free KV entries of a batch of prompts.

    Parameters
    ----------
    keys, values : tuple of tensors (B, H, T, D)
        One per layer; keys without their rotation.
    mask : int64 tensor (B, T)
        1 where an entry is real, 0 where it is padding.
    layout : CacheLayout
    hidden : tensor (B, T, E), optional
        What the last layer computed, after the final norm. A KV cache never contains it:
        the entries of a layer are made from that layer's *input*.
    """

    keys: tuple[Tensor, ...] = field(repr=False)
    values: tuple[Tensor, ...] = field(repr=False)
    mask: Tensor = field(repr=False)
    layout: CacheLayout
    hidden: Tensor | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        n, t = self.mask.shape
        want = (n, self.layout.heads, t, self.layout.head_size)
        if len(self.keys) != self.layout.layers or len(self.values) != self.layout.layers:
            raise CacheError("a cache with more or fewer layers than its layout says")
        if any(tuple(x.shape) != want for x in (*self.keys, *self.values)):
            raise CacheError("a cache whose entries have other shapes than its layout says")
        if self.hidden is not None and tuple(self.hidden.shape) != (n, t, self.layout.hidden_size):
            raise CacheError("a cache whose hidden state has another shape than its layout says")

    @property
    def rows(self) -> int:
        """Prompts in the batch."""
        return int(self.mask.shape[0])

    @property
    def tokens(self) -> int:
        """Tokens of a prompt, padding included."""
        return int(self.mask.shape[1])

    @property
    def positions(self) -> Tensor:
        """Positions from 0 for the first real token; int64 (B, T)."""
        return (self.mask.cumsum(1) - 1).clamp_min(0)

    def cut(self, start: int, stop: int | None = None) -> CacheEntries:
        """Return the entries of some tokens."""
        return replace(
            self,
            keys=tuple(k[:, :, start:stop] for k in self.keys),
            values=tuple(v[:, :, start:stop] for v in self.values),
            mask=self.mask[:, start:stop],
            hidden=None if self.hidden is None else self.hidden[:, start:stop],
        )

    def select(self, index: Tensor | Sequence[int]) -> CacheEntries:
        """Return the entries of some prompts."""
        rows = torch.as_tensor(index, dtype=torch.long)
        return replace(
            self,
            keys=tuple(k[rows] for k in self.keys),
            values=tuple(v[rows] for v in self.values),
            mask=self.mask[rows],
            hidden=None if self.hidden is None else self.hidden[rows],
        )

    def without_hidden(self) -> CacheEntries:
        """Return the entries alone."""
        return replace(self, hidden=None)

    def flat(self, layer: int) -> Tensor:
        """Return one layer's keys and values side by side: (B, T, 2 H D)."""
        both = (self.keys[layer], self.values[layer])
        n, t = self.mask.shape
        return torch.cat([x.transpose(1, 2).reshape(n, t, -1) for x in both], -1)

    def require_finite(self) -> None:
        """Require that every number is finite.

        Raises
        ------
        CacheError
            One NaN in a cache turns every answer into nonsense, silently.
        """
        hidden = () if self.hidden is None else (self.hidden,)
        if not all(bool(torch.isfinite(x).all()) for x in (*self.keys, *self.values, *hidden)):
            raise CacheError("a cache with numbers that are not finite")
