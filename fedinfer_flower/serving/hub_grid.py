"""`HubGrid`: what a strategy takes for Flower's grid, while others use the same one."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any, Self

from flwr.app import Message, RecordDict
from flwr.serverapp import Grid

from fedinfer_flower.errors import UnavailableError

if TYPE_CHECKING:
    from fedinfer_flower.serving.hub import GridHub

__all__ = ["HubGrid"]


class HubGrid(Grid):
    """A grid for one strategy in one thread, over a `GridHub`.

    Close it when the batch is done, or use it in a ``with`` block: replies that come later
    are dropped.

    Parameters
    ----------
    hub : GridHub
    """

    def __init__(self, hub: GridHub) -> None:
        self._hub = hub
        self._replies: dict[str, Message] = {}
        self._came = threading.Condition()
        self._closed = self._given_up = False

    def set_run(self, run: Any) -> None:
        """Do nothing: the run is the gateway's."""

    @property
    def run(self) -> Any:
        """The gateway's run."""
        return self._hub.run

    def create_message(
        self,
        content: RecordDict,
        message_type: str,
        dst_node_id: int,
        group_id: str,
        ttl: float | None = None,
    ) -> Message:
        """Build a message as Flower's grids do."""
        return Message(content, dst_node_id, message_type, ttl=ttl, group_id=group_id)

    def get_node_ids(self) -> Iterable[int]:
        """Return the ids of the nodes online."""
        return self._hub.node_ids()

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        """Push messages; the id of one that was not accepted is empty."""
        return self._hub.push(list(messages), self)

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        """Return the replies that have come. Never waits for the SuperLink."""
        with self._came:
            return [self._replies.pop(i) for i in message_ids if i in self._replies]

    def wait_for_replies(self, message_ids: Iterable[str], seconds: float) -> None:
        """Wait until one of these replies is there, or the time is up.

        Raises
        ------
        UnavailableError
            If none will come any more: the hub is closed.
        """
        wanted = set(message_ids)
        with self._came:
            self._came.wait_for(
                lambda: self._given_up or not wanted.isdisjoint(self._replies), timeout=seconds
            )
            if self._given_up:
                raise UnavailableError("the gateway's connection to the SuperLink is closed")

    def send_and_receive(
        self, messages: Iterable[Message], *, timeout: float | None = None
    ) -> Iterable[Message]:
        """Push, and collect until all replies are in or time is up."""
        pending = {i for i in self.push_messages(messages) if i}
        end = None if timeout is None else time.monotonic() + timeout
        replies: list[Message] = []
        while pending and (end is None or time.monotonic() < end):
            self.wait_for_replies(pending, 1.0 if end is None else end - time.monotonic())
            for reply in self.pull_messages(set(pending)):
                pending.discard(reply.metadata.reply_to_message_id)
                replies.append(reply)
        return replies

    def take(self, message_id: str, reply: Message) -> None:
        """Take a reply in from the hub's thread; drop it if nobody waits any more."""
        with self._came:
            if not self._closed:
                self._replies[message_id] = reply
                self._came.notify_all()

    def close(self) -> None:
        """Let go of replies; later ones are dropped."""
        with self._came:
            self._closed = True
            self._replies.clear()
            self._came.notify_all()

    def give_up(self) -> None:
        """Have whoever waits told that nothing will come."""
        with self._came:
            self._given_up = True
            self._came.notify_all()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
