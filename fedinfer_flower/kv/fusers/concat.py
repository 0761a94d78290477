"""Concatenation: projected entries of the whole prompt in front of the receiver's own."""

from __future__ import annotations

from dataclasses import replace
from typing import ClassVar

from torch import nn

from fedinfer_flower.errors import FuserError
from fedinfer_flower.kv.blocks import EntryHead, Trunk
from fedinfer_flower.kv.fuser import FUSERS, Fuser, FuserSpec
from fedinfer_flower.kv.layout import CacheEntries
from fedinfer_flower.kv.share import ShareSpec

__all__ = ["Concat"]


@FUSERS.register("concat")
class Concat(Fuser):
    """FedRefine's equation 1: the sharer's cache, projected, in front of the receiver's.

    One network a receiver layer, read by each of the sharer's tokens on its own. The
    receiver's cache is computed without it; what is decoded attends to both. Positions of
    the projected entries start at 0 and overlap the receiver's. No alignment of tokens, so
    sharer and receiver may read different texts.

    Parameters
    ----------
    spec : FuserSpec
        Its share is of the whole prompt.

    Privacy
    -------
    The whole prompt's entries travel: the first layer is a lookup table of its
    tokens. Prefer ``"last-token"``.

    References
    ----------
    FedRefine, equations 1 and 4.
    """

    default_share: ClassVar[ShareSpec] = ShareSpec(last=0, decode=0)

    def __init__(self, spec: FuserSpec) -> None:
        super().__init__(spec)
        to, size = spec.receiver, (spec.width, spec.depth, spec.dropout)
        self.trunks = nn.ModuleList(Trunk((spec.features,), *size) for _ in spec.layers)
        self.heads = nn.ModuleList(
            EntryHead(spec.width, to.heads, to.head_size) for _ in spec.layers
        )

    @classmethod
    def check(cls, spec: FuserSpec) -> None:
        """Require a share of the whole prompt."""
        super().check(spec)
        if not spec.share.full:
            raise FuserError(
                "a concat fuser reads the whole prompt",
                hint='give share.last=0, or take kind "last-token"',
            )

    def project(self, sharer: CacheEntries) -> CacheEntries:
        """Return the sharer's entries in the receiver's space."""
        self.require_sharer(sharer)
        parts = zip(self.spec.layers, self.trunks, self.heads, strict=True)
        pairs = [head(trunk(self.features(sharer, layer))) for layer, trunk, head in parts]
        return replace(
            sharer,
            keys=tuple(k for k, _ in pairs),
            values=tuple(v for _, v in pairs),
            layout=self.spec.receiver,
            hidden=None,
        )
