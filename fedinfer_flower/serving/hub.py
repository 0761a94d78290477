"""`GridHub`: one thread owns Flower's grid; strategies in other threads share it.

Flower's grid is made for one caller that waits. A gateway has several batches under way: all
their pushes and pulls go through one thread, which asks for all replies that anybody waits for
in one request, often while something is pending and not at all otherwise.
"""

from __future__ import annotations

import logging
import threading
import time
import weakref
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import CancelledError, Future
from concurrent.futures import TimeoutError as FutureTimeoutError
from dataclasses import dataclass
from typing import Any, Final, TypeVar

from flwr.app import Message
from flwr.serverapp import Grid

from fedinfer_flower.errors import UnavailableError
from fedinfer_flower.serving.hub_grid import HubGrid

__all__ = ["GridHub"]

log = logging.getLogger("fedinfer_flower.gateway")

_T = TypeVar("_T")

_POLL_MIN_S: Final = 0.005
_POLL_MAX_S: Final = 0.05
_FIRST_LOOK: Final = 0.7
_FIRST_LOOK_MAX_S: Final = 0.5
"""The first look for a reply comes after this share of what the quickest of late took."""

_CALL_S: Final = 30.0
_TRIES: Final = 3
_GRACE_S: Final = 5.0


@dataclass(kw_only=True)
class _Awaited:
    """A message that was pushed and has no reply yet."""

    owner: HubGrid
    pushed_at: float  # by the monotonic clock, as all times here
    until: float
    failures: int = 0


class GridHub:
    """Share one grid among threads.

    Parameters
    ----------
    grid : Grid
        Flower's. Nobody else may call it while the hub runs.
    pull_most : int
        Most replies that are asked for at once.

    Notes
    -----
    Flower can recall no message: replies to facades that were closed are pulled, so that they
    do not lie on the SuperLink, and dropped. A reply that cannot be rebuilt is given up after
    three tries, and hides no other.
    """

    def __init__(self, grid: Grid, *, pull_most: int = 256) -> None:
        self._grid = grid
        self._pull_most = pull_most
        self._calls: deque[tuple[Callable[[], Any], Future[Any]]] = deque()
        self._awaited: dict[str, _Awaited] = {}
        self._wake = threading.Condition()
        self._closed = False
        self._failing_since: float | None = None
        self._busy_since: float | None = None
        self._single = False
        self._took_s: deque[float] = deque(maxlen=16)
        self._facades: weakref.WeakSet[HubGrid] = weakref.WeakSet()
        self._thread = threading.Thread(target=self._run, name="fedinfer-hub", daemon=True)

    def start(self) -> None:
        """Start the thread."""
        self._thread.start()

    def close(self) -> None:
        """End the thread after the call that it is in; others' calls fail."""
        with self._wake:
            self._closed = True
            self._wake.notify_all()
        for grid in list(self._facades):
            grid.give_up()
        if self._thread.is_alive() and self._thread is not threading.current_thread():
            self._thread.join(timeout=_GRACE_S)

    def grid(self) -> HubGrid:
        """Return a facade for one strategy; close it when its batch is done."""
        grid = HubGrid(self)
        self._facades.add(grid)
        return grid

    @property
    def run(self) -> Any:
        """What the grid says of its run."""
        return self._grid.run

    @property
    def silent_s(self) -> float:
        """Seconds for which the SuperLink has not answered; 0.0 if its last answer was good."""
        since = [at for at in (self._failing_since, self._busy_since) if at is not None]
        return time.monotonic() - min(since) if since else 0.0

    @property
    def n_awaited(self) -> int:
        """Messages without a reply."""
        return len(self._awaited)

    # -- for facades -------------------------------------------------------------------

    def call(self, work: Callable[[], _T], *, timeout_s: float = _CALL_S) -> _T:
        """Run something in the thread that owns the grid and return what it returns.

        Raises
        ------
        UnavailableError
            If the hub is closed, or does not come to it in time.
        """
        done: Future[_T] = Future()
        with self._wake:
            if self._closed:
                raise UnavailableError("the gateway's connection to the SuperLink is closed")
            self._calls.append((work, done))
            self._wake.notify_all()
        try:
            return done.result(timeout=timeout_s)
        except CancelledError:
            raise UnavailableError("the gateway is closing") from None
        except FutureTimeoutError:
            done.cancel()
            raise UnavailableError(
                f"the SuperLink did not answer within {timeout_s:g} s",
                hint="is it running, and reachable from the gateway?",
            ) from None

    def push(self, messages: Sequence[Message], owner: HubGrid) -> list[str]:
        """Push messages for a facade."""

        def work() -> list[str]:
            accepted = [str(i or "") for i in self._grid.push_messages(messages)]
            known = set(accepted) - {""}
            now = time.monotonic()
            for message in messages:
                message_id = message.metadata.message_id
                if message_id in known:
                    until = now + message.metadata.ttl + _GRACE_S
                    self._awaited[message_id] = _Awaited(owner=owner, pushed_at=now, until=until)
            return accepted

        return self.call(work)

    def node_ids(self) -> list[int]:
        """Return the ids of the nodes online."""
        return self.call(lambda: [int(n) for n in self._grid.get_node_ids()])

    # -- the thread --------------------------------------------------------------------

    def _run(self) -> None:
        pause_s, next_pull = _POLL_MIN_S, 0.0
        while True:
            with self._wake:
                while not self._closed and not self._calls:
                    left_s = next_pull - time.monotonic() if self._awaited else None
                    if left_s is not None and left_s <= 0.0:
                        break
                    self._wake.wait(left_s)
                if self._closed:
                    break
                calls = list(self._calls)
                self._calls.clear()
            before = set(self._awaited)
            for work, done in calls:
                self._serve(work, done)
            if self._awaited.keys() - before:
                # A look that comes before the reply is a request for nothing.
                pause_s, first = _POLL_MIN_S, time.monotonic() + self._first_look_s()
                next_pull = min(next_pull, first) if before else first
            if self._awaited and time.monotonic() >= next_pull:
                begun = time.monotonic()
                pause_s = _POLL_MIN_S if self._pull() else min(1.5 * pause_s, _POLL_MAX_S)
                # A SuperLink that is slow to answer is asked less often.
                next_pull = time.monotonic() + max(pause_s, 0.5 * (time.monotonic() - begun))
        for _, done in self._calls:
            done.cancel()

    def _first_look_s(self) -> float:
        usual_s = min(self._took_s, default=_POLL_MIN_S)
        return min(max(_FIRST_LOOK * usual_s, _POLL_MIN_S), _FIRST_LOOK_MAX_S)

    def _serve(self, work: Callable[[], Any], done: Future[Any]) -> None:
        if not done.set_running_or_notify_cancel():
            return
        self._busy_since = time.monotonic()
        try:
            result = work()
        except Exception as exc:  # of whatever kind Flower's transport raises
            self._failed()
            done.set_exception(exc)
        else:
            self._worked()
            done.set_result(result)
        finally:
            self._busy_since = None

    def _pull(self) -> bool:
        """Pull what is awaited; return whether anything came."""
        now = time.monotonic()
        for message_id in [i for i, a in self._awaited.items() if now > a.until]:
            del self._awaited[message_id]
        ids = list(self._awaited)
        most = 1 if self._single else self._pull_most
        came, failed = False, False
        self._busy_since = now
        for start in range(0, len(ids), most):
            group = ids[start : start + most]
            try:
                replies = list(self._grid.pull_messages(set(group)))
            except Exception as exc:
                log.warning("pulling %d replies failed (%s)", len(group), type(exc).__name__)
                failed = True
                if not self._is_there():
                    break  # nothing is wrong with these replies, and each would only take time
                self._note_failures(group)
                continue
            self._worked()
            came = self._deliver(replies) or came
        # A reply that cannot be rebuilt fails a whole request: until all that is awaited was
        # pulled without a failure, ask for one at a time.
        self._single = failed
        self._busy_since = None
        if failed:
            self._failed()
        return came

    def _deliver(self, replies: Iterable[Message]) -> bool:
        came = False
        for reply in replies:
            message_id = reply.metadata.reply_to_message_id
            awaited = self._awaited.pop(message_id, None)
            if awaited is not None:
                came = True
                self._took_s.append(time.monotonic() - awaited.pushed_at)
                awaited.owner.take(message_id, reply)
        return came

    def _note_failures(self, group: Sequence[str]) -> None:
        if len(group) > 1:
            return
        awaited = self._awaited.get(group[0])
        if awaited is None:
            return
        awaited.failures += 1
        if awaited.failures >= _TRIES:
            del self._awaited[group[0]]

    def _is_there(self) -> bool:
        try:
            list(self._grid.get_node_ids())
        except Exception:
            return False
        self._worked()
        return True

    def _failed(self) -> None:
        if self._failing_since is None:
            self._failing_since = time.monotonic()

    def _worked(self) -> None:
        self._failing_since = None
