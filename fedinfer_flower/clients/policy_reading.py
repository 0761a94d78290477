"""From what TOML holds to typed values: every key known, every value of its type."""

from __future__ import annotations

import dataclasses
import difflib
import math
import re
import tomllib
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any, Final, TypeVar

from fedinfer_flower.errors import ConfigError, InvalidValueError, UnknownConfigKeyError

__all__ = ["key_ids", "read_file", "read_table", "require_known", "table_of"]

_KEY_ID: Final = re.compile(r"[0-9a-f]{64}")
_MAX_BYTES: Final = 1 << 20
_WORDS: Final = {str: "text", int: "a whole number", float: "a number", bool: "true or false"}

T = TypeVar("T")


def read_file(path: Path) -> dict[str, Any]:
    """Return what a TOML file of at most 1 MiB says.

    Raises
    ------
    ConfigError
        If it cannot be read, or is no TOML.
    """
    try:
        data = path.read_bytes()
        if len(data) > _MAX_BYTES:
            raise ConfigError(f"the policy {path.name!r} is larger than {_MAX_BYTES} bytes")
        return tomllib.loads(data.decode("utf-8"))
    except tomllib.TOMLDecodeError as exc:
        # The parser names line and column; the policy is the reader's own.
        raise ConfigError(f"the policy {path.name!r} is no TOML: {exc}") from None
    except (OSError, UnicodeDecodeError) as exc:
        raise ConfigError(
            f"the policy {path.name!r} cannot be read: {type(exc).__name__}",
            hint="give the path of a site's policy, as in 'fedinfer policy check site.toml'",
        ) from None


def table_of(value: object, where: str) -> dict[str, Any]:
    """Return a table.

    Raises
    ------
    InvalidValueError
        If the value is something else.
    """
    if not isinstance(value, Mapping):
        raise InvalidValueError(f"[{where}] of a site policy is a table")
    return {str(key): item for key, item in value.items()}


def require_known(key: str, known: Collection[str], where: str) -> None:
    """Refuse a key that nothing reads: a misspelt limit would not be one.

    Raises
    ------
    UnknownConfigKeyError
        With the nearest known key.
    """
    if key in known:
        return
    near = difflib.get_close_matches(key, known, n=1)
    raise UnknownConfigKeyError(
        f"{where} of a site policy has {key[:64]!r}, which nothing reads",
        hint=f"did you mean {near[0]!r}?" if near else f"known: {', '.join(sorted(known))}",
    )


def read_table(cls: type[T], values: object, where: str, *, folder: Path = Path()) -> T:
    """Build a frozen dataclass from a table with kebab-case keys.

    Parameters
    ----------
    folder : Path
        What relative paths are relative to.

    Raises
    ------
    UnknownConfigKeyError
        For a key that nothing reads.
    InvalidValueError
        For a value of another type, or out of its range.

    Examples
    --------
    >>> from fedinfer_flower.clients.policy_tables import LimitRules
    >>> read_table(LimitRules, {"rows-per-day": 10}, "limits").rows_per_day
    10
    """
    fields = {f.name.replace("_", "-"): f for f in dataclasses.fields(cls)}  # type: ignore[arg-type]
    given: dict[str, Any] = {}
    for key, value in table_of(values, where).items():
        require_known(key, fields, f"[{where}]")
        field = fields[key]
        given[field.name] = _typed(value, str(field.type), f"[{where}] {key}", folder)
    missing = [
        key
        for key, field in fields.items()
        if field.name not in given
        and field.default is dataclasses.MISSING
        and field.default_factory is dataclasses.MISSING
    ]
    if missing:
        raise InvalidValueError(f"[{where}] of a site policy lacks {missing[0]!r}")
    return cls(**given)


def key_ids(values: object, where: str) -> dict[str, str]:
    """Read a table of name = key id.

    Raises
    ------
    InvalidValueError
        If an entry is no key id.
    """
    table = table_of(values, where)
    for name, key_id in table.items():
        if not isinstance(key_id, str) or not _KEY_ID.fullmatch(key_id):
            raise InvalidValueError(
                f"[{where}] {name[:64]} is no key id",
                hint="64 lower-case hex digits, as 'fedinfer key' prints them",
            )
    return table


def _typed(value: Any, kind: str, where: str, folder: Path) -> Any:
    first = kind.split(" ", maxsplit=1)[0]
    if first == "Path":
        if not isinstance(value, str) or not value:
            raise InvalidValueError(f"{where} is a path")
        return folder / Path(value).expanduser()
    if first.startswith("tuple"):
        if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
            raise InvalidValueError(f"{where} is a list of texts")
        if len(set(value)) != len(value):
            raise InvalidValueError(f"{where} names something twice")
        return tuple(value)
    if first.startswith("Mapping"):
        return table_of(value, where.strip("[]").replace("] ", "."))
    wanted: type = {"str": str, "int": int, "float": float, "bool": bool}[first]
    if wanted is float and type(value) is int:
        value = float(value)
    if type(value) is not wanted:
        raise InvalidValueError(f"{where} is {_WORDS[wanted]}")
    if isinstance(value, float) and not math.isfinite(value):
        raise InvalidValueError(f"{where} is a finite number")
    return value
