"""API keys: who gets in, for what, how often; and what is counted."""

from __future__ import annotations

import asyncio
import os
import sqlite3
import threading

import pytest

from fedinfer_flower.errors import DeploymentError, InvalidValueError, QuotaExceededError
from fedinfer_flower.serving.auth import Caller
from fedinfer_flower.serving.http_app import create_app
from fedinfer_flower.serving.jobs import JobKind, JobRequest
from fedinfer_flower.serving.key_store import KeyStore
from fedinfer_flower.serving.problem import HttpProblem
from fedinfer_flower.serving.rate_limit import Buckets, FailureLimit, Quotas, RequestLimit

DAY_S = 86_400.0


class Clock:
    def __init__(self, now=1_000_000.0):
        self.now = now

    def __call__(self):
        return self.now


@pytest.fixture
def clock():
    return Clock()


@pytest.fixture
def store(tmp_path, clock):
    found = KeyStore(tmp_path / "clocked.db", clock=clock)
    yield found
    found.close()


def run(coroutine):
    return asyncio.run(coroutine)


# -- the store ---------------------------------------------------------------------------


def test_key_is_known_by_its_secret_alone(store):
    text = store.create("lab", scopes=["query"], models=["wine"], rows_per_day=5)
    caller = store.authenticate(text)
    assert (caller.name, caller.scopes, caller.models) == ("lab", {"query"}, {"wine"})
    assert text == f"fik_{caller.key_id}_{text.split('_', 2)[2]}"
    assert len(text.split("_", 2)[2]) == 43
    for wrong in ("", text[:-1], text + "x", text[:13] + "A" * 43, f"fik_00000000_{text[13:]}"):
        assert store.authenticate(wrong) is None


def test_file_holds_no_secret(store, tmp_path):
    text = store.create("lab", scopes=["query"])
    rotated = store.rotate(text.split("_")[1], grace_s=60.0)
    files = [path.read_bytes() for path in tmp_path.iterdir()]
    for secret in (text.split("_", 2)[2], rotated.split("_", 2)[2]):
        assert not any(secret.encode() in data for data in files)
    assert "digest" not in repr(store.list())


def test_file_is_its_owners_alone(tmp_path):
    path = tmp_path / "keys.db"
    KeyStore(path).close()
    assert path.stat().st_mode & 0o077 == 0
    path.chmod(0o640)
    with pytest.raises(DeploymentError, match="chmod 600"):
        KeyStore(path)


def test_other_files_are_refused(tmp_path):
    (tmp_path / "text").write_text("not a database, and long enough to be sure of it" * 30)
    other = sqlite3.connect(tmp_path / "other")
    other.execute("PRAGMA application_id = 77")
    other.close()
    for name in ("text", "other"):
        os.chmod(tmp_path / name, 0o600)
        with pytest.raises(DeploymentError):
            KeyStore(tmp_path / name)


def test_keys_expire(store, clock):
    text = store.create("lab", scopes=["query"], expires_at=clock.now + 10.0)
    assert store.authenticate(text) is not None
    clock.now += 10.0
    assert store.authenticate(text) is None


def test_rotation_leaves_the_old_secret_its_grace(store, clock):
    old = store.create("lab", scopes=["query"])
    key_id = old.split("_")[1]
    new = store.rotate(key_id, grace_s=60.0)
    assert store.authenticate(old) == store.authenticate(new)
    clock.now += 60.0
    assert store.authenticate(old) is None
    assert store.authenticate(new) is not None
    newer = store.rotate(key_id)
    assert store.authenticate(new) is None
    assert store.authenticate(newer) is not None


def test_revocation_ends_both_secrets(store):
    old = store.create("lab", scopes=["query"])
    new = store.rotate(old.split("_")[1], grace_s=60.0)
    store.revoke(old.split("_")[1])
    assert store.authenticate(old) is None
    assert store.authenticate(new) is None
    with pytest.raises(InvalidValueError):
        store.revoke(old.split("_")[1])
    with pytest.raises(InvalidValueError):
        store.rotate(old.split("_")[1])


def test_changes_by_another_process_count_within_a_second(store, clock, tmp_path):
    text = store.create("lab", scopes=["query"])
    assert store.authenticate(text) is not None
    other = KeyStore(tmp_path / "clocked.db", clock=clock)
    other.revoke(text.split("_")[1])
    fresh = other.create("late", scopes=["query"])
    other.close()
    clock.now += 0.99
    assert store.authenticate(text) is None
    assert store.authenticate(fresh) is not None


@pytest.mark.parametrize(
    "wrong",
    [
        {"scopes": []},
        {"scopes": ["everything"]},
        {"scopes": ["query"], "rows_per_day": -1},
        {"scopes": ["query"], "name": ""},
        {"scopes": ["query"], "name": "a\nb"},
    ],
    ids=["no-scope", "unknown-scope", "negative", "no-name", "line-end"],
)
def test_wrong_keys_are_not_made(store, wrong):
    with pytest.raises(InvalidValueError):
        store.create(wrong.pop("name", "lab"), **wrong)
    assert not store.list()


# -- quotas ------------------------------------------------------------------------------


def caller_of(store, **limits):
    return store.authenticate(store.create("lab", scopes=["query"], **limits))


def request(caller, n_rows=1, key=""):
    return JobRequest(
        owner=caller.key_id,
        model="wine",
        kind=JobKind.ROWS,
        body=b"x",
        n_rows=n_rows,
        timeout_s=5.0,
        idempotency_key=key,
    )


def refused(quotas, board, made, caller):
    with pytest.raises(HttpProblem) as caught:
        quotas.submit(board, made, caller)
    assert isinstance(caught.value.error, QuotaExceededError)
    assert caught.value.retry_after_s > 0.0
    return caught.value


def test_rows_of_a_day_outlive_the_process_and_end_at_midnight(store, clock, board, tmp_path):
    caller = caller_of(store, rows_per_day=10)
    Quotas(store).submit(board, request(caller, 10), caller)
    again = KeyStore(tmp_path / "clocked.db", clock=clock)
    problem = refused(Quotas(again), board, request(caller), caller)
    assert 0.0 < problem.retry_after_s <= DAY_S
    clock.now += problem.retry_after_s
    Quotas(again).submit(board, request(caller, 10), caller)
    again.close()


def test_retried_request_is_counted_once(store, board):
    caller = caller_of(store, rows_per_day=10, rows_per_minute=10)
    quotas = Quotas(store)
    jobs = {quotas.submit(board, request(caller, 10, "once"), caller).job_id for _ in range(3)}
    assert len(jobs) == 1
    assert store.rows.today(caller.key_id) == 10


def test_retry_after_the_job_is_forgotten_counts_again(store, board):
    caller = caller_of(store, rows_per_day=15)
    quotas = Quotas(store)
    job = quotas.submit(board, request(caller, 10, "once"), caller)
    board.jobs.clear()
    refused(quotas, board, request(caller, 10, "once"), caller)
    assert store.rows.today(caller.key_id) == 10
    assert job.job_id not in board.jobs


def test_crash_before_acceptance_counts_the_retry_once(store, board):
    caller = caller_of(store, rows_per_day=15)
    made = request(caller, 10, "once")
    quotas = Quotas(store)

    class Crash(BaseException):
        pass

    def crash(*_, **__):
        raise Crash

    settle, store.rows.settle = store.rows.settle, crash
    with pytest.raises(Crash):
        quotas.submit(board, made, caller)
    store.rows.settle = settle
    assert quotas.submit(board, made, caller).job_id in board.jobs
    assert store.rows.today(caller.key_id) == 10


def test_what_is_not_accepted_is_not_counted(store, board):
    caller = caller_of(store, rows_per_day=10, rows_per_minute=10)
    quotas = Quotas(store)
    board.error = QuotaExceededError("the queue is full")
    for key in ("", "once"):
        with pytest.raises(QuotaExceededError):
            quotas.submit(board, request(caller, 10, key), caller)
    assert store.rows.today(caller.key_id) == 0
    board.error = None
    assert quotas.submit(board, request(caller, 10, "once"), caller)
    assert store.rows.today(caller.key_id) == 10


def test_rows_of_a_minute_come_back(store, board):
    clock = Clock()
    caller = caller_of(store, rows_per_minute=60)
    quotas = Quotas(store, clock=clock)
    quotas.submit(board, request(caller, 60), caller)
    assert refused(quotas, board, request(caller, 6), caller).retry_after_s == pytest.approx(6.0)
    clock.now += 6.0
    quotas.submit(board, request(caller, 6), caller)
    refused(quotas, board, request(caller, 61), caller)


def test_jobs_at_a_time_are_bounded_until_they_end(store, board):
    caller = caller_of(store, concurrent=2)
    quotas = Quotas(store)
    board.answering = False
    first = quotas.submit(board, request(caller), caller)
    quotas.submit(board, request(caller), caller)
    refused(quotas, board, request(caller), caller)
    board.finish(first.job_id)
    quotas.submit(board, request(caller), caller)


def test_quota_holds_when_many_ask_at_once(store, board):
    caller = caller_of(store, rows_per_day=10, concurrent=50)
    quotas, done = Quotas(store), []

    def ask():
        try:
            done.append(quotas.submit(board, request(caller, 3), caller))
        except HttpProblem:
            done.append(None)

    threads = [threading.Thread(target=ask) for _ in range(12)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sum(job is not None for job in done) == 3
    assert store.rows.today(caller.key_id) == 9


def test_buckets_forget_the_oldest_name():
    buckets = Buckets(clock=lambda: 0.0)
    for i in range(10_001):
        assert buckets.take(str(i), 1, rate=1.0, burst=1.0) == 0.0
    assert buckets.take("10000", 1, rate=1.0, burst=1.0) > 0.0
    assert buckets.take("0", 1, rate=1.0, burst=1.0) == 0.0


# -- over HTTP ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    "header",
    [
        {},
        {"Authorization": ""},
        {"Authorization": "Bearer"},
        {"Authorization": "Bearer nonsense"},
        {"Authorization": f"Bearer fik_00000000_{'A' * 43}"},
        {"Authorization": f"Basic fik_00000000_{'A' * 43}"},
        {"Authorization": b"Bearer \xff\xfe"},
    ],
    ids=["none", "empty", "no-key", "nonsense", "unknown", "basic", "bytes"],
)
def test_without_a_key_nothing_is_said(app, client_of, header):
    async def ask():
        async with client_of(app) as client:
            return [
                await client.request(method, path, headers=header)
                for method, path in (
                    ("POST", "/v1/query"),
                    ("GET", f"/v1/queries/{'0' * 32}"),
                    ("GET", "/v1/models"),
                    ("GET", "/v1/status"),
                    ("GET", "/v1/none"),
                    ("GET", "/metrics"),
                )
            ]

    for reply in run(ask()):
        assert reply.status_code == 401
        assert reply.json()["error"]["code"] == "FI414"
        assert reply.headers["www-authenticate"] == "Bearer"


def test_two_authorization_headers_are_none(app, client_of, key):
    headers = [("Authorization", f"Bearer {key}"), ("Authorization", f"Bearer {key}")]
    assert run(client_of(app).get("/v1/models", headers=headers)).status_code == 401


def test_body_is_not_read_before_the_key_is_known(app):
    reads = []

    async def receive():
        reads.append(1)
        return {"type": "http.request", "body": b"", "more_body": False}

    sent = []

    async def send(message):
        sent.append(message)

    scope = {
        "type": "http",
        "asgi": {"version": "3.0"},
        "http_version": "1.1",
        "method": "POST",
        "path": "/v1/query",
        "raw_path": b"/v1/query",
        "query_string": b"",
        "root_path": "",
        "headers": [(b"content-length", b"100000"), (b"content-type", b"application/json")],
        "client": ("192.0.2.1", 1),
        "server": ("gw", 80),
        "scheme": "http",
    }
    run(app(scope, receive, send))
    assert sent[0]["status"] == 401
    assert (b"connection", b"close") in sent[0]["headers"]
    assert not reads


@pytest.mark.parametrize(
    ("scopes", "path"),
    [("query", "/v1/status"), ("query", "/metrics"), ("query", "/v1/models/wine/directory")],
)
def test_scopes_are_kept(app, keys, bearer, client_of, scopes, path):
    client = client_of(app, bearer(keys.create("lab", scopes=[scopes])))
    reply = run(client.get(path))
    assert (reply.status_code, reply.json()["error"]["code"]) == (403, "FI414")


def test_scope_and_models_of_a_key_bound_its_queries(app, keys, bearer, client_of):
    query = {"model": "wine", "inputs": [[1.0]]}
    for limits in ({"scopes": ["sealed"]}, {"scopes": ["query"], "models": ["other"]}):
        client = client_of(app, bearer(keys.create("lab", **limits)))
        assert run(client.post("/v1/query", json=query)).status_code == 403


def test_quota_says_when_to_come_back(app, keys, bearer, client_of):
    client = client_of(app, bearer(keys.create("lab", scopes=["query"], rows_per_day=1)))
    query = {"model": "wine", "inputs": [[1.0], [2.0]]}
    reply = run(client.post("/v1/query", json=query))
    assert (reply.status_code, reply.json()["error"]["code"]) == (429, "FI415")
    assert 0 < int(reply.headers["retry-after"]) <= DAY_S


def test_requests_a_second_are_bounded_for_a_key(board, config, keys, key, bearer, client_of):
    clock = Clock()
    limit = RequestLimit(per_s=1.0, burst=2.0, clock=clock)
    app = create_app(board, config, keys=keys, requests=limit)

    async def ask():
        async with client_of(app, bearer(key)) as client:
            return [(await client.get("/v1/models")).status_code for _ in range(3)]

    assert run(ask()) == [200, 200, 429]
    clock.now += 1.0
    assert run(ask()) == [200, 429, 429]


def test_failures_are_bounded_for_an_address_and_valid_keys_get_in(
    board, config, keys, key, bearer, client_of
):
    limit = FailureLimit(per_s=1.0, burst=2.0, clock=Clock())
    app = create_app(board, config, keys=keys, failures=limit)

    async def ask():
        async with client_of(app) as client:
            failed = [(await client.get("/v1/models")).status_code for _ in range(3)]
            return failed, (await client.get("/v1/models", headers=bearer(key))).status_code

    assert run(ask()) == ([401, 401, 429], 200)


def test_refusals_of_known_keys_are_written_down(board, config, keys, bearer, client_of):
    class Audit:
        def __init__(self):
            self.entries = []

        def append(self, event, **facts):
            self.entries.append((event, facts))

    audit = Audit()
    app = create_app(board, config, keys=keys, audit=audit)
    text = keys.create("lab", scopes=["query"])

    async def ask():
        async with client_of(app, bearer(text)) as client:
            await client.get("/v1/status")
            for _ in range(100):
                if audit.entries:
                    return
                await asyncio.sleep(0.01)

    run(ask())
    [(event, facts)] = audit.entries
    assert event == "refused"
    assert facts == {"code": "FI414", "querier": text.split("_")[1], "n_rows": 0}


def test_caller_without_limits_writes_nothing(store, board):
    caller = caller_of(store)
    assert isinstance(caller, Caller)
    Quotas(store).submit(board, request(caller, 10, "once"), caller)
    assert store.rows.today(caller.key_id) == 0
