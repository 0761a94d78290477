"""Flower's wire format within one process: what `simulation.LocalGrid` needs of it."""

from __future__ import annotations

from flwr.app import Message
from flwr.supercore.inflatable.inflatable_object import (
    get_all_nested_objects,
    no_object_id_recompute,
)
from flwr.supercore.inflatable.inflatable_utils import inflate_object_from_contents
from flwr.supercore.task_identity import TaskIdentity

__all__ = ["over_the_wire", "take_identity"]


def over_the_wire(message: Message) -> tuple[Message, int]:
    """Return a copy of the message that went through Flower's wire format, and its bytes."""
    with no_object_id_recompute():
        object_id = message.object_id
        blobs = {key: obj.deflate() for key, obj in get_all_nested_objects(message).items()}
    size = sum(len(blob) for blob in blobs.values())
    copy = inflate_object_from_contents(object_id, blobs)
    if not isinstance(copy, Message):
        raise TypeError("the wire format did not give back a Message")
    copy.metadata.__dict__["_message_id"] = object_id
    return copy, size


def take_identity(*, run_id: int) -> None:
    """Set the run of this process, without which Flower builds no message."""
    TaskIdentity.run_id = run_id
    TaskIdentity.node_id = TaskIdentity.task_id = 1
