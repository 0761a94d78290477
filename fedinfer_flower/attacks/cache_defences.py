"""Changes to a cache that are proposed as its protection, to measure what they are worth.

None of them is applied by this library in order to protect: what protects a cache is that
nobody but its receiver gets it, and that a site may refuse to share any.

Axes: N real tokens of the batch, W numbers a token.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Final

import numpy as np
import numpy.typing as npt

from fedinfer_flower.errors import InvalidValueError

if TYPE_CHECKING:
    from torch import Tensor

    from fedinfer_flower.kv.layout import CacheEntries
    from fedinfer_flower.kv.static_scales import StaticScales

__all__ = [
    "CacheChange",
    "coded",
    "noise_spread",
    "noisy",
    "rotated",
    "rounded",
    "unchanged",
]

CacheChange = Callable[["CacheEntries"], "CacheEntries"]
"""What happens to a cache before the attacker sees it."""

_OnMatrix = Callable[[npt.NDArray[np.float32]], npt.NDArray[np.float32]]
_MAX_BITS: Final = 8


def unchanged(entries: CacheEntries) -> CacheEntries:
    """Return the cache as it is."""
    return entries


def coded(codec: str, *, scales: StaticScales | None = None) -> CacheChange:
    """Pass a cache through the bytes of one of the codecs, as it travels.

    Parameters
    ----------
    codec : str
        One of `fedinfer_flower.kv.compress.CODECS`.
    scales : StaticScales, optional
        For the static codecs.

    Raises
    ------
    CacheError, InvalidValueError, UnknownNameError
        When it is applied; see `fedinfer_flower.kv.payload.encode_entries`.
    """

    def change(entries: CacheEntries) -> CacheEntries:
        from fedinfer_flower.kv.payload import PayloadLimits, decode_entries, encode_entries

        # The attacker's own bytes: limits are against others'.
        limits = PayloadLimits(
            max_bytes=1 << 62, max_rows=1 << 62, max_tokens=1 << 62, max_entries_bytes=1 << 62
        )
        data = encode_entries(entries, codec=codec, scales=scales, squeeze=False)
        return decode_entries(data, limits=limits, scales=scales)

    return change


def rounded(bits: int) -> CacheChange:
    """Round every token's numbers to so many bits, coarser than any codec if wanted.

    Parameters
    ----------
    bits : int
        In [1, 8]; steps cover the range of the token's own numbers.
    """
    if type(bits) is not int or not 1 <= bits <= _MAX_BITS:
        raise InvalidValueError(f"bits are a whole number in [1, {_MAX_BITS}]")

    def change(matrix: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
        low, high = matrix.min(1, keepdims=True), matrix.max(1, keepdims=True)
        step = np.maximum(high - low, 1e-12) / (2**bits - 1)
        return np.asarray(low + np.round((matrix - low) / step) * step, np.float32)

    return _on_tokens(change)


def noisy(level: float, *, seed: int = 0) -> CacheChange:
    """Add Gaussian noise, in units of each channel's own standard deviation.

    Parameters
    ----------
    level : float
        1.0 adds as much noise as there is signal.
    seed : int
        So that figures can be repeated: noise with a known seed protects nobody.
    """
    if not 0.0 <= level < float("inf"):
        raise InvalidValueError("a level of noise is finite and not negative")
    draws = np.random.default_rng(seed)

    def change(matrix: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
        drawn = draws.standard_normal(matrix.shape)
        return np.asarray(matrix + level * matrix.std(0) * drawn, np.float32)

    return _on_tokens(change)


def noise_spread(entries: CacheEntries, level: float) -> Tensor:
    """Return the standard deviation of `noisy` in each number of `cache_features`.

    An attacker who knows it draws such noise for its own prompts, as often as it likes.

    Parameters
    ----------
    entries : CacheEntries
        Without noise; any of the same kind as those that get it.
    level : float

    Returns
    -------
    spread : float32 tensor (F,)
    """
    import torch

    parts = [entries.flat(layer) for layer in range(entries.layout.layers)]
    if entries.hidden is not None:
        parts.append(entries.hidden)
    real = torch.cat([x.float() for x in parts], -1)[entries.mask > 0]
    return level * real.std(0, correction=0).repeat(entries.tokens)


def rotated(width: int, *, seed: int) -> CacheChange:
    """Rotate every token's numbers by a secret rotation that two sites share.

    Parameters
    ----------
    width : int
        Numbers a token: `CacheLayout.floats_per_token`.
    seed : int
        Stands for the secret.

    Notes
    -----
    Distances stay, so that whoever has messages with their prompts learns it: it hides a
    cache only from those who have never seen one.
    """
    draws = np.random.default_rng(seed)
    rotation, _ = np.linalg.qr(draws.standard_normal((width, width)))

    def change(matrix: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
        if matrix.shape[1] != width:
            raise InvalidValueError("a rotation for caches of another width")
        return np.asarray(matrix @ rotation, np.float32)

    return _on_tokens(change)


def _on_tokens(change: _OnMatrix) -> CacheChange:
    def changed(entries: CacheEntries) -> CacheEntries:
        from fedinfer_flower.kv.token_matrix import entries_of, matrix_of

        matrix, shape, mask = matrix_of(entries)
        return entries_of(change(matrix), shape, mask)

    return changed
