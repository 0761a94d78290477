"""The SuperNode's counter: one message in hand, one worker that may take it, a bounded wait.

A stock SuperNode waits for the reply of a task without any limit, and hands a task out before
its message is complete. Here a task is handed out when the message is complete, and the wait
ends when the reply is complete, when the message's time is up, or when the worker is lost; in
the last two cases with an error reply, so that the next message is served.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Final

from flwr.app import Error, Message
from flwr.common.constant import ErrorCode, Status, SubStatus
from flwr.proto.message_pb2 import (
    ConfirmMessageReceivedRequest,
    PullObjectRequest,
    PushObjectRequest,
)
from flwr.proto.runtime_pb2 import (
    AcquireTaskRequest,
    AcquireTaskResponse,
    PullAppMessagesRequest,
    PullAppMessagesResponse,
    PullTaskInputRequest,
    PushAppMessagesRequest,
    PushTaskOutputRequest,
)
from flwr.proto.task_pb2 import Task
from flwr.supercore.constant import TaskType
from flwr.supercore.inflatable.inflatable_object import iterate_object_tree
from flwr.supernode import start_client_internal
from flwr.supernode.nodestate.in_memory_nodestate import InMemoryNodeState
from flwr.supernode.servicer.runtime import runtime_handlers

from fedinfer_flower.flower_internals.polling import bounded_s
from fedinfer_flower.flower_internals.task_frames import MAX_INLINE_BYTES, OtherFab

__all__ = ["DeskLimits", "NodeDesk"]

_OUTDATED: Final = "the site did not answer within the message's time"
_UNCLAIMED: Final = "no worker takes tasks at this site"
_NO_AGENTS: Final = "this site serves no agents"
_LOST: Final = "the site's worker was lost while it answered"
_acquire = runtime_handlers.acquire_task  # the stock one: `warm_node` puts a gate before it


@dataclass(frozen=True, kw_only=True)
class DeskLimits:
    """How long the SuperNode waits for its worker.

    Parameters
    ----------
    task_s : float
        For a reply, if the message's own time is longer.
    claim_s : float
        For any worker to ask for a task while one is waiting.
    silent_s : float
        For a sign of life of the worker that has the task.
    replaced_s : float
        The same, once another worker asks.
    """

    task_s: float = 3600.0
    claim_s: float = 30.0
    silent_s: float = 15.0
    replaced_s: float = 3.0


@dataclass(kw_only=True)
class _Claim:
    worker: str
    task_id: int
    heard_at: float
    lost: bool = False


class NodeDesk:
    """Hands tasks to a worker in one request and waits for the reply, never for ever.

    Parameters
    ----------
    limits : DeskLimits
    clock : callable
        Monotonic seconds.
    """

    def __init__(
        self,
        *,
        limits: DeskLimits | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._limits = limits or DeskLimits()
        self._clock = clock
        self._changed = threading.Condition()
        self._open = False
        self._closed = False
        self._claim: _Claim | None = None
        self._opened_at = 0.0
        self._asked_at = 0.0

    # -- for the worker, on the server's threads -------------------------------------------

    def take(
        self,
        state: InMemoryNodeState,
        *,
        worker: str,
        pinned: str,
        with_fab: bool,
        wait_s: float,
    ) -> list[bytes] | OtherFab | None:
        """Hand out the task that waits, or wait for one.

        Parameters
        ----------
        state : InMemoryNodeState
        worker : str
            Random name of the worker's process.
        pinned : str
            SHA-256 of the only app bundle that the worker serves; empty for any.
        with_fab : bool
            Whether the bytes of the bundle are wanted.
        wait_s : float

        Returns
        -------
        list of bytes, OtherFab or None
            AcquireTaskResponse, PullTaskInputResponse, PullAppMessagesResponse, and the message's
            objects in the order of its tree unless they are large.
        """
        end = self._clock() + wait_s
        with self._changed:
            self._note_asking(worker)
            while not self._closed:
                self._asked_at = self._clock()
                if self._open and self._claim is None:
                    found = self._hand_out(state, worker, pinned, with_fab=with_fab)
                    if found is not None:
                        return found
                left = end - self._clock()
                if left <= 0:
                    break
                self._changed.wait(left)
        return None

    def give(self, state: InMemoryNodeState, *, token: str, frames: list[bytes]) -> bool:
        """Take a reply in: message, output, and the message's objects. False if none is due."""
        with self._changed:
            task = state.get_task_by_token(token)
            if task is None or not self._open:
                return False
            pushed = PushAppMessagesRequest.FromString(frames[0])
            answer = runtime_handlers.push_messages(pushed, state, task)
            ids = [t.object_id for t in iterate_object_tree(pushed.message_object_trees[0])]
            contents = dict(zip(dict.fromkeys(ids), frames[2:], strict=True))
            for object_id in answer.objects_to_push:
                stored = runtime_handlers.push_object(
                    PushObjectRequest(
                        run_id=task.run_id,
                        object_id=object_id,
                        object_content=contents[object_id],
                        session_id=answer.session_id,
                    ),
                    state,
                    task,
                )
                if not stored.stored:
                    raise ValueError("an object of the reply was not stored")
            output = PushTaskOutputRequest.FromString(frames[1])
            runtime_handlers.push_task_output(output, state, task)
            self._changed.notify_all()
            return True

    def beat(self, state: InMemoryNodeState, *, token: str) -> bool:
        """Note that the worker lives. False if its task is no longer wanted."""
        with self._changed:
            task = state.get_task_by_token(token)
            if task is None:
                return False
            if self._claim is not None and self._claim.task_id == task.task_id:
                self._claim.heard_at = self._clock()
            return bool(state.acknowledge_task_heartbeat(task.task_id))

    @contextmanager
    def gate(self) -> Iterator[bool]:
        """Give whether a task may be handed out now, and keep it so within the block."""
        with self._changed:
            self._asked_at = self._clock()
            yield self._open and self._claim is None

    # -- for the SuperNode's own loop ------------------------------------------------------

    def wait_for_reply(
        self, message: Message, state: InMemoryNodeState, *, tick: Callable[[], None]
    ) -> None:
        """Offer the task of a complete message and wait until a complete reply is in `state`.

        Parameters
        ----------
        message : Message
            As the SuperLink delivered it.
        state : InMemoryNodeState
        tick : callable
            Called while waiting.
        """
        # From now on and not from `created_at`, which is another machine's clock.
        deadline = self._clock() + bounded_s(message.metadata.ttl, most_s=self._limits.task_s)
        with self._changed:
            self._open, self._claim, self._opened_at = True, None, self._clock()
            self._changed.notify_all()
            try:
                while not self._closed and not _has_reply(state):
                    words = self._why_to_end(deadline)
                    if self._claim is None and _is_for_an_agent(state):
                        words = _NO_AGENTS
                    if words:
                        _end_with_error(message, state, words)
                        return
                    tick()
                    # A worker that speaks Flower's own protocol does not wake this thread.
                    self._changed.wait(0.02 if self._claim is None else 0.25)
            finally:
                self._open, self._claim = False, None

    def close(self) -> None:
        """Let every waiting request go."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()

    # -- within the lock -------------------------------------------------------------------

    def _note_asking(self, worker: str) -> None:
        claim = self._claim
        if claim is None:
            return
        # One worker a SuperNode: whoever asks has nothing in hand, so a claim under its own
        # name never arrived, and one under another name is of a process that was replaced.
        silent = self._clock() - claim.heard_at
        if claim.worker == worker or silent > self._limits.replaced_s:
            claim.lost = True
            self._changed.notify_all()

    def _hand_out(
        self, state: InMemoryNodeState, worker: str, pinned: str, *, with_fab: bool
    ) -> list[bytes] | OtherFab | None:
        waiting = state.get_tasks(statuses=[Status.PENDING])
        if not waiting:
            return None
        if pinned and waiting[0].fab_hash != pinned:
            return OtherFab(waiting[0].fab_hash)
        acquired: AcquireTaskResponse = _acquire(
            AcquireTaskRequest(supported_task_types=[TaskType.CLIENT_APP]), state
        )
        if not acquired.token:
            return None
        task = acquired.task
        given = runtime_handlers.pull_task_input(PullTaskInputRequest(), state, task)
        if not with_fab:
            given.fab.content = b""
        found = runtime_handlers.pull_messages(PullAppMessagesRequest(), state, task)
        body = [acquired.SerializeToString(), given.SerializeToString()]
        body.append(found.SerializeToString())
        self._claim = _Claim(worker=worker, task_id=task.task_id, heard_at=self._clock())
        return body + _objects(state, task, found)

    def _why_to_end(self, deadline: float) -> str:
        now = self._clock()
        if now >= deadline:
            return _OUTDATED
        if self._claim is None:
            # Flower's own claims end by themselves: see InMemoryCoreState.
            waited = now - max(self._opened_at, self._asked_at)
            return _UNCLAIMED if waited > self._limits.claim_s else ""
        silent = now - self._claim.heard_at
        return _LOST if self._claim.lost or silent > self._limits.silent_s else ""


def _objects(state: InMemoryNodeState, task: Task, found: PullAppMessagesResponse) -> list[bytes]:
    """Return the objects of the message, if they are small enough, and confirm them."""
    (tree,) = found.message_object_trees
    contents: list[bytes] = []
    ids = dict.fromkeys(part.object_id for part in iterate_object_tree(tree))
    for object_id in ids:
        request = PullObjectRequest(object_id=object_id)
        contents.append(runtime_handlers.pull_object(request, state, task).object_content)
        if sum(map(len, contents)) > MAX_INLINE_BYTES:
            return []
    confirmed = ConfirmMessageReceivedRequest(message_object_id=tree.object_id)
    runtime_handlers.confirm_message_received(confirmed, state, task)
    return contents


def _is_for_an_agent(state: InMemoryNodeState) -> bool:
    """Return whether the task that waits is one that no worker of a site takes."""
    waiting = state.get_tasks(statuses=[Status.PENDING])
    return bool(waiting) and all(task.type != TaskType.CLIENT_APP for task in waiting)


def _has_reply(state: InMemoryNodeState) -> bool:
    """Return whether a reply with all of its objects is there."""
    store = state.object_store
    with state.lock_msg_store:
        entries = list(state.msg_store.values())
    for entry in entries:
        metadata = entry.message.metadata
        if entry.is_retrieved or not metadata.reply_to_message_id:
            continue
        tree = store.get_object_tree(metadata.message_id)
        if all(store.get(part.object_id) for part in iterate_object_tree(tree)):
            return True
    return False


def _end_with_error(message: Message, state: InMemoryNodeState, words: str) -> None:
    """Put an error reply in place of the one that does not come, and revoke the task."""
    store = state.object_store
    # First, so that a late reply is refused.
    for task in state.get_tasks(statuses=[Status.PENDING, Status.STARTING, Status.RUNNING]):
        state.finish_task(task.task_id, SubStatus.FAILED, words)
    with state.lock_msg_store:
        partial = [
            entry.message.metadata.message_id
            for entry in state.msg_store.values()
            if entry.message.metadata.reply_to_message_id
        ]
    state.delete_messages(message_ids=partial)
    message_id = message.metadata.message_id
    for object_id in (*partial, message_id):
        store.delete(object_id)
    # What Flower's own loop asks for when it sends a reply.
    state.record_message_processing_start(message_id)
    state.record_message_processing_end(message_id)
    reply = Message(Error(ErrorCode.CLIENT_APP_CRASHED, words), reply_to=message)
    start_client_internal._insert_message(reply, state, store)
