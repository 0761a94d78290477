"""Adapter for scikit-learn estimators, and whatever has their interface."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from fedinfer_flower.clients.adapters.base import class_name, log_probabilities
from fedinfer_flower.ensemble.base import Array
from fedinfer_flower.errors import ModelError

__all__ = ["SklearnAdapter"]


class SklearnAdapter:
    """Wrap a fitted estimator with ``predict_proba`` and ``classes_``.

    Parameters
    ----------
    model : estimator
    classes : tuple of str, optional
        Names for the columns of ``predict_proba``; default ``model.classes_``.

    Raises
    ------
    ModelError
        If the estimator is not fitted, or the number of names differs from its classes.
    """

    def __init__(self, model: Any, *, classes: tuple[str, ...] | None) -> None:
        own = getattr(model, "classes_", None)
        if own is None:
            raise ModelError(
                f"{type(model).__name__} has no classes_",
                hint="fit the estimator before load_model returns it",
            )
        self.kind = type(model).__name__
        self.classes = classes or tuple(class_name(c) for c in own)
        if len(own) != len(self.classes):
            raise ModelError(f"{self.kind} has {len(own)} classes, {len(self.classes)} are named")
        self._model = model

    def logits(self, inputs: npt.NDArray[np.generic]) -> Array:
        """Return log-probabilities."""
        return log_probabilities(self._model.predict_proba(inputs))
