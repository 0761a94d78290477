"""Check a receipt without a network: signatures, agreement, sums, pins, words.

What a receipt that passes proves is that the holders of these keys signed these statements
and that the rest follows from them. It does not prove that a site did what it signed.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from enum import StrEnum
from typing import Any

from fedinfer_flower.errors import FedInferError, ReceiptError, error_class
from fedinfer_flower.receipts import rules
from fedinfer_flower.receipts.receipt import MAX_RECEIPT_BYTES, Receipt

__all__ = ["Check", "Outcome", "Verification", "verify"]


class Outcome(StrEnum):
    """How a check ended."""

    OK = "ok"
    FAILED = "failed"
    NOT_CHECKED = "not checked"


@dataclass(frozen=True, kw_only=True)
class Check:
    """One thing that was looked at.

    Parameters
    ----------
    name : str
    outcome : Outcome
    words : str
        What was found, for people.
    code : str
        Of the typed error that fits a failure; empty otherwise.
    """

    name: str
    outcome: Outcome
    words: str
    code: str = ""


@dataclass(frozen=True, kw_only=True)
class Verification:
    """All checks of one receipt.

    Parameters
    ----------
    receipt : Receipt
    checks : tuple of Check
    """

    receipt: Receipt
    checks: tuple[Check, ...]

    @property
    def ok(self) -> bool:
        """Whether no check failed. A check that could not be made has not failed."""
        return not self.failed

    @property
    def failed(self) -> tuple[Check, ...]:
        """Checks that failed."""
        return tuple(check for check in self.checks if check.outcome is Outcome.FAILED)

    @property
    def not_checked(self) -> tuple[Check, ...]:
        """Checks that could not be made: nothing was given to compare with."""
        return tuple(check for check in self.checks if check.outcome is Outcome.NOT_CHECKED)

    def require_ok(self) -> None:
        """Raise the first failure.

        Raises
        ------
        SignatureError
            If a signature is not by the key that it names.
        UntrustedKeyError
            If a key is not the pinned one.
        ReceiptError
            If the receipt contradicts itself otherwise.
        """
        for check in self.failed:
            raise error_class(check.code)(
                f"check {check.name!r}: {check.words}",
                hint="do not rely on the receipt; ask each site for its own copy",
            )

    def to_dict(self) -> dict[str, Any]:
        """Return plain values for JSON."""
        receipt = self.receipt
        return {
            "ok": self.ok,
            "job_id": receipt.job_id,
            "checks": [asdict(check) for check in self.checks],
            "totals": [total.to_dict() for total in receipt.totals],
            "who_can_learn_what": [line.to_dict() for line in receipt.who_can_learn_what],
        }


def verify(
    receipt_bytes: bytes | memoryview,
    *,
    pins: Mapping[str, str] | None = None,
    queriers: Mapping[str, str] | None = None,
    coordinator_key_id: str | None = None,
    now: float | None = None,
    max_bytes: int = MAX_RECEIPT_BYTES,
) -> Verification:
    """Check everything that can be checked without asking anybody.

    Parameters
    ----------
    receipt_bytes : bytes
    pins : mapping of site name to key id, optional
        Keys that were compared out of band. Without them anybody could have made all the
        keys, and the receipt.
    queriers : mapping of name to key id, optional
        If given, the querier must be one of them.
    coordinator_key_id : str, optional
        If given, this key must have signed the receipt as a whole.
    now : float, optional
        UTC, seconds since 1970; by default the clock's.
    max_bytes : int

    Returns
    -------
    verification : Verification
        With failures for content that is wrong.

    Raises
    ------
    EnvelopeError
        If the bytes are no receipt, or hold something unknown.
    SizeLimitError
        If there are too many.
    UnsupportedVersionError
        If the receipt is of another version.

    Examples
    --------
    >>> verify(b"{}")  # doctest: +ELLIPSIS
    Traceback (most recent call last):
    ...
    fedinfer_flower.errors.UnsupportedVersionError: FI302 ...
    """
    receipt = Receipt.from_bytes(receipt_bytes, max_bytes=max_bytes)
    clock = time.time() if now is None else now
    found: list[Check] = [_run(name, rule, receipt) for name, rule in rules.ALWAYS.items()]
    found += [
        _run("times", lambda r: rules.times(r, now=clock), receipt),
        _run("coordinator", lambda r: rules.coordinator(r, key_id=coordinator_key_id), receipt),
        _run("site pins", lambda r: rules.site_pins(r, pins=pins), receipt),
        _run("querier pin", lambda r: rules.querier_pin(r, pins=queriers), receipt),
    ]
    return Verification(receipt=receipt, checks=tuple(found))


def _run(name: str, rule: rules.Rule, receipt: Receipt) -> Check:
    try:
        words = rule(receipt)
    except rules.NotCheckedError as exc:
        return Check(name=name, outcome=Outcome.NOT_CHECKED, words=str(exc))
    except FedInferError as exc:
        # Numbers that no honest receipt has end in other classes; their text says enough.
        code = exc.code if exc.code in {"FI310", "FI311"} else ReceiptError.code
        return Check(name=name, outcome=Outcome.FAILED, words=exc.message, code=code)
    return Check(name=name, outcome=Outcome.OK, words=words)
