"""No gate: every sharer that answered is fused."""

from __future__ import annotations

from torch import Tensor

from fedinfer_flower.kv.gate import GATES, Gate

__all__ = ["NoGate"]


@GATES.register("none")
class NoGate(Gate):
    """Fuse every available sharer, also those that abstain.

    For comparison. What the receiver knew itself may be lost: the other gates exist for it.

    Examples
    --------
    >>> import torch
    >>> sure = torch.tensor([[0.9, 0.3, 0.8, 0.0]])
    >>> NoGate().choose(sure, sure[:, None].repeat(1, 2, 1), torch.tensor([[1, 0]])).tolist()
    [[1.0, 0.0]]
    """

    def _pick(
        self,
        own: Tensor,  # noqa: ARG002
        sharers: Tensor,  # noqa: ARG002
        seen: Tensor,
        agreement: Tensor | None,  # noqa: ARG002
    ) -> Tensor:
        return seen
