"""The gateway as a Flower ServerApp: it serves for as long as its run lasts."""

from __future__ import annotations

import logging
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from logging.handlers import RotatingFileHandler
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any, Final

from flwr.app import Context
from flwr.serverapp import Grid, ServerApp

from fedinfer_flower.errors import ConfigError, DeploymentError
from fedinfer_flower.observability.audit_log import AuditLog
from fedinfer_flower.observability.json_logs import JsonFormatter, configure_json_logs
from fedinfer_flower.observability.metrics import GatewayMetrics
from fedinfer_flower.observability.tracing import configure_tracing
from fedinfer_flower.serving.config import GatewayConfig
from fedinfer_flower.serving.http_app import create_app
from fedinfer_flower.serving.key_store import KeyStore
from fedinfer_flower.serving.tls_server import HttpServer
from fedinfer_flower.wire.identity import Identity

if TYPE_CHECKING:
    from fedinfer_flower.serving.core import GatewayCore

__all__ = ["ACCESS_FILE", "AUDIT_FILE", "CONFIG_KEY", "KEYS_FILE", "app", "serve", "state_folder"]

CONFIG_KEY: Final = "gateway-config"
KEYS_FILE: Final = "keys.db"
_IDENTITY_FILE: Final = "gateway.id"
AUDIT_FILE: Final = "audit.jsonl"
ACCESS_FILE: Final = "access.jsonl"
_ACCESS_BYTES: Final = 16 << 20
_LOCK_FILE: Final = "gateway.lock"
_LOOK_S: Final = 0.2
_LOG: Final = logging.getLogger(__name__)

app = ServerApp()
"""The ServerApp of a gateway's project; reads run config ``gateway-config``, a path."""


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Serve until the run is stopped or lost."""
    path = context.run_config.get(CONFIG_KEY)
    if not isinstance(path, str) or not path:
        raise ConfigError(
            f"run config {CONFIG_KEY!r} is the path of a gateway.toml on this machine"
        )
    configure_json_logs()
    config = GatewayConfig.read(path)
    configure_tracing(service="fedinfer-gateway")
    _shorten_backoff()
    grid = _lean(grid)
    with _told_to_end() as told, _access_log(state_folder(config.state) / ACCESS_FILE):
        serve(config, grid, run_id=context.run_id, told_to_end=told.is_set)


@contextmanager
def _access_log(path: Path) -> Iterator[None]:
    """Write one line a request to a file of the state folder, and not to the run's log.

    Flower sends every line of that to the SuperLink, which keeps it: a request and a row in
    its database for each query.
    """
    log = logging.getLogger("fedinfer_flower.access")
    handler = RotatingFileHandler(path, maxBytes=_ACCESS_BYTES, backupCount=3, encoding="utf-8")
    handler.setFormatter(JsonFormatter())
    log.addHandler(handler)
    log.propagate = False
    try:
        yield
    finally:
        log.propagate = True
        log.removeHandler(handler)
        handler.close()


def _lean(grid: Grid) -> Grid:
    try:
        from fedinfer_flower.flower_internals import lean_grid

        return lean_grid(grid)
    except (ImportError, AttributeError, DeploymentError) as exc:
        _LOG.warning("the SuperLink is asked more often than need be: %s", type(exc).__name__)
        return grid


def serve(
    config: GatewayConfig,
    grid: Grid,
    *,
    run_id: int,
    told_to_end: Callable[[], bool],
    tell_port: Callable[[int], None] | None = None,
) -> str:
    """Serve until told to end, or until the SuperLink or the run is lost; return why it ended.

    Told to end, the gateway accepts nothing more and goes on with what it has accepted, for
    ``limits.drain-s`` at most; what is left then stays in the outbox, for the next run.

    Parameters
    ----------
    config : GatewayConfig
    grid : Grid
    run_id : int
    told_to_end : callable
        Asked several times a second.
    tell_port : callable, optional
        Called with the port once connections are accepted.

    Raises
    ------
    ConfigError
        If the state folder, the certificate or the port cannot be used, or another gateway
        uses the folder.
    """
    from fedinfer_flower.serving.core import GatewayCore

    folder = state_folder(config.state)
    with ExitStack() as stack:
        stack.enter_context(_alone(folder))
        audit = AuditLog(folder / AUDIT_FILE, role="gateway")
        metrics = GatewayMetrics()
        keys = KeyStore(folder / KEYS_FILE)
        stack.callback(keys.close)
        identity = Identity.load_or_create(folder / _IDENTITY_FILE)
        core = GatewayCore(
            config, grid, run_id=run_id, identity=identity, audit=audit, metrics=metrics
        )
        stack.callback(core.close)
        server = HttpServer(
            create_app(core, config, keys=keys, metrics=metrics, audit=audit), config
        )
        stack.callback(server.stop)
        core.start()
        server.start()
        audit.append("started", run_id=str(run_id), key_id=identity.key_id)
        _LOG.info("the gateway serves on port %s", server.port)
        if tell_port is not None:
            tell_port(server.port)
        why = _wait(core, server, told_to_end)
        # `ready` says no from now on, and `submit` refuses; what was accepted goes on.
        core.drain(0.0 if core.lost else config.limits.drain_s)
        audit.append("stopped", run_id=str(run_id), reason=why)
    _LOG.info("the gateway ended: %s", why)
    return why


def _wait(core: GatewayCore, server: HttpServer, told_to_end: Callable[[], bool]) -> str:
    while True:
        if told_to_end():
            return "told to end"
        if core.lost:
            return "the run is lost"
        if not server.is_alive:
            return "the HTTP server ended"
        time.sleep(_LOOK_S)


def state_folder(path: Path) -> Path:
    """Return the folder of the gateway's state, made with mode 0700 if there is none.

    Raises
    ------
    DeploymentError
        If it cannot be made, or others than its owner can read it.
    """
    try:
        path.mkdir(parents=True, exist_ok=True, mode=0o700)
        mode, owner = path.stat().st_mode, path.stat().st_uid
    except OSError as exc:
        raise DeploymentError(
            f"the state folder {path.name!r} cannot be used: {type(exc).__name__}"
        ) from None
    if os.name == "posix" and (mode & 0o077 or owner != os.geteuid()):
        raise DeploymentError(
            f"the state folder {path.name!r} holds keys and queries, and is not its owner's alone",
            hint=f"chmod 700 {path.name}, as the user who runs the gateway",
        )
    return path


@contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """Keep other gateways off the state folder: two would ask, and charge, each query twice."""
    handle = os.open(folder / _LOCK_FILE, os.O_RDWR | os.O_CREAT, 0o600)
    try:
        if os.name == "posix":
            import fcntl

            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                raise DeploymentError(
                    f"another gateway uses the state folder {folder.name!r}",
                    hint="one that is ending needs limits.drain-s at most",
                ) from None
        yield
    finally:
        os.close(handle)


@contextmanager
def _told_to_end() -> Iterator[threading.Event]:
    """Take SIGTERM and SIGINT as the word to end; a second one as Flower takes it.

    Flower's own handlers leave at once, and 5 seconds later by force: too soon for a query
    that was accepted. ``flwr stop`` arrives as SIGINT, from Flower's heartbeat.
    """
    told = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield told
        return
    before: dict[signal.Signals, Any] = {}

    def take(number: int, frame: FrameType | None) -> None:
        if told.is_set():
            handler = before[signal.Signals(number)]
            if callable(handler):
                handler(number, frame)
            return
        told.set()

    for number in (signal.SIGTERM, signal.SIGINT):
        before[number] = signal.signal(number, take)
    try:
        yield told
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _shorten_backoff() -> None:
    try:
        from fedinfer_flower.flower_internals import shorten_pull_backoff

        shorten_pull_backoff()
    except (ImportError, AttributeError) as exc:
        _LOG.warning("each answer takes about a second longer: %s", type(exc).__name__)
