"""What a receiver decodes on: its own entries, and those that others brought.

Axes: B prompts, P entries of the past, N tokens still to be read.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from fedinfer_flower.errors import CacheError

__all__ = ["Past"]


@dataclass(frozen=True, eq=False, kw_only=True)
class Past:
    """Position-free entries in the receiver's space, and where they stand.

    Parameters
    ----------
    keys, values : tuple of tensors (B, H, P, D)
        One per layer of the receiver.
    mask : int64 tensor (B, P)
        0 hides an entry: padding, or a sharer whose gate is closed.
    positions : int64 tensor (B, P)
        Where the receiver sees the entries. Those of a prefix overlap its own.
    ids : int64 tensor (B, N)
        Tokens not yet read: at least the last one of the prompt.
    ids_positions : int64 tensor (B, N)
    own_from : int
        Index of the receiver's first own entry; those before are a prefix.
    """

    keys: tuple[Tensor, ...] = field(repr=False)
    values: tuple[Tensor, ...] = field(repr=False)
    mask: Tensor = field(repr=False)
    positions: Tensor = field(repr=False)
    ids: Tensor = field(repr=False)
    ids_positions: Tensor = field(repr=False)
    own_from: int = 0

    def with_prefix(
        self,
        keys: tuple[Tensor, ...],
        values: tuple[Tensor, ...],
        mask: Tensor,
        positions: Tensor,
    ) -> Past:
        """Put entries in front (the paper's concatenation, equations 1 and 4).

        The receiver's own positions stay: the prefix overlaps them.
        """
        if len(keys) != len(self.keys):
            raise CacheError("a prefix with more or fewer layers than the receiver has")
        return replace(
            self,
            keys=tuple(torch.cat([a, b], 2) for a, b in zip(keys, self.keys, strict=True)),
            values=tuple(torch.cat([a, b], 2) for a, b in zip(values, self.values, strict=True)),
            mask=torch.cat([mask, self.mask], 1),
            positions=torch.cat([positions, self.positions], 1),
            own_from=self.own_from + mask.shape[1],
        )

    def with_residual(self, keys: tuple[Tensor, ...], values: tuple[Tensor, ...]) -> Past:
        """Add to the receiver's own entries (C2C's residual); a prefix is left as it is."""
        start = self.own_from

        def added(old: Tensor, delta: Tensor) -> Tensor:
            return torch.cat([old[:, :, :start], old[:, :, start:] + delta], 2)

        return replace(
            self,
            keys=tuple(added(k, d) for k, d in zip(self.keys, keys, strict=True)),
            values=tuple(added(v, d) for v, d in zip(self.values, values, strict=True)),
        )
