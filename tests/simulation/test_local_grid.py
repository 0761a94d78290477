"""`LocalGrid` stands in for a SuperLink: same wire format, same errors, nothing hidden."""

from __future__ import annotations

import threading
import time

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, RecordDict
from flwr.clientapp import ClientApp

from fedinfer_flower.simulation.local_grid import LocalGrid, over_the_wire


def content(value: int = 0) -> RecordDict:
    return RecordDict({"c": ConfigRecord({"x": value})})


def echo_app(handle=None) -> ClientApp:
    app = ClientApp()

    @app.query()
    def echo(message, context):
        return (handle or reply)(message, context)

    return app


def reply(message, context):
    answer = {
        "x": message.content["c"]["x"],
        "node": context.node_id,
        "partition": context.node_config["partition-id"],
        "run": context.run_id,
    }
    return Message(RecordDict({"a": ConfigRecord(answer)}), reply_to=message)


@pytest.mark.parametrize("workers", [0, 1, 3])
def test_every_node_answers_its_own_message(workers):
    with LocalGrid(echo_app(), num_supernodes=4, workers=workers) as grid:
        nodes = list(grid.get_node_ids())
        asked = [Message(content(n), n, "query") for n in nodes]
        replies = list(grid.send_and_receive(asked, timeout=10.0))

    by_id = {m.metadata.message_id: m for m in asked}
    assert len(replies) == 4
    for message in replies:
        answer = message.content["a"]
        request = by_id[message.metadata.reply_to_message_id]
        assert answer["x"] == answer["node"] == request.metadata.dst_node_id
        assert answer["run"] == grid.run_id
        assert answer["partition"] == nodes.index(answer["node"])


def test_message_for_an_unknown_node_gets_an_empty_id():
    with LocalGrid(echo_app(), num_supernodes=1) as grid:
        asked = [Message(content(), node, "query") for node in (4711, 1000)]
        ids = list(grid.push_messages(asked))
    assert ids[0] == asked[0].metadata.message_id == ""
    assert ids[1]


def test_message_is_copied_through_the_wire():
    seen = []

    def keep(message, context):
        seen.append(message)
        return reply(message, context)

    data = np.arange(10, dtype=np.uint8).tobytes()
    array = Array(dtype="uint8", shape=(10,), stype="own", data=data)
    sent = RecordDict({"c": ConfigRecord({"x": 1}), "r": ArrayRecord({"a": array})})
    with LocalGrid(echo_app(keep), num_supernodes=1) as grid:
        list(grid.send_and_receive([Message(sent, 1000, "query")], timeout=10.0))

    (message,) = seen
    assert message.content is not sent
    assert message.content["r"]["a"].data == data
    assert message.content["r"]["a"].stype == "own"
    assert grid.wire_bytes > 2 * len(data)


def test_over_the_wire_counts_the_payload_once():
    with LocalGrid(echo_app(), num_supernodes=1):
        sizes = []
        for n_bytes in (1000, 101_000):
            array = Array(dtype="uint8", shape=(n_bytes,), stype="own", data=bytes(n_bytes))
            message = Message(RecordDict({"r": ArrayRecord({"a": array})}), 1000, "query")
            sizes.append(over_the_wire(message)[1])
    assert abs(sizes[1] - sizes[0] - 100_000) < 64  # but for the lengths' own digits


def raises(message, context):
    raise ValueError("of the handler")


def returns_none(message, context):
    return None


def builds_a_new_message(message, context):
    return Message(content(), 1, "query")


@pytest.mark.parametrize("handle", [raises, returns_none, builds_a_new_message])
def test_handler_that_would_fail_or_block_a_node_gives_error_two(handle):
    with LocalGrid(echo_app(handle), num_supernodes=1) as grid:
        (answer,) = grid.send_and_receive([Message(content(), 1000, "query")], timeout=10.0)
    assert answer.has_error()
    assert answer.error.code == 2


def test_unregistered_action_gives_error_two_naming_it():
    with LocalGrid(echo_app(), num_supernodes=1) as grid:
        (answer,) = grid.send_and_receive([Message(content(), 1000, "query.other")], timeout=10.0)
    assert answer.error.code == 2
    assert "function registered with name" in answer.error.reason


def test_reply_is_given_out_once():
    with LocalGrid(echo_app(), num_supernodes=1, workers=0) as grid:
        ids = list(grid.push_messages([Message(content(), 1000, "query")]))
        assert len(list(grid.pull_messages(ids))) == 1
        assert list(grid.pull_messages(ids)) == []
        assert list(grid.pull_messages(["no-such-id"])) == []


def test_slow_node_does_not_hold_up_the_others():
    with LocalGrid(
        echo_app(),
        num_supernodes=3,
        workers=3,
        latency_s=lambda node: 0.6 if node == 1001 else 0.0,
    ) as grid:
        asked = [Message(content(), node, "query") for node in grid.get_node_ids()]
        early = list(grid.send_and_receive(asked, timeout=0.3))
        nodes = {m.content["a"]["node"] for m in early}
        assert nodes == {1000, 1002}
        time.sleep(0.5)
        late = list(grid.pull_messages([asked[1].metadata.message_id]))
        assert [m.content["a"]["node"] for m in late] == [1001]


def test_node_serves_one_message_at_a_time():
    lock, busy, most = threading.Lock(), [0], [0]

    def count(message, context):
        with lock:
            busy[0] += 1
            most[0] = max(most[0], busy[0])
        time.sleep(0.02)
        with lock:
            busy[0] -= 1
        return reply(message, context)

    with LocalGrid(echo_app(count), num_supernodes=1, workers=4) as grid:
        asked = [Message(content(i), 1000, "query") for i in range(4)]
        assert len(list(grid.send_and_receive(asked, timeout=10.0))) == 4
    assert most[0] == 1


def test_run_config_reaches_every_node_and_state_stays_there():
    def count(message, context):
        state = context.state.setdefault("seen", ConfigRecord({"n": 0}))
        state["n"] += 1
        answer = ConfigRecord({"n": state["n"], "lr": context.run_config["lr"]})
        return Message(RecordDict({"a": answer}), reply_to=message)

    with LocalGrid(echo_app(count), num_supernodes=2, run_config={"lr": 0.5}) as grid:
        for turn in (1, 2):
            asked = [Message(content(), node, "query") for node in grid.get_node_ids()]
            for answer in grid.send_and_receive(asked, timeout=10.0):
                assert dict(answer.content["a"]) == {"n": turn, "lr": 0.5}


def test_runs_of_two_grids_differ():
    ids = set()
    for _ in range(2):
        with LocalGrid(echo_app(), num_supernodes=1) as grid:
            assert grid.run.run_id == grid.run_id > 0
            ids.add(grid.run_id)
    assert len(ids) == 2
