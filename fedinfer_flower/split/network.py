"""The two halves of a split network as torch modules."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from fedinfer_flower.errors import InvalidValueError
from fedinfer_flower.privacy.base import optional_module

if TYPE_CHECKING:
    import torch

__all__ = ["split_back", "split_network"]


def split_back(back: torch.nn.Module, *, embedding_shape: tuple[int, ...]) -> torch.nn.Module:
    """Wrap the rest of a network so that it takes flat embeddings: for `LocalModel`.

    Parameters
    ----------
    back : torch.nn.Module
        From embeddings of shape ``(n_queries, *embedding_shape)`` to logits.
    embedding_shape : tuple of int
        Of one embedding, as the front returns it.

    Raises
    ------
    InvalidValueError
        If the shape is empty or has a dimension below 1.

    Examples
    --------
    >>> import torch
    >>> back = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(4, 3))
    >>> split_back(back, embedding_shape=(1, 2, 2))(torch.zeros(5, 4)).shape
    torch.Size([5, 3])
    """
    if not embedding_shape or min(embedding_shape) < 1:
        raise InvalidValueError(f"an embedding cannot have shape {embedding_shape}")
    torch_module = optional_module("torch", extra="torch")
    unflatten = torch_module.nn.Unflatten(1, tuple(embedding_shape))
    wrapped: torch.nn.Module = torch_module.nn.Sequential(unflatten, back)
    return wrapped


def split_network(
    front: torch.nn.Module,
    back: torch.nn.Module,
    *,
    clip_norm: float,
    noise_std: float = 0.0,
) -> torch.nn.Module:
    """Join both halves, with the clipping between them, and with noise while training.

    In evaluation mode it answers as front and back do apart, without noise. The noise
    makes the back robust; **it is torch's and protects nothing**.

    Parameters
    ----------
    front, back : torch.nn.Module
        Held as ``network.front`` and ``network.back``.
    clip_norm : float
    noise_std : float
        On each entry of the embedding, in training mode.

    Raises
    ------
    InvalidValueError
        If a number is out of range.

    Examples
    --------
    >>> import torch
    >>> network = split_network(torch.nn.Linear(4, 2), torch.nn.Linear(2, 3), clip_norm=1.0)
    >>> network(torch.zeros(5, 4)).shape
    torch.Size([5, 3])
    """
    if not (math.isfinite(clip_norm) and clip_norm > 0.0):
        raise InvalidValueError(f"clip_norm is a positive number, got {clip_norm!r}")
    if not (math.isfinite(noise_std) and noise_std >= 0.0):
        raise InvalidValueError(f"noise_std is not negative, got {noise_std!r}")
    torch_module = optional_module("torch", extra="torch")

    class SplitNetwork(torch_module.nn.Module):  # type: ignore[misc,name-defined]
        """Front, clipping, noise while training, back."""

        def __init__(self) -> None:
            super().__init__()
            self.front = front
            self.back = back

        def forward(self, inputs: Any) -> Any:
            """Return logits of shape (n_queries, n_classes)."""
            embedding = self.front(inputs)
            flat = embedding.flatten(1)
            norms = flat.norm(dim=1, keepdim=True).clamp_min(1e-30)
            flat = flat * (clip_norm / norms).clamp_max(1.0)
            if self.training and noise_std > 0.0:
                flat = flat + noise_std * torch_module.randn_like(flat)
            return self.back(flat.view_as(embedding))

    network: torch.nn.Module = SplitNetwork()
    return network
