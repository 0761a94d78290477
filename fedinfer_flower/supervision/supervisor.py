"""Keep processes running: start, watch, start again, end in order."""

from __future__ import annotations

import logging
import os
import signal
import time
from collections.abc import Callable, Sequence
from typing import Final

from fedinfer_flower.errors import DeploymentError, InvalidValueError
from fedinfer_flower.supervision.backoff import Backoff
from fedinfer_flower.supervision.child import Child, ChildSpec, ended_words
from fedinfer_flower.supervision.run_folder import RunFolder

__all__ = ["StopFlag", "Supervisor"]

_log = logging.getLogger("fedinfer.supervision")

_WRITE_S: Final = 5.0
_PAUSE_S: Final = 5.0
"""A round that comes so late was not late by itself: this process was stopped, or the machine
asleep. What the children did in that time is not held against them."""
_MANY_FAILURES: Final = 5


class StopFlag:
    """Set by a signal; read between two rounds.

    A flag and not a `threading.Event`: a signal handler may run while this thread holds the
    event's lock.
    """

    def __init__(self) -> None:
        self.is_set = False

    def set(self) -> None:
        """Ask for the end."""
        self.is_set = True

    def on_signals(self) -> StopFlag:
        """Be set by SIGTERM and SIGINT. Call it from the main thread."""
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, lambda *_: self.set())
        return self


class Supervisor:
    """Runs children until it is told to stop. It never gives up, and says when it would.

    Parameters
    ----------
    specs : sequence of ChildSpec
        Started in this order, ended in the opposite one.
    folder : RunFolder, optional
        Where the state is written, for ``fedinfer site status``.
    settle_s : float
        Pause between the ends of two children: the last answer of the one goes out through
        the other.
    poll_s : float
        Seconds between rounds.
    backoff : callable
        Makes a `Backoff` for each child.
    clock : callable
        Monotonic seconds.

    Notes
    -----
    Children are restarted one by one: that one fails is no reason to end another. A child
    whose *command* has changed since its start, because another one has had to move, is
    started anew.
    """

    def __init__(
        self,
        specs: Sequence[ChildSpec],
        *,
        folder: RunFolder | None = None,
        settle_s: float = 0.0,
        poll_s: float = 0.2,
        backoff: Callable[[], Backoff] = Backoff,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        names = [spec.name for spec in specs]
        if not specs or len(set(names)) != len(names):
            raise InvalidValueError("children have names, each its own")
        self.children = [Child(spec, backoff()) for spec in specs]
        self.folder = folder
        self.settle_s = settle_s
        self.poll_s = poll_s
        self.clock = clock
        self._since = time.time()
        self._written_at = float("-inf")

    def run(self, stop: StopFlag, *, once: bool = False) -> int:
        """Run until `stop` is set; return 0.

        With `once`, the first child that ends, or is not well, ends all; return 1.

        Whatever happens, no child is left behind.
        """
        try:
            seen_at = self.clock()
            while not stop.is_set:
                now_s = self.clock()
                if now_s - seen_at > _PAUSE_S + self.poll_s:
                    self._excuse(now_s)
                if self._round(now_s, once=once):
                    return 1
                # What this round took itself, such as the end of a child, is no pause.
                seen_at = self.clock()
                time.sleep(self.poll_s)
            return 0
        finally:
            self._end_all()

    def _round(self, now_s: float, *, once: bool) -> bool:
        """Look at every child; return whether all is over."""
        changed = False
        for child in self.children:
            if not self._look_after(child, now_s):
                continue
            if once:
                return True
            changed = True
        for child in self.children:
            if not child.runs and self.clock() >= child.due_at:
                self._start(child)
                changed = True
        if changed or now_s - self._written_at >= _WRITE_S:
            self._write(now_s)
        return False

    def _look_after(self, child: Child, now_s: float) -> bool:
        """Find out whether a child has ended, and end one that is not well."""
        if not child.runs:
            return False
        name = child.spec.name
        ran_s = now_s - child.started_at
        status = child.ended()
        if status is not None:
            child.why = ended_words(status)
            wait_s = 0.0 if status in child.spec.at_once else child.backoff.next_s(ran_s=ran_s)
        elif child.ill(now_s=now_s):
            child.why = child.ill(now_s=now_s)
            child.end(grace_s=child.spec.wedged_grace_s)
            wait_s = child.backoff.next_s(ran_s=ran_s)
        elif tuple(child.spec.command()) != child.command:
            child.why = "its command has changed"
            child.end(grace_s=child.spec.wedged_grace_s)
            wait_s = 0.0
        else:
            return False
        child.due_at = self.clock() + wait_s
        log = child.spec.log.name
        _log.warning("%s: %s; started again in %.1f s; see %s", name, child.why, wait_s, log)
        if child.backoff.failures >= _MANY_FAILURES:
            _log.error("%s has failed %d times in a row", name, child.backoff.failures)
        return True

    def _start(self, child: Child) -> None:
        now_s = self.clock()
        try:
            child.start(now_s=now_s)
        except DeploymentError as exc:
            wait_s = child.backoff.next_s(ran_s=0.0)
            child.why, child.due_at = exc.message, now_s + wait_s
            _log.error("%s; tried again in %.1f s", exc.message, wait_s)
            return
        _log.info("%s started, process %d", child.spec.name, child.pid)

    def _excuse(self, now_s: float) -> None:
        _log.warning("this process was stopped, or the machine asleep")
        for child in self.children:
            if child.runs and child.spec.probe is not None:
                child.spec.probe.excuse(now_s=now_s)

    def _end_all(self) -> None:
        for number, child in enumerate(reversed(self.children)):
            if not child.runs:
                continue
            if number and self.settle_s:
                time.sleep(self.settle_s)
            status = child.end(grace_s=child.spec.grace_s)
            if status is not None:
                _log.info("%s %s", child.spec.name, ended_words(status))
        self._write(self.clock())

    def _write(self, now_s: float) -> None:
        self._written_at = now_s
        if self.folder is None:
            return
        self.folder.write(
            {
                "pid": os.getpid(),
                "started_at": self._since,
                "written_at": time.time(),
                "children": [
                    {
                        "name": child.spec.name,
                        "pid": child.pid,
                        "restarts": max(0, child.starts - 1),
                        "running_s": round(now_s - child.started_at, 1) if child.runs else 0.0,
                        "last_end": child.why,
                    }
                    for child in self.children
                ],
            }
        )
