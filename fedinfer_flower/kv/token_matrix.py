"""The numbers of a cache's real tokens as one matrix, and back.

A line for each real token: keys of all layers, values of all layers, then the hidden state
if it travels. Padding is left out.

Axes: B prompts, T tokens, padding included; N real tokens of the batch, W floats a token.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final, TypeAlias

import numpy as np
import numpy.typing as npt
import torch

from fedinfer_flower.errors import CacheError
from fedinfer_flower.kv.layout import CacheEntries, CacheLayout

__all__ = ["Mask", "Matrix", "TokenShape", "entries_of", "matrix_of"]

Matrix: TypeAlias = npt.NDArray[np.float32]
Mask: TypeAlias = npt.NDArray[np.bool_]

# A scale a channel costs 32 bits over the tokens of a prompt: at 32 tokens one bit an entry.
_TOKENS_FOR_CHANNEL_SCALES: Final = 32
_HIDDEN_GROUP: Final = 128


@dataclass(frozen=True, kw_only=True)
class TokenShape:
    """Shape of the matrix of real tokens.

    Parameters
    ----------
    layout : CacheLayout
    counts : tuple of int
        Real tokens of each prompt.
    hidden : bool
    """

    layout: CacheLayout
    counts: tuple[int, ...]
    hidden: bool

    @property
    def tokens(self) -> int:
        """Real tokens of all prompts: N."""
        return sum(self.counts)

    @property
    def width(self) -> int:
        """Floats a token: W."""
        return self.layout.floats_per_token(hidden=self.hidden)

    @property
    def channels(self) -> int:
        """Columns of the keys; the values have as many."""
        return self.layout.layers * self.layout.heads * self.layout.head_size

    def groups(self) -> Iterator[tuple[slice, slice, int]]:
        """Yield lines, columns, and columns that share a scale in one line.

        0 stands for a scale a column, shared by the lines.
        """
        size, c = self.layout.head_size, self.channels
        stop = 0
        for count in self.counts:
            start, stop = stop, stop + count
            if count:
                by_channel = count >= min(size, _TOKENS_FOR_CHANNEL_SCALES)
                yield slice(start, stop), slice(0, c), 0 if by_channel else size
        if stop:
            yield slice(0, stop), slice(c, 2 * c), size
            if self.hidden:
                yield slice(0, stop), slice(2 * c, self.width), _HIDDEN_GROUP

    def scales(self) -> int:
        """Return the number of groups."""
        total = 0
        for lines, columns, size in self.groups():
            width = columns.stop - columns.start
            total += -(-width // size) * (lines.stop - lines.start) if size else width
        return total


def matrix_of(entries: CacheEntries) -> tuple[Matrix, TokenShape, Mask]:
    """Return the real tokens' numbers (N, W), their shape, and the mask (B, T).

    Raises
    ------
    CacheError
        If the mask is not of 0 and 1, or a number of a real token is not finite.
    """
    mask = entries.mask.detach().cpu()
    if not bool(((mask == 0) | (mask == 1)).all()):
        raise CacheError("a cache whose mask has other values than 0 and 1")
    real = mask.bool()
    parts = [x.detach().cpu().transpose(1, 2)[real] for x in (*entries.keys, *entries.values)]
    if entries.hidden is not None:
        parts.append(entries.hidden.detach().cpu()[real])
    matrix = torch.cat([x.flatten(1).float() for x in parts], 1).numpy()
    if not np.isfinite(matrix).all():
        raise CacheError(
            "a cache with numbers that are not finite",
            hint="the model overflowed on this prompt: run it in bfloat16 or float32",
        )
    counts = tuple(int(n) for n in real.sum(1))
    shape = TokenShape(layout=entries.layout, counts=counts, hidden=entries.hidden is not None)
    return matrix, shape, real.numpy()


def entries_of(matrix: Matrix, shape: TokenShape, mask: Mask) -> CacheEntries:
    """Undo `matrix_of`; padding comes back as 0, every number as float32."""
    layout, (rows, tokens) = shape.layout, mask.shape

    def padded(columns: Matrix, *axes: int) -> npt.NDArray[np.float32]:
        full = np.zeros((rows, tokens, columns.shape[1]), np.float32)
        full[mask] = columns
        return full.reshape(rows, tokens, *axes)

    def per_layer(columns: Matrix) -> tuple[torch.Tensor, ...]:
        full = padded(columns, layout.layers, layout.heads, layout.head_size)
        return tuple(
            torch.from_numpy(np.ascontiguousarray(full[:, :, layer].transpose(0, 2, 1, 3)))
            for layer in range(layout.layers)
        )

    c = shape.channels
    return CacheEntries(
        keys=per_layer(matrix[:, :c]),
        values=per_layer(matrix[:, c : 2 * c]),
        mask=torch.from_numpy(mask.astype(np.int64)),
        layout=layout,
        hidden=torch.from_numpy(padded(matrix[:, 2 * c :], -1)) if shape.hidden else None,
    )
