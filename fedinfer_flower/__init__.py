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
    from fedinfer_flower.clients.consent import OptionLimits
    from fedinfer_flower.clients.language_mod import LanguageMod, LanguageSite
    from fedinfer_flower.clients.language_policy import LanguagePolicy
    from fedinfer_flower.clients.policy import SitePolicy
    from fedinfer_flower.errors import FedInferError
    from fedinfer_flower.privacy.site_budget import BudgetPolicy
    from fedinfer_flower.querier import Querier
    from fedinfer_flower.querier.async_gateway_client import AsyncGateway
    from fedinfer_flower.querier.federated_classifier import FederatedClassifier
    from fedinfer_flower.querier.gateway_client import Gateway
    from fedinfer_flower.querier.language_querier import LanguageQuerier
    from fedinfer_flower.querier.sequential_querier import SequentialQuerier
    from fedinfer_flower.query import Deadline, Prediction
    from fedinfer_flower.selection.history import SiteHistory
    from fedinfer_flower.strategies import FedEnsemble, InferenceResult, InferenceStrategy
    from fedinfer_flower.strategies.fed_calibrate import FedCalibrate
    from fedinfer_flower.strategies.fed_coalitions import FedCoalitions
    from fedinfer_flower.strategies.fed_decode import FedDecode
    from fedinfer_flower.strategies.fed_group_median import FedGroupMedian
    from fedinfer_flower.strategies.fed_refine import FedRefine
    from fedinfer_flower.strategies.fed_sequential import FedSequential
    from fedinfer_flower.strategies.fed_stack import FedStack
    from fedinfer_flower.strategies.handover import Handover
    from fedinfer_flower.strategies.mixture_of_answers import MixtureOfAnswers
    from fedinfer_flower.strategies.treasurer import Treasurer
    from fedinfer_flower.wire.directory import Directory
    from fedinfer_flower.wire.identity import Identity
    from fedinfer_flower.wire.pins import Pins, read_pins

__version__ = "0.5.0"

_HOMES = {
    "AsyncGateway": "fedinfer_flower.querier.async_gateway_client",
    "BudgetPolicy": "fedinfer_flower.privacy.site_budget",
    "Deadline": "fedinfer_flower.query",
    "Directory": "fedinfer_flower.wire.directory",
    "FedCalibrate": "fedinfer_flower.strategies.fed_calibrate",
    "FedCoalitions": "fedinfer_flower.strategies.fed_coalitions",
    "FedDecode": "fedinfer_flower.strategies.fed_decode",
    "FedEnsemble": "fedinfer_flower.strategies",
    "FederatedClassifier": "fedinfer_flower.querier.federated_classifier",
    "FedGroupMedian": "fedinfer_flower.strategies.fed_group_median",
    "FedInferError": "fedinfer_flower.errors",
    "FedRefine": "fedinfer_flower.strategies.fed_refine",
    "FedSequential": "fedinfer_flower.strategies.fed_sequential",
    "FedStack": "fedinfer_flower.strategies.fed_stack",
    "Gateway": "fedinfer_flower.querier.gateway_client",
    "Handover": "fedinfer_flower.strategies.handover",
    "Identity": "fedinfer_flower.wire.identity",
    "inference": "fedinfer_flower.clients",
    "InferenceMod": "fedinfer_flower.clients",
    "InferenceResult": "fedinfer_flower.strategies",
    "InferenceStrategy": "fedinfer_flower.strategies",
    "LanguageMod": "fedinfer_flower.clients.language_mod",
    "LanguagePolicy": "fedinfer_flower.clients.language_policy",
    "LanguageQuerier": "fedinfer_flower.querier.language_querier",
    "LanguageSite": "fedinfer_flower.clients.language_mod",
    "LocalModel": "fedinfer_flower.clients",
    "MixtureOfAnswers": "fedinfer_flower.strategies.mixture_of_answers",
    "OptionLimits": "fedinfer_flower.clients.consent",
    "Pins": "fedinfer_flower.wire.pins",
    "Prediction": "fedinfer_flower.query",
    "Querier": "fedinfer_flower.querier",
    "read_pins": "fedinfer_flower.wire.pins",
    "SequentialQuerier": "fedinfer_flower.querier.sequential_querier",
    "SiteHistory": "fedinfer_flower.selection.history",
    "SitePolicy": "fedinfer_flower.clients.policy",
    "Treasurer": "fedinfer_flower.strategies.treasurer",
}

__all__ = [
    "AsyncGateway",
    "BudgetPolicy",
    "Deadline",
    "Directory",
    "FedCalibrate",
    "FedCoalitions",
    "FedDecode",
    "FedEnsemble",
    "FedGroupMedian",
    "FedInferError",
    "FedRefine",
    "FedSequential",
    "FedStack",
    "FederatedClassifier",
    "Gateway",
    "Handover",
    "Identity",
    "InferenceMod",
    "InferenceResult",
    "InferenceStrategy",
    "LanguageMod",
    "LanguagePolicy",
    "LanguageQuerier",
    "LanguageSite",
    "LocalModel",
    "MixtureOfAnswers",
    "OptionLimits",
    "Pins",
    "Prediction",
    "Querier",
    "SequentialQuerier",
    "SiteHistory",
    "SitePolicy",
    "Treasurer",
    "__version__",
    "inference",
    "read_pins",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)
