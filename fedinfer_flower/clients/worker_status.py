"""A status file beside a process: is it well, what does it do. Read by whoever supervises it.

The file says that the process was well at `beat_at`, not merely that it exists: a thread writes
it once a second, but only while the loop said, within the time that its step may take, that it
moves. A loop that hangs lets the beat grow stale, and its supervisor starts it anew.
"""

from __future__ import annotations

import json
import logging
import os
import threading
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, Final

__all__ = ["ROLES", "STATES", "Status", "StatusFile", "read_status"]

log = logging.getLogger("fedinfer_flower.site")

ROLES: Final = ("worker", "supernode")
STATES: Final = ("starting", "idle", "busy")
_MAX_FILE_BYTES: Final = 4096
_STEP_S: Final = 20.0


@dataclass(frozen=True, kw_only=True)
class Status:
    """What a status file says.

    Parameters
    ----------
    pid : int
    role : {"worker", "supernode"}
    beat_at : float
        Seconds since 1970 at which the process was last well.
    state : {"starting", "idle", "busy"}
    busy_since : float
        Seconds since 1970; 0.0 unless busy.
    tasks_done : int
        Since the process started.
    last_error : str
        Name of the type of the last error; empty for none. Never its text.
    """

    pid: int
    role: str
    beat_at: float
    state: str
    busy_since: float
    tasks_done: int
    last_error: str


def read_status(path: Path) -> Status | None:
    """Return what a status file says, or None if there is none that can be read.

    Examples
    --------
    >>> read_status(Path("no-such-file")) is None
    True
    """
    try:
        with path.open("rb") as file:
            facts = json.loads(file.read(_MAX_FILE_BYTES))
        return _status_of(facts)
    except (OSError, ValueError, TypeError, KeyError):
        return None


def _status_of(facts: Any) -> Status:
    if not isinstance(facts, dict) or set(facts) != {part.name for part in fields(Status)}:
        raise ValueError("other fields than those of a status")
    status = Status(
        pid=int(facts["pid"]),
        role=str(facts["role"]),
        beat_at=float(facts["beat_at"]),
        state=str(facts["state"]),
        busy_since=float(facts["busy_since"]),
        tasks_done=int(facts["tasks_done"]),
        last_error=str(facts["last_error"]),
    )
    if status.role not in ROLES or status.state not in STATES:
        raise ValueError("an unknown role or state")
    return status


class StatusFile:
    """Writes the status of this process, once a second while it is well.

    Parameters
    ----------
    path : Path
        Replaced as a whole each time; its folder is made if need be.
    role : {"worker", "supernode"}
    starting_s : float
        How long starting may take.
    clock, monotonic : callable
        Seconds since 1970, and seconds that never jump.
    """

    def __init__(
        self,
        path: Path,
        *,
        role: str,
        starting_s: float = 600.0,
        clock: Callable[[], float] = time.time,
        monotonic: Callable[[], float] = time.monotonic,
    ) -> None:
        self._path = path
        self._role = role
        self._clock = clock
        self._monotonic = monotonic
        self._lock = threading.Lock()
        self._state = "starting"
        self._busy_since = 0.0
        self._tasks_done = 0
        self._last_error = ""
        self._well_until = monotonic() + starting_s
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._write_often, name="status", daemon=True)

    def start(self) -> None:
        """Write the file, and go on writing it from a thread.

        Raises
        ------
        OSError
            If the file cannot be written.
        """
        self._path.parent.mkdir(parents=True, exist_ok=True)
        self.write()
        self._thread.start()

    def alive(self, for_s: float = _STEP_S) -> None:
        """Note that the loop moved, and that its next step may take so long."""
        with self._lock:
            self._well_until = self._monotonic() + for_s

    def idle(self, for_s: float = _STEP_S) -> None:
        """Note that nothing is in hand."""
        with self._lock:
            self._state, self._busy_since = "idle", 0.0
            self._well_until = self._monotonic() + for_s

    def busy(self, for_s: float) -> None:
        """Note that something is in hand, which may take so long."""
        with self._lock:
            self._state, self._busy_since = "busy", self._clock()
            self._well_until = self._monotonic() + for_s

    def done(self, error: str = "") -> None:
        """Count what was in hand as done; `error` is the name of a type, if it failed."""
        with self._lock:
            self._tasks_done += 1
            self._last_error = error or self._last_error
            self._state, self._busy_since = "idle", 0.0
            self._well_until = self._monotonic() + _STEP_S

    def status(self) -> Status | None:
        """Return what there is to write now; None if the process is not well."""
        with self._lock:
            if self._monotonic() > self._well_until:
                return None
            return Status(
                pid=os.getpid(),
                role=self._role,
                beat_at=self._clock(),
                state=self._state,
                busy_since=self._busy_since,
                tasks_done=self._tasks_done,
                last_error=self._last_error,
            )

    def write(self) -> None:
        """Write the file now, if the process is well."""
        status = self.status()
        if status is None:
            return
        # Named after the process: two of them never write the same temporary file.
        new = self._path.with_name(f".{self._path.name}.{os.getpid()}")
        new.write_text(json.dumps(asdict(status)) + "\n", encoding="utf-8")
        new.replace(self._path)

    def close(self) -> None:
        """Stop writing; the file stays, with the last beat."""
        self._ended.set()
        if self._thread.is_alive():
            self._thread.join(timeout=5.0)

    def _write_often(self) -> None:
        while not self._ended.wait(1.0):
            try:
                self.write()
            except OSError as exc:
                log.warning("the status file cannot be written (%s)", type(exc).__name__)
