"""The objects of a message that its receiver can rebuild: known without a request for them.

A message with one packed envelope is three objects: the message, its record dictionary, and the
record with the bytes. The first two say nothing that was not announced with the message: they are
built here, and used if their SHA-256 is the id that was announced. What differs is asked for.
"""

from __future__ import annotations

import hashlib
import json
from typing import Final

from flwr.app import Message
from flwr.common.serde_utils import error_to_proto, metadata_to_proto
from flwr.proto.message_pb2 import Message as MessageProto
from flwr.proto.message_pb2 import ObjectTree
from flwr.supercore.constant import HEAD_BODY_DIVIDER, HEAD_VALUE_DIVIDER

__all__ = ["derived_objects"]

_RECORD: Final = "fedinfer"
"""Name of the one record of a packed envelope: see `wire.records`."""


def derived_objects(message: Message, tree: ObjectTree) -> dict[str, bytes]:
    """Return objects of a message, by id, as far as they follow from what announced it.

    Parameters
    ----------
    message : Message
        Without its content.
    tree : ObjectTree
    """
    metadata = metadata_to_proto(message.metadata)
    metadata.message_id = ""
    body = MessageProto(
        metadata=metadata,
        content=None,
        error=error_to_proto(message.error) if message.has_error() else None,
    ).SerializeToString(deterministic=True)
    built = {tree.object_id: _content("Message", tree, body)}
    if len(tree.children) == 1 and len(tree.children[0].children) == 1:
        records = tree.children[0]
        named = json.dumps({_RECORD: records.children[0].object_id}).encode()
        built[records.object_id] = _content("RecordDict", records, named)
    return {
        object_id: content
        for object_id, content in built.items()
        if hashlib.sha256(content).hexdigest() == object_id
    }


def _content(kind: str, tree: ObjectTree, body: bytes) -> bytes:
    children = ",".join(child.object_id for child in tree.children)
    head = HEAD_VALUE_DIVIDER.join((kind, children, str(len(body))))
    return head.encode() + HEAD_BODY_DIVIDER + body
