"""Typed readers for JSON values that came over the wire.

Each returns the value in the type asked for, or raises `EnvelopeError` naming the field
and never the value.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np
import numpy.typing as npt

from fedinfer_flower.errors import EnvelopeError, SizeLimitError
from fedinfer_flower.wire.envelope import Json

__all__ = [
    "exactly",
    "flag",
    "number",
    "numbers",
    "optional_numbers",
    "scalars",
    "text",
    "texts",
    "whole",
]


def exactly(meta: Mapping[str, Json], *names: str) -> None:
    """Require exactly these fields."""
    if meta.keys() != set(names):
        raise EnvelopeError(
            "the envelope's meta lacks a field or has an unknown one",
            hint="install the same release of fedinfer-flower at every role",
        )


def text(meta: Mapping[str, Json], name: str, *, max_chars: int = 256) -> str:
    """Read a string of at most `max_chars` characters that UTF-8 can carry."""
    value = meta.get(name)
    if not isinstance(value, str) or len(value) > max_chars:
        raise EnvelopeError(f"field {name!r} is not a string of at most {max_chars} characters")
    try:
        value.encode()
    except UnicodeEncodeError:  # lone surrogates: valid JSON, no text
        raise EnvelopeError(f"field {name!r} is not valid text") from None
    return value


def texts(meta: Mapping[str, Json], name: str, *, max_items: int) -> tuple[str, ...]:
    """Read a list of strings."""
    values = meta.get(name)
    if not isinstance(values, list):
        raise EnvelopeError(f"field {name!r} is not a list")
    if len(values) > max_items:
        raise SizeLimitError(f"field {name!r} has {len(values)} items; the limit is {max_items}")
    return tuple(text({name: value}, name) for value in values)


def flag(meta: Mapping[str, Json], name: str) -> bool:
    """Read a boolean."""
    value = meta.get(name)
    if not isinstance(value, bool):
        raise EnvelopeError(f"field {name!r} is not true or false")
    return value


def whole(meta: Mapping[str, Json], name: str, *, low: int, high: int) -> int:
    """Read an integer in [low, high]."""
    value = meta.get(name)
    if type(value) is not int or not low <= value <= high:
        raise EnvelopeError(f"field {name!r} is not an integer in [{low}, {high}]")
    return value


def number(meta: Mapping[str, Json], name: str) -> float:
    """Read a finite number."""
    value = meta.get(name)
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise EnvelopeError(f"field {name!r} is not a number")
    try:
        value = float(value)
    except OverflowError:  # an integer of hundreds of digits
        raise EnvelopeError(f"field {name!r} is too large") from None
    if not math.isfinite(value):
        raise EnvelopeError(f"field {name!r} is not finite")
    return value


def numbers(meta: Mapping[str, Json], name: str, *, max_items: int) -> tuple[float, ...]:
    """Read a list of finite numbers."""
    values = meta.get(name)
    if not isinstance(values, list) or len(values) > max_items:
        raise EnvelopeError(f"field {name!r} is not a list of at most {max_items} numbers")
    return tuple(number({name: value}, name) for value in values)


def optional_numbers(
    meta: Mapping[str, Json], name: str, *, length: int
) -> npt.NDArray[np.float64] | None:
    """Read null, or a list of exactly `length` finite numbers."""
    if meta.get(name) is None:
        return None
    values = numbers(meta, name, max_items=length)
    if len(values) != length:
        raise EnvelopeError(f"field {name!r} does not have {length} numbers")
    return np.array(values)


def scalars(meta: Mapping[str, Json], name: str) -> dict[str, str | int | float | bool]:
    """Read an object of at most 32 scalar options."""
    value = meta.get(name)
    if not isinstance(value, dict) or len(value) > 32:
        raise EnvelopeError(f"field {name!r} is not an object of at most 32 options")
    for key, entry in value.items():
        if len(key) > 64 or not isinstance(entry, str | int | float | bool):
            raise EnvelopeError(f"field {name!r} has an option that is not a scalar")
        if isinstance(entry, str):
            text({name: entry}, name)
        elif not isinstance(entry, bool):
            number({name: entry}, name)
    return dict(value)
