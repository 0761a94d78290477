"""The grid with fewer requests: what it asks for, what it leaves out, and what cannot fool it."""

from __future__ import annotations

import time

import pytest
from flwr.app import Error, Message, RecordDict
from flwr.app.message import remove_content_from_message
from flwr.common.serde import message_from_proto, message_to_proto
from flwr.proto.message_pb2 import PullObjectResponse, PushObjectResponse
from flwr.proto.runtime_pb2 import PullAppMessagesResponse, PushAppMessagesResponse
from flwr.supercore.inflatable.inflatable_object import (
    get_all_nested_objects,
    get_object_tree,
    no_object_id_recompute,
)
from flwr.supercore.run import Run
from flwr.superlink.grid.http_grid import HttpGrid

from fedinfer_flower.flower_internals import lean_grid
from fedinfer_flower.flower_internals.derived import derived_objects
from fedinfer_flower.flower_internals.local_wire import take_identity
from fedinfer_flower.simulation.local_grid import LocalGrid
from fedinfer_flower.wire import records
from fedinfer_flower.wire.envelope import Envelope, Kind
from fedinfer_flower.wire.records import pack, unpack

RUN, NODE = 7, 5


@pytest.fixture(autouse=True)
def _run():
    take_identity(run_id=RUN)


def question(content: RecordDict | None = None) -> Message:
    content = pack(Envelope(kind=Kind.PING, run_id=RUN)) if content is None else content
    return Message(content, NODE, "query.fi_ask", ttl=10.0, group_id="g")


def taken_apart(message: Message):
    """Return what announces a message, its tree, and its objects."""
    message.metadata.__dict__["_message_id"] = message.object_id
    with no_object_id_recompute():
        head = message_to_proto(remove_content_from_message(message))
        objects = {i: o.deflate() for i, o in get_all_nested_objects(message).items()}
        return head, get_object_tree(message), objects


class Link:
    """The SuperLink's routes, as far as a grid asks for them."""

    def __init__(self):
        self.asked = []
        self.replies = []
        self.objects = {}
        self.broken = set()

    def add(self, message: Message) -> None:
        head, tree, objects = taken_apart(message)
        self.replies.append((head, tree))
        self.objects |= objects

    def PushMessages(self, request):
        self.asked.append("PushMessages")
        found = []
        for tree in request.message_object_trees:
            found += [tree.children[0].children[0].object_id, tree.children[0].object_id]
            found.append(tree.object_id)
        ids = [m.metadata.message_id for m in request.messages_list]
        return PushAppMessagesResponse(message_ids=ids, objects_to_push=found, session_id="s")

    def PushObject(self, request):
        self.asked.append(("PushObject", request.object_content.split(b" ")[0]))
        return PushObjectResponse(stored=True)

    def PullMessages(self, request):
        self.asked.append("PullMessages")
        found, self.replies = self.replies, []
        return PullAppMessagesResponse(
            messages_list=[head for head, _ in found], message_object_trees=[t for _, t in found]
        )

    def PullObject(self, request):
        content = self.objects[request.object_id]
        self.asked.append(("PullObject", content.split(b" ")[0]))
        found = request.object_id not in self.broken
        return PullObjectResponse(
            object_found=found, object_available=found, object_content=content
        )

    def ConfirmMessageReceived(self, request):
        self.asked.append(("Confirm", request.message_object_id))

    def waited_for(self, n: int) -> list:
        end = time.monotonic() + 20.0
        while len(self.asked) < n and time.monotonic() < end:
            time.sleep(0.01)
        return self.asked


@pytest.fixture
def link():
    return Link()


@pytest.fixture
def grid(link):
    flower = HttpGrid("127.0.0.1:1", insecure=True, token="t")  # noqa: S106
    flower._client = link
    flower._run = Run.create_empty(run_id=RUN)
    grid = lean_grid(flower)
    assert grid is not flower
    return grid


def reply_to(message: Message, content: RecordDict | Error) -> Message:
    message.metadata.__dict__["_message_id"] = message.object_id
    return Message(content, reply_to=message)


@pytest.mark.parametrize("small_bytes", [1 << 20, 0], ids=["config-record", "array"])
def test_message_and_its_dictionary_are_derived(small_bytes, monkeypatch):
    monkeypatch.setattr(records, "_SMALL_BYTES", small_bytes)
    head, tree, objects = taken_apart(question())
    derived = derived_objects(message_from_proto(head), tree)
    assert set(derived) == {tree.object_id, tree.children[0].object_id}
    assert all(objects[i] == content for i, content in derived.items())


def test_what_is_announced_otherwise_than_it_was_sent_is_not_derived():
    head, tree, _ = taken_apart(question())
    head.metadata.ttl = 11.0
    assert set(derived_objects(message_from_proto(head), tree)) == {tree.children[0].object_id}


def test_dictionary_with_another_name_is_not_derived():
    content = pack(Envelope(kind=Kind.PING, run_id=RUN))
    head, tree, _ = taken_apart(question(RecordDict({"other": content["fedinfer"]})))
    assert set(derived_objects(message_from_proto(head), tree)) == {tree.object_id}


def test_bytes_go_up_first_and_the_rest_behind_them(grid, link):
    message = question()
    assert list(grid.push_messages([message])) == [message.metadata.message_id]
    assert link.asked[:2] == ["PushMessages", ("PushObject", b"ConfigRecord")]
    rest = link.waited_for(4)[2:]
    assert sorted(rest) == [("PushObject", b"Message"), ("PushObject", b"RecordDict")]


def test_of_a_reply_only_its_bytes_are_asked_for_and_it_is_confirmed_later(grid, link):
    reply = reply_to(question(), pack(Envelope(kind=Kind.PING, run_id=RUN)))
    link.add(reply)
    (found,) = grid.pull_messages(["x"])
    assert link.asked == ["PullMessages", ("PullObject", b"ConfigRecord")]
    assert unpack(found.content).run_id == RUN
    assert found.metadata == reply.metadata
    assert link.waited_for(3)[2:] == [("Confirm", reply.metadata.message_id)]


def test_error_reply_arrives_without_a_further_request(grid, link):
    link.add(reply_to(question(), Error(2, "fixed words")))
    (found,) = grid.pull_messages(["x"])
    assert (found.error.code, found.error.reason) == (2, "fixed words")
    assert link.asked == ["PullMessages"]


def test_reply_whose_objects_do_not_come_hides_no_other(grid, link):
    asked = [question(pack(Envelope(kind=Kind.PING, run_id=RUN + i))) for i in range(2)]
    for message in asked:
        number = unpack(message.content).run_id
        link.add(reply_to(message, pack(Envelope(kind=Kind.PING, run_id=number + 10))))
    link.broken = {link.replies[0][1].children[0].children[0].object_id}
    first, second = grid.pull_messages(["x", "y"])
    assert first.has_error()
    assert first.metadata.reply_to_message_id == asked[0].metadata.message_id
    assert unpack(second.content).run_id == RUN + 11


def test_other_grids_are_left_as_they_are():
    other = LocalGrid.__new__(LocalGrid)
    assert lean_grid(other) is other
