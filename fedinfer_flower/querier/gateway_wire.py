"""How a querier and a gateway talk, without a socket: calls, replies, retries, errors.

A *talk* is a generator: it yields a `Call` or a `Pause`, is sent a `Reply`, and returns its
result. `gateway_client` and `async_gateway_client` carry talks out, and know nothing else of
the protocol.
"""

from __future__ import annotations

import email.utils
import json
import random
import time
from collections.abc import Callable, Generator, Mapping
from dataclasses import dataclass, field
from typing import Any, Final, TypeVar

from fedinfer_flower.errors import (
    AuthenticationError,
    EnvelopeError,
    FedInferError,
    GatewayError,
    error_class,
)

__all__ = [
    "MAX_ANSWER_BYTES",
    "MAX_JSON_BYTES",
    "Call",
    "Pause",
    "Reply",
    "Talk",
    "Terms",
    "exchange",
    "json_object",
    "typed_error",
]

MAX_JSON_BYTES: Final = 4 << 20
"""Of a reply that carries no answer."""
MAX_ANSWER_BYTES: Final = 64 << 20

_MAX_WORDS: Final = 500
_CALL_S: Final = 30.0
_FIRST_PAUSE_S, _LONGEST_PAUSE_S = 0.25, 8.0
_RETRY_STATUSES: Final = (429, 502, 503, 504)
_RETRY_CODES: Final = ("FI415", "FI417")

T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class Call:
    """One HTTP request.

    Parameters
    ----------
    method, path : str
    params, headers : mapping of str to str
    body : bytes
    timeout_s : float
        Of the whole exchange.
    max_bytes : int
        Largest reply body that is read.
    """

    method: str
    path: str
    params: Mapping[str, str] = field(default_factory=dict)
    headers: Mapping[str, str] = field(default_factory=dict)
    body: bytes = field(default=b"", repr=False)
    timeout_s: float = _CALL_S
    max_bytes: int = MAX_JSON_BYTES


@dataclass(frozen=True, kw_only=True)
class Reply:
    """What came back.

    Parameters
    ----------
    status : int
        0 if nothing whole came: see `lost`.
    headers : mapping of str to str
        Names in lower case.
    body : bytes
    lost : str
        What kind of failure it was, for people; never a text of the other side's.
    final : bool
        Whether the same would come again.
    """

    status: int = 0
    headers: Mapping[str, str] = field(default_factory=dict)
    body: bytes = field(default=b"", repr=False)
    lost: str = ""
    final: bool = False


@dataclass(frozen=True)
class Pause:
    """Wait before going on."""

    seconds: float


Talk = Generator[Call | Pause, Reply | None, T]


@dataclass(kw_only=True)
class Terms:
    """How long a talk may take, and how often it may try again.

    Parameters
    ----------
    timeout_s : float
        Seconds for everything together.
    retries : int
        Most repetitions of one call.
    clock : callable
        Monotonic seconds.
    draw : callable
        Uniform in [0, 1): spreads what many clients do at the same moment.
    """

    timeout_s: float
    retries: int = 4
    clock: Callable[[], float] = time.monotonic
    draw: Callable[[], float] = random.random
    ends_at: float = field(init=False)

    def __post_init__(self) -> None:
        self.ends_at = self.clock() + self.timeout_s

    @property
    def left_s(self) -> float:
        """Seconds that are left; not positive when there are none."""
        return self.ends_at - self.clock()

    def pause_s(self, attempt: int, wanted_s: float = 0.0) -> float:
        """Return how long to wait before repetition `attempt`, at least what was asked for."""
        # Full jitter: clients of a gateway that restarts do not come back in step.
        most = min(_LONGEST_PAUSE_S, _FIRST_PAUSE_S * 2.0**attempt)
        return wanted_s + most * (0.5 + 0.5 * self.draw())


def exchange(call: Call, terms: Terms) -> Talk[Reply]:
    """Make a call, again where that is safe, until it is answered with a success.

    A call is repeated, within the time given, when the connection failed, and on status
    429, 502, 503 and 504 unless they carry the end of a query. Whoever makes a call that
    changes something gives it an idempotency key.

    Raises
    ------
    GatewayError
        If no whole reply came, or one that no gateway sends; the last failure.
    FedInferError
        Of the class that the gateway names.
    """
    attempt = 0
    while True:
        if terms.left_s <= 0.0:
            raise GatewayError(
                "the time given ran out before the gateway had answered",
                hint="a larger timeout_s; or look at the gateway's /ready",
            )
        timed = Call(**{**vars(call), "timeout_s": min(call.timeout_s, terms.left_s)})
        reply = yield timed
        if reply is None:
            raise GatewayError("a talk was carried on without a reply")
        if 200 <= reply.status < 300:
            return reply
        error = _lost_error(reply) if reply.status == 0 else typed_error(reply)
        pause_s = terms.pause_s(attempt, _retry_after_s(reply))
        if not _may_repeat(reply) or attempt >= terms.retries or pause_s >= terms.left_s:
            raise error
        attempt += 1
        yield Pause(pause_s)


def _lost_error(reply: Reply) -> GatewayError:
    return GatewayError(
        f"the gateway cannot be reached: {reply.lost}",
        hint="check url and ca; curl URL/health",
    )


def _may_repeat(reply: Reply) -> bool:
    if reply.status == 0:
        return not reply.final
    if reply.status not in _RETRY_STATUSES:
        return False
    try:
        plain = json_object(reply.body)
    except EnvelopeError:
        return True  # a proxy, for a gateway that is not there
    error = plain.get("error")
    if "id" in plain or not isinstance(error, Mapping):
        return "id" not in plain
    # What a query ended with stays what it is: asking again brings the same.
    return error.get("code") in _RETRY_CODES and not error.get("query_id")


def _retry_after_s(reply: Reply) -> float:
    text = reply.headers.get("retry-after", "")
    if text.isdecimal() and len(text) < 10:
        return float(text)
    try:
        at = email.utils.parsedate_to_datetime(text).timestamp()
    except (TypeError, ValueError, OverflowError):
        return 0.0
    return max(0.0, at - time.time())


def typed_error(reply: Reply) -> FedInferError:
    """Return the error that a reply names, with a bounded text.

    The class is by the code: a gateway can choose among the classes of this package, and
    add words; nothing of it is run or formatted.

    Examples
    --------
    >>> body = b'{"error": {"code": "FI415", "message": "too many", "hint": "later"}}'
    >>> typed_error(Reply(status=429, body=body)).message
    'the gateway: too many'
    >>> type(typed_error(Reply(status=302))).__name__
    'GatewayError'
    """
    try:
        plain = json_object(reply.body)
    except EnvelopeError:
        plain = {}
    error = plain.get("error")
    if isinstance(error, Mapping) and isinstance(error.get("code"), str):
        return error_of(error)
    if 300 <= reply.status < 400:
        return GatewayError(
            f"the gateway answers with a redirect ({reply.status}), which is not followed:"
            " the API key would go to another server",
            hint="give the gateway's own URL",
        )
    if reply.status in (401, 403):
        return AuthenticationError(f"the gateway refuses the API key ({reply.status})")
    return GatewayError(f"the gateway answers with status {reply.status} and no typed error")


def error_of(error: Mapping[str, Any]) -> FedInferError:
    """Return the error that ``{"code", "message", "hint"}`` stands for."""
    code = error.get("code")
    # Made from the code alone: no class can be named that is not an error of this package.
    found = error_class(code) if isinstance(code, str) else GatewayError
    message = _words(error.get("message")) or "no reason given"
    return found(f"the gateway: {message}", hint=_words(error.get("hint")))


def _words(value: object) -> str:
    if not isinstance(value, str):
        return ""
    # Terminals act on control characters.
    clean = "".join(c if c.isprintable() else " " for c in value[:_MAX_WORDS])
    return clean.strip()


def json_object(data: bytes) -> dict[str, Any]:
    """Read bytes as one JSON object without NaN.

    Raises
    ------
    EnvelopeError
        If they are anything else.
    """
    try:
        plain = json.loads(data, parse_constant=_no_constant)
    except (ValueError, RecursionError):
        raise EnvelopeError("the gateway's reply is not JSON") from None
    if not isinstance(plain, dict):
        raise EnvelopeError("the gateway's reply is not a JSON object")
    return plain


def _no_constant(name: str) -> float:
    raise ValueError(name)
