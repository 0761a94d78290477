"""One thread owns the grid: strategies side by side, replies that go wrong, a SuperLink away."""

from __future__ import annotations

import threading
import time

import numpy as np
import pytest
from flwr.app import Message

from fedinfer_flower import FedEnsemble
from fedinfer_flower.errors import QueryError, UnavailableError
from fedinfer_flower.serving.hub import GridHub
from fedinfer_flower.strategies.onboarding import onboard
from fedinfer_flower.strategies.pull_loop import stream_replies
from fedinfer_flower.wire.actions import HELLO, message_type
from fedinfer_flower.wire.envelope import Envelope, Kind
from fedinfer_flower.wire.records import pack


@pytest.fixture
def sites(bed):
    return bed.sites()


@pytest.fixture
def hub(sites):
    hub = GridHub(sites.grid)
    hub.start()
    yield hub
    hub.close()


def hellos(sites) -> list[Message]:
    content = pack(Envelope(kind=Kind.HELLO, run_id=sites.grid.run_id))
    return [
        Message(content, n, message_type(HELLO), ttl=10.0, group_id="g")
        for n in sites.grid.get_node_ids()
    ]


def test_strategies_in_several_threads_work_unchanged(hub, rows, mean_probability):
    found = {}

    def ask(number: int) -> None:
        mine = rows + number
        with hub.grid() as grid:
            strategy = FedEnsemble(rule="mean-probability", min_available_nodes=3)
            found[number] = (strategy.start(grid, mine).prediction, mine)

    threads = [threading.Thread(target=ask, args=(n,)) for n in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

    assert len(found) == 4
    for prediction, mine in found.values():
        np.testing.assert_allclose(
            prediction.probabilities, mean_probability(mine), rtol=0.0, atol=1e-6
        )
    assert hub.n_awaited == 0


def test_replies_after_a_facade_closed_are_pulled_and_dropped(bed, hub, sites):
    sites.instead = lambda action, partition, *_: sites.hanging.wait(20.0) and None
    grid = hub.grid()
    assert list(stream_replies(grid, hellos(sites), timeout_s=0.05)) == []
    assert hub.n_awaited == 3
    grid.close()

    sites.hanging.set()

    bed.until(lambda: hub.n_awaited == 0)
    assert grid._replies == {}


def test_reply_that_cannot_be_rebuilt_hides_no_other(bed, sites, monkeypatch):
    broken: set[str] = set()
    pull = sites.grid.pull_messages

    def failing(ids):
        if broken & set(ids):
            raise ValueError("no message")
        return pull(ids)

    hub = GridHub(sites.grid)
    hub.start()
    with hub.grid() as grid:
        asks = hellos(sites)
        sites.instead = lambda *_: time.sleep(0.1)
        list(grid.push_messages(asks))
        broken.add(asks[0].metadata.message_id)
        monkeypatch.setattr(sites.grid, "pull_messages", failing)
        came: list[Message] = []

        def both_came() -> bool:
            came.extend(grid.pull_messages([ask.metadata.message_id for ask in asks]))
            return len(came) == 2

        bed.until(both_came)
        bed.until(lambda: hub.n_awaited == 0)
    assert hub.silent_s == 0.0
    hub.close()


def test_rejected_message_is_reported_and_not_awaited(hub, sites):
    asks = hellos(sites)
    content = pack(Envelope(kind=Kind.HELLO, run_id=sites.grid.run_id))
    asks.append(Message(content, 4711, message_type(HELLO), ttl=10.0, group_id="g"))
    with hub.grid() as grid:
        arrivals = list(stream_replies(grid, asks, timeout_s=10.0))
    assert [a.node_id for a in arrivals if a.reply is None] == [4711]
    assert len(arrivals) == 4


def test_superlink_that_is_away_is_noticed_and_forgiven(bed, hub, sites, monkeypatch):
    def away():
        raise ConnectionError("refused")

    with monkeypatch.context() as patched:
        patched.setattr(sites.grid, "get_node_ids", away)
        with pytest.raises(ConnectionError):
            hub.node_ids()
        time.sleep(0.02)
        assert hub.silent_s > 0.0
    hub.node_ids()
    assert hub.silent_s == 0.0


def test_superlink_that_hangs_holds_up_callers_for_their_time_only(hub, sites, monkeypatch):
    release = threading.Event()
    monkeypatch.setattr(sites.grid, "get_node_ids", lambda: release.wait(20.0) and [])
    with pytest.raises(UnavailableError):
        hub.call(sites.grid.get_node_ids, timeout_s=0.05)
    assert hub.silent_s > 0.0
    release.set()


def test_closing_the_hub_wakes_whoever_waits(hub, sites):
    sites.instead = lambda *_: sites.hanging.wait(20.0) and None
    failed: list[Exception] = []

    def wait() -> None:
        try:
            with hub.grid() as grid:
                list(stream_replies(grid, hellos(sites), timeout_s=20.0))
        except Exception as exc:
            failed.append(exc)

    thread = threading.Thread(target=wait)
    thread.start()
    while hub.n_awaited < 3:
        time.sleep(0.001)
    hub.close()
    thread.join(10.0)

    assert [type(exc) for exc in failed] == [UnavailableError]
    with pytest.raises(QueryError):
        list(stream_replies(hub.grid(), hellos(sites), timeout_s=1.0))


def test_onboarding_works_through_a_facade(hub, sites):
    with hub.grid() as grid:
        found = onboard(grid, sorted(grid.get_node_ids()), run_id=sites.grid.run_id, timeout_s=10.0)
    assert len(found.cards) == 3
    assert not found.failures
