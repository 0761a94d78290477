"""C2C's residual: something is added to the receiver's own entries."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor, nn

from fedinfer_flower.errors import CacheError, FuserError
from fedinfer_flower.kv.blocks import ResidualLayer, side_by_side
from fedinfer_flower.kv.fuser import FUSERS, Fuser, FuserSpec
from fedinfer_flower.kv.layout import CacheEntries
from fedinfer_flower.kv.past import Past
from fedinfer_flower.kv.share import ShareSpec

__all__ = ["Fuse"]


@FUSERS.register("fuse")
class Fuse(Fuser):
    """A residual on the receiver's own entries, token by token.

    For each own entry one network a receiver layer reads it and the sharer's token that
    is aligned with it. What it gives is scaled token- and head-wise, and a learned switch
    for the layer's keys and one for its values turn it on or off: soft and noisy in
    training (`temperature`), hard in evaluation. The last token of the prompt is not
    fused: it is read on top.

    Parameters
    ----------
    spec : FuserSpec
        Its share is of the whole prompt.

    Notes
    -----
    Both sides must read the same text; rephrasing calls for a kind that concatenates.

    Privacy
    -------
    As for ``"concat"``: the whole prompt's entries travel.

    References
    ----------
    Cache-to-Cache (C2C); FedRefine's case study.
    """

    needs_alignment: ClassVar[bool] = True
    projects: ClassVar[bool] = False
    default_share: ClassVar[ShareSpec] = ShareSpec(last=0, decode=0, hidden=True)
    default_lookahead: ClassVar[int] = 1

    def __init__(self, spec: FuserSpec) -> None:
        super().__init__(spec)
        to = spec.receiver
        size = (spec.width, spec.depth, spec.dropout)
        self.nets = nn.ModuleList(
            ResidualLayer(spec.features, to.heads, to.head_size, *size) for _ in spec.layers
        )

    @classmethod
    def check(cls, spec: FuserSpec) -> None:
        """Require a share of the whole prompt."""
        super().check(spec)
        if not spec.share.full:
            raise FuserError("a fuse fuser reads the whole prompt", hint="give share.last=0")

    def extend(
        self,
        past: Past,
        sharer: CacheEntries,
        *,
        gate: Tensor | None = None,
        alignment: Tensor | None = None,
        clean: Past | None = None,
    ) -> Past:
        """Return the receiver's past with a residual on its own entries."""
        base = past if clean is None else clean
        self.require_past(past)
        self.require_past(base)
        self.require_sharer(sharer)
        own_mask = base.mask[:, base.own_from :]
        if tuple(past.mask[:, past.own_from :].shape) != tuple(own_mask.shape):
            raise FuserError("a clean past of other prompts than the past that is extended")
        columns, aligned = self._columns(alignment, sharer, own_mask)
        used = aligned & (own_mask > 0) & self.open_rows(gate, past)[:, None]
        shown, index = used[:, None, :, None], columns[..., None]
        keys: list[Tensor] = []
        values: list[Tensor] = []
        for net, layer, k, v in zip(
            self.nets, self.spec.layers, base.keys, base.values, strict=True
        ):
            features = self.features(sharer, layer)
            read = features.gather(1, index.expand(-1, -1, features.shape[-1]))
            own = side_by_side(k[:, :, base.own_from :], v[:, :, base.own_from :]).float()
            for kept, delta in zip((keys, values), net(read, own, self.temperature), strict=True):
                kept.append(torch.where(shown, delta, torch.zeros(())))
        return past.with_residual(tuple(keys), tuple(values))

    def _columns(
        self, alignment: Tensor | None, sharer: CacheEntries, own_mask: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Return the sharer's column for each own entry, and whether there is one."""
        if alignment is None:
            raise FuserError(
                "a fuse fuser without the alignment of tokens",
                hint="give alignment=alignment_tensor(...) of fedinfer_flower.kv.align",
            )
        if sharer.rows != own_mask.shape[0] or tuple(alignment.shape) != tuple(own_mask.shape):
            raise CacheError(
                "an alignment or a cache of other prompts than the receiver reads",
                hint="align all prompt tokens but the last: one column for each own entry",
            )
        if alignment.numel() and int(alignment.min()) < -1:
            raise CacheError("an alignment below -1")
        if alignment.numel() and int(alignment.max()) >= sharer.tokens:
            raise CacheError("an alignment to a token that the sharer did not send")
        columns = alignment.clamp_min(0)
        aligned = (alignment >= 0) & (sharer.mask.gather(1, columns) > 0)
        # Looking ahead from the last token there is nothing: it reads itself.
        return (columns + self.spec.lookahead).clamp_max(sharer.tokens - 1), aligned
