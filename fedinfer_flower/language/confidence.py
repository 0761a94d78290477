"""What a model shows of its own certainty: four numbers about the first answer token."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

import torch
from torch import Tensor

__all__ = ["EVIDENCE", "evidence"]

EVIDENCE: Final = ("probability", "entropy", "margin", "abstention")
"""Names of the columns: largest probability, entropy in nats, lead over the second, and the
probability of beginning to say "I do not know"."""


def evidence(logits: Tensor, abstention_ids: Sequence[int]) -> Tensor:
    """Return label-free evidence about the next token.

    Parameters
    ----------
    logits : tensor (B, V)
    abstention_ids : sequence of int
        First tokens of the abstentions.

    Returns
    -------
    evidence : float32 tensor (B, 4)
        Columns as `EVIDENCE`.

    Examples
    --------
    >>> evidence(torch.tensor([[0.0, 0.0]]), [1]).round(decimals=2).tolist()
    [[0.5, 0.6899999976158142, 0.0, 0.5]]
    """
    p = logits.float().softmax(-1)
    top = p.topk(2, -1).values
    entropy = -(p * p.clamp_min(1e-9).log()).sum(-1)
    ids = sorted(set(abstention_ids))
    abstains = p[:, ids].sum(-1) if ids else torch.zeros(len(p))
    return torch.stack([top[:, 0], entropy, top[:, 0] - top[:, 1], abstains], 1)
