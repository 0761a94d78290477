"""Many small networks trained at once, with NumPy alone: the shadow models of an attacker.

All networks have one hidden layer and the same shapes, so a step of all of them is a few
products of stacked matrices. They are trained on the whole of their rows in every step and
long past the point where they know these by heart: overfitting is what membership inference
reads, and what small shards do in practice.

Axes: M networks, n rows of each, d features, H hidden units, C classes, B queries.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import numpy as np
import numpy.typing as npt

from fedinfer_flower.errors import InvalidValueError

__all__ = ["Mlps", "train_mlps"]

Float32 = npt.NDArray[np.float32]

_CHUNK: Final = 20
"""Networks trained together: few enough that their state stays in the processor's cache."""

_BETA_1, _BETA_2, _EPSILON = 0.9, 0.999, 1e-8


@dataclass(frozen=True, kw_only=True, eq=False)
class Mlps:
    """M trained networks.

    Parameters
    ----------
    weights_1 : float32 array of shape (M, d, H)
    bias_1 : float32 array of shape (M, 1, H)
    weights_2 : float32 array of shape (M, H, C)
    bias_2 : float32 array of shape (M, 1, C)
    """

    weights_1: Float32
    bias_1: Float32
    weights_2: Float32
    bias_2: Float32

    def __len__(self) -> int:
        return len(self.weights_1)

    def logits(self, inputs: npt.NDArray[np.floating], *, which: slice = slice(None)) -> Float32:
        """Return logits of shape (M, B, C) for inputs of shape (B, d)."""
        rows = np.asarray(inputs, dtype=np.float32)
        hidden = np.maximum(rows @ self.weights_1[which] + self.bias_1[which], 0.0)
        return np.asarray(hidden @ self.weights_2[which] + self.bias_2[which], dtype=np.float32)

    def probabilities(self, inputs: npt.NDArray[np.floating]) -> Float32:
        """Return probabilities of shape (M, B, C), worked out a few networks at a time."""
        parts = [
            _softmax(self.logits(inputs, which=slice(start, start + _CHUNK)))
            for start in range(0, len(self), _CHUNK)
        ]
        return np.concatenate(parts)


def train_mlps(
    inputs: npt.NDArray[np.floating],
    labels: npt.NDArray[np.integer],
    *,
    n_classes: int,
    hidden: int = 64,
    steps: int = 250,
    learning_rate: float = 2e-2,
    seed: int = 0,
) -> Mlps:
    """Train one network on each of M sets of rows, with Adam on all rows of a set.

    Parameters
    ----------
    inputs : float array of shape (M, n, d)
        Features of the order of 1.
    labels : int array of shape (M, n)
        In [0, n_classes).
    n_classes, hidden, steps : int
    learning_rate : float
    seed : int
        Of the initial weights.

    Raises
    ------
    InvalidValueError
        If the shapes do not fit.

    References
    ----------
    .. [1] Kingma and Ba, Adam, ICLR 2015, algorithm 1.

    Examples
    --------
    >>> rows = np.array([[[0.0], [1.0]]] * 3)
    >>> nets = train_mlps(rows, np.array([[0, 1]] * 3), n_classes=2, hidden=8)
    >>> nets.probabilities(np.array([[0.0], [1.0]])).argmax(axis=-1).tolist()
    [[0, 1], [0, 1], [0, 1]]
    """
    if inputs.ndim != 3 or labels.shape != inputs.shape[:2] or not inputs.size:
        raise InvalidValueError("inputs have shape (M, n, d) and labels (M, n), neither empty")
    rng = np.random.default_rng(seed)
    n_nets, _, width = inputs.shape
    first = (rng.standard_normal((n_nets, width, hidden)) / np.sqrt(width)).astype(np.float32)
    second = (rng.standard_normal((n_nets, hidden, n_classes)) / np.sqrt(hidden)).astype(np.float32)
    chunks = []
    for start in range(0, n_nets, _CHUNK):
        part = slice(start, start + _CHUNK)
        chunks.append(
            _train_chunk(
                inputs[part].astype(np.float32),
                np.eye(n_classes, dtype=np.float32)[labels[part]],
                [
                    first[part],
                    np.zeros((len(first[part]), 1, hidden), dtype=np.float32),
                    second[part],
                    np.zeros((len(first[part]), 1, n_classes), dtype=np.float32),
                ],
                steps,
                learning_rate,
            )
        )
    joined = [np.concatenate(parts) for parts in zip(*chunks, strict=True)]
    return Mlps(weights_1=joined[0], bias_1=joined[1], weights_2=joined[2], bias_2=joined[3])


def _softmax(logits: Float32) -> Float32:
    shifted = np.exp(logits - logits.max(axis=-1, keepdims=True))
    return np.asarray(shifted / shifted.sum(axis=-1, keepdims=True), dtype=np.float32)


def _train_chunk(
    rows: Float32, targets: Float32, weights: list[Float32], steps: int, learning_rate: float
) -> list[Float32]:
    means = [np.zeros_like(w) for w in weights]
    squares = [np.zeros_like(w) for w in weights]
    for step in range(1, steps + 1):
        # Both corrections of Adam's start in one factor and one epsilon.
        root = (1.0 - _BETA_2**step) ** 0.5
        rate = np.float32(learning_rate * root / (1.0 - _BETA_1**step))
        gradients = _gradients(rows, targets, weights)
        for part in zip(weights, means, squares, gradients, strict=True):
            _adam_step(*part, rate=rate, tiny=np.float32(_EPSILON * root))
    return weights


def _adam_step(
    weight: Float32,
    mean: Float32,
    square: Float32,
    gradient: Float32,
    *,
    rate: np.float32,
    tiny: np.float32,
) -> None:
    """Change weight, mean and square in place, with `gradient` as scratch space."""
    mean *= np.float32(_BETA_1)
    mean += np.float32(1.0 - _BETA_1) * gradient
    square *= np.float32(_BETA_2)
    np.multiply(gradient, gradient, out=gradient)
    gradient *= np.float32(1.0 - _BETA_2)
    square += gradient
    np.sqrt(square, out=gradient)
    gradient += tiny
    np.divide(mean, gradient, out=gradient)
    gradient *= rate
    weight -= gradient


def _gradients(rows: Float32, targets: Float32, weights: list[Float32]) -> list[Float32]:
    """Return gradients of the mean cross-entropy of each network."""
    first, bias_1, second, bias_2 = weights
    hidden: Float32 = rows @ first
    hidden += bias_1
    np.maximum(hidden, 0.0, out=hidden)
    logits: Float32 = hidden @ second
    logits += bias_2
    error = _softmax(logits)
    error -= targets
    error /= np.float32(rows.shape[1])
    back = error @ second.transpose(0, 2, 1)
    back *= hidden > 0.0
    return [
        rows.transpose(0, 2, 1) @ back,
        back.sum(axis=1, keepdims=True),
        hidden.transpose(0, 2, 1) @ error,
        error.sum(axis=1, keepdims=True),
    ]
