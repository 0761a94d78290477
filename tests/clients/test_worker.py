"""The desk between SuperNode and worker: over real HTTP, with Flower's real state, no SuperLink."""

from __future__ import annotations

import socket
import sys
import threading
import time

import pytest
import uvicorn
from flwr.app import ConfigRecord, Context, Error, Message, RecordDict
from flwr.clientapp import ClientApp
from flwr.supercore.constant import TaskType
from flwr.supercore.fab import Fab
from flwr.supercore.inflatable.inflatable_object import (
    get_all_nested_objects,
    get_object_tree,
    iterate_object_tree,
    no_object_id_recompute,
)
from flwr.supercore.object_store import ObjectStoreFactory
from flwr.supercore.run import Run
from flwr.supernode.main import create_app
from flwr.supernode.nodestate import NodeStateFactory

from fedinfer_flower.clients.app_source import Bundle, ListedFabs, OwnApp
from fedinfer_flower.clients.worker import EXIT_OTHER_FAB, serve_tasks
from fedinfer_flower.clients.worker_reply import safe_reply
from fedinfer_flower.clients.worker_status import StatusFile
from fedinfer_flower.errors import DeploymentError, UnavailableError
from fedinfer_flower.flower_internals import node_desk, task_desk
from fedinfer_flower.flower_internals.local_wire import take_identity
from fedinfer_flower.flower_internals.node_desk import DeskLimits, NodeDesk
from fedinfer_flower.flower_internals.node_routes import TaskRoutes
from fedinfer_flower.flower_internals.task_desk import OpenTask, TaskDesk, pack_reply
from fedinfer_flower.flower_internals.task_frames import (
    TAKE,
    OtherFab,
    frames_from_bytes,
    frames_to_bytes,
)
from fedinfer_flower.flower_internals.warm_node import _forget_finished_tasks
from fedinfer_flower.wire.envelope import DEFAULT_LIMITS, Envelope, Kind
from fedinfer_flower.wire.messages import read_error
from fedinfer_flower.wire.records import pack, unpack

RUN, NODE = 7, 1000
CONTENT = b"the bytes of a bundle"


class Node:
    """The SuperNode's half: Flower's state and Runtime API, and the desk, on a free port."""

    def __init__(self, *, warm: bool = True, key: str = "", limits: DeskLimits | None = None):
        take_identity(run_id=RUN)
        self.states = NodeStateFactory(ObjectStoreFactory())
        self.state = self.states.state()
        self.state.set_node_id(NODE)
        self.fab_hash = self.state.store_fab(Fab("", CONTENT, {}))
        run = Run.create_empty(RUN)
        run.fab_hash, run.fab_id, run.fab_version = self.fab_hash, "a/b", "1"
        self.state.store_run(run)
        context = Context(RUN, NODE, {}, RecordDict(), {})
        self.state.set_run_series_context(run.series_id, context)
        self.desk = NodeDesk(limits=limits or DeskLimits())
        app = create_app(self.states)
        if warm:
            app = TaskRoutes(app, self.desk, self.states, key=key)
        self._socket = socket.socket()
        self._socket.bind(("127.0.0.1", 0))
        self.address = f"127.0.0.1:{self._socket.getsockname()[1]}"
        self._server = uvicorn.Server(
            uvicorn.Config(app, log_config=None, lifespan="off", ws="none")
        )
        self._thread = threading.Thread(target=self._server.run, args=([self._socket],))
        self._waits: list[threading.Thread] = []

    def __enter__(self) -> Node:
        self._thread.start()
        while not self._server.started:
            assert self._thread.is_alive()
            time.sleep(0.01)
        return self

    def __exit__(self, *_: object) -> None:
        self.desk.close()
        self._server.should_exit = True
        self._thread.join()
        for thread in self._waits:
            thread.join()
        self._socket.close()

    def deliver(self, message_type: str = "query.any", body: bytes = b"body", ttl: float = 60.0):
        """Store a message as the SuperNode's loop does, and wait for its reply in a thread."""
        content = RecordDict({"record": ConfigRecord({"body": body})})
        if message_type.startswith("query.fi_"):
            content = pack(Envelope(kind=Kind.PING, run_id=RUN))
        message = Message(content, NODE, message_type, ttl=ttl)
        task_id = self.state.create_task(TaskType.CLIENT_APP, RUN, self.fab_hash)
        message.metadata.__dict__["_message_id"] = message.object_id
        with no_object_id_recompute():
            self.state.store_message(message)
            self.state.object_store.preregister(RUN, get_object_tree(message))
            for object_id, found in get_all_nested_objects(message).items():
                self.state.object_store.put(object_id, found.deflate())
        wait = threading.Thread(
            target=self.desk.wait_for_reply, args=(message, self.state), kwargs={"tick": int}
        )
        wait.start()
        self._waits.append(wait)
        return message, task_id, wait

    def replies(self) -> list[Message]:
        """What the SuperNode would send now."""
        return list(self.state.get_messages_legacy(is_reply=True))

    def objects(self) -> int:
        return len(self.state.object_store)


@pytest.fixture
def node():
    with Node() as node:
        yield node


@pytest.fixture
def desk(node):
    desk = TaskDesk(node.address)
    yield desk
    desk.close()


def take(desk: TaskDesk, **options) -> OpenTask:
    found = desk.take(**({"pinned": "", "with_fab": False, "wait_s": 5.0} | options))
    assert isinstance(found, OpenTask)
    return found


def answer(task: OpenTask, body: bytes = b"reply"):
    content = RecordDict({"record": ConfigRecord({"body": body})})
    return pack_reply(Message(content, reply_to=task.message))


# -- there and back ------------------------------------------------------------------------


def test_task_and_reply_travel_whole(node, desk):
    message, task_id, wait = node.deliver(body=b"question")
    task = take(desk)
    assert task.message.content["record"]["body"] == b"question"
    assert task.message.metadata.message_id == message.metadata.message_id
    assert (task.context.run_id, task.context.node_id) == (RUN, NODE)
    assert (task.fab_id, task.fab_hash, task.fab_bytes) == ("a/b", node.fab_hash, b"")
    task.context.state["seen"] = ConfigRecord({"times": 1})
    assert desk.give(task, answer(task))
    wait.join()
    (reply,) = node.replies()
    assert reply.metadata.reply_to_message_id == message.metadata.message_id
    (done,) = node.state.get_tasks(task_ids=[task_id])
    assert (done.status.status, done.status.sub_status) == ("finished", "completed")
    # What the app keeps between messages is kept; what it was asked is not.
    assert node.state.get_run_series_context(0).state["seen"]["times"] == 1
    tree = node.state.object_store.get_object_tree(reply.metadata.message_id)
    node.state.object_store.delete(tree.object_id)
    assert node.objects() == 0


def test_bundle_travels_only_where_it_is_wanted(node, desk):
    node.deliver()
    assert take(desk, with_fab=True).fab_bytes == CONTENT


@pytest.mark.parametrize("direction", ["there", "back"])
def test_large_message_travels_object_by_object(node, desk, monkeypatch, direction):
    module = {"there": node_desk, "back": task_desk}[direction]
    monkeypatch.setattr(module, "MAX_INLINE_BYTES", 100)
    _, _, wait = node.deliver(body=b"x" * 200)
    task = take(desk)
    assert task.message.content["record"]["body"] == b"x" * 200
    assert desk.give(task, answer(task, b"y" * 200))
    wait.join()
    assert len(node.replies()) == 1


def test_stock_supernode_is_served_too():
    with Node(warm=False) as node:
        desk = TaskDesk(node.address)
        assert desk.is_warm
        assert desk.take(pinned="", with_fab=True, wait_s=0.0) is None
        assert not desk.is_warm
        _, _, wait = node.deliver(body=b"question")
        task = take(desk)
        assert task.message.content["record"]["body"] == b"question"
        assert desk.beat(task)
        assert desk.give(task, answer(task))
        wait.join()
        assert len(node.replies()) == 1
        desk.close()


def test_incomplete_message_is_not_handed_out(node, desk):
    node.state.create_task(TaskType.CLIENT_APP, RUN, node.fab_hash)
    assert desk.take(pinned="", with_fab=False, wait_s=0.0) is None


def test_frames_that_are_cut_off_are_refused():
    body = frames_to_bytes([b"abc", b"d"])
    assert frames_from_bytes(body) == [b"abc", b"d"]
    for cut in (2, 5, len(body) - 1):
        with pytest.raises(ValueError, match="cut off"):
            frames_from_bytes(body[:cut])


# -- who may ask ---------------------------------------------------------------------------


def test_worker_with_another_key_gets_nothing():
    with Node(key="right") as node:
        node.deliver()
        wrong, right = TaskDesk(node.address, key="wrong"), TaskDesk(node.address, key="right")
        with pytest.raises(DeploymentError, match="another key"):
            wrong.take(pinned="", with_fab=False, wait_s=0.0)
        task = take(right)
        assert right.give(task, answer(task))
        wrong.close()
        right.close()


@pytest.mark.parametrize("address", ["10.0.0.1:9094", "site.example:9094", "0.0.0.0:1", "x"])
def test_supernode_on_another_machine_is_refused(address):
    with pytest.raises(DeploymentError, match="on this machine"):
        TaskDesk(address)


def test_supernode_that_is_not_there_is_unavailable():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        desk = TaskDesk(f"127.0.0.1:{probe.getsockname()[1]}")
        with pytest.raises(UnavailableError, match="ConnectError"):
            desk.take(pinned="", with_fab=False, wait_s=0.0)
        desk.close()


@pytest.mark.parametrize(
    ("method", "path", "headers", "status"),
    [
        ("GET", TAKE, {"fedinfer-worker": "w"}, 400),
        ("POST", TAKE, {}, 400),
        ("POST", "/v1/fedinfer/other", {"fedinfer-worker": "w"}, 404),
        ("POST", TAKE, {"fedinfer-worker": "w", "fedinfer-wait-s": "odd"}, 500),
        ("POST", "/v1/fedinfer/give", {"fedinfer-worker": "w"}, 410),
        ("GET", "/health", {}, 200),
    ],
    ids=["get", "no-worker", "unknown", "bad-wait", "no-token", "flower"],
)
def test_odd_request_is_answered_by_status_alone(node, method, path, headers, status):
    import httpx

    with httpx.Client(base_url=f"http://{node.address}", trust_env=False) as client:
        response = client.request(method, path, headers=headers)
    assert response.status_code == status
    assert status == 200 or response.content == b""


# -- no wait without an end ------------------------------------------------------------------


def error_of(node: Node, wait: threading.Thread) -> Error:
    wait.join()
    (reply,) = node.replies()
    assert reply.has_error()
    return reply.error


@pytest.mark.parametrize(
    ("limits", "ttl", "words"),
    [
        (DeskLimits(claim_s=0.05), 60.0, "no worker takes tasks"),
        (DeskLimits(), 0.05, "did not answer within"),
        (DeskLimits(task_s=0.05), 60.0, "did not answer within"),
    ],
    ids=["nobody-asks", "message-expires", "task-limit"],
)
def test_task_that_nobody_takes_ends_in_an_error(limits, ttl, words):
    with Node(limits=limits) as node:
        _, _, wait = node.deliver(ttl=ttl)
        error = error_of(node, wait)
        assert error.code == 8
        assert words in error.reason


def test_worker_that_falls_silent_is_lost_and_its_late_reply_refused():
    with Node(limits=DeskLimits(silent_s=0.1)) as node:
        desk = TaskDesk(node.address)
        _, _, wait = node.deliver()
        task = take(desk)
        assert "worker was lost" in error_of(node, wait).reason
        assert not desk.beat(task)
        assert not desk.give(task, answer(task))
        assert node.replies() == []
        # The SuperNode goes on.
        _, _, wait = node.deliver(body=b"next")
        task = take(desk)
        assert desk.give(task, answer(task))
        wait.join()
        assert not node.replies()[0].has_error()
        desk.close()


def test_beats_keep_a_slow_task():
    with Node(limits=DeskLimits(silent_s=0.5)) as node:
        desk = TaskDesk(node.address)
        _, _, wait = node.deliver()
        task = take(desk)
        for _ in range(10):
            time.sleep(0.1)
            assert desk.beat(task)
        assert desk.give(task, answer(task))
        wait.join()
        assert not node.replies()[0].has_error()
        desk.close()


@pytest.mark.parametrize("same", [True, False], ids=["same-process", "successor"])
def test_worker_that_asks_again_without_reply_has_lost_its_task(same):
    with Node(limits=DeskLimits(replaced_s=0.0)) as node:
        first = TaskDesk(node.address)
        second = first if same else TaskDesk(node.address)
        _, _, wait = node.deliver()
        take(first)
        assert second.take(pinned="", with_fab=False, wait_s=0.0) is None
        assert "worker was lost" in error_of(node, wait).reason
        first.close()
        second.close()


def test_message_in_pieces_ends_the_task_and_not_the_worker(node, desk, monkeypatch):
    # A run that ends takes the objects of its messages with it, while one is on its way.
    whole = node_desk._objects
    monkeypatch.setattr(node_desk, "_objects", lambda *a: [b"" for _ in whole(*a)])
    _, _, wait = node.deliver()
    with pytest.raises(UnavailableError, match="a message came incomplete"):
        take(desk)
    monkeypatch.undo()
    assert desk.take(pinned="", with_fab=False, wait_s=0.0) is None
    assert "worker was lost" in error_of(node, wait).reason
    _, _, wait = node.deliver(body=b"next")
    task = take(desk)
    assert desk.give(task, answer(task))
    wait.join()


def test_finished_tasks_are_forgotten(node, desk):
    _, _, wait = node.deliver()
    task = take(desk)
    desk.give(task, answer(task))
    wait.join()
    node.state.create_task(TaskType.CLIENT_APP, RUN, node.fab_hash)
    _forget_finished_tasks(node.state)
    (left,) = node.state.get_tasks()
    assert left.status.status == "pending"


def test_gate_is_open_only_while_a_task_waits(node, desk):
    with node.desk.gate() as is_open:
        assert not is_open
    node.deliver()
    task = take(desk)
    with node.desk.gate() as is_open:
        assert not is_open
    desk.give(task, answer(task))


# -- the worker's loop -----------------------------------------------------------------------


def serve(node: Node, source, tmp_path, *, messages: int) -> int:
    """Serve until so many replies are there, or the loop ends by itself."""
    stop, codes = threading.Event(), []
    status = StatusFile(tmp_path / "s.json", role="worker")
    desk = TaskDesk(node.address)
    loop = threading.Thread(
        target=lambda: codes.append(serve_tasks(desk, source, status=status, stop=stop))
    )
    loop.start()
    for wait in node._waits[-messages:] if messages else []:
        wait.join()
    if messages:
        stop.set()
    loop.join()
    desk.close()
    return codes[0]


def test_loop_answers_and_ends_when_told(node, tmp_path):
    app = ClientApp()
    app.query("any")(lambda message, context: Message(message.content, reply_to=message))
    node.deliver(body=b"echo")
    assert serve(node, OwnApp(app), tmp_path, messages=1) == 0
    assert not node.replies()[0].has_error()


def test_loop_ends_to_be_started_anew_for_another_listed_bundle(node, tmp_path):
    other = "0" * 64
    source = ListedFabs([node.fab_hash, other], load=lambda bundle: ClientApp())
    source.get(1, Bundle(fab_id="a/b", fab_version="1", fab_hash=other))
    node.deliver()
    desk = TaskDesk(node.address)
    assert desk.take(pinned=other, with_fab=True, wait_s=5.0) == OtherFab(node.fab_hash)
    desk.close()
    assert serve(node, source, tmp_path, messages=0) == EXIT_OTHER_FAB


def test_loop_refuses_a_bundle_that_is_not_listed(node, tmp_path):
    node.deliver("query.fi_ping")
    assert serve(node, ListedFabs([]), tmp_path, messages=1) == 0
    (reply,) = node.replies()
    assert not reply.has_error()  # a typed error is content
    stored = node.state.object_store
    parts = iterate_object_tree(stored.get_object_tree(reply.metadata.message_id))
    assert any(b"FI322" in stored.get(part.object_id) for part in parts)


# -- a reply in any case -----------------------------------------------------------------------


def replies_none(message, context):
    return None


def replies_text(message, context):
    return "text"


def replies_new(message, context):
    return Message(RecordDict(), dst_node_id=1, message_type="query.any")


def replies_what_cannot_be_sent(message, context):
    content = RecordDict({"record": ConfigRecord({"body": b""})})
    content["record"].__dict__["_data"] = {"body": object()}
    return Message(content, reply_to=message)


def raises(message, context):
    raise RuntimeError("SECRET")


def exits(message, context):
    sys.exit("SECRET")


def panics(message, context):
    raise BaseException("SECRET")


BAD = [replies_none, replies_text, replies_new, replies_what_cannot_be_sent, raises, exits, panics]


def message_of(message_type: str, content: RecordDict | None = None) -> tuple[Message, Context]:
    take_identity(run_id=RUN)
    message = Message(content or RecordDict(), NODE, message_type, ttl=60.0)
    message.metadata.__dict__["_message_id"] = message.object_id
    return message, Context(RUN, NODE, {}, RecordDict(), {})


@pytest.mark.parametrize("handler", BAD, ids=lambda handler: handler.__name__)
def test_bad_handler_gets_a_typed_error_in_fixed_words(handler):
    app = ClientApp()
    app.query("fi_bad")(handler)
    message, context = message_of("query.fi_bad", pack(Envelope(kind=Kind.PING, run_id=RUN)))
    safe = safe_reply(message, context, lambda: app)
    assert safe.failed
    envelope = unpack(safe.reply.message.content, limits=DEFAULT_LIMITS)
    error = read_error(envelope, run_id=RUN, sender=NODE)
    assert (error.code, error.message) == ("FI404", "the site's app failed")
    assert b"SECRET" not in b"".join(safe.reply.contents)


@pytest.mark.parametrize("handler", BAD, ids=lambda handler: handler.__name__)
def test_bad_handler_of_another_message_gets_flowers_error_in_fixed_words(handler):
    app = ClientApp()
    app.query("bad")(handler)
    message, context = message_of("query.bad")
    safe = safe_reply(message, context, lambda: app)
    error = safe.reply.message.error
    assert (error.code, error.reason) == (2, "the site's app failed")


def test_app_that_cannot_be_loaded_gets_an_error_in_fixed_words():
    def fails():
        raise ImportError("SECRET")

    message, context = message_of("query.any")
    safe = safe_reply(message, context, fails)
    assert safe.reply.message.error.reason == "the site's app failed"
    assert safe.failed == "ImportError"


def test_message_whose_time_is_up_still_gets_a_reply():
    app = ClientApp()
    app.query("late")(replies_none)
    message, context = message_of("query.late")
    message.metadata.__dict__["_created_at"] -= 3600.0
    assert safe_reply(message, context, lambda: app).reply.message.has_error()


def test_good_reply_goes_out_as_it_is():
    app = ClientApp()
    app.query("good")(lambda message, context: Message(RecordDict(), reply_to=message))
    message, context = message_of("query.good")
    safe = safe_reply(message, context, lambda: app)
    assert safe.failed == ""
    assert safe.reply.message.metadata.reply_to_message_id == message.metadata.message_id
