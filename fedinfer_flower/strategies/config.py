"""Settings from ``[tool.flwr.app.config]``: typed, in kebab-case, nothing ignored."""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

from fedinfer_flower.errors import InvalidValueError, UnknownConfigKeyError
from fedinfer_flower.privacy.base import PROTECTIONS, make_protection
from fedinfer_flower.query import Deadline

__all__ = ["InferConfig"]

_PREFIX: Final = "fedinfer."
_STRATEGY_KEYS: Final = (
    "fraction_query",
    "min_query_nodes",
    "evidence",
    "min_available_nodes",
    "patience_s",
    "batch_size",
    "allow_coordinator_key",
)


@dataclass(frozen=True, kw_only=True)
class InferConfig:
    """The ``fedinfer.*`` keys of a Flower app.

    Options of the protection are keys too: ``fedinfer.epsilon``, ``fedinfer.scheme``.
    ``fedinfer.gates`` names several with commas between; 0 is no limit for
    ``fedinfer.max-query-nodes`` and ``fedinfer.budget``.

    Examples
    --------
    >>> config = InferConfig.from_run_config({"fedinfer.rule": "median", "lr": 0.1})
    >>> config.rule, config.timeout_s
    ('median', 60.0)
    >>> InferConfig.from_run_config({"fedinfer.rul": "median"})  # doctest: +ELLIPSIS
    Traceback (most recent call last):
    ...
    fedinfer_flower.errors.UnknownConfigKeyError: FI206 ...
    """

    rule: str = "auto"
    protection: str = "plain"
    protection_options: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    timeout_s: float = 60.0
    quorum: int = 1
    straggler_s: float = 0.0
    fraction_query: float = 1.0
    min_query_nodes: int = 1
    max_query_nodes: int = 0
    selector: str = ""
    gates: str = ""
    budget: float = 0.0
    evidence: bool = False
    min_available_nodes: int = 0
    patience_s: float = 60.0
    batch_size: int = 1024
    allow_coordinator_key: bool = False

    @classmethod
    def from_run_config(cls, run_config: Mapping[str, Any]) -> InferConfig:
        """Read the keys with the prefix; all others belong to the app.

        Raises
        ------
        UnknownConfigKeyError
            For a ``fedinfer.*`` key that nothing reads.
        InvalidValueError
            For a value of the wrong type.
        """
        given = {
            key.removeprefix(_PREFIX): value
            for key, value in run_config.items()
            if key.startswith(_PREFIX)
        }
        own = {f.name.replace("_", "-"): f for f in dataclasses.fields(cls)}
        own.pop("protection-options")
        protection = PROTECTIONS.get(_typed("protection", given.get("protection", "plain"), str))
        options = {f.name.replace("_", "-"): f.name for f in dataclasses.fields(protection)}
        values: dict[str, Any] = {}
        extra: dict[str, Any] = {}
        for key, value in given.items():
            if key in own:
                default = own[key].default
                values[own[key].name] = _typed(key, value, type(default))
            elif key in options:
                extra[options[key]] = value
            else:
                raise _unknown(key, [*own, *options], protection.name)
        return cls(**values, protection_options=extra)

    def strategy_arguments(self) -> dict[str, Any]:
        """Return arguments for the constructor of `FedEnsemble`."""
        return {
            "rule": self.rule,
            "protection": make_protection(self.protection, self.protection_options),
            "deadline": Deadline(
                timeout_s=self.timeout_s, quorum=self.quorum, straggler_s=self.straggler_s
            ),
            "max_query_nodes": self.max_query_nodes or None,
            "selector": self.selector or None,
            "gates": tuple(name.strip() for name in self.gates.split(",") if name.strip()),
            "budget": self.budget or None,
        } | {name: getattr(self, name) for name in _STRATEGY_KEYS}


def _typed(key: str, value: Any, kind: type) -> Any:
    if kind is float and type(value) is int:
        value = float(value)
    if type(value) is not kind:
        raise InvalidValueError(
            f"run-config key 'fedinfer.{key}' is a {type(value).__name__}, expected {kind.__name__}"
        )
    return value


def _unknown(key: str, known: list[str], protection: str) -> UnknownConfigKeyError:
    near = difflib.get_close_matches(key, known, n=1)
    if near:
        hint = f"did you mean 'fedinfer.{near[0]}'?"
    else:
        hint = "known: " + ", ".join(f"fedinfer.{k}" for k in sorted(known))
    return UnknownConfigKeyError(
        f"run-config key 'fedinfer.{key}' is read by nothing (protection {protection!r})",
        hint=hint,
    )
