"""What may stand in an entry: names, amounts, memos, claims."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterable, Mapping
from types import MappingProxyType
from typing import Final, TypeAlias

from fedinfer_flower.errors import InvalidValueError

__all__ = [
    "DIGEST",
    "ESCROW",
    "EXTERNAL",
    "KEY",
    "KIND",
    "MAX_AMOUNT",
    "REASON",
    "ROW_KEY",
    "STAKE",
    "Memo",
    "checked_amount",
    "checked_claims",
    "checked_memo",
    "is_account",
    "is_ordinary",
    "ordinary_account",
]

Memo: TypeAlias = Mapping[str, str | int]

EXTERNAL: Final = "external"
"""The world outside: the one account that may be below zero."""
ESCROW: Final = "escrow:"
STAKE: Final = "stake:"

MAX_AMOUNT: Final = 10**15
"""Most micro-credits in one posting: a billion credits. A thousand such sums fit 64 bits."""

KIND: Final = re.compile(r"[a-z][a-z0-9-]{0,31}")
KEY: Final = re.compile(r"[0-9a-zA-Z._-]{1,128}")
"""A key that a caller chooses; keys of escrows and stakes have a colon, so none collides."""
ROW_KEY: Final = re.compile(r"[0-9a-zA-Z._:-]{1,192}")
REASON: Final = re.compile(r"[a-z][a-z0-9-]{0,63}")
DIGEST: Final = re.compile(r"[0-9a-f]{64}")

_MAX_ACCOUNT: Final = 128
_MAX_ORDINARY: Final = 120
_FIELD: Final = re.compile(r"[a-z][a-z0-9_]{0,63}")
_MAX_FIELDS: Final = 16
_MAX_TEXT: Final = 256
_MAX_WHOLE: Final = 2**53
_MAX_CLAIMS: Final = 100_001


def is_account(name: object) -> bool:
    r"""Whether an account may have this name.

    Printable, of one Unicode form (NFC), and with a letter or digit first: a spreadsheet
    takes no exported name for a formula. Letters that look alike are told apart by nobody.

    Examples
    --------
    >>> is_account("north hospital"), is_account("=1+1"), is_account("a\n")
    (True, False, False)
    """
    return (
        isinstance(name, str)
        and 0 < len(name) <= _MAX_ACCOUNT
        and name.isprintable()
        and name[0].isalnum()
        and name == name.strip()
        and unicodedata.is_normalized("NFC", name)
    )


def is_ordinary(name: object) -> bool:
    """Whether this is the account of a party, not one that the ledger keeps itself."""
    return (
        is_account(name)
        and isinstance(name, str)
        and len(name) <= _MAX_ORDINARY
        and name != EXTERNAL
        and not name.startswith((ESCROW, STAKE))
    )


def ordinary_account(name: str) -> str:
    """Return the name of a party's account.

    Raises
    ------
    InvalidValueError
        If it is none.
    """
    if not is_ordinary(name):
        raise InvalidValueError(
            f"an account has a printable name of 1 to {_MAX_ORDINARY} characters that starts with"
            f" a letter or digit and is not the ledger's own ({EXTERNAL!r}, {ESCROW!r},"
            f" {STAKE!r})",
            hint="use the party's key id",
        )
    return name


def checked_amount(amount: int, *, what: str = "an amount") -> int:
    """Return a number of micro-credits in [1, `MAX_AMOUNT`].

    Raises
    ------
    InvalidValueError
        If it is none.
    """
    if type(amount) is not int or not 0 < amount <= MAX_AMOUNT:
        raise InvalidValueError(f"{what} is a whole number of micro-credits in [1, {MAX_AMOUNT}]")
    return amount


def checked_memo(memo: Mapping[str, object]) -> Memo:
    """Return a read-only copy of at most 16 short texts and whole numbers.

    Raises
    ------
    InvalidValueError
        If it is something else; never quotes it.
    """
    if len(memo) > _MAX_FIELDS:
        raise InvalidValueError(f"a memo has at most {_MAX_FIELDS} fields")
    fields: dict[str, str | int] = {}
    for name, value in memo.items():
        if not (isinstance(name, str) and _FIELD.fullmatch(name)):
            raise InvalidValueError("a memo's fields have names like job_id")
        if isinstance(value, str):
            if len(value) > _MAX_TEXT or not value.isprintable():
                raise InvalidValueError(f"a memo's texts are printable, at most {_MAX_TEXT} long")
            fields[name] = value
        elif type(value) is int and abs(value) <= _MAX_WHOLE:
            fields[name] = value
        else:
            raise InvalidValueError("a memo holds texts and whole numbers")
    return MappingProxyType(fields)


def checked_claims(claims: Iterable[str]) -> tuple[str, ...]:
    """Return claims sorted.

    Raises
    ------
    InvalidValueError
        If one comes twice, is not printable, or there are too many.
    """
    ordered = sorted(claims)
    if len(ordered) > _MAX_CLAIMS or len(set(ordered)) != len(ordered):
        raise InvalidValueError("an entry makes each of at most 100 001 claims once")
    if not all(0 < len(claim) <= _MAX_TEXT and claim.isprintable() for claim in ordered):
        raise InvalidValueError(f"a claim is printable text of 1 to {_MAX_TEXT} characters")
    return tuple(ordered)
