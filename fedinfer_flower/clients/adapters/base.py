"""The face of a local model, and the choice of the adapter that fits it."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from fedinfer_flower.ensemble.base import PROBABILITY_FLOOR, Array
from fedinfer_flower.errors import ModelError

__all__ = ["ModelAdapter", "adapt", "class_name", "log_probabilities"]


class ModelAdapter(Protocol):
    """A local model as the site's handler sees it."""

    kind: str
    classes: tuple[str, ...]

    def logits(self, inputs: npt.NDArray[np.generic]) -> Array:
        """Return logits of shape (n_queries, n_local_classes), columns as in `classes`."""


def class_name(value: object) -> str:
    """Return the name of a class under which sites find each other's classes.

    Label spaces are aligned by name: 3, 3.0, NumPy's 3 and "3" are the same class.

    Examples
    --------
    >>> class_name(np.float64(3.0)), class_name("3"), class_name(True)
    ('3', '3', 'True')
    """
    if isinstance(value, float | np.floating) and float(value).is_integer():
        return str(int(value))
    return str(value)


def log_probabilities(probabilities: npt.NDArray[Any]) -> Array:
    """Return floored logarithms of probabilities.

    A forest or a neighbour vote says exactly zero; the floor keeps its logarithm finite.
    NaN stays NaN, and is refused later.
    """
    return np.asarray(np.log(np.maximum(np.asarray(probabilities, float), PROBABILITY_FLOOR)))


def adapt(model: object, *, classes: Sequence[object] | None, outputs: str) -> ModelAdapter:
    """Choose the adapter for a model.

    Parameters
    ----------
    model : object
        A scikit-learn estimator with ``predict_proba``, a ``torch.nn.Module``, or a
        callable from inputs to an array of shape (n_queries, n_local_classes).
    classes : sequence, optional
        Class of each output column. Needed for all but scikit-learn estimators.
    outputs : {"probabilities", "logits"}
        What a callable returns; a torch module returns logits.

    Raises
    ------
    ModelError
        If nothing fits, or classes are missing.
    """
    from fedinfer_flower.clients.adapters.function import FunctionAdapter
    from fedinfer_flower.clients.adapters.sklearn import SklearnAdapter
    from fedinfer_flower.clients.adapters.torch import TorchAdapter

    names = None if classes is None else tuple(class_name(c) for c in classes)
    if hasattr(model, "predict_proba"):
        return SklearnAdapter(model, classes=names)
    # A torch module can only exist where torch is already imported: no import for others.
    torch = sys.modules.get("torch")
    is_module = torch is not None and isinstance(model, torch.nn.Module)
    if not callable(model):
        raise ModelError(
            f"no adapter fits a local model of type {type(model).__name__}",
            hint="return an estimator with predict_proba, a torch.nn.Module or a callable",
        )
    if not names:
        raise ModelError(
            f"a local model of type {type(model).__name__} does not name its classes",
            hint="return LocalModel(model, classes=[...]) from load_model",
        )
    if is_module:
        return TorchAdapter(model, classes=names)
    return FunctionAdapter(model, classes=names, outputs=outputs)
