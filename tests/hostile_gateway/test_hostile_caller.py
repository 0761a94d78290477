"""A caller with a valid key who wants more than the key allows."""

from __future__ import annotations

import asyncio
import dataclasses
import threading

import numpy as np
import pytest

from fedinfer_flower.errors import InvalidValueError, QuotaExceededError, ShapeError
from fedinfer_flower.serving.auth import Caller
from fedinfer_flower.serving.config import LimitsConfig
from fedinfer_flower.serving.http_app import create_app
from fedinfer_flower.serving.jobs import JobKind, JobRequest
from fedinfer_flower.serving.problem import HttpProblem
from fedinfer_flower.serving.rate_limit import Quotas

QUERY = {"model": "wine", "inputs": [[1.0, 2.0]]}


def request_of(n_rows: int, *, body: bytes = b"x", key: str = "k", owner: str = "") -> JobRequest:
    return JobRequest(
        owner=owner,
        model="wine",
        kind=JobKind.ROWS,
        body=body,
        n_rows=n_rows,
        timeout_s=5.0,
        idempotency_key=key,
    )


@pytest.fixture
def caller(keys) -> Caller:
    return keys.authenticate(keys.create("lab", scopes=["query"], rows_per_day=10))


class Refusing:
    """A board that refuses one body, and only once it is told to."""

    def __init__(self, board, bad: bytes) -> None:
        self.board, self.bad = board, bad
        self.reached, self.go = threading.Event(), threading.Event()

    def submit(self, request):
        if request.body == self.bad:
            self.reached.set()
            self.go.wait(20.0)
            raise ShapeError("the rows are not as many as was said")
        return self.board.submit(request)

    def __getattr__(self, name):
        return getattr(self.board, name)


def test_rows_are_counted_when_a_twin_under_the_same_key_is_refused(board, keys, caller):
    """One row that will be refused does not hide a thousand that are accepted."""
    slow, quotas = Refusing(board, b"bad"), Quotas(keys)

    def twin():
        with pytest.raises(ShapeError):
            quotas.submit(slow, request_of(1, body=b"bad", owner=caller.key_id), caller)

    other = threading.Thread(target=twin)
    other.start()
    assert slow.reached.wait(20.0)
    threading.Timer(0.2, slow.go.set).start()
    try:
        with pytest.raises(HttpProblem) as refused:
            quotas.submit(slow, request_of(1000, owner=caller.key_id), caller)
    finally:
        slow.go.set()
        other.join()
    assert isinstance(refused.value.error, QuotaExceededError)
    assert not board.requests
    assert keys.rows.today(caller.key_id) == 0


def test_rows_stay_counted_when_the_same_request_was_refused_at_first(board, keys, caller):
    quotas = Quotas(keys)
    asked = request_of(6, owner=caller.key_id)
    board.error = ShapeError("not now")
    with pytest.raises(ShapeError):
        quotas.submit(board, asked, caller)
    board.error = None
    quotas.submit(board, asked, caller)
    assert keys.rows.today(caller.key_id) == 6


def test_crash_while_one_row_was_counted_does_not_hide_a_thousand(board, keys, caller):
    class Crash(Exception):
        pass

    quotas = Quotas(keys)
    settle = keys.rows.uncount
    keys.rows.uncount = lambda *args, **options: None  # the process was gone by then
    board.error = Crash()
    with pytest.raises(Crash):
        quotas.submit(board, request_of(1, owner=caller.key_id), caller)
    keys.rows.uncount, board.error = settle, None
    with pytest.raises(HttpProblem):
        Quotas(keys).submit(board, request_of(1000, body=b"y", owner=caller.key_id), caller)


def test_same_key_at_once_from_eight_threads_is_one_job_counted_once(board, keys, caller):
    quotas, found = Quotas(keys), []
    gate = threading.Barrier(8)

    def ask():
        gate.wait()
        found.append(quotas.submit(board, request_of(4, owner=caller.key_id), caller).job_id)

    threads = [threading.Thread(target=ask) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 8
    assert len(set(found)) == 1
    assert keys.rows.today(caller.key_id) == 4


def test_quota_of_a_day_holds_against_32_threads(board, keys):
    caller = keys.authenticate(keys.create("lab", scopes=["query"], rows_per_day=50))
    quotas, gate, done = Quotas(keys), threading.Barrier(32), []

    def ask(n):
        gate.wait()
        try:
            quotas.submit(board, request_of(3, key=f"k{n % 24}", owner=caller.key_id), caller)
            done.append(n % 24)
        except HttpProblem:
            pass

    threads = [threading.Thread(target=ask, args=(n,)) for n in range(32)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert keys.rows.today(caller.key_id) == 48
    assert len(set(done)) == len(board.requests) == 16


@pytest.mark.parametrize("method", ["GET", "DELETE"])
@pytest.mark.parametrize("end", ["", "/events", "/answer", "/receipt"])
def test_another_keys_query_is_as_unknown_as_none(board, keys, app, client_of, bearer, method, end):
    scopes = ["query", "sealed", "chat", "status", "metrics"]
    mine, other = keys.create("mine", scopes=scopes), keys.create("other", scopes=scopes)

    async def go():
        async with client_of(app) as client:
            asked = await client.post("/v1/query", json=QUERY, headers=bearer(mine))
            path = f"/v1/queries/{asked.json()['id']}{end}"
            none = f"/v1/queries/{'0' * 32}{end}"
            there = await client.request(method, path, headers=bearer(other))
            nowhere = await client.request(method, none, headers=bearer(other))
            owned = await client.get(f"/v1/queries/{asked.json()['id']}", headers=bearer(mine))
            return there, nowhere, owned

    there, nowhere, owned = asyncio.run(go())
    assert there.status_code in (404, 405)
    assert (there.status_code, there.content) == (nowhere.status_code, nowhere.content)
    assert owned.json()["state"] == "done"


def test_idempotency_keys_of_two_owners_are_two_jobs(board, keys, app, client_of, bearer):
    one, two = (keys.create(n, scopes=["query"]) for n in ("one", "two"))

    async def go():
        async with client_of(app) as client:
            return [
                (
                    await client.post(
                        "/v1/query", json=QUERY, headers=bearer(k) | {"Idempotency-Key": "same"}
                    )
                ).json()["id"]
                for k in (one, two, one)
            ]

    first, second, again = asyncio.run(go())
    assert first == again != second


def test_models_that_a_key_may_not_use_cannot_be_told_from_none(
    board, keys, config, client_of, bearer
):
    limited = keys.create("limited", scopes=["query", "sealed"], models=["wine"])
    app = create_app(board, config, keys=keys)

    async def go():
        async with client_of(app, bearer(limited)) as client:
            said = []
            for name in ("sealed-only", "no-such-model"):
                asked = QUERY | {"model": name}
                for reply in (
                    await client.post("/v1/query", json=asked),
                    await client.post(f"/v1/query?model={name}", json=QUERY),
                    await client.get(f"/v1/models/{name}"),
                    await client.get(f"/v1/models/{name}/directory"),
                ):
                    said.append((reply.status_code, reply.content))
            return said

    said = asyncio.run(go())
    assert said[:4] == said[4:]


def test_bodies_that_wait_are_bounded_in_bytes_as_well(bed):
    """A row may be as large as a body: a hundred thousand of them would be the whole memory."""
    sites = bed.sites(2)
    limits = {"queued-bytes": 64_000}
    core = bed.core(sites, limits=limits, start=False)
    wide = np.zeros((1, 2000))  # 16 kB in one row
    kept = [core.submit(bed.request(wide, timeout_s=20.0)) for _ in range(4)]
    with pytest.raises(QuotaExceededError, match="bytes"):
        core.submit(bed.request(wide))
    core.cancel(kept[0].job_id, owner="alice")
    core.submit(bed.request(wide))
    for job in kept[1:]:
        core.cancel(job.job_id, owner="alice")


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/responses"])
@pytest.mark.parametrize(
    "body",
    [
        b'{"model": "wine", "messages": [' + b"{}," * 100_000 + b"{}]}",
        b'{"model": "wine", "messages": [' + b"[]," * 600_000 + b"[]]}",
    ],
    ids=["objects", "lists"],
)
def test_chats_of_a_million_values_are_refused_before_they_are_made(
    board, keys, config, client_of, bearer, key, path, body
):
    """Made into objects on the event loop, they would hold up every other caller."""
    config = dataclasses.replace(config, limits=LimitsConfig(body_bytes=4 << 20))
    app = create_app(board, config, keys=keys)
    headers = bearer(key) | {"Content-Type": "application/json"}

    async def go():
        async with client_of(app, headers) as client:
            return await client.post(path, content=body)

    reply = asyncio.run(go())
    assert reply.status_code == 413


def test_idempotency_key_that_the_schema_allows_is_taken(bed, rows):
    core = bed.core(bed.sites(1), start=False)
    job = core.submit(bed.request(rows, key="k" * 255, timeout_s=5.0))
    core.cancel(job.job_id, owner="alice")
    with pytest.raises(InvalidValueError):
        core.submit(bed.request(rows, key="k" * 256))
