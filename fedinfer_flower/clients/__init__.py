"""Site side: the mod that answers queries, adapters of local models, calibration."""

from fedinfer_flower.clients.local_model import LocalModel
from fedinfer_flower.clients.mod import InferenceMod, inference

__all__ = ["InferenceMod", "LocalModel", "inference"]
