"""Rotary tables from a cache's layout, for whoever does not hold its model.

Keys travel free of positions, so most fusers never need these. Published C2C networks read
keys as a model caches them, rotated: the receiver has to turn the sharer's keys as the
sharer's model would have.

Axes: B prompts, T tokens, D head size.
"""

from __future__ import annotations

import json
import math
from typing import Any, Final

import torch
from torch import Tensor

from fedinfer_flower.errors import CacheError
from fedinfer_flower.kv.layout import CacheLayout

__all__ = ["layout_tables", "require_known_rotation"]

_FIELDS: Final[dict[str, tuple[str, ...]]] = {
    "default": ("rope_theta",),
    "linear": ("rope_theta", "factor"),
    "llama3": (
        *("rope_theta", "factor", "low_freq_factor", "high_freq_factor"),
        "original_max_position_embeddings",
    ),
}
_MOST: Final = 1e12


def layout_tables(layout: CacheLayout, positions: Tensor) -> tuple[Tensor, Tensor]:
    """Return cos and sin of a layout's model at these positions.

    Plain, linear and Llama 3 frequencies: those of Qwen2.5, Qwen3 and Llama 3.2 as published.

    Parameters
    ----------
    layout : CacheLayout
    positions : int64 tensor (B, T)

    Returns
    -------
    cos, sin : float32 tensors (B, 1, T, D)
        As `fedinfer_flower.kv.rotary.rotary_tables` gives them.

    Raises
    ------
    CacheError
        If the layout's rotation is malformed, or of a kind that is not computed here.

    Notes
    -----
    *Privacy.* Public parameters only.

    References
    ----------
    Su et al., "RoFormer", 2021, section 3.2.2; for ``"llama3"`` the rotary scaling of the
    public Llama 3.1 release, which Llama 3.2 uses too.

    Examples
    --------
    >>> layout = CacheLayout(layers=1, heads=1, head_size=4, hidden_size=4, window=16,
    ...                      rope='{"rope_theta": 100.0, "rope_type": "default"}',
    ...                      architecture="llama", tokenizer_digest="0" * 64,
    ...                      model_digest="1" * 64)
    >>> cos, sin = layout_tables(layout, torch.tensor([[0, 10]]))
    >>> tuple(cos.shape), round(float(cos[0, 0, 1, 1]), 4)  # the cosine of 10 / sqrt(100)
    ((1, 1, 2, 4), 0.5403)
    """
    turns = positions[..., None].float() * _frequencies(layout).to(positions.device)
    angles = torch.cat([turns, turns], -1)[:, None]
    return angles.cos(), angles.sin()


def require_known_rotation(layout: CacheLayout) -> None:
    """Require that `layout_tables` can compute a layout's tables.

    Raises
    ------
    CacheError
    """
    _parameters(layout)


def _frequencies(layout: CacheLayout) -> Tensor:
    """Return radians a position, float32 (D / 2,)."""
    given, size = _parameters(layout), layout.head_size
    plain: Tensor = 1.0 / given["rope_theta"] ** (torch.arange(0, size, 2).float() / size)
    if given["rope_type"] == "default":
        return plain
    slow: Tensor = plain / given["factor"]
    if given["rope_type"] == "linear":
        return slow
    # Waves longer than the low bound are slowed down, those shorter than the high bound kept.
    low, high = given["low_freq_factor"], given["high_freq_factor"]
    turns = given["original_max_position_embeddings"] * plain / (2 * math.pi)
    kept: Tensor = ((turns - low) / (high - low)).clamp(0.0, 1.0)
    return (1 - kept) * slow + kept * plain


def _parameters(layout: CacheLayout) -> dict[str, Any]:
    try:
        given: Any = json.loads(layout.rope)
    except (ValueError, RecursionError):
        raise CacheError("a cache layout whose rotation is not JSON") from None
    kind = given.get("rope_type") if isinstance(given, dict) else None
    if not isinstance(kind, str) or kind not in _FIELDS:
        raise CacheError(
            "a model whose rotary positions are neither plain, linear nor Llama 3's",
            hint="a fuser that reads keys free of positions, such as last-token, takes any model",
        )
    if given.get("partial_rotary_factor", 1.0) != 1.0 or layout.head_size % 2:
        raise CacheError("a model that turns only a part of its keys")
    for name in _FIELDS[kind]:
        value = given.get(name)
        if type(value) not in (int, float) or not 0 < value <= _MOST:
            raise CacheError(f"a cache layout whose rotation has no usable {name}")
    if kind == "llama3" and not given["low_freq_factor"] < given["high_freq_factor"]:
        raise CacheError("a cache layout whose rotation has its two bounds in the wrong order")
    return given  # type: ignore[no-any-return]
