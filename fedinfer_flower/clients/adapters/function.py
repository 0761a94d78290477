"""Adapter for any callable from inputs to scores."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt

from fedinfer_flower.clients.adapters.base import log_probabilities
from fedinfer_flower.ensemble.base import Array
from fedinfer_flower.errors import ModelError

__all__ = ["FunctionAdapter"]


class FunctionAdapter:
    """Wrap a callable from (n_queries, ...) to (n_queries, n_local_classes).

    Parameters
    ----------
    model : callable
    classes : tuple of str
    outputs : {"probabilities", "logits"}
    """

    def __init__(
        self, model: Callable[..., Any], *, classes: tuple[str, ...], outputs: str
    ) -> None:
        if outputs not in ("probabilities", "logits"):
            raise ModelError(f"outputs is 'probabilities' or 'logits', not {outputs!r}")
        self.kind = getattr(model, "__name__", type(model).__name__)
        self.classes = classes
        self._model = model
        self._outputs = outputs

    def logits(self, inputs: npt.NDArray[np.generic]) -> Array:
        """Return logits, or logarithms of the probabilities."""
        out = self._model(inputs)
        if self._outputs == "probabilities":
            return log_probabilities(out)
        return np.asarray(out, dtype=float)
