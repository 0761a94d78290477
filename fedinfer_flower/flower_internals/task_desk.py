"""The worker's side: take a task from the SuperNode on this machine, give its reply."""

from __future__ import annotations

import ipaddress
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Final

import httpx
from flwr.app import Context, Message
from flwr.app.message import remove_content_from_message
from flwr.common.constant import SubStatus
from flwr.common.serde import context_from_proto, context_to_proto, message_to_proto
from flwr.proto.message_pb2 import ObjectTree
from flwr.proto.runtime_pb2 import (
    AcquireTaskRequest,
    AcquireTaskResponse,
    PullAppMessagesResponse,
    PullTaskInputResponse,
    PushAppMessagesRequest,
    PushTaskOutputRequest,
    SendTaskHeartbeatRequest,
)
from flwr.supercore.constant import TASK_TOKEN_HEADER, TaskType
from flwr.supercore.inflatable.inflatable_object import (
    get_all_nested_objects,
    get_object_tree,
    iterate_object_tree,
    no_object_id_recompute,
)
from flwr.supercore.inflatable.inflatable_utils import (
    inflate_object_from_contents,
    pull_and_inflate_object_from_tree,
)
from flwr.supercore.interceptors import (
    RuntimeTokenHttpInterceptor,
    RuntimeVersionHttpInterceptor,
)
from flwr.supercore.runtime import RuntimeHttpClient
from flwr.supercore.task_identity import TaskIdentity
from flwr.supernode.runtime.run_clientapp import (
    pull_task_input,
    push_message,
    push_task_output,
)

from fedinfer_flower.errors import DeploymentError, FedInferError, UnavailableError
from fedinfer_flower.flower_internals.node_client import NodeClient
from fedinfer_flower.flower_internals.task_frames import (
    BEAT,
    GIVE,
    MAX_INLINE_BYTES,
    PINNED_HEADER,
    TAKE,
    WAIT_HEADER,
    WITH_FAB_HEADER,
    OtherFab,
    frames_from_bytes,
    frames_to_bytes,
)

__all__ = ["OpenTask", "PackedReply", "TaskDesk", "pack_reply"]

_GIVE_TRIES: Final = 4


@dataclass(frozen=True, kw_only=True)
class OpenTask:
    """One message that waits for its reply.

    Parameters
    ----------
    message : Message
    context : Context
    fab_id, fab_version, fab_hash : str
        Which app bundle the run is of.
    fab_bytes : bytes
        The bundle; empty if it was not asked for.
    token : str
        Flower's, for this task.
    """

    message: Message
    context: Context
    fab_id: str
    fab_version: str
    fab_hash: str
    fab_bytes: bytes = field(repr=False)
    token: str = field(repr=False)


@dataclass(frozen=True, kw_only=True)
class PackedReply:
    """A reply in Flower's wire format: packing it shows that it can be sent at all."""

    message: Message
    request: PushAppMessagesRequest
    contents: tuple[bytes, ...] = field(repr=False)


def pack_reply(reply: Message) -> PackedReply:
    """Return the reply in wire format; whatever cannot be serialised raises here."""
    reply.metadata.__dict__["_message_id"] = reply.object_id
    head = message_to_proto(remove_content_from_message(reply))
    with no_object_id_recompute():
        tree = get_object_tree(reply)
        objects = get_all_nested_objects(reply)
        ids = dict.fromkeys(part.object_id for part in iterate_object_tree(tree))
        contents = tuple(objects[object_id].deflate() for object_id in ids)
    request = PushAppMessagesRequest(messages_list=[head], message_object_trees=[tree])
    return PackedReply(message=reply, request=request, contents=contents)


class TaskDesk:
    """Takes tasks from a SuperNode: in one request from a warm one, as Flower does from another.

    Parameters
    ----------
    address : str
        ``HOST:PORT`` of the SuperNode's Runtime API, on this machine.
    key : str
        What both have; empty for nothing. It is never sent, and a SuperNode that does not show
        that it has it is not believed: see `node_key`.

    Raises
    ------
    DeploymentError
        If the address is not one of this machine: nothing here is encrypted.
    """

    def __init__(self, address: str, *, key: str = "") -> None:
        _require_loopback(address)
        self._address = address
        self._node = NodeClient(address, key=key)
        self._flower: RuntimeHttpClient | None = None

    def take(self, *, pinned: str, with_fab: bool, wait_s: float) -> OpenTask | OtherFab | None:
        """Return the next task, or None if none came.

        A SuperNode that is not warm answers at once; the caller paces itself.

        Parameters
        ----------
        pinned : str
            SHA-256 of the only app bundle that is served; empty for any.
        with_fab : bool
            Whether the bytes of the bundle are wanted.
        wait_s : float

        Raises
        ------
        UnavailableError
            If the SuperNode cannot be reached, or fails.
        DeploymentError
            If it asks for another key.
        """
        with _reaching():
            if self._flower is not None:
                return self._take_as_flower_does()
            return self._take_whole(pinned=pinned, with_fab=with_fab, wait_s=wait_s)

    def _take_whole(
        self, *, pinned: str, with_fab: bool, wait_s: float
    ) -> OpenTask | OtherFab | None:
        headers = {
            PINNED_HEADER: pinned,
            WITH_FAB_HEADER: str(int(with_fab)),
            WAIT_HEADER: str(wait_s),
        }
        response = self._node.post(TAKE, headers=headers)
        if response.status_code == 404:
            self._flower = self._runtime()
            return None
        if response.status_code == 204:
            return None
        if response.status_code == 409:
            return OtherFab(response.text[:64])
        response.raise_for_status()
        try:
            return self._opened(frames_from_bytes(response.content))
        except (FedInferError, httpx.HTTPError):
            raise
        except Exception as exc:
            # A run that ends takes its messages with it, also one that is on its way. Not for
            # this worker to end by: asking again tells the SuperNode that no reply will come.
            raise UnavailableError(
                f"a message came incomplete ({type(exc).__name__})",
                hint="its run may have ended meanwhile; the next message is served",
            ) from None

    @property
    def is_warm(self) -> bool:
        """Whether the SuperNode has the warm routes, as far as is known."""
        return self._flower is None

    def give(self, task: OpenTask, reply: PackedReply, *, failed: str = "") -> bool:
        """Send the reply. False if it is no longer wanted.

        Parameters
        ----------
        task : OpenTask
        reply : PackedReply
        failed : str
            Name of what went wrong, for Flower's task status; empty if nothing did.

        Raises
        ------
        UnavailableError
            If the SuperNode cannot be reached, or fails.
        """
        status = SubStatus.FAILED if failed else SubStatus.COMPLETED
        with _reaching():
            if self._flower is not None or sum(map(len, reply.contents)) > MAX_INLINE_BYTES:
                return self._give_as_flower_does(task, reply, status=status, details=failed)
            return self._give_whole(task, reply, status=status, details=failed)

    def _give_whole(self, task: OpenTask, reply: PackedReply, *, status: str, details: str) -> bool:
        output = PushTaskOutputRequest(
            context=context_to_proto(task.context), sub_status=status, details=details
        )
        frames = [reply.request.SerializeToString(), output.SerializeToString(), *reply.contents]
        body, headers = frames_to_bytes(frames), {TASK_TOKEN_HEADER: task.token}
        for left in reversed(range(_GIVE_TRIES)):
            try:
                if not self._is_wanted(task):
                    return False
                response = self._node.post(GIVE, content=body, headers=headers)
                break
            except httpx.TransportError:
                if not left:
                    raise
                time.sleep(0.5)
        if response.status_code == 410:
            return False
        response.raise_for_status()
        return True

    def beat(self, task: OpenTask) -> bool:
        """Say that the task is still being worked on. False if it is no longer wanted."""
        with _reaching():
            if self._flower is None:
                return self._beat(task)
            with self._runtime(task.token) as client:
                return bool(client.SendTaskHeartbeat(SendTaskHeartbeatRequest()).success)

    def _beat(self, task: OpenTask) -> bool:
        token = {TASK_TOKEN_HEADER: task.token}
        return self._node.post(BEAT, headers=token, timeout_s=5.0).status_code != 410

    def _is_wanted(self, task: OpenTask) -> bool:
        # Whoever took the port in the meantime must not be sent the reply.
        return not self._node.has_key or self._beat(task)

    def close(self) -> None:
        """Let the connections go."""
        self._node.close()
        if self._flower is not None:
            self._flower.close()

    # -- Flower's own way ------------------------------------------------------------------

    def _runtime(self, token: str = "") -> RuntimeHttpClient:
        interceptors: list[Any] = [RuntimeVersionHttpInterceptor(component_name="flwr-clientapp")]
        if token:
            interceptors.append(RuntimeTokenHttpInterceptor(token))
        # Without Flower's retries, which end the process when a token is no longer good.
        return RuntimeHttpClient.from_server_address(self._address, True, None, interceptors)

    def _take_as_flower_does(self) -> OpenTask | None:
        assert self._flower is not None  # noqa: S101  (the one caller has looked)
        wanted = AcquireTaskRequest(supported_task_types=[TaskType.CLIENT_APP])
        acquired: AcquireTaskResponse = self._flower.AcquireTask(wanted)
        if not acquired.token:
            return None
        with self._runtime(acquired.token) as client:
            message, context, run, fab = pull_task_input(client)
        return OpenTask(
            message=message,
            context=context,
            fab_id=run.fab_id,
            fab_version=run.fab_version,
            fab_hash=fab.hash_str,
            fab_bytes=fab.content,
            token=acquired.token,
        )

    def _give_as_flower_does(
        self, task: OpenTask, reply: PackedReply, *, status: str, details: str
    ) -> bool:
        if self._flower is None and not self._is_wanted(task):
            return False
        with self._runtime(task.token) as client:
            try:
                push_message(client, reply.message, task.context)
            except httpx.HTTPStatusError as exc:
                if exc.response.status_code in {401, 403}:
                    return False
                raise
            push_task_output(client, task.context, status, details)
        return True

    def _opened(self, frames: list[bytes]) -> OpenTask:
        acquired = AcquireTaskResponse.FromString(frames[0])
        given = PullTaskInputResponse.FromString(frames[1])
        found = PullAppMessagesResponse.FromString(frames[2])
        TaskIdentity.task_id = given.task_id
        TaskIdentity.run_id = given.run.run_id
        TaskIdentity.node_id = given.context.node_id
        (tree,) = found.message_object_trees
        message = self._inflated(tree, frames[3:], acquired.token, given)
        message.metadata.__dict__["_message_id"] = tree.object_id
        return OpenTask(
            message=message,
            context=context_from_proto(given.context),
            fab_id=given.run.fab_id,
            fab_version=given.run.fab_version,
            fab_hash=given.fab.hash_str,
            fab_bytes=given.fab.content,
            token=acquired.token,
        )

    def _inflated(
        self, tree: ObjectTree, contents: list[bytes], token: str, given: PullTaskInputResponse
    ) -> Message:
        message: object
        if contents:
            ids = dict.fromkeys(part.object_id for part in iterate_object_tree(tree))
            whole = dict(zip(ids, contents, strict=True))
            message = inflate_object_from_contents(tree.object_id, whole)
        else:
            message = self._pulled(tree, token, given)
        if not isinstance(message, Message):
            raise TypeError("the task's object is no message")
        return message

    def _pulled(self, tree: ObjectTree, token: str, given: PullTaskInputResponse) -> object:
        from flwr.proto.node_pb2 import Node
        from flwr.supercore.inflatable.inflatable_protobuf_utils import (
            make_confirm_message_received_fn_protobuf,
            make_pull_object_fn_protobuf,
        )

        node, run_id = Node(node_id=given.context.node_id), given.run.run_id
        with self._runtime(token) as client:
            return pull_and_inflate_object_from_tree(
                tree,
                make_pull_object_fn_protobuf(client.PullObject, node, run_id),
                make_confirm_message_received_fn_protobuf(
                    client.ConfirmMessageReceived, node, run_id
                ),
                return_type=Message,
            )


@contextmanager
def _reaching() -> Iterator[None]:
    try:
        yield
    except httpx.HTTPError as exc:
        raise UnavailableError(
            f"the SuperNode of this site does not answer ({type(exc).__name__})",
            hint="is it running, with this --port?",
        ) from None


def _require_loopback(address: str) -> None:
    host = address.rpartition(":")[0].strip("[]")
    try:
        is_here = host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        is_here = False
    if not is_here:
        raise DeploymentError(
            "the worker takes tasks only from a SuperNode on this machine",
            hint="--runtime-api-address 127.0.0.1:PORT",
        )
