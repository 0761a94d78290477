from __future__ import annotations

import numpy as np
import pytest

from fedinfer_flower.attacks import shadow_models
from fedinfer_flower.attacks.shadow_models import train_mlps
from fedinfer_flower.errors import InvalidValueError


def loss(rows, targets, weights) -> np.ndarray:
    """Mean cross-entropy of each network, in 64 bits."""
    first, bias_1, second, bias_2 = (w.astype(np.float64) for w in weights)
    logits = np.maximum(rows @ first + bias_1, 0.0) @ second + bias_2
    logits -= logits.max(axis=-1, keepdims=True)
    log_p = logits - np.log(np.exp(logits).sum(axis=-1, keepdims=True))
    return -(targets * log_p).sum(axis=-1).mean(axis=-1)


def test_gradients_are_those_of_the_loss() -> None:
    rng = np.random.default_rng(0)
    rows = rng.normal(size=(2, 7, 3)).astype(np.float32)
    targets = np.eye(4, dtype=np.float32)[rng.integers(0, 4, (2, 7))]
    shapes = [(2, 3, 5), (2, 1, 5), (2, 5, 4), (2, 1, 4)]
    weights = [rng.normal(size=shape).astype(np.float32) for shape in shapes]

    found = shadow_models._gradients(rows, targets, weights)

    for number, gradient in enumerate(found):
        direction = rng.normal(size=gradient.shape)
        step = 1e-5
        up, down = list(weights), list(weights)
        up[number] = weights[number] + step * direction
        down[number] = weights[number] - step * direction
        slope = (loss(rows, targets, up) - loss(rows, targets, down)) / (2 * step)
        # Float32 gradients of sums of 7 rows: seven digits, less what cancels.
        np.testing.assert_allclose((gradient * direction).sum(axis=(1, 2)), slope, atol=1e-4)


def test_networks_learn_their_own_rows_by_heart_and_differ() -> None:
    rng = np.random.default_rng(1)
    rows = rng.normal(size=(25, 30, 6))  # more networks than one chunk
    labels = rng.integers(0, 3, (25, 30))

    nets = train_mlps(rows, labels, n_classes=3, hidden=32, seed=2)

    for number in range(25):
        own = nets.probabilities(rows[number])
        assert (own[number].argmax(axis=-1) == labels[number]).all()
    everywhere = nets.probabilities(rows[0]).argmax(axis=-1)
    # Random labels: other networks guess. 3 classes, 30 rows: 24 of 30 by chance is 1e-8.
    assert ((everywhere[1:] == labels[0]).mean(axis=1) < 0.8).all()


def test_same_seed_trains_the_same_networks() -> None:
    rows, labels = np.ones((2, 3, 2)), np.array([[0, 1, 0], [1, 1, 0]])

    first, again = (train_mlps(rows, labels, n_classes=2, steps=5, seed=3) for _ in range(2))

    np.testing.assert_array_equal(first.weights_1, again.weights_1)


def test_shapes_that_do_not_fit_are_refused() -> None:
    with pytest.raises(InvalidValueError):
        train_mlps(np.ones((2, 3, 2)), np.zeros((2, 4), dtype=int), n_classes=2)
