"""No fuser at all: both sides run the same model."""

from __future__ import annotations

from dataclasses import replace
from typing import ClassVar

import torch

from fedinfer_flower.errors import CacheError, FuserError
from fedinfer_flower.kv.fuser import FUSERS, Fuser, FuserSpec
from fedinfer_flower.kv.layout import CacheEntries
from fedinfer_flower.kv.past import Past
from fedinfer_flower.kv.share import ShareSpec

__all__ = ["Identity"]


@FUSERS.register("identity")
class Identity(Fuser):
    """Entries of the same model, injected unchanged: exact, nothing to train.

    `extend` puts them in front, as the other kinds do. `replace_own` takes them for the
    receiver's own, when both read the same prompt: the receiver then need not read it.

    Parameters
    ----------
    spec : FuserSpec
        With the same model on both sides and a share of the whole prompt.

    Privacy
    -------
    As for ``"concat"``: the whole prompt's entries travel.
    """

    trainable: ClassVar[bool] = False
    default_share: ClassVar[ShareSpec] = ShareSpec(last=0, decode=0)

    @classmethod
    def check(cls, spec: FuserSpec) -> None:
        """Require one model, and a share of the whole prompt."""
        super().check(spec)
        sharer, receiver = spec.pair
        if sharer != receiver or spec.sharer != spec.receiver:
            raise FuserError(
                f"an identity fuser from model {sharer[:12]} to model {receiver[:12]}",
                hint="it needs the same model on both sides; train a last-token fuser",
            )
        if not spec.share.full or spec.share.hidden:
            raise FuserError(
                "an identity fuser injects whole prompts, without the hidden state",
                hint="give share.last=0 and share.hidden=False",
            )

    def project(self, sharer: CacheEntries) -> CacheEntries:
        """Return the entries as they are."""
        self.require_sharer(sharer)
        return sharer.without_hidden()

    def replace_own(self, past: Past, sharer: CacheEntries) -> Past:
        """Return the past with the sharer's entries in place of the receiver's own.

        Parameters
        ----------
        past : Past
            Of the same prompts, padded alike; other sharers' prefixes stay.
        sharer : CacheEntries
            Of at least those prompt tokens that the past has read.

        Raises
        ------
        CacheError
            If the entries cannot be of the same prompts.
        """
        self.require_past(past)
        self.require_sharer(sharer)
        start, tokens = past.own_from, past.mask.shape[1] - past.own_from
        entries = sharer.cut(0, tokens)
        if not torch.equal(entries.mask, past.mask[:, start:]):
            raise CacheError(
                "a cache of other prompts than the receiver's own",
                hint="an own cache is replaced only by one of the same prompts in the same order",
            )
        both = zip(past.keys, entries.keys, past.values, entries.values, strict=True)
        pairs = [
            (torch.cat([k[:, :, :start], a], 2), torch.cat([v[:, :, :start], b], 2))
            for k, a, v, b in both
        ]
        return replace(past, keys=tuple(k for k, _ in pairs), values=tuple(v for _, v in pairs))
