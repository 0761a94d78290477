"""Train both halves of a split network, or one, with the noise that queries will have."""

from __future__ import annotations

import copy
import itertools
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy.typing as npt

from fedinfer_flower.errors import InvalidValueError
from fedinfer_flower.privacy.base import optional_module
from fedinfer_flower.split.front import embedding_noise_std
from fedinfer_flower.split.network import split_network

if TYPE_CHECKING:
    import torch

__all__ = ["SplitTrained", "train_split"]


@dataclass(frozen=True, kw_only=True, eq=False)
class SplitTrained:
    """Both halves after training, plain and in evaluation mode.

    Parameters
    ----------
    front, back : torch.nn.Module
    """

    front: torch.nn.Module
    back: torch.nn.Module


def train_split(
    front: torch.nn.Module,
    back: torch.nn.Module,
    inputs: torch.Tensor | npt.NDArray[Any],
    labels: torch.Tensor | npt.NDArray[Any],
    *,
    clip_norm: float,
    epsilon: float | None = None,
    delta: float = 1e-5,
    train_front: bool = True,
    train_back: bool = True,
    epochs: int = 30,
    batch_size: int = 64,
    learning_rate: float = 3e-3,
    seed: int | None = None,
) -> SplitTrained:
    """Train copies of both halves with clipping and noise at the split.

    Train the front once, on public or pooled data, and publish it. Then each site trains
    its own back on its own records, with ``train_front=False``. Without the noise in
    training a back takes noise for signal.

    Parameters
    ----------
    front, back : torch.nn.Module
    inputs : array of shape (n_records, ...)
    labels : int64 array of shape (n_records,)
    clip_norm : float
    epsilon : float, optional
        Per query row, as `SplitFront` will have it; None for no noise.
    delta : float
    train_front, train_back : bool
    epochs, batch_size : int
    learning_rate : float
        Of Adam.
    seed : int, optional
        Of torch's generator: order of records and noise.

    Raises
    ------
    InvalidValueError
        If nothing is to be trained, or a number is out of range.
    MissingExtraError
        Without the extra ``torch``, or with `epsilon` without ``dp``.

    Privacy
    -------
    None: the noise makes the back robust, and neither half is private with respect to
    the records. **A published front shows what it was trained on**; see `train_privately`.

    Examples
    --------
    >>> import torch
    >>> halves = train_split(
    ...     torch.nn.Linear(4, 2), torch.nn.Linear(2, 2), torch.randn(20, 4), torch.arange(20) % 2,
    ...     clip_norm=1.0, epsilon=16.0, epochs=1, seed=0,
    ... )
    >>> halves.front.training
    False
    """
    torch_module = optional_module("torch", extra="torch")
    if not (train_front or train_back):
        raise InvalidValueError("neither half is to be trained")
    if epochs < 1 or batch_size < 1 or not learning_rate > 0.0:
        raise InvalidValueError("epochs, batch_size and learning_rate are positive")
    noise_std = (
        0.0
        if epsilon is None
        else embedding_noise_std(clip_norm=clip_norm, epsilon=epsilon, delta=delta)
    )
    own_front, own_back = copy.deepcopy(front), copy.deepcopy(back)
    device = next(itertools.chain(own_front.parameters(), own_back.parameters())).device
    with torch_module.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        if seed is not None:
            torch_module.manual_seed(seed)
        network = split_network(own_front, own_back, clip_norm=clip_norm, noise_std=noise_std)
        trained = [*own_front.parameters()] if train_front else []
        trained += [*own_back.parameters()] if train_back else []
        _fit(
            network.train(),
            [p for p in trained if p.requires_grad],
            torch_module.as_tensor(inputs).to(device),
            torch_module.as_tensor(labels).to(device),
            epochs=epochs,
            batch_size=batch_size,
            learning_rate=learning_rate,
            frozen=[
                half for half, on in ((own_front, train_front), (own_back, train_back)) if not on
            ],
        )
    for half in (own_front, own_back):
        half.zero_grad(set_to_none=True)
    return SplitTrained(front=own_front.eval(), back=own_back.eval())


def _fit(
    network: torch.nn.Module,
    trained: list[torch.nn.Parameter],
    inputs: torch.Tensor,
    labels: torch.Tensor,
    *,
    epochs: int,
    batch_size: int,
    learning_rate: float,
    frozen: list[torch.nn.Module],
) -> None:
    import torch

    for half in frozen:
        half.eval()  # its running statistics stay as they are
    optimiser = torch.optim.Adam(trained, lr=learning_rate)
    for _ in range(epochs):
        order = torch.randperm(len(inputs))
        for start in range(0, len(inputs), batch_size):
            at = order[start : start + batch_size].to(inputs.device)
            network.zero_grad(set_to_none=True)
            loss = torch.nn.functional.cross_entropy(network(inputs[at]), labels[at])
            torch.autograd.backward(loss)
            optimiser.step()
