"""Which process a gateway is, so that it can be told to end before its run is stopped.

``flwr stop`` deletes the messages of a run at once, and its process learns of it half a minute
later: too late to finish what was accepted. A signal to the process comes first.
"""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Final

from flwr.app import Context
from flwr.serverapp import ServerApp

from fedinfer_flower.errors import ConfigError
from fedinfer_flower.serving.config import GatewayConfig

__all__ = ["PROCESS_FILE", "is_gone", "noted", "tell_to_end"]

PROCESS_FILE: Final = "gateway.pid"
_PROGRAM: Final = b"serverapp"


def noted(app: ServerApp) -> ServerApp:
    """Let an app write its process and run to the state folder for as long as it runs."""

    @app.lifespan()
    def lifespan(context: Context) -> Iterator[None]:
        file = _write(context)
        try:
            yield
        finally:
            if file is not None:
                file.unlink(missing_ok=True)

    return app


def tell_to_end(state: Path, *, run_id: int) -> bool:
    """Send SIGTERM to the gateway of a run, if it is a process of this machine.

    Parameters
    ----------
    state : Path
        The gateway's state folder.
    run_id : int
        Of the run that is to end; the process of another is left alone.

    Returns
    -------
    bool
        Whether it was sent.
    """
    pid = _noted(state, run_id)
    try:
        if not pid or not _is_gateway(pid):
            return False
        os.kill(pid, signal.SIGTERM)
    except OSError:
        return False
    return True


def is_gone(state: Path, *, run_id: int) -> bool:
    """Whether the process of a run has ended without a word; False if that cannot be told."""
    pid = _noted(state, run_id)
    try:
        return bool(pid) and not _is_gateway(pid)
    except FileNotFoundError:
        return True
    except OSError:
        return False


def _noted(state: Path, run_id: int) -> int:
    """Return the process that a run's gateway has noted; 0 if there is none."""
    try:
        note = json.loads((state / PROCESS_FILE).read_text(encoding="utf-8"))
        pid = int(note["pid"])
        return pid if int(note["run_id"]) == run_id and pid > 1 else 0
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return 0


def _is_gateway(pid: int) -> bool:
    # The number of a process that has ended is given to another.
    command = Path(f"/proc/{pid}/cmdline")
    return not Path("/proc/self/cmdline").exists() or _PROGRAM in command.read_bytes()


def _write(context: Context) -> Path | None:
    try:
        state = GatewayConfig.read(str(context.run_config.get("gateway-config", ""))).state
        if not state.is_dir():
            state.mkdir(parents=True, mode=0o700)
        file = state / PROCESS_FILE
        draft = state / f".{PROCESS_FILE}.{os.getpid()}"
        handle = os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
        with os.fdopen(handle, "w") as note:
            json.dump({"pid": os.getpid(), "run_id": str(context.run_id)}, note)
        draft.replace(file)
    except (OSError, ConfigError):
        # The gateway says itself what is wrong with its settings.
        return None
    return file
