"""Real data that scikit-learn bundles, split into what sites hold and what is asked."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import numpy as np
import numpy.typing as npt

from fedinfer_flower.errors import InvalidValueError, MissingExtraError

__all__ = ["DATASETS", "Dataset", "load_dataset"]

DATASETS: Final = ("breast_cancer", "digits", "wine")


@dataclass(frozen=True, kw_only=True, eq=False)
class Dataset:
    """Training data for the sites, and held-out rows that nobody trained on.

    Parameters
    ----------
    name : str
    train_inputs, test_inputs : float array of shape (n_examples, n_features)
    train_labels, test_labels : int array of shape (n_examples,)
        Index into `classes`, which are "0", "1", ...
    classes : tuple of str
    image_side : int
        Pixels a side if rows are square images, else 0.
    """

    name: str
    train_inputs: npt.NDArray[np.float64]
    train_labels: npt.NDArray[np.int64]
    test_inputs: npt.NDArray[np.float64]
    test_labels: npt.NDArray[np.int64]
    classes: tuple[str, ...]
    image_side: int = 0


def load_dataset(name: str, *, seed: int = 0, test_share: float = 0.3) -> Dataset:
    """Load a bundled dataset and split it, stratified by class.

    Nothing is downloaded. Digits are scaled to [0, 1]; other features stay as they are:
    a common scale would need statistics over all sites.

    Raises
    ------
    InvalidValueError
        If the name is not in `DATASETS`.
    """
    if name not in DATASETS:
        raise InvalidValueError(f"no dataset is called {name!r}", hint=f"use {', '.join(DATASETS)}")
    try:
        from sklearn import datasets
        from sklearn.model_selection import train_test_split
    except ImportError as exc:
        raise MissingExtraError(
            "simulation data need scikit-learn",
            hint="pip install 'fedinfer-flower[simulation]'",
        ) from exc
    inputs, labels = getattr(datasets, f"load_{name}")(return_X_y=True)
    inputs = inputs.astype(float) / (16.0 if name == "digits" else 1.0)
    train_x, test_x, train_y, test_y = train_test_split(
        inputs, labels, test_size=test_share, stratify=labels, random_state=seed
    )
    return Dataset(
        name=name,
        train_inputs=train_x,
        train_labels=train_y.astype(np.int64),
        test_inputs=test_x,
        test_labels=test_y.astype(np.int64),
        classes=tuple(str(c) for c in range(int(labels.max()) + 1)),
        image_side=8 if name == "digits" else 0,
    )
