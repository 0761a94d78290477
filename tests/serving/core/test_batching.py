"""Batches: every row once, in order, fairly, and never more at a time than allowed."""

from __future__ import annotations

import math

from hypothesis import given
from hypothesis import strategies as st

from fedinfer_flower.serving.batching import Piece, Queue


def piece(job: str, owner: str, n_rows: int, *, since: float = 0.0, alone: bool = False) -> Piece:
    return Piece(job_id=job, owner=owner, since=since, start=0, stop=n_rows, alone=alone)


def queue_of(pieces, *, in_flight=4, max_rows=8, window_s=0.0):
    queue = Queue(in_flight=in_flight)
    handle = queue.lane("m", "k", window_s=window_s, max_rows=max_rows)
    for one in pieces:
        queue.add(queue.lane("m", "k", window_s=window_s, max_rows=max_rows), one)
    return queue, handle


JOBS = st.lists(
    st.tuples(st.sampled_from("abc"), st.integers(1, 40), st.booleans()), min_size=1, max_size=12
)


@given(jobs=JOBS, max_rows=st.integers(1, 16), in_flight=st.integers(1, 5))
def test_every_row_leaves_once_in_order_and_no_batch_is_too_large(jobs, max_rows, in_flight):
    queue, _ = queue_of(
        [piece(f"j{i}", owner, n, alone=alone) for i, (owner, n, alone) in enumerate(jobs)],
        in_flight=in_flight,
        max_rows=max_rows,
    )
    left = {f"j{i}": n for i, (_, n, _) in enumerate(jobs)}
    at = dict.fromkeys(left, 0)
    under_way: list = []
    while any(left.values()):
        found = queue.next_batch(now=0.0)
        if found is None:
            assert under_way, "nothing under way, and nothing may leave"
            queue.ended(*under_way.pop(0))
            continue
        under_way.append(found)
        assert len(under_way) <= in_flight
        parts = found[1]
        assert 0 < sum(part.n_rows for part in parts) <= max_rows
        for part in parts:
            assert part.start == at[part.job_id]
            at[part.job_id] = part.stop
            left[part.job_id] -= part.n_rows
            if jobs[int(part.job_id[1:])][2]:
                assert len({p.job_id for p in parts}) == 1
    assert queue.next_at() == math.inf


@given(n_big=st.integers(100, 10_000), in_flight=st.integers(2, 6))
def test_single_row_leaves_with_the_next_batch_whatever_another_owner_waits_for(n_big, in_flight):
    queue, _ = queue_of([piece("big", "a", n_big)], in_flight=in_flight, max_rows=8)
    while queue.next_batch(now=0.0) is not None:
        pass

    queue.add(queue.lane("m", "k", window_s=0.0, max_rows=8), piece("one", "b", 1))

    # A place was kept for it: no batch has to end first.
    assert "one" in {part.job_id for part in queue.next_batch(now=0.0)[1]}
    assert queue.next_batch(now=0.0) is None


def test_batch_waits_for_its_window_unless_it_is_full():
    queue, handle = queue_of([piece("j", "a", 3, since=5.0)], window_s=1.0)
    assert queue.next_batch(now=5.5) is None
    assert queue.next_at() == 6.0
    queue.add(handle, piece("k", "a", 5, since=5.5))
    assert queue.next_at() == -math.inf
    assert len(queue.next_batch(now=5.5)[1]) == 2


def test_owners_share_a_batch_evenly_and_leave_each_other_what_they_do_not_need():
    queue, _ = queue_of([piece("x", "a", 100), piece("y", "b", 2), piece("z", "c", 100)])
    rows = {part.job_id: part.n_rows for part in queue.next_batch(now=0.0)[1]}
    assert rows["y"] == 2
    assert sum(rows.values()) == 8
    assert abs(rows["x"] - rows["z"]) <= 1


def test_blocked_group_stays_and_others_leave():
    queue = Queue(in_flight=1)
    queue.add(queue.lane("m", "k", window_s=0.0, max_rows=8), piece("j", "a", 1))
    queue.add(queue.lane("n", "k", window_s=0.0, max_rows=8), piece("i", "a", 1))
    assert queue.next_batch(now=0.0, blocked=frozenset({"m"}))[0][0] == "n"
    assert queue.next_batch(now=0.0, blocked=frozenset({"m"})) is None
    assert queue.next_at(blocked=frozenset({"m"})) == math.inf
    assert queue.next_batch(now=0.0)[0][0] == "m"


def test_removed_job_never_leaves():
    queue, _ = queue_of([piece("j", "a", 20), piece("k", "a", 1)])
    assert queue.remove("j")
    assert not queue.remove("j")
    assert [p.job_id for p in queue.next_batch(now=0.0)[1]] == ["k"]
