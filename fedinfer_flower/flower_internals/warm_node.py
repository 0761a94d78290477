"""`flower-supernode` with short looks, a wait with an end, and the worker's routes."""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from types import SimpleNamespace
from typing import Any, Final, Protocol, cast

import flwr.supernode.main as runtime_main
from flwr.app import Message
from flwr.common.constant import Status
from flwr.proto.message_pb2 import ObjectTree
from flwr.proto.runtime_pb2 import AcquireTaskRequest, AcquireTaskResponse
from flwr.supercore.exit import add_exit_handler
from flwr.supernode import start_client_internal
from flwr.supernode.cli.flower_supernode import flower_supernode
from flwr.supernode.nodestate import NodeStateFactory
from flwr.supernode.nodestate.in_memory_nodestate import InMemoryNodeState
from flwr.supernode.servicer.runtime import runtime_handlers

from fedinfer_flower.flower_internals.beating import beat_often
from fedinfer_flower.flower_internals.derived import derived_objects
from fedinfer_flower.flower_internals.fab_app import run_config_of
from fedinfer_flower.flower_internals.node_desk import NodeDesk
from fedinfer_flower.flower_internals.node_routes import App, TaskRoutes
from fedinfer_flower.flower_internals.polling import Polling
from fedinfer_flower.flower_internals.pulling import shorten

__all__ = ["NodeWatch", "run_warm_node"]

log = logging.getLogger("fedinfer_flower.site")

_stock_acquire = runtime_handlers.acquire_task
_stock_create_app = runtime_main.create_app
_stock_pull = start_client_internal._pull_and_store_message
_stock_push = start_client_internal._push_messages

_STEP_S: Final = 20.0
_SUPERLINK_AWAY_S: Final = 600.0
"""So long a request to the SuperLink may retry before the process counts as stuck."""


class NodeWatch(Protocol):
    """Is told what the SuperNode does, for its status file."""

    def alive(self, for_s: float) -> None:
        """Note that the loop moved, and that its next step may take so long."""

    def busy(self, for_s: float) -> None:
        """Note that a message is being answered, which may take so long."""

    def done(self) -> None:
        """Note that a message is answered."""


class _WarmLoop:
    """Flower's own loop, with its two steps and its pause replaced."""

    def __init__(self, desk: NodeDesk, polling: Polling, watch: NodeWatch) -> None:
        self._desk = desk
        self._polling = polling
        self._watch = watch
        self._message: Message | None = None
        self._unconfirmed: Callable[[], object] | None = None
        self._behind = ThreadPoolExecutor(1, thread_name_prefix="fedinfer-confirm")

    def sleep(self, seconds: float) -> None:
        self._watch.alive(_STEP_S)
        time.sleep(min(seconds, self._polling.pause_s()))

    def pull(self, **parts: Any) -> int | None:
        """Pull one message whole; no task is handed out meanwhile."""
        receive = cast("Callable[[], tuple[Message, ObjectTree] | None]", parts["receive"])
        confirm, pull_object = parts["confirm_message_received"], parts["pull_object"]
        known: dict[str, bytes] = {}
        self._message = None

        def noting() -> tuple[Message, ObjectTree] | None:
            begun = time.monotonic()
            received = receive()
            self._polling.looked(time.monotonic() - begun)
            if received is not None:
                self._message = received[0]
                known.update(derived_objects(*received))
            return received

        def pull_unknown(run_id: int, object_id: str) -> bytes:
            content = known.get(object_id)
            return pull_object(run_id, object_id) if content is None else content

        def confirm_later(run_id: int, message_id: str) -> None:
            self._unconfirmed = partial(confirm, run_id, message_id)

        self._watch.alive(_SUPERLINK_AWAY_S)
        changed = {
            "receive": noting,
            "pull_object": pull_unknown,
            "confirm_message_received": confirm_later,
        }
        run_id = _stock_pull(**(parts | changed))
        if run_id is not None:
            self._polling.traffic()
        return run_id

    def push(self, *, state: InMemoryNodeState, **parts: Any) -> None:
        """Wait for the reply, within bounds, and send it as Flower does."""
        if self._message is not None:
            self._watch.busy(_STEP_S)
            self._desk.wait_for_reply(self._message, state, tick=lambda: self._watch.alive(_STEP_S))
        self._watch.alive(_SUPERLINK_AWAY_S)
        _stock_push(state=state, **parts)
        if self._unconfirmed is not None:
            # Whoever sent the message may have been uploading the rest of it until now.
            self._behind.submit(_calmly, self._unconfirmed)
            self._unconfirmed = None
        _forget_finished_tasks(state)
        self._watch.done()
        self._polling.traffic()


def _calmly(work: Callable[[], object]) -> None:
    try:
        work()
    except Exception as exc:
        log.debug("a confirmation failed (%s)", type(exc).__name__)


def _forget_finished_tasks(state: InMemoryNodeState) -> None:
    # Flower keeps the task of every message, and goes through all of them for each look.
    with state.lock_task_store:
        for task_id, task in list(state.task_store.items()):
            if task.status.status == Status.FINISHED:
                del state.task_store[task_id]


def run_warm_node(
    arguments: Sequence[str],
    *,
    watch: NodeWatch,
    key: str = "",
    desk: NodeDesk | None = None,
    polling: Polling | None = None,
) -> None:
    """Run `flower-supernode` in this process, warm, until it is told to end.

    Changes Flower's modules in this process for good: call it once, in a process of its own.

    Parameters
    ----------
    arguments : sequence of str
        Of `flower-supernode`, with ``--isolation process``.
    watch : NodeWatch
    key : str
        What a worker has to show. With one, tasks are handed out by the warm routes alone.
    desk : NodeDesk, optional
    polling : Polling, optional
    """
    desk = desk or NodeDesk()
    loop = _WarmLoop(desk, polling or Polling(), watch)
    shorten(initial_s=0.01, cap_s=0.25)
    beat_often()

    def gated_acquire(request: AcquireTaskRequest, state: Any) -> AcquireTaskResponse:
        # A task exists before its message is complete: Flower's own workers start too slowly
        # to notice, one that is waiting does not.
        if key:
            return AcquireTaskResponse()
        with desk.gate() as is_open:
            return _stock_acquire(request, state) if is_open else AcquireTaskResponse()

    def create_app(
        state_factory: NodeStateFactory | None = None, superexec_auth_secret: bytes | None = None
    ) -> App:
        app = _stock_create_app(state_factory, superexec_auth_secret)
        assert state_factory is not None  # noqa: S101  (Flower's caller always gives one)
        return TaskRoutes(app, desk, state_factory, key=key)

    internals: Any = start_client_internal
    internals.time = SimpleNamespace(sleep=loop.sleep)
    internals._pull_and_store_message = loop.pull
    internals._push_messages = loop.push
    internals.get_fused_config_from_fab = run_config_of
    handlers: Any = runtime_handlers
    handlers.acquire_task = gated_acquire
    main: Any = runtime_main
    main.create_app = create_app
    add_exit_handler(desk.close)
    sys.argv = ["flower-supernode", *arguments]
    flower_supernode()
