"""Take the rotary position out of cached keys, and put another one in.

A cached key carries the rotation of the position at which it was computed. Without it the
key means the same at any place, so keys travel *position-free*. The tables come from the
model's own module, so whatever its config says about scaling is honoured.

Axes: B prompts, H key-value heads, T tokens, D head size.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

__all__ = ["rotary_tables", "rotate", "unrotate"]

_TINY = 1e-12


def rotary_tables(model: Any, positions: Tensor) -> tuple[Tensor, Tensor]:
    """Return cos and sin of a model at these positions.

    Parameters
    ----------
    model : transformers.PreTrainedModel
    positions : int64 tensor (B, T)

    Returns
    -------
    cos, sin : float32 tensors (B, 1, T, D)
    """
    probe = torch.zeros(*positions.shape, 1, dtype=torch.float32, device=positions.device)
    cos, sin = model.base_model.rotary_emb(probe, positions)
    return cos[:, None].float(), sin[:, None].float()


def rotate(keys: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn position-free keys (B, H, T, D) to the positions of the tables."""
    return (keys.float() * cos + _half_turn(keys.float()) * sin).to(keys.dtype)


def unrotate(keys: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Undo `rotate`.

    Scaled variants (YaRN) carry a factor in the tables: it is divided out, squared.
    """
    square = (cos * cos + sin * sin).clamp_min(_TINY)
    return ((keys.float() * cos - _half_turn(keys.float()) * sin) / square).to(keys.dtype)


def _half_turn(x: Tensor) -> Tensor:
    first, second = x.chunk(2, -1)
    return torch.cat((-second, first), -1)
