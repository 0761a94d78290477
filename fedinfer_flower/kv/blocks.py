"""Networks that fusers are made of.

The block is that of C2C (pre-norm, GELU, residual), and so is a token- and head-wise
strength with a switch per layer for keys and for values.

Axes: B prompts, H key-value heads, T tokens, D head size, W width.
"""

from __future__ import annotations

from typing import Final

import torch
from torch import Tensor, nn

__all__ = ["EntryHead", "ResidualLayer", "Trunk", "side_by_side"]

_EXPANSION: Final = 2
_OUT_STD: Final = 0.02
"""Of the last weights: a new fuser adds almost nothing."""
_SWITCH_START: Final = 0.5
"""Logit: every layer starts switched on, and may be switched off."""
_EDGE: Final = 1e-6


def side_by_side(keys: Tensor, values: Tensor) -> Tensor:
    """Return keys and values (B, H, T, D) as (B, T, 2 H D)."""
    n, _, t, _ = keys.shape
    return torch.cat([x.transpose(1, 2).reshape(n, t, -1) for x in (keys, values)], -1)


class FeedForward(nn.Module):
    """``x + W2 gelu(W1 rmsnorm(x))``."""

    def __init__(self, width: int, dropout: float) -> None:
        super().__init__()
        self.norm = nn.RMSNorm(width)
        self.up = nn.Linear(width, _EXPANSION * width)
        self.down = nn.Linear(_EXPANSION * width, width)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        """Map (..., W) to (..., W)."""
        hidden = nn.functional.gelu(self.up(self.norm(x)))
        return x + self.dropout(self.down(hidden))  # type: ignore[no-any-return]


class Trunk(nn.Module):
    """Normalise groups of features, and mix them into one vector a token.

    Parameters
    ----------
    groups : sequence of int
        Sizes of the feature groups; each is normalised on its own, because entries of two
        models have two scales.
    width, depth : int
    dropout : float
    """

    def __init__(self, groups: tuple[int, ...], width: int, depth: int, dropout: float) -> None:
        super().__init__()
        self.groups = groups
        self.norms = nn.ModuleList(nn.LayerNorm(size) for size in groups)
        self.enter = nn.Linear(sum(groups), width)
        self.blocks = nn.Sequential(*(FeedForward(width, dropout) for _ in range(depth)))
        self.leave = nn.RMSNorm(width)

    def forward(self, *features: Tensor) -> Tensor:
        """Map one tensor (B, T, size) a group to (B, T, W)."""
        both = zip(self.norms, features, strict=True)
        x = torch.cat([norm(part) for norm, part in both], -1)
        out: Tensor = self.leave(self.blocks(self.enter(x)))
        return out


class EntryHead(nn.Module):
    """Map (B, T, W) to keys and values of one receiver layer, (B, H, T, D) each."""

    def __init__(self, width: int, heads: int, head_size: int) -> None:
        super().__init__()
        self.heads, self.head_size = heads, head_size
        self.out = nn.Linear(width, 2 * heads * head_size)
        nn.init.normal_(self.out.weight, std=_OUT_STD)
        nn.init.zeros_(self.out.bias)

    def forward(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """Return keys and values."""
        n, t, _ = z.shape
        both = self.out(z).view(n, t, 2, self.heads, self.head_size).permute(2, 0, 3, 1, 4)
        return both[0], both[1]


class ResidualLayer(nn.Module):
    """What is added to one receiver layer: entries times strength times switch (C2C).

    Parameters
    ----------
    features : int
        Of the sharer's token.
    heads, head_size : int
        Of the receiver.
    width, depth : int
    dropout : float
    """

    def __init__(
        self, features: int, heads: int, head_size: int, width: int, depth: int, dropout: float
    ) -> None:
        super().__init__()
        self.trunk = Trunk((features, 2 * heads * head_size), width, depth, dropout)
        self.head = EntryHead(width, heads, head_size)
        self.strength = nn.Linear(width, 2 * heads)
        self.switch = nn.Parameter(torch.full((2,), _SWITCH_START))
        # Half strength everywhere to begin with.
        nn.init.zeros_(self.strength.weight)
        nn.init.zeros_(self.strength.bias)

    def forward(self, features: Tensor, own: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
        """Return what to add to keys and values, (B, H, T, D) each.

        Parameters
        ----------
        features : tensor (B, T, F)
            Of the sharer's token that belongs to each of the receiver's.
        own : tensor (B, T, 2 H D)
        temperature : float
            Of the switch in training; in evaluation it is hard.
        """
        z = self.trunk(features, own)
        n, t, _ = z.shape
        strength = torch.sigmoid(self.strength(z)).view(n, t, 2, -1).permute(2, 0, 3, 1)[..., None]
        on = self._switched(n, temperature)[..., None, None, None]  # (2, B, 1, 1, 1)
        keys, values = self.head(z)
        return keys * strength[0] * on[0], values * strength[1] * on[1]

    def _switched(self, rows: int, temperature: float) -> Tensor:
        """Return the switch of keys and of values for each row: (2, B)."""
        logits = self.switch[:, None].expand(2, rows)
        if not self.training:
            return (logits > 0).float()
        # Logistic noise is the difference of two Gumbels: a relaxed Bernoulli sample. It
        # trains, and protects nothing.
        u = torch.rand(2, rows, device=logits.device).clamp(_EDGE, 1 - _EDGE)
        return torch.sigmoid((logits + u.logit()) / temperature)
