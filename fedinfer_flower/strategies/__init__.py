"""Server-side strategies, one file each."""

from fedinfer_flower.strategies.base import InferenceStrategy
from fedinfer_flower.strategies.fed_ensemble import FedEnsemble
from fedinfer_flower.strategies.result import InferenceResult

__all__ = ["FedEnsemble", "InferenceResult", "InferenceStrategy"]
