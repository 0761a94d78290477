"""The default: concatenation of the sharer's last tokens only."""

from __future__ import annotations

from typing import ClassVar

from fedinfer_flower.errors import FuserError
from fedinfer_flower.kv.fuser import FUSERS, FuserSpec
from fedinfer_flower.kv.fusers.concat import Concat
from fedinfer_flower.kv.share import ShareSpec

__all__ = ["LastToken"]


@FUSERS.register("last-token")
class LastToken(Concat):
    """Projected entries of the sharer's last tokens in front of the receiver's own.

    The last token has read the whole prompt. What the model's last layer made of it is not
    among its entries, so one more thing travels: the entries of a token decoded on top
    (`share.decode`, the default), or the final hidden state (`share.hidden`).

    Parameters
    ----------
    spec : FuserSpec
        Its share is of the last tokens.

    Privacy
    -------
    The payload tells the receiver the answer, by design, and part of what else
    stood in the sharer's prompt. Only the tokens that travel are in it, but those have read
    all others.
    """

    default_share: ClassVar[ShareSpec] = ShareSpec(last=1, decode=1)

    @classmethod
    def check(cls, spec: FuserSpec) -> None:
        """Require a share of the last tokens."""
        super(Concat, cls).check(spec)  # Concat itself wants the opposite
        if spec.share.full:
            raise FuserError(
                "a last-token fuser reads the last tokens of the prompt",
                hint='give share.last of 1 or more, or take kind "concat"',
            )
