"""Joint answers whose errors follow their own probabilities, so that promises can be counted."""

from __future__ import annotations

import numpy as np
import pytest

from fedinfer_flower.query import Prediction


def prediction_of(probabilities: np.ndarray) -> Prediction:
    ordered = np.sort(probabilities, axis=1)
    return Prediction(
        classes=tuple(f"class-{c}" for c in range(probabilities.shape[1])),
        labels=probabilities.argmax(axis=1),
        probabilities=probabilities,
        margin=ordered[:, -1] - ordered[:, -2],
        abstained=np.zeros(len(probabilities), dtype=bool),
    )


def draw_rows(
    rng: np.random.Generator, n_rows: int, n_classes: int = 5, *, sharpness: float = 1.0
) -> tuple[np.ndarray, np.ndarray]:
    """Return (what the model says, right labels): labels follow ``p^sharpness``."""
    p = rng.dirichlet(np.full(n_classes, 0.4), size=n_rows)
    true = p**sharpness + 1e-12
    true /= true.sum(axis=1, keepdims=True)
    labels = (true.cumsum(axis=1) < rng.random((n_rows, 1))).sum(axis=1)
    return p, np.minimum(labels, n_classes - 1)


@pytest.fixture
def as_prediction():
    return prediction_of


@pytest.fixture
def rows():
    return draw_rows
