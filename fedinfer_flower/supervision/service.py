"""Keep something running that another machine's process runs: start, watch, start again."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final, Protocol

from fedinfer_flower.errors import FedInferError
from fedinfer_flower.supervision.backoff import Backoff
from fedinfer_flower.supervision.probes import HttpProbe
from fedinfer_flower.supervision.supervisor import StopFlag

__all__ = ["Ended", "Service", "ServiceKeeper"]

_log = logging.getLogger("fedinfer.supervision")

_SUSPICION_S: Final = 4.0
"""Silence after which it is asked whether the service still runs, once every so often."""
_GONE_S: Final = 60.0
"""How long the address of a service that was stopped may stay taken."""


@dataclass(frozen=True)
class Ended:
    """How a service ended.

    Parameters
    ----------
    words : str
        What is known of it; never a text that somebody else chose.
    well : bool
        Whether it ended by itself, as it should.
    """

    words: str
    well: bool = False


class Service(Protocol):
    """Something that runs elsewhere. Every method may take seconds."""

    def start(self) -> str:
        """Start it; return its name. Raises a `FedInferError` if that fails."""
        ...

    def ended(self, name: str) -> Ended | None:
        """Return how it ended; None if it runs, or nobody knows."""
        ...

    def drain(self, name: str) -> bool:
        """Ask it to finish what it has, and end; return whether it was asked."""
        ...

    def stop(self, name: str) -> None:
        """End it. Nothing happens if it has ended. Raises a `FedInferError` if that fails."""
        ...


class ServiceKeeper:
    """Starts a service, watches its URL, and starts it anew when it is gone.

    Parameters
    ----------
    service : Service
    probe : HttpProbe
        Of a URL that answers 200 while the service lives.
    ready : HttpProbe, optional
        Of one that answers 200 once it is of use; that is said, no more.
    drain_s : float
        How long it may go on with what it has, at the end.
    found : str
        Name of a service that an earlier keeper left running: it is watched, and not started
        again while it is well.
    backoff : Backoff, optional
    poll_s : float
        Seconds between rounds.
    clock : callable
        Monotonic seconds.
    """

    def __init__(
        self,
        service: Service,
        probe: HttpProbe,
        *,
        ready: HttpProbe | None = None,
        drain_s: float = 20.0,
        found: str = "",
        backoff: Backoff | None = None,
        poll_s: float = 0.2,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.service = service
        self.probe = probe
        self.ready = ready
        self.drain_s = drain_s
        self.found = found
        self.backoff = backoff or Backoff(first_s=1.0)
        self.poll_s = poll_s
        self.clock = clock
        self.starts = 0

    def run(self, stop: StopFlag, *, once: bool = False) -> int:
        """Run until `stop` is set; return 0.

        With `once`, the first end of the service is the end; return 0 if it was a good one,
        else 1.
        """
        found = self.found
        while not stop.is_set:
            began = self.clock()
            name, found = found or self._start(), ""
            if name:
                ended = self._watch(name, stop)
                if ended is None:
                    self._finish(name)
                    return 0
                _log.warning("run %s: %s", name, ended.words)
                self._stop(name)
                if once:
                    return 0 if ended.well else 1
            elif once:
                return 1
            wait_s = self.backoff.next_s(ran_s=self.clock() - began)
            _log.warning("started again in %.1f s", wait_s)
            self._sleep(wait_s, stop)
            if name:
                self._wait_until_gone(stop)
        return 0

    def _start(self) -> str:
        try:
            name = self.service.start()
        except FedInferError as exc:
            _log.error("%s", exc.message)
            return ""
        self.starts += 1
        _log.info("run %s started", name)
        return name

    def _watch(self, name: str, stop: StopFlag) -> Ended | None:
        """Return how it ended; None if `stop` was set."""
        told = False
        probes = [probe for probe in (self.probe, self.ready) if probe is not None]
        for probe in probes:
            probe.start(now_s=self.clock())
        asked_at = seen_at = self.clock()
        while not stop.is_set:
            now_s = self.clock()
            if now_s - seen_at > _SUSPICION_S + self.probe.timeout_s + self.poll_s:
                self.probe.excuse(now_s=now_s)
            seen_at = now_s
            gone = self.probe.check(now_s=now_s)
            if not told and self.ready is not None and self.probe.answered:
                self.ready.check(now_s=now_s)
            if not told and all(probe.answered for probe in probes):
                told = True
                _log.info("run %s is ready", name)
            silent = self.probe.silent_s(now_s=now_s) > _SUSPICION_S
            if gone or (silent and now_s - asked_at > _SUSPICION_S):
                ended = self.service.ended(name)
                asked_at = seen_at = self.clock()
                if ended is not None or gone:
                    return ended or Ended(gone)
            time.sleep(self.poll_s)
        return None

    def _finish(self, name: str) -> None:
        """End it when everything ends: first what it has taken on, then itself."""
        if self.service.drain(name):
            end_at = self.clock() + self.drain_s
            while self.clock() < end_at and self.service.ended(name) is None:
                time.sleep(max(self.poll_s, 0.5))
        self._stop(name)
        _log.info("run %s stopped", name)

    def _stop(self, name: str) -> None:
        try:
            self.service.stop(name)
        except FedInferError as exc:
            _log.error("%s", exc.message)

    def _wait_until_gone(self, stop: StopFlag) -> None:
        # A service that was told to end may hold its address until it notices.
        end_at = self.clock() + _GONE_S
        self.probe.start(now_s=self.clock())
        while not stop.is_set and self.clock() < end_at:
            self.probe.check(now_s=self.clock())
            if not self.probe.answered:
                return
            self.probe.start(now_s=self.clock())
            time.sleep(max(self.poll_s, 0.5))

    def _sleep(self, wait_s: float, stop: StopFlag) -> None:
        end_at = self.clock() + wait_s
        while not stop.is_set and self.clock() < end_at:
            time.sleep(min(self.poll_s, 0.2))
