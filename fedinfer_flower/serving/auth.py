"""Who asks: an API key in a header, looked up in constant time."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from fedinfer_flower.errors import AuthenticationError, QuotaExceededError
from fedinfer_flower.serving.problem import HttpProblem
from fedinfer_flower.serving.rate_limit import FailureLimit, RequestLimit

if TYPE_CHECKING:
    from fedinfer_flower.serving.key_store import KeyStore

__all__ = ["SCOPES", "Caller", "Doorkeeper"]

SCOPES: Final = ("query", "sealed", "chat", "status", "metrics")
"""Queries in clear; under seal; in text; the dashboard's figures; the metrics."""

_HEADER: Final = re.compile(r"[Bb]earer +(fik_[0-9a-f]{8}_[A-Za-z0-9_-]{43})")


@dataclass(frozen=True, kw_only=True)
class Caller:
    """Who asks.

    Parameters
    ----------
    key_id : str
        Of the API key: 8 hex digits, no secret.
    name : str
    scopes : frozenset of str
        Of `SCOPES`.
    models : frozenset of str, optional
        None for all.
    rows_per_minute, rows_per_day, concurrent : int
        0 for no limit.
    """

    key_id: str
    name: str
    scopes: frozenset[str]
    models: frozenset[str] | None = None
    rows_per_minute: int = 0
    rows_per_day: int = 0
    concurrent: int = 0


class Doorkeeper:
    """Tells callers by their keys, and slows down those that have none.

    Parameters
    ----------
    keys : KeyStore
    requests : RequestLimit
        Of each key.
    failures : FailureLimit
        Of each address.

    Privacy
    -------
    A key that does not exist, one that expired or was revoked, and a wrong secret are told in
    the same words after the same work.
    """

    def __init__(self, keys: KeyStore, *, requests: RequestLimit, failures: FailureLimit) -> None:
        self._keys = keys
        self._requests = requests
        self._failures = failures

    def identify(self, authorization: str, *, address: str) -> Caller:
        """Return who sends this header.

        Raises
        ------
        HttpProblem
            401, or 429 for an address that failed too often, or a key that asks too often.
            An address that failed too often still gets in with a valid key: behind a proxy
            all callers may have the same.
        """
        found = _HEADER.fullmatch(authorization)
        caller = self._keys.authenticate(found[1] if found else "")
        if caller is None:
            wait_s = self._failures.take(address)
            if wait_s > 0.0:
                error = QuotaExceededError("too many requests without a valid API key")
                raise HttpProblem(error, retry_after_s=wait_s)
            if not authorization:
                raise HttpProblem(
                    AuthenticationError(
                        "this needs an API key", hint="send 'Authorization: Bearer fik_...'"
                    )
                )
            raise HttpProblem(
                AuthenticationError(
                    "the API key is not valid", hint="it may be mistyped, expired or revoked"
                )
            )
        wait_s = self._requests.take(caller.key_id)
        if wait_s > 0.0:
            error = QuotaExceededError("too many requests a second with this API key")
            raise HttpProblem(error, retry_after_s=wait_s)
        return caller
