"""Which settings a served language model takes, and which options a job may bring."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from typing import Any, Final

from fedinfer_flower.errors import (
    InvalidValueError,
    KeyAtCoordinatorError,
    UnknownConfigKeyError,
)
from fedinfer_flower.privacy.base import Protection, make_protection
from fedinfer_flower.serving.config import ModelConfig
from fedinfer_flower.serving.text_job import TextJob
from fedinfer_flower.strategies.answer_mixing.base import ANSWER_MIXINGS, AnswerMixing
from fedinfer_flower.strategies.decode_budget import DecodeBudget
from fedinfer_flower.strategies.decode_steps import DecodeTerms
from fedinfer_flower.strategies.refine_options import RefineOptions, consents, names_of

__all__ = [
    "decode_terms",
    "decoding_of",
    "mixing_of",
    "protection_of",
    "require_askable",
    "require_text_options",
]

_DECODING: Final = ("max_new_tokens", "temperature", "top_k", "top_p", "seed")
_TAKEN: Final[Mapping[str, tuple[str, ...]]] = {
    "refine": (
        "receiver",
        "sharers",
        "medium",
        "allow",
        "rephrase",
        "rounds",
        "batch_size",
        *_DECODING,
    ),
    "mixture": ("mixing", "site", "samples", "sites", "batch_size", *_DECODING),
    "decode": (
        "candidates",
        "max_steps",
        "stop",
        "joiner",
        "abstain_below",
        "abstentions",
        "max_epsilon",
        "batch_size",
    ),
}


def require_text_options(model: ModelConfig) -> None:
    """Require that the settings of a language model can work; call it before serving.

    Raises
    ------
    ConfigError
        For an option that nothing reads, a value out of its range, or a protection whose
        secret key would lie with the coordinator.

    Examples
    --------
    >>> require_text_options(ModelConfig(kind="language", strategy="refine",
    ...                                  strategy_options={"receiver": "north"}))
    """
    known = _TAKEN[model.strategy]
    for name in model.strategy_options:
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1)
            raise UnknownConfigKeyError(
                f"strategy {model.strategy!r} has no option {name[:64]!r} here",
                hint=f"did you mean {near[0]!r}?" if near else f"known: {', '.join(known)}",
            )
    if model.strategy == "decode":
        decode_terms(model, {})
        DecodeBudget(
            protection=protection_of(model), max_epsilon=model.strategy_options.get("max_epsilon")
        )
        return
    TextJob(questions=["?"], options=_of_jobs(decoding_of(model, {})))
    if model.strategy == "mixture":
        mixing_of(model).exchanges(names_of(model.strategy_options.get("sites"), "sites"))
        return
    given = model.strategy_options
    RefineOptions(
        receivers=names_of(given.get("receiver"), "receiver"),
        sharers=names_of(given.get("sharers"), "sharers"),
        medium=given.get("medium", "auto"),
        allow=consents(given.get("allow", ("text",))),
        rephrase=given.get("rephrase", "template"),
        rounds=given.get("rounds", 1),
        batch_size=given.get("batch_size", 32),
    )


def require_askable(model: ModelConfig, job: TextJob) -> None:
    """Require that a model's strategy can do what a job asks.

    Raises
    ------
    InvalidValueError
        If it cannot: candidates that are chosen together are not sampled.
    """
    if model.strategy != "decode":
        return
    # 1.0 is what clients send who mean the default.
    neutral = {"temperature": (0, 1), "top_p": (1,)}
    for name, values in neutral.items():
        if job.options.get(name, values[0]) not in values:
            raise InvalidValueError(
                f"{name} of a model whose sites write together: the best candidate is taken",
                hint=f"leave {name} out",
            )


def decoding_of(model: ModelConfig, options: Mapping[str, Any]) -> dict[str, Any]:
    """Return the decoding of a job: the model's own settings, below the job's.

    ``max_new_tokens`` of a job is capped by the model's.
    """
    own = {k: v for k, v in model.strategy_options.items() if k in _DECODING}
    both = own | {k: v for k, v in options.items() if k != "stop"}
    if "max_new_tokens" in own and "max_new_tokens" in options:
        both["max_new_tokens"] = min(own["max_new_tokens"], options["max_new_tokens"])
    return both


def decode_terms(model: ModelConfig, options: Mapping[str, Any]) -> DecodeTerms:
    """Return how texts grow; ``max_new_tokens`` of a job counts candidates, and caps them."""
    own = model.strategy_options
    steps = own.get("max_steps", 1)
    candidates = own.get("candidates")
    return DecodeTerms(
        candidates=None if candidates is None else tuple(candidates),
        max_steps=min(steps, options.get("max_new_tokens", steps)),
        stop=(*own.get("stop", ()), *options.get("stop", ())),
        joiner=own.get("joiner", " "),
        abstain_below=own.get("abstain_below", 0.0),
        abstentions=tuple(own.get("abstentions", ())),
    )


def mixing_of(model: ModelConfig) -> AnswerMixing:
    """Return the way to mix answers that a model's settings name."""
    own = model.strategy_options
    options = {name: own[name] for name in ("site", "samples") if name in own}
    cls = ANSWER_MIXINGS.get(own.get("mixing", "majority"))
    try:
        return cls(**options)
    except TypeError:
        raise InvalidValueError(
            f"mixing {cls.name!r} takes no {' and no '.join(options)}"
        ) from None


def protection_of(model: ModelConfig) -> Protection:
    """Return the protection of every step of a text.

    Raises
    ------
    KeyAtCoordinatorError
        For one with a secret key: the gateway is coordinator and querier in one.
    """
    protection = make_protection(model.protection, dict(model.protection_options))
    if protection.needs_key:
        raise KeyAtCoordinatorError(
            f"protection {protection.name!r} needs a key, and a gateway that writes texts would"
            " hold it beside the ciphertexts",
            hint="protection 'secagg' or 'secagg+dp', or 'dp'",
        )
    return protection


def _of_jobs(decoding: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in decoding.items() if name != "top_k"}
