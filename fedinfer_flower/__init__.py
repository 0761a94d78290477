"""Federated inference on Flower: institutions answer queries together, models stay home.

>>> from fedinfer_flower import FedEnsemble, InferenceMod

Everything is imported where it is first used: ``import fedinfer_flower`` loads neither
torch nor tenseal.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fedinfer_flower.clients import InferenceMod, LocalModel, inference
    from fedinfer_flower.errors import FedInferError
    from fedinfer_flower.querier import Querier
    from fedinfer_flower.query import Deadline, Prediction
    from fedinfer_flower.strategies import FedEnsemble, InferenceResult, InferenceStrategy

__version__ = "0.1.0"

_HOMES = {
    "Deadline": "fedinfer_flower.query",
    "FedEnsemble": "fedinfer_flower.strategies",
    "FedInferError": "fedinfer_flower.errors",
    "InferenceMod": "fedinfer_flower.clients",
    "InferenceResult": "fedinfer_flower.strategies",
    "InferenceStrategy": "fedinfer_flower.strategies",
    "LocalModel": "fedinfer_flower.clients",
    "Prediction": "fedinfer_flower.query",
    "Querier": "fedinfer_flower.querier",
    "inference": "fedinfer_flower.clients",
}

__all__ = [
    "Deadline",
    "FedEnsemble",
    "FedInferError",
    "InferenceMod",
    "InferenceResult",
    "InferenceStrategy",
    "LocalModel",
    "Prediction",
    "Querier",
    "__version__",
    "inference",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)
