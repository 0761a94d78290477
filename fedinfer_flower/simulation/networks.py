"""Networks that can answer under encryption or on shares, and inputs that fit them.

Where institutions compute on ciphertexts or shares they agree beforehand on the classes, on
the order of the logits, and on a range of every feature. A class that a site never saw still
has a logit there, which its training pushed down.
"""

from __future__ import annotations

import dataclasses
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from fedinfer_flower.errors import InvalidValueError
from fedinfer_flower.privacy.base import optional_module
from fedinfer_flower.simulation.data import Dataset

__all__ = [
    "NETWORKS",
    "RELU_NETWORK",
    "SOFTMAX_REGRESSION",
    "SQUARE_NETWORK",
    "dirichlet_rows",
    "fit_network",
    "in_unit_box",
]

SQUARE_NETWORK: Final = "network with squares"
SOFTMAX_REGRESSION: Final = "softmax regression"
RELU_NETWORK: Final = "network with ReLU"

NETWORKS: Final = (SQUARE_NETWORK, SOFTMAX_REGRESSION, RELU_NETWORK)
"""Kinds of model that `fit_network` trains."""

_N_HIDDEN: Final = 32
_BATCH_ROWS: Final = 32
_STEPS: Final = 800
_TRIES: Final = 1000


def in_unit_box(dataset: Dataset) -> Dataset:
    """Return the dataset with every feature scaled to [-1, 1] by public constants.

    The constants are the smallest and largest value of each feature, which the description
    of the published dataset states: they tell nothing about any one site. Digits are in
    [0, 1] already and stay as they are.

    Examples
    --------
    >>> from fedinfer_flower.simulation.data import load_dataset
    >>> boxed = in_unit_box(load_dataset("wine"))
    >>> float(abs(boxed.train_inputs).max()) <= 1.0
    True
    """
    if dataset.image_side:
        return dataset
    loaders = optional_module("sklearn.datasets", extra="simulation")
    published = getattr(loaders, f"load_{dataset.name}")().data
    low, high = published.min(axis=0), published.max(axis=0)

    def scaled(rows: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
        # Rounding may leave the box by one unit in the last place.
        return np.asarray(np.clip(2.0 * (rows - low) / (high - low) - 1.0, -1.0, 1.0))

    return dataclasses.replace(
        dataset,
        train_inputs=scaled(dataset.train_inputs),
        test_inputs=scaled(dataset.test_inputs),
    )


def fit_network(
    kind: str,
    inputs: npt.NDArray[np.float64],
    labels: npt.NDArray[np.int64],
    *,
    n_classes: int,
    seed: int,
) -> Any:
    """Train one of `NETWORKS` with a logit for every class, also those without rows.

    Parameters
    ----------
    kind : str
    inputs : float array of shape (n_examples, n_features)
        Within [-1, 1].
    labels : int array of shape (n_examples,)
    n_classes : int
    seed : int

    Returns
    -------
    network : torch.nn.Sequential

    Raises
    ------
    InvalidValueError
        If the kind is unknown.
    MissingExtraError
        If torch is not installed.
    """
    torch = optional_module("torch", extra="torch")
    torch.set_num_threads(1)  # tiny layers: threads cost more than they give
    generator = torch.Generator().manual_seed(seed)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        network = torch.nn.Sequential(*_layers(kind, inputs.shape[1], n_classes))
    x = torch.tensor(inputs, dtype=torch.float32)
    y = torch.tensor(labels)
    optimiser = torch.optim.Adam(network.parameters(), lr=1e-2, weight_decay=1e-3)
    # Smoothed labels bound how far an unseen class is pushed down.
    loss = torch.nn.CrossEntropyLoss(label_smoothing=0.1)
    done = 0
    while done < _STEPS:
        order = torch.randperm(len(x), generator=generator)
        for batch in order.split(_BATCH_ROWS):
            optimiser.zero_grad()
            loss(network(x[batch]), y[batch]).backward()
            optimiser.step()
            done += 1
    return network.eval()


def _layers(kind: str, n_features: int, n_classes: int) -> list[Any]:
    import torch

    class Square(torch.nn.Module):
        """The one activation that a ciphertext takes as it is."""

        def forward(self, values: torch.Tensor) -> torch.Tensor:
            return values * values

    if kind == SOFTMAX_REGRESSION:
        return [torch.nn.Linear(n_features, n_classes)]
    activations = {SQUARE_NETWORK: Square, RELU_NETWORK: torch.nn.ReLU}
    if kind not in activations:
        raise InvalidValueError(f"no network is called {kind!r}", hint=", ".join(NETWORKS))
    first, second = torch.nn.Linear(n_features, _N_HIDDEN), torch.nn.Linear(_N_HIDDEN, n_classes)
    return [first, activations[kind](), second]


def dirichlet_rows(
    labels: npt.NDArray[np.int64], *, n_sites: int, alpha: float, min_size: int, seed: int
) -> list[npt.NDArray[np.int64]]:
    """Return the row numbers of each site: every class divided by a Dirichlet draw.

    The scheme of `partition_rows`, with numpy alone: flwr-datasets stands on pyarrow, whose
    current release needs numpy 2, and SPU needs numpy 1.

    Raises
    ------
    InvalidValueError
        If no draw gives every site `min_size` rows.

    Examples
    --------
    >>> rows = dirichlet_rows(np.arange(90) % 3, n_sites=3, alpha=1.0, min_size=5, seed=0)
    >>> sorted(np.concatenate(rows).tolist()) == list(range(90))
    True
    """
    rng = np.random.default_rng(seed)
    for _ in range(_TRIES):
        parts: list[list[npt.NDArray[np.int64]]] = [[] for _ in range(n_sites)]
        for name in np.unique(labels):
            rows = rng.permutation(np.flatnonzero(labels == name))
            cuts = (np.cumsum(rng.dirichlet([alpha] * n_sites))[:-1] * len(rows)).astype(int)
            for part, piece in zip(parts, np.split(rows, cuts), strict=True):
                part.append(piece)
        joined = [np.concatenate(part) for part in parts]
        if min(len(rows) for rows in joined) >= min_size:
            return joined
    raise InvalidValueError(
        f"no Dirichlet({alpha:g}) partition gives {n_sites} sites {min_size} rows each",
        hint="raise alpha, or ask for fewer sites",
    )
