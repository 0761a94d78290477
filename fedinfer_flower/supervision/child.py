"""One process under supervision: how it is started, and how it is ended."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO, Final, cast

from fedinfer_flower.errors import DeploymentError, InvalidValueError
from fedinfer_flower.supervision.backoff import Backoff
from fedinfer_flower.supervision.binding import bound_command
from fedinfer_flower.supervision.output import OutputFile, follow
from fedinfer_flower.supervision.probes import Probe

__all__ = ["Child", "ChildSpec", "ended_words"]

_OUTPUT_S: Final = 2.0
"""How long to wait for the last lines of a child that has ended."""


@dataclass(frozen=True, kw_only=True)
class ChildSpec:
    """What to run, and what is expected of it.

    Parameters
    ----------
    name : str
    command : callable
        Returns the argument list, without effects. A child whose list has changed is started
        anew. Everybody on the machine can read it: no secrets.
    before_start : callable, optional
        Called before each start, and before `command`.
    environment : mapping
        On top of this process's environment.
    log : Path
        File for what the child prints.
    probe : Probe, optional
        Whether a running child is well.
    grace_s : float
        How long it may take to end when it is told to, before it is killed.
    wedged_grace_s : float
        The same, where it was found not to be well.
    at_once : frozenset of int
        Exit statuses by which it asks to be started again without a wait.
    """

    name: str
    command: Callable[[], Sequence[str]]
    log: Path
    before_start: Callable[[], None] | None = None
    environment: Mapping[str, str] = field(default_factory=dict, repr=False)
    probe: Probe | None = None
    grace_s: float = 30.0
    wedged_grace_s: float = 2.0
    at_once: frozenset[int] = frozenset()

    def __post_init__(self) -> None:
        if self.grace_s < 0.0 or self.wedged_grace_s < 0.0:
            raise InvalidValueError("grace_s and wedged_grace_s are not negative")


class Child:
    """A process that is started again and again.

    Parameters
    ----------
    spec : ChildSpec
    backoff : Backoff
    """

    def __init__(self, spec: ChildSpec, backoff: Backoff) -> None:
        self.spec = spec
        self.backoff = backoff
        self.output = OutputFile(spec.log)
        self.starts = 0
        self.why = ""
        self.command: tuple[str, ...] = ()
        self.due_at: float = 0.0
        self.started_at: float = 0.0
        self._process: subprocess.Popen[bytes] | None = None
        self._follower: threading.Thread | None = None

    @property
    def pid(self) -> int:
        """Process id; 0 if it does not run."""
        return 0 if self._process is None else self._process.pid

    @property
    def runs(self) -> bool:
        """Whether there is a process."""
        return self._process is not None

    def start(self, *, now_s: float) -> None:
        """Start it, in a session of its own, bound to this process's life.

        Call it from the thread that lives as long as the children shall.

        Raises
        ------
        DeploymentError
            If the machine has no room for another process.
        """
        if self.spec.before_start is not None:
            self.spec.before_start()
        self.command = tuple(self.spec.command())
        if self.spec.probe is not None:
            self.spec.probe.start(now_s=now_s)
        try:
            process = subprocess.Popen(  # noqa: S603  a list, no shell
                bound_command(self.command),
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                env=os.environ | dict(self.spec.environment),
                start_new_session=True,
            )
        except OSError as exc:
            raise DeploymentError(
                f"{self.spec.name} cannot be started ({type(exc).__name__})"
            ) from None
        self._process = process
        self._follower = follow(cast("BinaryIO", process.stdout), self.output, name=self.spec.name)
        self.starts += 1
        self.started_at = now_s

    def ended(self) -> int | None:
        """Return the exit status if it has ended since the last call, and forget it."""
        if self._process is None:
            return None
        if not _has_exited(self._process):
            return None
        return self._reap(self._process)

    def ill(self, *, now_s: float) -> str:
        """Return why it is not well; empty if it is, or nobody asks."""
        if self._process is None or self.spec.probe is None:
            return ""
        return self.spec.probe.check(now_s=now_s)

    def end(self, *, grace_s: float) -> int | None:
        """Tell it to end, and kill it with all it started if it does not in time."""
        process = self._process
        if process is None:
            return None
        if not _has_exited(process):
            process.send_signal(signal.SIGTERM)
            end_at = time.monotonic() + grace_s
            while not _has_exited(process) and time.monotonic() < end_at:
                time.sleep(0.02)
        return self._reap(process)

    def _reap(self, process: subprocess.Popen[bytes]) -> int:
        # What it started itself is in its session; a stopped process dies of this as well.
        # Before the wait: until then its number, which is the group's, cannot be another's.
        if process.returncode is None:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(process.pid, signal.SIGKILL)
        status = process.wait()
        if self._follower is not None:
            self._follower.join(timeout=_OUTPUT_S)
        self._process = self._follower = None
        return status


def _has_exited(process: subprocess.Popen[bytes]) -> bool:
    """Whether a process has ended; it is not reaped by that where the system can tell."""
    if process.returncode is None and hasattr(os, "waitid"):
        options = os.WEXITED | os.WNOWAIT | os.WNOHANG
        return os.waitid(os.P_PID, process.pid, options) is not None
    return process.poll() is not None


def ended_words(status: int) -> str:
    """Return an exit status in words.

    Examples
    --------
    >>> ended_words(3), ended_words(-9)
    ('ended with status 3', 'was ended by SIGKILL')
    """
    if status >= 0:
        return f"ended with status {status}"
    try:
        return f"was ended by {signal.Signals(-status).name}"
    except ValueError:
        return f"was ended by signal {-status}"
