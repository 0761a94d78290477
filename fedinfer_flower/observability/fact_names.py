"""Which facts about a query may be written down, and in which form."""

from __future__ import annotations

import math
import numbers
import unicodedata
from collections.abc import Mapping
from typing import Final

from fedinfer_flower.errors import InvalidValueError

__all__ = ["FACT_NAMES", "MAX_TEXT", "Fact", "checked_facts", "shown"]

Fact = str | int | float | bool

MAX_TEXT: Final = 200
"""Most characters of a text fact."""

_MAX_WHOLE: Final = 2**63

FACT_NAMES: Final = frozenset(
    {
        # Who and what: ids and names, which are public among the roles.
        *("query_id", "job_id", "run_id", "node_id", "message_id", "querier", "key_id", "name"),
        *("site", "model", "kind", "role", "scopes", "version", "model_digest", "policy_digest"),
        *("app", "fab_hash", "receipt_digest", "answer_digest", "request_digest"),
        # How it was asked, and what came of it.
        *("action", "protection", "rule", "strategy", "medium", "sealed", "rule_name", "code"),
        *("error_type", "state", "status", "outcome", "reason", "route", "method", "degraded"),
        # How much.
        *("n_rows", "n_fresh_rows", "n_sites", "n_answers", "n_jobs", "n_tokens", "n_attempts"),
        *("epsilon", "delta", "credits", "seconds", "timeout_s", "request_bytes", "reply_bytes"),
        # Processes.
        *("pid", "exit_status", "restarts", "n_entries", "torn_bytes", "file", "head"),
    }
)
"""Names under which facts are kept in audit logs, JSON logs and traces. What was asked or
answered has none: a new name is added here, by someone who has thought about what it tells."""


def checked_facts(facts: Mapping[str, object]) -> dict[str, Fact]:
    """Return facts as they are written.

    Parameters
    ----------
    facts : mapping
        Names of `FACT_NAMES`; texts of at most `MAX_TEXT` printable characters, whole
        numbers below 2^63, finite numbers, truth values. NumPy's numbers become Python's.

    Raises
    ------
    InvalidValueError
        Naming the fact, never its value.

    Examples
    --------
    >>> checked_facts({"n_rows": 3, "epsilon": 0.5})
    {'n_rows': 3, 'epsilon': 0.5}
    """
    return {name: _checked(name, value) for name, value in facts.items()}


def shown(value: object) -> str | None:
    """Return a value as a label or attribute: short printable text, None for anything else.

    Examples
    --------
    >>> shown("north"), shown(b"bytes"), shown("x" * 300)
    ('north', None, None)
    """
    if isinstance(value, bool | int) or (isinstance(value, float) and math.isfinite(value)):
        return str(value)
    return str(value) if isinstance(value, str) and _is_short(value) else None


def _checked(name: str, value: object) -> Fact:
    if name not in FACT_NAMES:
        # Not even the name: of a mistake it may be anything.
        raise InvalidValueError(
            "a fact has a name that may not be written down",
            hint="names: observability.fact_names.FACT_NAMES",
        )
    if isinstance(value, bool):
        return value
    if isinstance(value, str):
        if _is_short(value):
            return str(value)
        raise InvalidValueError(
            f"the fact {name!r} is a text of more than {MAX_TEXT} characters, or not printable"
        )
    if isinstance(value, numbers.Integral) and abs(int(value)) < _MAX_WHOLE:
        return int(value)
    if isinstance(value, numbers.Real) and not isinstance(value, numbers.Rational):
        number = float(value)
        if math.isfinite(number):
            return number
    raise InvalidValueError(
        f"the fact {name!r} is of type {type(value).__name__}, or out of range; a fact is a"
        " short text, a finite number or a truth value"
    )


def _is_short(text: str) -> bool:
    # Cc, Cf, Cs, ...: what would break a line, hide, or turn text around in a terminal.
    return len(text) <= MAX_TEXT and not any(unicodedata.category(c)[0] in "C" for c in text)
