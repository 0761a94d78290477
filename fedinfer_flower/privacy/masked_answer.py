"""The byte form of masked vectors: one site's answer, and the sum for the querier.

Both start with a magic number and the digest of the batch that their masks belong to: a
masked vector is uniform, so nothing else could show that it is of another batch.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass, field
from typing import Final

import numpy as np

from fedinfer_flower.errors import BindingError, EnvelopeError, SizeLimitError
from fedinfer_flower.privacy.cohort import bitmap, places_of
from fedinfer_flower.privacy.mask_graph import FULL_GRAPH_MAX
from fedinfer_flower.privacy.masks import RingArray
from fedinfer_flower.privacy.self_mask import SHARE_BYTES

__all__ = ["MaskedAnswer", "MaskedTotal"]

_HEADER: Final = struct.Struct(">4s32s")
_ANSWER: Final = b"FMA1"
_TOTAL: Final = b"FMT1"


@dataclass(frozen=True, kw_only=True, eq=False)
class MaskedAnswer:
    """One site's masked scores.

    Parameters
    ----------
    context : bytes
        `Cohort.context`, 32 bytes.
    entries : uint32 array of shape (n_queries * width,)
    shares : tuple of bytes
        Sealed shares of the self-mask, one a neighbour in order; empty without it.
    """

    context: bytes
    entries: RingArray = field(repr=False)
    shares: tuple[bytes, ...] = field(default=(), repr=False)

    @staticmethod
    def size(count: int, *, n_sites: int, self_mask: bool) -> int:
        """Return the length in bytes of an answer of `count` entries."""
        degree = n_sites - 1 if n_sites <= FULL_GRAPH_MAX + 1 else FULL_GRAPH_MAX
        return _HEADER.size + 4 * count + (SHARE_BYTES * degree if self_mask else 0)

    def to_bytes(self) -> bytes:
        """Return the byte form."""
        entries = self.entries.astype("<u4", copy=False).tobytes()
        return b"".join([_HEADER.pack(_ANSWER, self.context), entries, *self.shares])

    @classmethod
    def from_bytes(
        cls, data: bytes | memoryview, *, context: bytes, count: int, n_shares: int
    ) -> MaskedAnswer:
        """Read an answer of exactly this batch and size.

        Raises
        ------
        ProtocolError
            If it is anything else.
        """
        view = _checked(data, _ANSWER, context, 4 * count + SHARE_BYTES * n_shares)
        tail = bytes(view[4 * count :])
        shares = tuple(tail[i : i + SHARE_BYTES] for i in range(0, len(tail), SHARE_BYTES))
        return cls(context=context, entries=_entries(view[: 4 * count]), shares=shares)


@dataclass(frozen=True, kw_only=True, eq=False)
class MaskedTotal:
    """The sum that the querier opens.

    Parameters
    ----------
    context : bytes
    survivors : frozenset of int
        Places in the roster of the sites in the sum.
    entries : uint32 array of shape (n_queries * width,)
    """

    context: bytes
    survivors: frozenset[int]
    entries: RingArray = field(repr=False)

    def to_bytes(self, n_sites: int) -> bytes:
        """Return the byte form; `n_sites` are in the roster."""
        head = _HEADER.pack(_TOTAL, self.context) + bitmap(self.survivors, n_sites)
        return head + self.entries.astype("<u4", copy=False).tobytes()

    @classmethod
    def from_bytes(
        cls, data: bytes | memoryview, *, context: bytes, count: int, n_sites: int
    ) -> MaskedTotal:
        """Read a sum of exactly this batch and size.

        Raises
        ------
        ProtocolError
            If it is anything else.
        """
        width = -(-n_sites // 8)
        view = _checked(data, _TOTAL, context, width + 4 * count)
        survivors = places_of(bytes(view[:width]), n_sites)
        return cls(context=context, survivors=survivors, entries=_entries(view[width:]))


def _checked(data: bytes | memoryview, magic: bytes, context: bytes, body_bytes: int) -> memoryview:
    view = memoryview(data)
    expected = _HEADER.size + body_bytes
    if len(view) > expected:
        raise SizeLimitError(f"a masked vector of this batch has {expected} bytes")
    if len(view) != expected:
        raise EnvelopeError(f"a masked vector of this batch has {expected} bytes, got {len(view)}")
    found, batch = _HEADER.unpack_from(view)
    if found != magic:
        raise EnvelopeError("the bytes do not start like a masked vector")
    if batch != context:
        raise BindingError("the masked vector belongs to another batch, roster or querier")
    return view[_HEADER.size :]


def _entries(view: memoryview) -> RingArray:
    return np.frombuffer(view, dtype="<u4").astype(np.uint32, copy=False)
