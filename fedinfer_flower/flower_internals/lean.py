"""Flower's grid with fewer requests to the SuperLink between a question and its answer.

Of the objects of a message, those with bytes go up first and what a receiver can rebuild goes up
behind them; of a reply, only what cannot be rebuilt is asked for; and the SuperLink is told that
a reply has arrived after the reply was handed on.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any, Final

from flwr.app import Error, Message, Metadata, RecordDict
from flwr.app.message import make_message, remove_content_from_message
from flwr.common.constant import ErrorCode
from flwr.common.serde import message_from_proto, message_to_proto
from flwr.proto.message_pb2 import ConfirmMessageReceivedRequest, ObjectTree
from flwr.proto.message_pb2 import Message as MessageProto
from flwr.proto.runtime_pb2 import PullAppMessagesRequest, PushAppMessagesRequest
from flwr.serverapp import Grid
from flwr.supercore.constant import SYSTEM_MESSAGE_TYPE
from flwr.supercore.inflatable.inflatable_object import (
    get_all_nested_objects,
    get_object_tree,
    iterate_object_tree,
    no_object_id_recompute,
)
from flwr.supercore.inflatable.inflatable_protobuf_utils import (
    make_pull_object_fn_protobuf,
    make_push_object_fn_protobuf,
)
from flwr.supercore.inflatable.inflatable_utils import (
    inflate_object_from_contents,
    pull_objects,
    push_objects,
)
from flwr.superlink.grid.http_grid import HttpGrid

from fedinfer_flower.flower_internals.derived import derived_objects

__all__ = ["LeanGrid"]

log = logging.getLogger("fedinfer_flower.coordinator")

_CONFIRM_AFTER_S: Final = 0.25
"""The sender may still be uploading what was not asked for; a confirmation deletes it all."""


class LeanGrid(Grid):
    """An `HttpGrid`, with its own `push_messages` and `pull_messages`.

    Parameters
    ----------
    grid : HttpGrid
    """

    def __init__(self, grid: HttpGrid) -> None:
        self._grid = grid
        # One for each, because confirmations wait.
        self._pushing = ThreadPoolExecutor(1, thread_name_prefix="fedinfer-push")
        self._confirming = ThreadPoolExecutor(1, thread_name_prefix="fedinfer-confirm")

    def set_run(self, run: Any) -> None:
        """Set the run."""
        self._grid.set_run(run)

    @property
    def run(self) -> Any:
        """The run."""
        return self._grid.run

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
        return self._grid.get_node_ids()

    def send_and_receive(
        self, messages: Iterable[Message], *, timeout: float | None = None
    ) -> Iterable[Message]:
        """Push messages and wait for their replies, as Flower does."""
        return self._grid.send_and_receive(messages, timeout=timeout)

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        """Push messages; return when what their receivers need is on the SuperLink."""
        given = list(messages)
        if not given:
            return []
        client: Any = self._grid._runtime_client
        with no_object_id_recompute():
            heads, trees, objects = [], [], {}
            for message in given:
                # The SuperLink does not keep it in a database, so no receiver could rebuild it.
                message.metadata.src_task_id = None
                message.metadata.__dict__["_message_id"] = message.object_id
                heads.append(message_to_proto(remove_content_from_message(message)))
                trees.append(get_object_tree(message))
                objects.update(get_all_nested_objects(message))
            pushed = client.PushMessages(
                PushAppMessagesRequest(messages_list=heads, message_object_trees=trees)
            )
            wanted = set(pushed.objects_to_push)
            rest = wanted & {i for tree in trees for i in _outer(tree)}
            late = {i: objects[i].deflate() for i in rest}
            push_object = make_push_object_fn_protobuf(
                client.PushObject, self._grid.node, self.run.run_id, pushed.session_id
            )
            push_objects(objects, push_object, object_ids_to_push=wanted - rest)
        for object_id, content in late.items():
            self._pushing.submit(_calmly, partial(push_object, object_id, content))
        return list(pushed.message_ids)

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        """Pull the replies that are there."""
        client: Any = self._grid._runtime_client
        found = client.PullMessages(PullAppMessagesRequest(message_ids=message_ids))
        return [
            self._pulled(client, head, tree)
            for head, tree in zip(found.messages_list, found.message_object_trees, strict=True)
        ]

    def _pulled(self, client: Any, head: MessageProto, tree: ObjectTree) -> Message:
        run_id, node = self.run.run_id, self._grid.node
        message_id = head.metadata.message_id
        try:
            contents = derived_objects(message_from_proto(head), tree)
            ids = dict.fromkeys(part.object_id for part in iterate_object_tree(tree))
            pull = make_pull_object_fn_protobuf(client.PullObject, node, run_id)
            contents |= pull_objects([i for i in ids if i not in contents], pull)
            message = inflate_object_from_contents(message_id, contents)
            if not isinstance(message, Message):
                raise TypeError("a reply's object is no message")
        except Exception as exc:
            # The SuperLink gives a reply once: this one must not take the others with it.
            log.warning("a reply could not be rebuilt (%s)", type(exc).__name__)
            return _unavailable(head, node_id=node.node_id, run_id=run_id)
        finally:
            confirmed = ConfirmMessageReceivedRequest(
                node=node, run_id=run_id, message_object_id=message_id
            )
            due = time.monotonic() + _CONFIRM_AFTER_S
            self._confirming.submit(
                _calmly, partial(client.ConfirmMessageReceived, confirmed), due=due
            )
        message.metadata.__dict__["_message_id"] = message_id
        return message


def _outer(tree: ObjectTree) -> list[str]:
    """Return the ids of the objects that the receiver of a packed envelope rebuilds."""
    if len(tree.children) == 1 and len(tree.children[0].children) == 1:
        return [tree.children[0].object_id, tree.object_id]
    return []


def _calmly(work: Callable[[], object], *, due: float = 0.0) -> None:
    """Do something that nobody waits for."""
    time.sleep(max(0.0, due - time.monotonic()))
    try:
        work()
    except Exception as exc:
        log.debug("a request behind a message failed (%s)", type(exc).__name__)


def _unavailable(head: MessageProto, *, node_id: int, run_id: int) -> Message:
    """Return what Flower's grid returns for a reply whose objects do not come."""
    metadata = Metadata(
        run_id=run_id,
        message_id="",
        src_node_id=node_id,
        dst_node_id=node_id,
        message_type=SYSTEM_MESSAGE_TYPE,
        group_id="",
        ttl=0,
        reply_to_message_id=head.metadata.reply_to_message_id,
        created_at=time.time(),
    )
    error = Error(ErrorCode.MESSAGE_UNAVAILABLE, "the reply cannot be rebuilt")
    return make_message(metadata=metadata, error=error)
