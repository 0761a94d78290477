"""What is wrong before anything runs."""

from __future__ import annotations

from fedinfer_flower.errors.base import FedInferError

__all__ = [
    "CapacityError",
    "ConfigError",
    "DeploymentError",
    "IncompatibleProtection",
    "InvalidValueError",
    "KeyAtCoordinatorError",
    "MissingExtraError",
    "ModelError",
    "UnknownConfigKeyError",
    "UnknownNameError",
]


class ConfigError(FedInferError):
    """Wrong before anything runs."""

    code = "FI200"


class UnknownNameError(ConfigError):
    """No rule, protection or other registered thing has that name."""

    code = "FI201"


class InvalidValueError(ConfigError, ValueError):
    """A value outside its range or of the wrong type."""

    code = "FI202"


class IncompatibleProtection(ConfigError):
    """A rule and a protection that cannot work together."""

    code = "FI203"


class MissingExtraError(ConfigError, ImportError):
    """An optional dependency is not installed."""

    code = "FI204"


class KeyAtCoordinatorError(ConfigError):
    """The coordinator would hold the key that is to keep answers from it."""

    code = "FI205"


class UnknownConfigKeyError(ConfigError):
    """A run-config key that nothing reads."""

    code = "FI206"


class CapacityError(ConfigError):
    """A sum of this many scores could wrap around its modulus without notice."""

    code = "FI207"


class ModelError(ConfigError):
    """A local model that no adapter fits, or without the facts an adapter needs."""

    code = "FI208"


class DeploymentError(ConfigError):
    """A site, a gateway or a SuperLink that is set up wrongly."""

    code = "FI209"
