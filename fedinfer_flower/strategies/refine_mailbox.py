"""Messages that go out one by one, and replies in the order in which they come.

An exchange of caches is no single wave: what one site answers decides what another is asked,
and a receiver whose helpers are ready must not wait for those of another receiver.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

from flwr.app import Message
from flwr.serverapp import Grid

from fedinfer_flower.errors import FedInferError, QueryError
from fedinfer_flower.strategies.onboarding import read_arrival
from fedinfer_flower.strategies.pull_loop import Arrival
from fedinfer_flower.wire.actions import message_type
from fedinfer_flower.wire.envelope import Envelope, WireLimits
from fedinfer_flower.wire.records import pack

__all__ = ["Ask", "Letter", "Mailbox"]

log = logging.getLogger("fedinfer_flower.coordinator")

K = TypeVar("K")
_WINDOW = 16
"""Replies asked for at once: a cache is megabytes, and a thousand must not lie in memory."""


@dataclass(frozen=True, kw_only=True)
class Ask(Generic[K]):
    """One message to one node.

    Parameters
    ----------
    key : object
        Names the message to whoever sent it; a node may have several.
    node_id : int
    action : str
    envelope : Envelope
    ttl_s : float
    """

    key: K
    node_id: int
    action: str
    envelope: Envelope
    ttl_s: float


@dataclass(frozen=True, kw_only=True)
class Letter(Generic[K]):
    """The reply to an `Ask`.

    Parameters
    ----------
    key : object
    node_id : int
    envelope : Envelope, optional
        None where an error came instead.
    error : FedInferError, optional
    seconds : float
        Since the message was pushed.
    """

    key: K
    node_id: int
    envelope: Envelope | None
    error: FedInferError | None
    seconds: float


class Mailbox(Generic[K]):
    """Push messages at any time, and collect what comes back.

    Parameters
    ----------
    grid : Grid
    run_id : int
    limits : WireLimits
        Largest reply that is read.
    group_id : str
    clock : callable
        Monotonic seconds.
    """

    def __init__(
        self,
        grid: Grid,
        *,
        run_id: int,
        limits: WireLimits,
        group_id: str = "refine",
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._grid, self._run_id, self._limits = grid, run_id, limits
        self._group_id, self._clock = group_id, clock
        self._pending: dict[str, tuple[Ask[K], float]] = {}
        self._rejected: list[Letter[K]] = []
        self.bytes_out = self.bytes_in = 0

    def push(self, asks: Sequence[Ask[K]]) -> None:
        """Send messages.

        Raises
        ------
        QueryError
            If the SuperLink takes none at all.
        """
        if not asks:
            return
        messages = [
            Message(
                pack(ask.envelope),
                ask.node_id,
                message_type(ask.action),
                ttl=ask.ttl_s,
                group_id=self._group_id,
            )
            for ask in asks
        ]
        try:
            # Ids are set in place; the answer may leave rejected messages out.
            accepted = {name for name in self._grid.push_messages(messages) if name}
        except Exception as exc:
            raise QueryError(
                f"the SuperLink did not take the messages ({type(exc).__name__})",
                hint="is it running, and reachable from the ServerApp?",
            ) from exc
        for ask, message in zip(asks, messages, strict=True):
            self.bytes_out += sum(len(data) for _, data in ask.envelope.sections)
            if message.metadata.message_id in accepted:
                self._pending[message.metadata.message_id] = (ask, self._clock())
            else:
                arrival = Arrival(node_id=ask.node_id, reply=None, seconds=0.0)
                self._rejected.append(self._read(ask, arrival))

    def collect(self) -> Iterator[Letter[K]]:
        """Yield the replies that are there; returns at once if none are."""
        rejected, self._rejected = self._rejected, []
        yield from rejected
        waiting = list(self._pending)
        for start in range(0, len(waiting), _WINDOW):
            for reply in self._pull(set(waiting[start : start + _WINDOW])):
                found = self._pending.pop(reply.metadata.reply_to_message_id, None)
                if found is None:
                    continue
                ask, pushed = found
                arrival = Arrival(node_id=ask.node_id, reply=reply, seconds=self._clock() - pushed)
                yield self._read(ask, arrival)

    def _pull(self, group: set[str]) -> list[Message]:
        try:
            return list(self._grid.pull_messages(group))
        except Exception as exc:
            log.warning("pulling %d replies failed (%s)", len(group), type(exc).__name__)
        if len(group) == 1:
            return []
        # One reply that cannot be rebuilt fails the whole pull: it must hide itself only.
        return [reply for name in group for reply in self._pull({name})]

    def _read(self, ask: Ask[K], arrival: Arrival) -> Letter[K]:
        envelope, error = None, None
        try:
            envelope = read_arrival(arrival, run_id=self._run_id, limits=self._limits)
            self.bytes_in += sum(len(data) for _, data in envelope.sections)
        except FedInferError as exc:
            error = exc
        return Letter(
            key=ask.key,
            node_id=ask.node_id,
            envelope=envelope,
            error=error,
            seconds=arrival.seconds,
        )
