"""The gateway over HTTP: its routes, and what holds for every one of them."""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import logging
import time
from collections import Counter
from collections.abc import Callable, Coroutine, Iterator
from typing import TYPE_CHECKING, Any, Final

from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.routing import APIRoute
from starlette.concurrency import run_in_threadpool
from starlette.datastructures import Headers, MutableHeaders
from starlette.exceptions import HTTPException
from starlette.routing import Match, Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from fedinfer_flower.errors import (
    EnvelopeError,
    FedInferError,
    ProtocolError,
    QuotaExceededError,
)
from fedinfer_flower.observability.tracing import from_headers
from fedinfer_flower.serving.auth import Doorkeeper
from fedinfer_flower.serving.body_limits import BodyRoom, LimitedBody, read_json, too_large
from fedinfer_flower.serving.config import GatewayConfig
from fedinfer_flower.serving.desk import Desk
from fedinfer_flower.serving.jobs import Board
from fedinfer_flower.serving.openapi import describe, field_names
from fedinfer_flower.serving.problem import HttpProblem, is_openai_path, problem_response
from fedinfer_flower.serving.rate_limit import FailureLimit, Quotas, RequestLimit

if TYPE_CHECKING:
    from fedinfer_flower.observability.audit_log import AuditLog
    from fedinfer_flower.observability.metrics import GatewayMetrics
    from fedinfer_flower.serving.key_store import KeyStore

__all__ = ["create_app"]

_LOG: Final = logging.getLogger("fedinfer_flower.access")
_ROUTES: Final = ("query", "models", "health", "openai_chat", "openai_responses", "dashboard")
_BODIES_AT_A_TIME: Final = 32
_MAX_DIGITS: Final = 16
_SHORT_BYTES: Final = 16 << 10
_HEADERS: Final = {
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Content-Security-Policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:;"
        " connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    ),
}
_WORDS: Final = {404: "there is no such route", 405: "this route has no such method"}


def create_app(
    board: Board,
    config: GatewayConfig,
    *,
    keys: KeyStore,
    metrics: GatewayMetrics | None = None,
    audit: AuditLog | None = None,
    requests: RequestLimit | None = None,
    failures: FailureLimit | None = None,
) -> FastAPI:
    """Return the gateway's ASGI application.

    Parameters
    ----------
    board : Board
    config : GatewayConfig
    keys : KeyStore
    metrics : GatewayMetrics, optional
    audit : AuditLog, optional
        Refusals of callers with a valid key are written there.
    requests : RequestLimit, optional
        Requests a second of one key; default 200, in bursts 400.
    failures : FailureLimit, optional
        Requests without a valid key of one address; default one in 5 s, in bursts 20.

    Privacy
    -------
    An answer is shown to the key that asked, and to no other. Responses and logs carry nothing
    of a request: no path, header, query string, body.
    """
    desk = Desk(
        board=board,
        config=config,
        keys=keys,
        quotas=Quotas(keys),
        metrics=metrics,
        audit=audit,
    )
    app = FastAPI(
        title="fedinfer gateway",
        description="Federated inference on Flower over HTTP.",
        version=importlib.import_module("fedinfer_flower").__version__,
        docs_url=None,
        redoc_url=None,
        redirect_slashes=False,
    )
    app.state.desk = desk
    app.router.route_class = StrictRoute
    for name in _ROUTES:
        module = f"fedinfer_flower.serving.routes.{name}"
        if importlib.util.find_spec(module) is not None:
            importlib.import_module(module).add_routes(app, desk)
    describe(app)
    _add_handlers(app)
    door = Doorkeeper(
        keys, requests=requests or RequestLimit(), failures=failures or FailureLimit()
    )
    app.add_middleware(Guard, desk=desk, door=door)
    return app


class StrictRoute(APIRoute):
    """A route whose JSON bodies are read by `body_limits.read_json`."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        """Return the handler, which sees a `StrictRequest`."""
        handler = super().get_route_handler()

        async def strict(request: Request) -> Response:
            return await handler(StrictRequest(request.scope, request.receive))

        return strict


class StrictRequest(Request):
    """A request whose JSON is strict."""

    async def json(self) -> Any:
        """Return the body as a JSON value; see `body_limits.parse_json`."""
        if not hasattr(self, "_json"):
            self._json = await read_json(self)
        return self._json


class Guard:
    """What every request goes through: limits, key, headers, one line in the access log.

    Parameters
    ----------
    app : ASGI application
    desk : Desk
    door : Doorkeeper

    Notes
    -----
    The key is looked at before a byte of the body is read: who has none can make the gateway
    hold headers, and nothing else.
    """

    def __init__(self, app: ASGIApp, *, desk: Desk, door: Doorkeeper) -> None:
        self._app = app
        self._desk = desk
        self._door = door
        self._limits = desk.config.limits
        self._held: Counter[str] = Counter()
        self._room = BodyRoom(_BODIES_AT_A_TIME * self._limits.body_bytes)
        self._headers = dict(_HEADERS)
        if desk.config.certificate is not None:
            self._headers["Strict-Transport-Security"] = "max-age=31536000"

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request."""
        if scope["type"] != "http":
            return
        began = time.monotonic()
        status = 0
        headers = Headers(scope=scope)
        body = LimitedBody(
            receive,
            most_bytes=self._limits.body_bytes,
            timeout_s=self._limits.body_timeout_s,
            room=self._room,
        )
        cut = _is_cut(headers)

        async def answer(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                shown = MutableHeaders(scope=message)
                for name, value in self._headers.items():
                    shown.setdefault(name, value)
                shown.setdefault("Cache-Control", "no-store")
                if (cut or status == 408) and not body.whole:
                    # Nobody will read the rest of the body.
                    shown["Connection"] = "close"
                body.release()
            await send(message)

        try:
            with from_headers({"traceparent": headers.get("traceparent", "")}):
                await self._admit(scope, headers)
                with self._place(scope):
                    await self._app(scope, body, answer)
        except Exception as exc:
            if status:  # the response has begun: all that is left is to cut it off
                _LOG.error("a response was cut off", extra={"error_type": type(exc).__name__})
                raise ConnectionAbortedError from None
            await self._failed(scope, exc)(scope, receive, answer)
        finally:
            body.release()
            self._note(scope, status, time.monotonic() - began)

    async def _admit(self, scope: Scope, headers: Headers) -> None:
        path = scope["path"]
        is_guarded = path == "/v1" or path.startswith("/v1/")
        if is_guarded or (path == "/metrics" and not self._desk.config.public_metrics):
            await self._identify(scope, headers)
        if "transfer-encoding" in headers and (
            "content-length" in headers or scope.get("http_version") == "1.0"
        ):
            # A proxy in front may read it as two requests, and this one as somebody else's.
            raise EnvelopeError("a body has a length, or comes in the chunks of HTTP/1.1")
        length = headers.get("content-length", "0")
        is_length = length.isascii() and length.isdigit() and len(length) < _MAX_DIGITS
        if not is_length or int(length) > self._limits.body_bytes:
            raise too_large(self._limits.body_bytes)

    async def _identify(self, scope: Scope, headers: Headers) -> None:
        address = (scope.get("client") or ("", 0))[0]
        given = headers.getlist("authorization")
        text = given[0] if len(given) == 1 else ""
        caller = await run_in_threadpool(self._door.identify, text, address=address)
        scope.setdefault("state", {})["caller"] = caller

    @contextlib.contextmanager
    def _place(self, scope: Scope) -> Iterator[None]:
        """Let one key hold half of the connections at most: others get in beside it."""
        caller = scope.get("state", {}).get("caller")
        name = getattr(caller, "key_id", "")
        if name and self._held[name] >= max(1, self._limits.connections // 2):
            raise HttpProblem(
                QuotaExceededError("too many requests of this API key are under way"),
                retry_after_s=1.0,
            )
        self._held[name] += 1
        try:
            yield
        finally:
            self._held[name] -= 1
            if not self._held[name]:
                del self._held[name]

    def _failed(self, scope: Scope, exc: Exception) -> Response:
        if isinstance(exc, FedInferError | HttpProblem):
            _count(self._desk, exc)
            return problem_response(exc, openai=is_openai_path(scope["path"]))
        return _internal(scope["path"], exc)

    def _note(self, scope: Scope, status: int, seconds: float) -> None:
        route = getattr(scope.get("route"), "path", "") or "none"
        caller = scope.get("state", {}).get("caller")
        facts = {
            "route": route,
            "method": scope["method"] if scope["method"] in _METHODS else "other",
            "status": status,
            "seconds": round(seconds, 6),
            "key_id": getattr(caller, "key_id", ""),
        }
        _LOG.info("request", extra=facts)
        if self._desk.metrics is not None:
            self._desk.metrics.http_seconds.observe(seconds, route=route, status=str(status))


_METHODS: Final = frozenset({"GET", "HEAD", "POST", "DELETE", "OPTIONS", "PUT", "PATCH"})


def _is_cut(headers: Headers) -> bool:
    """Whether the connection is closed if this body is not read to its end.

    One that is short is let come, and dropped: a client whose data meet a closed connection
    may lose the response as well, and never learn why it was refused.
    """
    length = headers.get("content-length", "0")
    short = length.isascii() and length.isdigit() and len(length) < _MAX_DIGITS
    return "transfer-encoding" in headers or not short or int(length) > _SHORT_BYTES


def _internal(path: str, exc: BaseException) -> Response:
    # Where, by the names of our own code; never what the exception says.
    _LOG.error("internal error", exc_info=exc, extra={"error_type": type(exc).__name__})
    error = FedInferError("the gateway failed on this request", hint="its operator has a log")
    return problem_response(HttpProblem(error, status=500), openai=is_openai_path(path))


def _methods(app: FastAPI, request: Request) -> str:
    found: set[str] = set()
    for route in app.routes:
        if isinstance(route, Route) and route.matches(request.scope)[0] is not Match.NONE:
            found |= route.methods or set()
    return ", ".join(sorted(found))


def _count(desk: Desk, exc: FedInferError | HttpProblem) -> None:
    # What the board refuses it counts itself.
    if desk.metrics is not None and isinstance(exc, HttpProblem):
        desk.metrics.refused.inc(code=exc.error.code)


def _add_handlers(app: FastAPI) -> None:
    known = field_names(app)

    async def typed(request: Request, exc: Exception) -> Response:
        if not isinstance(exc, FedInferError | HttpProblem):
            return _internal(request.url.path, exc)
        _count(app.state.desk, exc)
        return problem_response(exc, openai=is_openai_path(request.url.path))

    async def plain(request: Request, exc: Exception) -> Response:
        cause = exc.__cause__
        if isinstance(cause, FedInferError | HttpProblem):  # reading the body, under FastAPI
            return await typed(request, cause)
        status = exc.status_code if isinstance(exc, HTTPException) else 500
        if status >= 500:
            return _internal(request.url.path, exc)
        words = _WORDS.get(status, "this request cannot be served")
        headers = {"Allow": _methods(app, request)} if status == 405 else {}
        problem = HttpProblem(ProtocolError(words), status=status, headers=headers)
        return problem_response(problem, openai=is_openai_path(request.url.path))

    async def schema(request: Request, exc: Exception) -> Response:
        errors = exc.errors() if isinstance(exc, RequestValidationError) else []
        # Of where it went wrong only names that are our own: a key may be anything.
        names = {part for e in errors for part in e.get("loc", ()) if part in known}
        where = f": {', '.join(sorted(map(str, names)))}" if names else ""
        problem = HttpProblem(
            ProtocolError(f"the request does not fit the schema{where}", hint="GET /openapi.json"),
            status=422,
        )
        return problem_response(problem, openai=is_openai_path(request.url.path))

    app.add_exception_handler(FedInferError, typed)
    app.add_exception_handler(HttpProblem, typed)
    app.add_exception_handler(HTTPException, plain)
    app.add_exception_handler(RequestValidationError, schema)
