"""`LocalGrid`: Flower's Grid in one process, with Flower's real wire format.

For tests and notebooks. Every message is serialised and rebuilt exactly as between a
SuperLink and a SuperNode, errors are mapped as a real ClientApp process maps them, and a
reply that would block a real SuperNode is refused. There is no Ray and no network.

Flower's wire format and task identity come from `flower_internals`.
"""

from __future__ import annotations

import secrets
import threading
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace
from typing import Any

from flwr.app import Context, Error, Message, RecordDict
from flwr.clientapp import ClientApp
from flwr.common.constant import ErrorCode
from flwr.serverapp import Grid

from fedinfer_flower.flower_internals.local_wire import over_the_wire, take_identity

__all__ = ["LocalGrid", "over_the_wire"]

_FIRST_NODE = 1000


class LocalGrid(Grid):
    """Run a ClientApp on many virtual SuperNodes in this process.

    Parameters
    ----------
    client_app : ClientApp
    num_supernodes : int
    run_config : mapping, optional
        What ``context.run_config`` holds at every node.
    workers : int
        Threads that serve nodes; a node is served by one at a time. With 0, a node runs
        when its reply is pulled: nothing waits in memory.
    latency_s : callable
        Seconds that a node waits before it starts, by node id.

    Notes
    -----
    Building a Message needs Flower's process-wide run identity, which this class sets:
    never use it inside a real run. One instance at a time in a process.

    Examples
    --------
    >>> from flwr.clientapp import ClientApp
    >>> grid = LocalGrid(ClientApp(), num_supernodes=3)
    >>> len(list(grid.get_node_ids()))
    3
    """

    def __init__(
        self,
        client_app: ClientApp,
        *,
        num_supernodes: int,
        run_config: dict[str, Any] | None = None,
        workers: int = 2,
        latency_s: Callable[[int], float] = lambda node_id: 0.0,  # noqa: ARG005
    ) -> None:
        # Fresh for every grid, so that the resident models of one never serve another.
        self.run_id = secrets.randbits(48) + 1
        take_identity(run_id=self.run_id)
        self.client_app = client_app
        self.wire_bytes = 0
        self._latency_s = latency_s
        self._contexts = {
            _FIRST_NODE + i: Context(
                run_id=self.run_id,
                node_id=_FIRST_NODE + i,
                state=RecordDict(),
                run_config=dict(run_config or {}),
                node_config={"partition-id": i, "num-partitions": num_supernodes},
            )
            for i in range(num_supernodes)
        }
        self._node_locks = {node_id: threading.Lock() for node_id in self._contexts}
        self._lock = threading.Lock()
        self._replies: dict[str, Message] = {}
        self._waiting: dict[str, Message] = {}
        self._pool = ThreadPoolExecutor(workers) if workers > 0 else None

    def set_run(self, run: Any) -> None:
        """Do nothing: the run is this grid's own."""

    @property
    def run(self) -> Any:
        """An object with the `run_id` of this grid."""
        return SimpleNamespace(run_id=self.run_id)

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
        """Return the ids of the virtual SuperNodes."""
        return list(self._contexts)

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        """Accept messages; the id of one for an unknown node is empty."""
        ids = []
        for message in messages:
            known = message.metadata.dst_node_id in self._contexts
            message_id = secrets.token_hex(16) if known else ""
            message.metadata.__dict__["_message_id"] = message_id
            if known:
                copy = self._travel(message)
                if self._pool is None:
                    self._waiting[message_id] = copy
                else:
                    self._pool.submit(self._serve, message_id, copy)
            ids.append(message_id)
        return ids

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        """Return the replies that are there."""
        wanted = list(message_ids)
        for message_id in wanted:
            if message_id in self._waiting:
                self._serve(message_id, self._waiting.pop(message_id))
        with self._lock:
            return [self._replies.pop(i) for i in wanted if i in self._replies]

    def send_and_receive(
        self, messages: Iterable[Message], *, timeout: float | None = None
    ) -> Iterable[Message]:
        """Push, and pull until all replies are in or time is up."""
        pending = {i for i in self.push_messages(messages) if i}
        end = float("inf") if timeout is None else time.monotonic() + timeout
        replies: list[Message] = []
        while pending and time.monotonic() < end:
            for reply in self.pull_messages(set(pending)):
                pending.discard(reply.metadata.reply_to_message_id)
                replies.append(reply)
            time.sleep(0.002 if pending else 0.0)
        return replies

    def close(self) -> None:
        """Wait for nodes that still work, and let the threads go."""
        if self._pool is not None:
            self._pool.shutdown(wait=True, cancel_futures=True)

    def __enter__(self) -> LocalGrid:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _travel(self, message: Message) -> Message:
        copy, size = over_the_wire(message)
        with self._lock:
            self.wire_bytes += size
        return copy

    def _serve(self, message_id: str, message: Message) -> None:
        node_id = message.metadata.dst_node_id
        time.sleep(self._latency_s(node_id))
        try:
            with self._node_locks[node_id]:
                reply = self._travel(self.client_app(message, self._contexts[node_id]))
            if not reply.metadata.reply_to_message_id:  # would block a real SuperNode
                raise TypeError("the reply was built without reply_to")
        except Exception as exc:  # as the real ClientApp process maps it
            reason = f"{type(exc)}:<'{exc}'>"
            error = Error(ErrorCode.CLIENT_APP_RAISED_EXCEPTION, reason)
            reply = Message(error, reply_to=message)
        reply.metadata.__dict__["_reply_to_message_id"] = message_id
        with self._lock:
            self._replies[message_id] = reply
