"""BERT-like models for DP-SGD: position ids of the shape of the batch."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from fedinfer_flower.privacy.base import optional_module
from fedinfer_flower.training.record_privacy import EXTRA

if TYPE_CHECKING:
    import torch

__all__ = ["with_explicit_positions"]


def with_explicit_positions(
    model: torch.nn.Module, *, padding_id: int = 0, token_types: bool = True
) -> torch.nn.Module:
    """Wrap a model of the BERT family so that every record has position ids of its own.

    Left to itself such a model looks up one row of position ids for the whole batch, and
    the position embeddings have one gradient for all records instead of one each. The
    gradients of all other layers are right, so that only a training step shows it.

    Parameters
    ----------
    model : torch.nn.Module
        Called with ``input_ids``, ``attention_mask``, ``position_ids`` and, with
        `token_types`, ``token_type_ids``; returns logits or an object with ``logits``.
    padding_id : int
        Tokens with this id are masked.
    token_types : bool

    Returns
    -------
    wrapped : torch.nn.Module
        From token ids of shape (n_queries, n_tokens) to logits. Holds `model` as
        ``wrapped.model``.

    Examples
    --------
    >>> import torch
    >>> class Positions(torch.nn.Module):
    ...     def forward(self, input_ids, attention_mask, position_ids):
    ...         return position_ids
    >>> with_explicit_positions(Positions(), token_types=False)(torch.ones(2, 3)).tolist()
    [[0, 1, 2], [0, 1, 2]]
    """
    torch_module = optional_module("torch", extra=EXTRA)

    class ExplicitPositions(torch_module.nn.Module):  # type: ignore[misc,name-defined]
        """Token ids in, logits out."""

        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def forward(self, input_ids: Any) -> Any:
            """Return logits of shape (n_queries, n_classes)."""
            n_tokens = input_ids.shape[1]
            places = torch_module.arange(n_tokens, device=input_ids.device)
            given = {
                "input_ids": input_ids,
                "attention_mask": (input_ids != padding_id).long(),
                "position_ids": places.expand(input_ids.shape).contiguous(),
            }
            if token_types:
                given["token_type_ids"] = torch_module.zeros_like(input_ids)
            out = self.model(**given)
            return getattr(out, "logits", out)

    wrapped: torch.nn.Module = ExplicitPositions()
    return wrapped
