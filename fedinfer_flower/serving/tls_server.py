"""uvicorn, made fit for strangers: TLS, and an end to connections that dawdle."""

from __future__ import annotations

import asyncio
import json
import logging
import socket
import ssl
import threading
import time
import weakref
from pathlib import Path
from typing import Any, Final

import uvicorn
from starlette.types import ASGIApp
from uvicorn.protocols.http.h11_impl import H11Protocol

from fedinfer_flower.errors import (
    DeploymentError,
    FedInferError,
    ProtocolError,
    UnavailableError,
)
from fedinfer_flower.serving.config import GatewayConfig, LimitsConfig
from fedinfer_flower.serving.problem import body_of

__all__ = ["Certificate", "HttpServer"]

_LOG: Final = logging.getLogger(__name__)
_HEADER_BYTES: Final = 16 << 10
_TICKS: Final = 5
"""Of uvicorn, 0.1 s each, between two looks at the connections."""

_LOOK_S: Final = 1.0
_GRACE_S: Final = 5.0
_BACKLOG: Final = 512
_HANDSHAKES: Final = 2
"""Open sockets for each connection that is allowed: the others are in a TLS handshake, or are
being told that there are too many."""


class Certificate:
    """A server certificate, which may be renewed while it is in use.

    Parameters
    ----------
    certificate, key : Path
        PEM files.

    Attributes
    ----------
    context : ssl.SSLContext
        TLS 1.2 or later.

    Raises
    ------
    DeploymentError
        If they cannot be read, or do not belong together.
    """

    def __init__(self, certificate: Path, key: Path) -> None:
        self._paths = (certificate, key)
        self._seen = self._marks()
        self.context = self._loaded()

    def renew(self) -> bool:
        """Take up files that changed; return whether. Bad ones leave the old ones in use."""
        marks = self._marks()
        if marks == self._seen:
            return False
        self._seen = marks
        try:
            # Tried out on a context of their own: a pair that does not fit must not be left
            # half loaded in the one that is in use.
            _ = self._loaded()
            self.context.load_cert_chain(*self._paths)
        except (DeploymentError, OSError) as exc:
            _LOG.error("the renewed certificate is not usable: %s", type(exc).__name__)
            return False
        _LOG.info("the certificate was renewed")
        return True

    def _marks(self) -> tuple[tuple[int, int, int], ...]:
        try:
            found = [path.stat() for path in self._paths]
        except OSError:
            return ()
        return tuple((stat.st_mtime_ns, stat.st_size, stat.st_ino) for stat in found)

    def _loaded(self) -> ssl.SSLContext:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.minimum_version = ssl.TLSVersion.TLSv1_2
        context.options |= ssl.OP_NO_COMPRESSION | ssl.OP_NO_RENEGOTIATION
        context.set_alpn_protocols(["http/1.1"])
        try:
            context.load_cert_chain(*self._paths)
        except (OSError, ssl.SSLError) as exc:
            raise DeploymentError(
                f"certificate and key cannot be used: {type(exc).__name__}",
                hint="PEM files of one pair, the key without a passphrase",
            ) from None
        return context


class HttpServer:
    """Serves an application until it is told to end, in a thread of its own.

    Parameters
    ----------
    app : ASGI application
    config : GatewayConfig
        Its host, port (0 for a free one), certificate and limits.

    Examples
    --------
    >>> async def app(scope, receive, send):
    ...     await send({"type": "http.response.start", "status": 204, "headers": []})
    ...     await send({"type": "http.response.body", "body": b""})
    >>> server = HttpServer(app, GatewayConfig.from_mapping(
    ...     {"gateway": {"port": 0}, "models": {"m": {}}}))
    >>> server.start()
    >>> server.port > 0, server.is_alive
    (True, True)
    >>> server.stop()
    """

    def __init__(self, app: ASGIApp, config: GatewayConfig) -> None:
        self._config = config
        self.certificate = (
            None
            if config.certificate is None or config.key is None
            else Certificate(config.certificate, config.key)
        )
        self._socket = _listening(
            config.host, config.port, most=_HANDSHAKES * config.limits.connections
        )
        self.port: int = self._socket.getsockname()[1]
        self._server = _Server(app, config.limits, self.certificate)
        self._thread = threading.Thread(target=self._run, name="fedinfer-http", daemon=True)

    @property
    def is_alive(self) -> bool:
        """Whether it serves."""
        return self._thread.is_alive() and self._server.started

    def start(self, *, timeout_s: float = 30.0) -> None:
        """Serve; return when connections are accepted.

        Raises
        ------
        DeploymentError
            If that does not come about.
        """
        self._thread.start()
        end = time.monotonic() + timeout_s
        while not self._server.started:
            if not self._thread.is_alive() or time.monotonic() > end:
                raise DeploymentError("the HTTP server did not start", hint="see its log")
            time.sleep(0.01)

    def stop(self, *, timeout_s: float = 2 * _GRACE_S) -> None:
        """Accept no more connections, end those that are served, and return."""
        self._server.should_exit = True
        self._thread.join(timeout_s)
        self._socket.close()

    def _run(self) -> None:
        try:
            self._server.run(sockets=[self._socket])
        except BaseException as exc:
            _LOG.error("the HTTP server ended", extra={"error_type": type(exc).__name__})
            raise


class _Server(uvicorn.Server):
    """uvicorn's server with `_Protocol`, a TLS handshake in time, and renewed certificates."""

    def __init__(self, app: ASGIApp, limits: LimitsConfig, certificate: Certificate | None) -> None:
        self.limits = limits
        self._certificate = certificate
        config = uvicorn.Config(
            app,
            http=H11Protocol,
            ws="none",
            lifespan="off",
            loop="asyncio",
            log_config=None,
            access_log=False,
            server_header=False,
            proxy_headers=False,
            h11_max_incomplete_event_size=_HEADER_BYTES,
            timeout_keep_alive=max(1, int(limits.header_timeout_s)),
            timeout_graceful_shutdown=int(_GRACE_S),
        )
        super().__init__(config)

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await self.lifespan.startup()
        secured = self._certificate is not None
        self.servers = [
            await asyncio.get_running_loop().create_server(
                self._protocol,
                sock=one,
                ssl=None if self._certificate is None else self._certificate.context,
                ssl_handshake_timeout=self.limits.header_timeout_s if secured else None,
                ssl_shutdown_timeout=_GRACE_S if secured else None,
                backlog=_BACKLOG,
            )
            for one in sockets or []
        ]
        self.started = True

    def _protocol(self) -> asyncio.Protocol:
        return _Protocol(
            config=self.config,
            server_state=self.server_state,
            app_state=self.lifespan.state,
            limits=self.limits,
        )

    async def on_tick(self, counter: int) -> bool:
        if counter % _TICKS == 0:
            now = time.monotonic()
            for connection in list(self.server_state.connections):
                if isinstance(connection, _Protocol):
                    connection.look(now)
        if self._certificate is not None and counter % (2 * _TICKS) == 0:
            self._certificate.renew()
        return await super().on_tick(counter)


class _Protocol(H11Protocol):
    """One connection: cut off when it is late with headers, or does not read its answer."""

    def __init__(self, *, limits: LimitsConfig, **options: Any) -> None:
        super().__init__(**options)
        self._limits = limits
        self._idle_since: float | None = None
        self._began = False
        self._stuck_since: float | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._idle_since = time.monotonic()
        if len(self.connections) > self._limits.connections:
            self._refuse(503, UnavailableError("the gateway has too many connections"))

    def data_received(self, data: bytes) -> None:
        if self.transport.is_closing():
            return
        if self._idle_since is not None and not self._began:
            # Its time for the headers runs from their first byte.
            self._began, self._idle_since = True, time.monotonic()
        super().data_received(data)

    def look(self, now: float) -> None:
        """Cut the connection off if it is late."""
        if self.cycle is not None and not self.cycle.response_complete:
            self._idle_since, self._began = None, False
        elif self._idle_since is None:
            self._idle_since = now
        elif now - self._idle_since > self._limits.header_timeout_s:
            self.transport.abort()
            return
        if self.flow is None or not self.flow.write_paused:
            self._stuck_since = None
        elif self._stuck_since is None:
            self._stuck_since = now
        elif now - self._stuck_since > self._limits.body_timeout_s:
            self.transport.abort()

    def send_400_response(self, msg: str) -> None:  # noqa: ARG002
        # uvicorn's words may change: ours say nothing of what came.
        self._refuse(400, ProtocolError("this is not an HTTP request"))

    def _refuse(self, status: int, error: FedInferError) -> None:
        body = json.dumps(body_of(error), separators=(",", ":")).encode()
        words = {400: "Bad Request", 503: "Service Unavailable"}[status]
        self.transport.write(
            f"HTTP/1.1 {status} {words}\r\ncontent-type: application/json\r\n"
            f"content-length: {len(body)}\r\ncache-control: no-store\r\n"
            f"connection: close\r\n\r\n".encode()
            + body
        )
        self.transport.close()


class _Listening(socket.socket):
    """A listening socket that closes connections beyond `most` without a word.

    The limit of connections is looked at once TLS has been agreed on. Whoever stops before
    that would hold a file descriptor, and those are what the whole process lives on.
    """

    def __init__(self, family: socket.AddressFamily, *, most: int) -> None:
        super().__init__(family, socket.SOCK_STREAM)
        self._most = most
        self._held: weakref.WeakSet[socket.socket] = weakref.WeakSet()

    def accept(self) -> tuple[socket.socket, Any]:
        found, address = super().accept()
        if len(self._held) >= self._most:
            for one in [one for one in self._held if one.fileno() < 0]:
                self._held.discard(one)
        if len(self._held) >= self._most:
            found.close()
            raise ConnectionAbortedError
        self._held.add(found)
        return found, address


def _listening(host: str, port: int, *, most: int) -> socket.socket:
    found = _Listening(socket.AF_INET6 if ":" in host else socket.AF_INET, most=most)
    try:
        found.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        found.bind((host, port))
    except OSError as exc:
        found.close()
        raise DeploymentError(
            f"cannot listen on port {port}: {type(exc).__name__}",
            hint="is another gateway running, or the port below 1024?",
        ) from None
    return found
