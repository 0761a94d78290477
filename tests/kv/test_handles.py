"""Handles: one use, one querier, a short time, and never more than the site allows."""

from __future__ import annotations

import subprocess
import sys
import threading

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, invariant, rule

from fedinfer_flower.errors import HandleError, InvalidValueError, SizeLimitError
from fedinfer_flower.kv.handles import HandleStore


class Clock:
    def __init__(self):
        self.now = 0.0

    def __call__(self):
        return self.now


class Handles(RuleBasedStateMachine):
    """Against a model that knows of every object whether it may still be fetched."""

    TTL, BYTES, ITEMS = 10.0, 100, 4
    handles = Bundle("handles")

    def __init__(self):
        super().__init__()
        self.clock = Clock()
        self.store = HandleStore(
            max_bytes=self.BYTES, max_items=self.ITEMS, ttl_s=self.TTL, clock=self.clock
        )
        self.made = {}  # handle -> (number, owner, run, size, expires), oldest first
        self.taken = set()
        self.count = 0

    def alive(self):
        """Return what a store of these bounds must still hold: the newest that fit."""
        return {h: m for h, m in self.made.items() if m[4] > self.clock.now}

    @rule(
        target=handles,
        size=st.integers(0, 100),
        owner=st.sampled_from("pq"),
        run=st.sampled_from([1, 2, "1"]),
    )
    def put(self, size, owner, run):
        alive = self.alive()
        while alive and (
            len(alive) >= self.ITEMS or sum(m[3] for m in alive.values()) + size > self.BYTES
        ):
            del alive[next(iter(alive))]
        handle = self.store.put(self.count, size_bytes=size, querier=owner, run_id=run)
        assert handle not in self.made
        self.made = alive | {handle: (self.count, owner, run, size, self.clock.now + self.TTL)}
        self.count += 1
        return handle

    @rule(handle=handles, owner=st.sampled_from("pq"), run=st.sampled_from([1, 2, "1"]))
    def take(self, handle, owner, run):
        entry = self.alive().get(handle)
        # == alone would let run 1 pass for True or 1.0; "1" is another tenant than 1.
        if entry is not None and (owner, run) == (entry[1], entry[2]):
            got = self.store.take(handle, querier=owner, run_id=run)
            assert got == entry[0]
            assert got not in self.taken
            self.taken.add(got)
            del self.made[handle]
        else:
            with pytest.raises(HandleError):
                self.store.take(handle, querier=owner, run_id=run)

    @rule(seconds=st.sampled_from([0.5, 4.0, 10.0]))
    def wait(self, seconds):
        self.clock.now += seconds

    @rule(run=st.sampled_from([1, 2, "1"]))
    def end_of_run(self, run):
        self.store.forget_run(run)
        self.made = {h: m for h, m in self.made.items() if m[2] != run}

    @invariant()
    def bounds_hold(self):
        alive = self.alive()
        assert len(self.store) == len(alive) <= self.ITEMS
        assert self.store.bytes_held == sum(m[3] for m in alive.values()) <= self.BYTES


TestHandles = Handles.TestCase
TestHandles.settings = settings(max_examples=60, stateful_step_count=30)


def text_of(store, handle, **whose):
    with pytest.raises(HandleError) as caught:
        store.take(handle, **whose)
    return str(caught.value)


def test_nothing_is_learned_from_the_error():
    clock = Clock()
    store = HandleStore(max_bytes=10, max_items=2, ttl_s=1.0, clock=clock)
    mine = {"querier": "q", "run_id": 1}
    spent = store.put("x", size_bytes=1, **mine)
    store.take(spent, **mine)
    evicted = store.put("x", size_bytes=1, **mine)
    foreign, _ = (store.put("x", size_bytes=1, **mine) for _ in range(2))
    texts = {
        text_of(store, spent, **mine),
        text_of(store, evicted, **mine),
        text_of(store, foreign, querier="p", run_id=1),
        text_of(store, foreign, querier="q", run_id=2),
        text_of(store, "never made", **mine),
        text_of(store, "a" * 100_000, **mine),
        text_of(store, None, **mine),
    }
    clock.now = 1.0
    texts.add(text_of(store, foreign, **mine))
    assert len(texts) == 1
    assert foreign not in texts.pop()


def test_attempt_of_another_querier_does_not_spend_the_handle():
    store = HandleStore()
    handle = store.put("mine", size_bytes=4, querier="q", run_id=1)
    text_of(store, handle, querier="p", run_id=1)
    assert store.take(handle, querier="q", run_id=1) == "mine"


def test_fields_of_the_key_cannot_run_into_each_other():
    store = HandleStore()
    handle = store.put("mine", size_bytes=4, querier="ab", run_id="c")
    for querier, run_id in (("a", "bc"), ("abc", ""), ("b", "ca")):
        text_of(store, handle, querier=querier, run_id=run_id)


def test_object_larger_than_the_store_is_refused_and_evicts_nobody():
    store = HandleStore(max_bytes=10)
    handle = store.put("small", size_bytes=5, querier="q", run_id=1)
    with pytest.raises(SizeLimitError):
        store.put("large", size_bytes=11, querier="q", run_id=1)
    assert store.take(handle, querier="q", run_id=1) == "small"


def test_threads_never_get_the_same_object_twice():
    store = HandleStore(max_items=64)
    handles = [store.put(i, size_bytes=1, querier="q", run_id=1) for i in range(64)]
    got, start = [], threading.Barrier(4)

    def fetch():
        start.wait()
        for handle in handles:
            try:
                got.append(store.take(handle, querier="q", run_id=1))
            except HandleError:
                continue

    threads = [threading.Thread(target=fetch) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(got) == list(range(64))
    assert store.bytes_held == 0


@pytest.mark.parametrize(
    "options", [{"max_bytes": 0}, {"max_items": True}, {"ttl_s": 0.0}, {"ttl_s": float("nan")}]
)
def test_store_without_bounds_cannot_be_made(options):
    with pytest.raises(InvalidValueError):
        HandleStore(**options)


def test_repr_shows_no_object_and_no_handle():
    store = HandleStore()
    handle = store.put("canary", size_bytes=1, querier="q", run_id=1)
    assert "canary" not in repr(store)
    assert handle not in repr(store)


@pytest.mark.parametrize("module", ["handles", "planner", "latency", "media_history"])
def test_module_loads_no_torch(module):
    code = f"import fedinfer_flower.kv.{module}, sys; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
