"""The file of a history: strict JSON, written whole.

Whoever can write the file decides whom a coordinator asks, so its folder is the
coordinator's alone. Reading is strict all the same: a damaged file is an error and never a
shorter history, which would forgive.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
import os
import re
import secrets
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Final, NoReturn, TypeVar

from fedinfer_flower.errors import ConfigError, InvalidValueError
from fedinfer_flower.profile import MAX_CLASSES
from fedinfer_flower.selection.candidate import AuditTally, SiteRecord

__all__ = [
    "MAX_EPOCH",
    "MAX_EPOCHS",
    "MAX_LATENCIES",
    "MAX_SITES",
    "checked_record",
    "is_key_id",
    "is_label",
    "read_records",
    "write_records",
]

MAX_SITES: Final = 10_000
MAX_LATENCIES: Final = 100
MAX_EPOCHS: Final = 50
MAX_EPOCH: Final = 2**53
"""Any JSON reader keeps whole numbers up to here."""

_MAX_FILE_BYTES: Final = 256 * 2**20
_FORMAT: Final = "fedinfer site history"
_VERSION: Final = 1
_KEY_ID = re.compile(r"[!-~]{1,128}")
_FIELDS: Final = tuple(field.name for field in dataclasses.fields(SiteRecord))

T = TypeVar("T")


def is_key_id(value: object) -> bool:
    """Return whether a value can be a key id."""
    return isinstance(value, str) and _KEY_ID.fullmatch(value) is not None


def is_label(value: object, *, most: int = 128) -> bool:
    """Return whether a value is a printable text of 1 to `most` characters."""
    return isinstance(value, str) and 0 < len(value) <= most and value.isprintable()


def checked_record(record: SiteRecord) -> SiteRecord:
    """Return an equal record, if it keeps all bounds of the file.

    Raises
    ------
    InvalidValueError
        If it does not.
    """
    try:
        return _record(_plain(record))
    except InvalidValueError:
        raise
    except ValueError:
        raise InvalidValueError(
            "a site's record is larger than a history keeps, or has a value out of its range",
            hint=f"at most {MAX_EPOCHS} epochs, oldest first, and {MAX_LATENCIES} latencies",
        ) from None


def write_records(path: Path, records: Mapping[str, SiteRecord]) -> None:
    """Write records by key id; a reader finds the old file or the new one, never half of one.

    Raises
    ------
    ConfigError
        If the file cannot be written, or would be too large to be read again.
    """
    document = {
        "format": _FORMAT,
        "version": _VERSION,
        "sites": {key_id: _plain(record) for key_id, record in records.items()},
    }
    data = json.dumps(document, allow_nan=False, indent=1).encode()
    if len(data) > _MAX_FILE_BYTES:
        raise ConfigError(
            f"the history has {len(data)} bytes, more than the {_MAX_FILE_BYTES} of a file",
            hint="forget sites that are gone",
        )
    draft = path.with_name(f".{path.name}.{os.getpid()}.{secrets.token_hex(4)}")
    try:
        handle = os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        with open(handle, "wb") as stream:
            stream.write(data)
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(draft, path)
    except OSError as exc:
        draft.unlink(missing_ok=True)
        raise ConfigError(
            f"the history {path.name!r} cannot be written: {exc.strerror}",
            hint="give a path in a folder that exists and is yours",
        ) from None


def read_records(path: Path) -> dict[str, SiteRecord]:
    """Read what `write_records` wrote.

    Raises
    ------
    ConfigError
        If the file is missing, too large, or not exactly a history of this version.
    """
    try:
        with path.open("rb") as stream:
            data = stream.read(_MAX_FILE_BYTES + 1)
    except OSError as exc:
        raise ConfigError(
            f"the history {path.name!r} cannot be read: {exc.strerror}",
            hint="restore it; a new one would forget what sites did",
        ) from None
    if len(data) > _MAX_FILE_BYTES:
        raise ConfigError(f"the history {path.name!r} is larger than {_MAX_FILE_BYTES} bytes")
    try:
        return _records(
            json.loads(data, parse_constant=_refuse, object_pairs_hook=_without_duplicates)
        )
    # Malformed JSON and UTF-8 are ValueErrors, and so is what our own value objects raise.
    except (ValueError, RecursionError):
        raise ConfigError(
            f"{path.name!r} is damaged, or no site history of this release",
            hint="restore it; a new one would forget what sites did",
        ) from None


def _plain(record: SiteRecord) -> dict[str, Any]:
    plain: dict[str, Any] = {name: getattr(record, name) for name in _FIELDS}
    plain["tallies"] = [
        {"epoch": t.epoch, "right": dict(t.right), "asked": dict(t.asked)} for t in record.tallies
    ]
    plain["merits"] = [list(merit) for merit in record.merits]
    for name in ("latencies_s", "reputation"):
        plain[name] = list(plain[name])
    return plain


def _refuse(_: str) -> NoReturn:
    raise ValueError


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    _require(len(found) == len(pairs))
    return found


def _require(condition: bool) -> None:
    if not condition:
        raise ValueError


def _records(document: Any) -> dict[str, SiteRecord]:
    _require(isinstance(document, dict) and set(document) == {"format", "version", "sites"})
    _require(document["format"] == _FORMAT)
    _require(type(document["version"]) is int and document["version"] == _VERSION)
    sites = document["sites"]
    _require(isinstance(sites, dict) and len(sites) <= MAX_SITES)
    _require(all(is_key_id(key_id) for key_id in sites))
    return {key_id: _record(value) for key_id, value in sites.items()}


def _record(value: Any) -> SiteRecord:
    _require(isinstance(value, dict) and set(value) == set(_FIELDS))
    tallies = _list(value["tallies"], _tally, most=MAX_EPOCHS)
    merits = _list(value["merits"], _merit, most=MAX_EPOCHS)
    for epochs in ([t.epoch for t in tallies], [epoch for epoch, _ in merits]):
        _require(all(a < b for a, b in itertools.pairwise(epochs)))
    alpha, beta = _list(value["reputation"], _number, most=2, least=2)
    return SiteRecord(
        owner=_text(value["owner"]),
        jurisdiction=_text(value["jurisdiction"]),
        tallies=tallies,
        merits=merits,
        latencies_s=_list(value["latencies_s"], _amount, most=MAX_LATENCIES),
        last_seen_at=_optional(value["last_seen_at"]),
        epsilon_left=_optional(value["epsilon_left"]),
        reputation=(alpha, beta),
        cluster=_text(value["cluster"]),
    )


def _tally(value: Any) -> AuditTally:
    _require(isinstance(value, dict) and set(value) == {"epoch", "right", "asked"})
    return AuditTally(
        epoch=_epoch(value["epoch"]), right=_counts(value["right"]), asked=_counts(value["asked"])
    )


def _counts(value: Any) -> dict[str, float]:
    _require(isinstance(value, dict) and len(value) <= MAX_CLASSES)
    _require(all(is_label(name, most=256) for name in value))
    return {name: _amount(count) for name, count in value.items()}


def _merit(value: Any) -> tuple[int, float]:
    _require(isinstance(value, list) and len(value) == 2)
    return _epoch(value[0]), _number(value[1])


def _list(value: Any, read: Callable[[Any], T], *, most: int, least: int = 0) -> tuple[T, ...]:
    _require(isinstance(value, list) and least <= len(value) <= most)
    return tuple(read(entry) for entry in value)


def _epoch(value: Any) -> int:
    _require(type(value) is int and 0 <= value <= MAX_EPOCH)
    return int(value)


def _text(value: Any) -> str:
    _require(value == "" or is_label(value))
    return str(value)


def _number(value: Any) -> float:
    _require(type(value) in (int, float))
    try:
        number = float(value)
    except OverflowError:  # an integer of hundreds of digits
        raise ValueError from None
    _require(math.isfinite(number))
    return number


def _amount(value: Any) -> float:
    number = _number(value)
    _require(number >= 0.0)
    return number


def _optional(value: Any) -> float | None:
    return None if value is None else _amount(value)
