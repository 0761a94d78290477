"""Adapter for torch modules that return logits."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from fedinfer_flower.ensemble.base import Array

__all__ = ["TorchAdapter"]


class TorchAdapter:
    """Wrap a ``torch.nn.Module`` from a batch of inputs to a batch of logits.

    The module is put into evaluation mode and runs without gradients, on the device and
    in the floating dtype of its parameters.

    Parameters
    ----------
    model : torch.nn.Module
    classes : tuple of str
        Class of each output column.
    """

    def __init__(self, model: Any, *, classes: tuple[str, ...]) -> None:
        self.kind = type(model).__name__
        self.classes = classes
        self._model = model.eval()

    def logits(self, inputs: npt.NDArray[np.generic]) -> Array:
        """Return the module's output as float64."""
        import torch

        first = next(iter(self._model.parameters()), None)
        batch = torch.from_numpy(np.array(inputs))  # a copy: the message's bytes are read-only
        if first is not None:
            dtype = first.dtype if batch.is_floating_point() else batch.dtype
            batch = batch.to(device=first.device, dtype=dtype)
        with torch.inference_mode():
            out = self._model(batch)
        return np.asarray(out.detach().to("cpu", torch.float64).numpy())
