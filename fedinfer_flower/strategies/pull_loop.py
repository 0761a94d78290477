"""Push queries, pull replies as they come.

Flower's own `send_and_receive` returns at the end only, holds every reply in memory, and
polls a real SuperLink every 3 s. This loop yields each reply when it is there, asks for
few enough at a time that a thousand large replies never lie in memory together, and ends
at its deadline whatever the sites do.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Final

from flwr.app import Message
from flwr.serverapp import Grid

from fedinfer_flower.errors import QueryError

__all__ = ["Arrival", "stream_replies"]

log = logging.getLogger("fedinfer_flower.coordinator")

PULL_BYTES: Final = 8 << 20
"""Replies that are asked for at once are expected to fit in this."""


@dataclass(frozen=True, kw_only=True)
class Arrival:
    """A reply, or the news that a message was not accepted.

    Parameters
    ----------
    node_id : int
        The node that was asked. Error replies of the SuperLink itself do not name it.
    reply : Message, optional
        None if the SuperLink did not accept the message.
    seconds : float
        Since the push.
    """

    node_id: int
    reply: Message | None
    seconds: float


def stream_replies(
    grid: Grid,
    messages: Sequence[Message],
    *,
    timeout_s: float,
    reply_bytes: int = 0,
    poll_s: float = 0.02,
    enough_s: Callable[[], float | None] | None = None,
    clock: Callable[[], float] = time.monotonic,
) -> Iterator[Arrival]:
    """Push messages and yield their replies until all are in or time is up.

    Parameters
    ----------
    grid : Grid
    messages : sequence of Message
    timeout_s : float
        From the push. Nothing is yielded after it.
    reply_bytes : int
        Expected size of one reply; bounds how many are pulled at once.
    poll_s : float
        Longest pause when nothing new is there; the first are shorter. A grid with a method
        ``wait_for_replies(message_ids, seconds)`` is asked to wait instead.
    enough_s : callable, optional
        Asked before every pull: seconds after the push at which the rest is not waited for
        any more, or None while it is.
    clock : callable
        Monotonic seconds.

    Raises
    ------
    QueryError
        If the messages cannot be pushed at all.
    """
    start = clock()
    # Both grids set the message id in place, but one leaves rejected messages out of its
    # answer and the other answers "": never zip the ids with the messages.
    try:
        accepted = {message_id for message_id in grid.push_messages(messages) if message_id}
    except Exception as exc:
        raise QueryError(
            f"the SuperLink did not take the messages ({type(exc).__name__})",
            hint="is it running, and reachable from the ServerApp?",
        ) from exc
    pending: dict[str, int] = {}
    for message in messages:
        node_id = message.metadata.dst_node_id
        if message.metadata.message_id in accepted:
            pending[message.metadata.message_id] = node_id
        else:
            yield Arrival(node_id=node_id, reply=None, seconds=clock() - start)
    window = max(1, PULL_BYTES // max(reply_bytes, 1))
    pause_s = poll_s / 16
    wait = getattr(grid, "wait_for_replies", None)

    def left_s() -> float:
        end_s = enough_s() if enough_s is not None else None
        return (timeout_s if end_s is None else min(timeout_s, end_s)) - (clock() - start)

    while pending and left_s() > 0.0:
        came = 0
        # Oldest first, a window at a time; ids that are not ready cost one request.
        for group in _groups(list(pending), window):
            replies, window = _pull(grid, group, window)
            for reply in replies:
                arrived = pending.pop(reply.metadata.reply_to_message_id, None)
                if arrived is not None and clock() - start < timeout_s:
                    came += 1
                    yield Arrival(node_id=arrived, reply=reply, seconds=clock() - start)
            del replies
            if clock() - start >= timeout_s:
                return
        pause_s = poll_s / 16 if came else min(2 * pause_s, poll_s)
        if pending and not came:
            if wait is None:
                time.sleep(max(0.0, min(pause_s, left_s())))
            else:
                wait(list(pending), max(0.0, left_s()))


def _groups(ids: list[str], window: int) -> Iterator[set[str]]:
    for start in range(0, len(ids), window):
        yield set(ids[start : start + window])


def _pull(grid: Grid, group: set[str], window: int) -> tuple[list[Message], int]:
    try:
        return list(grid.pull_messages(group)), window
    except Exception as exc:
        # One reply that cannot be rebuilt fails the whole pull. From now on ask for one
        # at a time, so that it can only hide itself; what is lost counts as late.
        log.warning("pulling %d replies failed (%s)", len(group), type(exc).__name__)
        return [], 1
