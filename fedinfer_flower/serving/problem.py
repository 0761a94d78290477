"""Errors over HTTP: one shape, typed, with nothing of the request in them."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import Any, Final

from starlette.responses import Response

from fedinfer_flower.errors import (
    AuditLogError,
    AuthenticationError,
    BindingError,
    ConfigError,
    ExpiredError,
    FedInferError,
    MediumRefusedError,
    MissingExtraError,
    NotEnoughNodesError,
    PolicyRefusedError,
    ProtectionRefusedError,
    ProtocolError,
    QueryCancelledError,
    QuorumNotMetError,
    QuotaExceededError,
    SiteFailedError,
    SizeLimitError,
    UnavailableError,
    UnknownQueryError,
)

__all__ = ["HttpProblem", "body_of", "is_openai_path", "problem_response", "status_of"]

_STATUS: Final[tuple[tuple[type[FedInferError], int], ...]] = (
    (AuthenticationError, 401),
    (QuotaExceededError, 429),
    (UnavailableError, 503),
    (UnknownQueryError, 404),
    (SizeLimitError, 413),
    (PolicyRefusedError, 403),
    (ProtectionRefusedError, 403),
    (MediumRefusedError, 403),
    (BindingError, 409),
    (QueryCancelledError, 409),
    (QuorumNotMetError, 503),
    (NotEnoughNodesError, 503),
    (SiteFailedError, 503),
    (ExpiredError, 410),
    (MissingExtraError, 501),
    (AuditLogError, 503),
    (ConfigError, 400),
    (ProtocolError, 400),
)
_OPENAI_PATHS: Final = ("/v1/chat/completions", "/v1/responses")
_RETRY_S: Final = 5.0


class HttpProblem(Exception):
    """A typed error, with what HTTP says of it besides.

    Parameters
    ----------
    error : FedInferError
    status : int
        0 for the one that goes with the error's class.
    retry_after_s : float
        0.0 for none.
    headers : mapping
    """

    def __init__(
        self,
        error: FedInferError,
        *,
        status: int = 0,
        retry_after_s: float = 0.0,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        self.error = error
        self.status = status or status_of(error)
        self.retry_after_s = retry_after_s
        self.headers = dict(headers or {})
        super().__init__(error.message)


def status_of(error: FedInferError) -> int:
    """Return the HTTP status of an error; 502 for what went wrong behind the gateway.

    Examples
    --------
    >>> status_of(QuotaExceededError("no more today"))
    429
    """
    return next((status for kind, status in _STATUS if isinstance(error, kind)), 502)


def is_openai_path(path: str) -> bool:
    """Whether errors on this path have the shape that OpenAI's clients read."""
    return path.rstrip("/") in _OPENAI_PATHS


def body_of(error: FedInferError, *, query_id: str = "", openai: bool = False) -> dict[str, Any]:
    """Return the JSON value that a client is shown."""
    if openai:
        text = f"{error.message} ({error.hint})" if error.hint else error.message
        facts = {"message": text, "type": type(error).__name__, "param": None, "code": error.code}
        return {"error": facts}
    shown = {
        "code": error.code,
        "type": type(error).__name__,
        "message": error.message,
        "hint": error.hint,
    }
    return {"error": shown | ({"query_id": query_id} if query_id else {})}


def problem_response(
    exc: FedInferError | HttpProblem, *, query_id: str = "", openai: bool = False
) -> Response:
    """Return the response that tells an error."""
    problem = exc if isinstance(exc, HttpProblem) else HttpProblem(exc)
    headers = {"Cache-Control": "no-store"} | problem.headers
    if problem.status == 401:
        headers["WWW-Authenticate"] = "Bearer"
    wait_s = problem.retry_after_s or (_RETRY_S if problem.status in (429, 503) else 0.0)
    if wait_s:
        headers["Retry-After"] = str(max(1, math.ceil(wait_s)))
    value = body_of(problem.error, query_id=query_id, openai=openai)
    return Response(
        json.dumps(value, separators=(",", ":")),
        status_code=problem.status,
        headers=headers,
        media_type="application/json",
    )
