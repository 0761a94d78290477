"""Fuse the k sharers that are surest of an answer."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fedinfer_flower.errors import InvalidValueError
from fedinfer_flower.kv.gate import ABSTAINS, GATES, Gate

__all__ = ["TopKGate"]


@GATES.register("top-k")
class TopKGate(Gate):
    """Fuse the `k` best sharers by probability of an answer, of those that do not abstain.

    Needs no training and no labels, and does not compare with the receiver: it asks even
    where the receiver knows. Largest probability alone would be worse than chance among
    models that abstain: "I do not know" is often said with confidence. It is therefore
    multiplied by the probability of not abstaining.

    Parameters
    ----------
    k : int
        At least 1. Equally sure sharers count in their order.

    Examples
    --------
    >>> own = torch.tensor([[0.5, 1.0, 0.1, 0.0]])
    >>> sharers = torch.tensor([[[0.6, 1.0, 0.2, 0.0], [0.9, 0.3, 0.8, 0.9]]])
    >>> TopKGate().choose(own, sharers, torch.ones(1, 2)).tolist()
    [[1.0, 0.0]]
    """

    def __init__(self, *, k: int = 1) -> None:
        if type(k) is not int or k < 1:
            raise InvalidValueError("k of gate 'top-k' is a whole number from 1")
        self.k = k

    def options(self) -> dict[str, Any]:
        """Return the options."""
        return {"k": self.k}

    def _pick(
        self,
        own: Tensor,  # noqa: ARG002
        sharers: Tensor,
        seen: Tensor,
        agreement: Tensor | None,  # noqa: ARG002
    ) -> Tensor:
        answers = seen & (sharers[..., 3] < ABSTAINS)
        sure = (sharers[..., 0] * (1.0 - sharers[..., 3])).masked_fill(~answers, -1.0)
        best = sure.argsort(dim=1, descending=True, stable=True)[:, : self.k]
        chosen = torch.zeros_like(seen).scatter_(1, best, torch.ones_like(best, dtype=torch.bool))
        return chosen & answers
