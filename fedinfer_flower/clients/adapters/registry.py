"""Models that a site names by kind and options, without code of its own."""

from __future__ import annotations

import dataclasses
import difflib
from abc import ABC, abstractmethod
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar, Final

from fedinfer_flower.errors import InvalidValueError, UnknownConfigKeyError
from fedinfer_flower.registry import Registry

__all__ = ["MODELS", "ModelKind", "make_model"]


class ModelKind(ABC):
    """A frozen dataclass of options, registered in `MODELS` under the kind's name."""

    name: ClassVar[str]

    @abstractmethod
    def make(self) -> object:
        """Return what `load_model` may return.

        Raises
        ------
        ModelError
            If the model is missing or not usable.
        """


MODELS: Final[Registry[ModelKind]] = Registry(
    kind="kind of model", package="fedinfer_flower.clients.adapters", group="fedinfer_flower.models"
)
"""Kinds of models by name: one file each in this package, or an entry point."""


def make_model(kind: str, options: Mapping[str, Any]) -> object:
    """Return a model as `load_model` of an `InferenceMod` or a `LanguageMod` does.

    Parameters
    ----------
    kind : str
        ``"onnx"``, ``"hf-classifier"``, ``"hf-causal-lm"``, ``"openai"``, or one that another
        distribution registered.
    options : mapping
        Of the kind, in kebab-case or snake_case. Paths are texts.

    Returns
    -------
    LocalModel or LanguageModel
        A `LanguageModel` of ``"hf-causal-lm"`` without ``candidates`` only.

    Raises
    ------
    UnknownNameError
        If no kind has that name.
    UnknownConfigKeyError
        For an option that the kind does not have.
    InvalidValueError
        For an option that is missing, or of another type.
    ModelError
        If the model is missing or not usable.
    MissingExtraError
        If the library that runs it is not installed.

    Examples
    --------
    >>> make_model("onnx", {"path": "no-such-file.onnx"})
    Traceback (most recent call last):
    ...
    fedinfer_flower.errors.ModelError: FI208 ModelError: there is no model file 'no-such-file.onnx'
    """
    cls: Any = MODELS.get(kind)
    fields = {field.name: field for field in dataclasses.fields(cls) if field.init}
    given: dict[str, Any] = {}
    for key, value in options.items():
        name = str(key).replace("-", "_")
        if name not in fields:
            near = difflib.get_close_matches(name, fields, n=1)
            known = ", ".join(sorted(each.replace("_", "-") for each in fields))
            raise UnknownConfigKeyError(
                f"a model of kind {kind!r} has no option {str(key)[:64]!r}",
                hint=f"did you mean {near[0].replace('_', '-')!r}?"
                if near
                else f"options: {known}",
            )
        given[name] = _converted(kind, str(key), str(fields[name].type), value)
    for name, field in fields.items():
        if (
            name not in given
            and field.default is dataclasses.MISSING
            and field.default_factory is dataclasses.MISSING
        ):
            raise InvalidValueError(
                f"a model of kind {kind!r} needs the option {name.replace('_', '-')!r}"
            )
    made: ModelKind = cls(**given)
    return made.make()


def _converted(kind: str, key: str, declared: str, value: Any) -> Any:
    """Return a value of TOML as the field declares it. Annotations are texts here."""
    plain = declared.removesuffix(" | None")
    wanted: dict[str, tuple[type, ...]] = {
        "Path": (str, Path),
        "str": (str,),
        "bool": (bool,),
        "int": (int,),
        "float": (int, float),
        "tuple[str, ...]": (list, tuple),
    }
    types = wanted.get(plain, (object,))
    ok = isinstance(value, types) and (plain == "bool" or not isinstance(value, bool))
    if ok and plain == "tuple[str, ...]":
        ok = all(isinstance(each, str) for each in value)
    if not ok:
        raise InvalidValueError(f"option {key[:64]!r} of a model of kind {kind!r} is a {plain}")
    makers: dict[str, Any] = {"Path": Path, "float": float, "tuple[str, ...]": tuple}
    return makers[plain](value) if plain in makers else value
