"""Options of a rule: dataclass fields that are JSON scalars with a stated range.

Options travel to the sites by name, so whatever arrives is checked: a coordinator cannot
slip a site a value that the rule's bounds and sensitivities were not worked out for.
"""

from __future__ import annotations

import dataclasses
import difflib
import math
from collections.abc import Collection
from typing import TypeVar

from fedinfer_flower.errors import InvalidValueError

__all__ = ["Scalar", "checked_options", "option", "require_known_options"]

Scalar = str | int | float | bool
"""What an option may be: the JSON scalars without null."""

Number = TypeVar("Number", int, float)

_KINDS: dict[str, tuple[type[Scalar], str]] = {
    "bool": (bool, "true or false"),
    "int": (int, "a whole number"),
    "float": (float, "a finite number"),
    "str": (str, "a text"),
}


def option(default: Number, *, low: Number, high: Number) -> Number:
    """Declare a numeric option with its closed range.

    Typed as its own default, so that a field reads ``clip: float = option(16.0, ...)``.

    Examples
    --------
    >>> @dataclasses.dataclass(frozen=True)
    ... class Example:
    ...     clip: float = option(16.0, low=1.0, high=64.0)
    >>> Example().clip
    16.0
    """
    field: Number = dataclasses.field(default=default, metadata={"low": low, "high": high})
    return field


def _shown(value: object) -> str:
    # Python refuses to write out integers of thousands of digits.
    long = type(value) is int and value.bit_length() > 128
    return "a very long number" if long else repr(value)[:64]


def _checked(where: str, field: dataclasses.Field[Scalar], value: object) -> Scalar:
    # `from __future__ import annotations` leaves names of types, not types.
    declared = field.type if isinstance(field.type, str) else field.type.__name__
    if declared not in _KINDS:
        raise InvalidValueError(f"{where} is declared as {declared}, which is no JSON scalar")
    kind, words = _KINDS[declared]
    # A whole number is a legal way to write a float; true, a kind of int to Python, is not.
    if kind is float and isinstance(value, int | float) and not isinstance(value, bool):
        try:
            value = float(value)
        except OverflowError:
            value = math.inf
    if not isinstance(value, kind) or type(value) is not kind or value in (math.inf, -math.inf):
        raise InvalidValueError(f"{where} must be {words}, got {_shown(value)}")
    low: float = field.metadata.get("low", -math.inf)
    high: float = field.metadata.get("high", math.inf)
    if isinstance(value, int | float) and not low <= value <= high:
        raise InvalidValueError(f"{where} must be in [{low:g}, {high:g}], got {_shown(value)}")
    return value


def checked_options(owner: str, instance: object) -> dict[str, Scalar]:
    """Return the fields of a dataclass as options of the declared types.

    Raises
    ------
    InvalidValueError
        If a value has the wrong type, is not finite or lies outside its range.
    """
    checked = {}
    for field in dataclasses.fields(instance):  # type: ignore[arg-type]
        where = f"option {field.name!r} of {owner}"
        checked[field.name] = _checked(where, field, getattr(instance, field.name))
    return checked


def require_known_options(owner: str, given: Collection[str], known: Collection[str]) -> None:
    """Raise `InvalidValueError` with the nearest known names if an option does not exist."""
    for name in given:
        if name not in known:
            near = difflib.get_close_matches(str(name), known, n=2)
            hint = f"did you mean {' or '.join(near)}?" if near else ""
            listed = ", ".join(sorted(known)) or "none"
            raise InvalidValueError(
                f"{owner} has no option {str(name)[:64]!r}", hint=hint or f"options: {listed}"
            )
