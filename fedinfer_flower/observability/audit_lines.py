"""One entry of an audit log, and the line that it is on disk."""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

from fedinfer_flower.errors import AuditLogError, InvalidValueError
from fedinfer_flower.observability.fact_names import Fact, checked_facts

__all__ = ["MAX_LINE_BYTES", "NO_HASH", "AuditEntry", "read_line"]

MAX_LINE_BYTES: Final = 16 * 1024
NO_HASH: Final = "0" * 64
"""What the first entry has for the hash of the one before it."""

_DOMAIN: Final = b"fedinfer audit entry v1\0"
_FORMAT: Final = 1
_EVENT: Final = re.compile(r"[a-z]+(-[a-z]+)*")
_HASH: Final = re.compile(r"[0-9a-f]{64}")
_KEYS: Final = frozenset({"at", "audit", "event", "facts", "hash", "index", "previous", "role"})


@dataclass(frozen=True, kw_only=True)
class AuditEntry:
    """An entry as it is on disk.

    Parameters
    ----------
    index : int
        From 0, over all files of the log.
    at : float
        Seconds since 1970, by the clock of the machine, to the millisecond.
    role : str
        Whose log it is: ``"site"``, ``"gateway"``.
    event : str
    facts : mapping
    previous, hash : str
        Hash of the entry before, and of this one: SHA-256, in hex.
    """

    index: int
    at: float
    role: str
    event: str
    facts: Mapping[str, Fact]
    previous: str
    hash: str

    @staticmethod
    def make(
        *,
        index: int,
        at: float,
        role: str,
        event: str,
        facts: Mapping[str, Fact],
        previous: str,
    ) -> AuditEntry:
        """Return an entry with its hash.

        Raises
        ------
        AuditLogError
            If the event is not kebab-case.
        """
        if not _EVENT.fullmatch(event) or len(event) > 64:
            raise AuditLogError("an event of an audit log is kebab-case, up to 64 characters")
        at = round(at, 3)
        entry = AuditEntry(
            index=index, at=at, role=role, event=event, facts=facts, previous=previous, hash=""
        )
        found = AuditEntry(**{**vars(entry), "hash": _hash_of(entry)})
        if len(found.to_line()) > MAX_LINE_BYTES:
            raise AuditLogError(f"an entry of an audit log is over {MAX_LINE_BYTES} bytes")
        return found

    def to_line(self) -> bytes:
        """Return the line, with its end."""
        return _canonical({**_content(self), "hash": self.hash}) + b"\n"


def read_line(line: bytes, *, role: str = "") -> AuditEntry:
    """Return the entry of a line, without its end.

    Parameters
    ----------
    line : bytes
    role : str
        Whose log it must be; empty for anyone's.

    Raises
    ------
    InvalidValueError
        With what is wrong, as the end of a sentence about the line.
    """
    try:
        content = json.loads(line.decode("ascii"))
    except (UnicodeDecodeError, ValueError, RecursionError):
        raise InvalidValueError("is no JSON") from None
    entry = _entry(content)
    if entry.to_line() != line + b"\n":
        raise InvalidValueError("is not written as entries are")
    if _hash_of(entry) != entry.hash:
        raise InvalidValueError("does not have the hash of its content")
    if role and entry.role != role:
        raise InvalidValueError("is of another role")
    return entry


def _entry(content: Any) -> AuditEntry:
    if not isinstance(content, dict) or content.keys() != _KEYS or content["audit"] != _FORMAT:
        raise InvalidValueError("is no entry of an audit log")
    index, at, facts = content["index"], content["at"], content["facts"]
    texts = [content[name] for name in ("role", "event", "previous", "hash")]
    ok = (
        type(index) is int
        and index >= 0
        and type(at) in (int, float)
        and math.isfinite(at)
        and isinstance(facts, dict)
        and all(isinstance(text, str) for text in texts)
        and _EVENT.fullmatch(texts[1])
        and all(_HASH.fullmatch(text) for text in texts[2:])
    )
    if not ok:
        raise InvalidValueError("is no entry of an audit log")
    checked = checked_facts(facts)
    role, event, previous, own = texts
    return AuditEntry(
        index=index, at=at, role=role, event=event, facts=checked, previous=previous, hash=own
    )


def _content(entry: AuditEntry) -> dict[str, Any]:
    return {
        "audit": _FORMAT,
        "index": entry.index,
        "at": entry.at,
        "role": entry.role,
        "event": entry.event,
        "facts": dict(entry.facts),
        "previous": entry.previous,
    }


def _hash_of(entry: AuditEntry) -> str:
    return hashlib.sha256(_DOMAIN + _canonical(_content(entry))).hexdigest()


def _canonical(content: Mapping[str, Any]) -> bytes:
    text = json.dumps(content, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return text.encode("ascii")
