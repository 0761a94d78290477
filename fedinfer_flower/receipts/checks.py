"""What the fields of statements and receipts may be: readers, and rules between fields."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from types import MappingProxyType
from typing import TYPE_CHECKING, Final, TypeAlias

from fedinfer_flower.errors import EnvelopeError, InvalidValueError
from fedinfer_flower.privacy.charge import Charge
from fedinfer_flower.wire import fields as read
from fedinfer_flower.wire.envelope import Json

if TYPE_CHECKING:
    from fedinfer_flower.receipts.statement import SiteStatement

__all__ = [
    "HEX",
    "JOB_ID",
    "MAX_ITEMS",
    "MAX_ROWS",
    "MAX_SITES",
    "MAX_TIME",
    "NAME",
    "QUERY_ID",
    "Scalars",
    "frozen_options",
    "hex_bytes",
    "in_floats",
    "is_site_name",
    "objects",
    "optional_number",
    "read_charge",
    "wrong_fields",
]

Scalars: TypeAlias = Mapping[str, str | int | float | bool]

HEX: Final = re.compile(r"[0-9a-f]{64}")
JOB_ID: Final = re.compile(r"[0-9a-zA-Z_-]{1,56}")
QUERY_ID: Final = re.compile(r"[0-9a-zA-Z_-]{1,56}-[0-9]{1,7}")
NAME: Final = re.compile(r"[a-z][a-z0-9+-]{0,63}")
MAX_ROWS: Final = 1_000_000
MAX_SITES: Final = 1_000_000
MAX_ITEMS: Final = 100_000
MAX_TIME: Final = 2**40
"""Seconds since 1970; the year 36812."""

EVIDENCE_FORMS: Final = ("", "clear", "shares", "ckks")
"""Of `settlement.forms.EvidenceForm`, and none."""


def hex_bytes(plain: Mapping[str, Json], name: str, *, n_bytes: int) -> bytes:
    """Read exactly `n_bytes` bytes in lower-case hex."""
    value = read.text(plain, name)
    if not re.fullmatch(f"[0-9a-f]{{{2 * n_bytes}}}", value):
        raise EnvelopeError(f"field {name!r} is not {n_bytes} bytes in lower-case hex")
    return bytes.fromhex(value)


def optional_number(plain: Mapping[str, Json], name: str) -> float | None:
    """Read null, or a finite number."""
    return None if plain[name] is None else read.number(plain, name)


def frozen_options(name: str, value: Scalars) -> Scalars:
    """Return a read-only copy of at most 32 scalar options."""
    try:
        return MappingProxyType(read.scalars({name: dict(value)}, name))
    except EnvelopeError as exc:
        raise InvalidValueError(exc.message) from None


def objects(plain: Mapping[str, Json], name: str) -> list[dict[str, Json]]:
    """Read a list of objects."""
    value = plain[name]
    if not isinstance(value, list) or len(value) > MAX_ITEMS:
        raise EnvelopeError(f"field {name!r} is not a list of at most {MAX_ITEMS} objects")
    if not all(isinstance(item, dict) for item in value):
        raise EnvelopeError(f"field {name!r} has an item that is not an object")
    return value


def read_charge(plain: Mapping[str, Json], name: str) -> Charge:
    """Read a charge."""
    sums = plain[name]
    if not isinstance(sums, dict):
        raise EnvelopeError(f"field {name!r} is not a charge")
    try:
        return in_floats(Charge.from_dict(sums))
    # An integer of hundreds of digits is valid JSON and no float.
    except (InvalidValueError, OverflowError):
        raise EnvelopeError(f"field {name!r} is not a charge") from None


def in_floats(charge: Charge) -> Charge:
    """Return the same charge with sums that are floats, so that it has one byte form."""
    sums = {k: v if k == "n_rows" else float(v) + 0.0 for k, v in charge.to_dict().items()}
    return Charge.from_dict(sums)


def is_site_name(value: str) -> bool:
    """Whether this can be a site's name: 1 to 128 printable characters."""
    return 0 < len(value) <= 128 and value.isprintable()


def wrong_fields(statement: SiteStatement) -> Iterator[str]:
    """Yield the names of fields that no honest statement has."""
    for name in ("site_key_id", "cohort_digest", "profile_commitment", "payload_digest"):
        if not HEX.fullmatch(getattr(statement, name)):
            yield name
    for name in ("querier_key_id", "session_key_id", "model_digest"):
        value = getattr(statement, name)
        if value and not HEX.fullmatch(value):
            yield name
    if statement.evidence not in EVIDENCE_FORMS:
        yield "evidence"
    for name in ("protection", "rule"):
        if not NAME.fullmatch(getattr(statement, name)):
            yield name
    if not QUERY_ID.fullmatch(statement.query_id):
        yield "query_id"
    if not is_site_name(statement.site):
        yield "site"
    yield from _wrong_counts(statement)
    yield from _wrong_charges(statement)


def _wrong_counts(statement: SiteStatement) -> Iterator[str]:
    limits = {
        "run_id": (0, 2**64 - 1),
        "n_rows": (1, MAX_ROWS),
        "n_fresh_rows": (0, statement.n_rows),
        "n_sites_asked": (1, MAX_SITES),
        "min_cohort": (1, MAX_SITES),
        "issued_at": (0, MAX_TIME),
    }
    for name, (low, high) in limits.items():
        value = getattr(statement, name)
        if type(value) is not int or not low <= value <= high:
            yield name
    if getattr(statement, "query_sealed") not in (True, False):  # noqa: B009
        yield "query_sealed"


def _wrong_charges(statement: SiteStatement) -> Iterator[str]:
    # Rows from the cache cost nothing; a protection without epsilon charges nothing.
    charged_rows = 0 if statement.epsilon is None else statement.n_fresh_rows
    charge = statement.charge
    if charge.n_rows != charged_rows or charge.is_free != (charged_rows == 0):
        yield "charge"
    if statement.epsilon and charge.is_free:
        yield "epsilon"
    for kind, (epsilon, delta) in {
        "": (statement.epsilon, statement.delta),
        "record_": (statement.record_epsilon, statement.record_delta),
    }.items():
        if (epsilon is None) != (delta is None):
            yield f"{kind}delta"
        if epsilon is not None and not (math.isfinite(epsilon) and epsilon >= 0.0):
            yield f"{kind}epsilon"
        if delta is not None and not 0.0 <= delta < 1.0:
            yield f"{kind}delta"
