"""Routes: what they take, what they answer, in which shape they refuse."""

from __future__ import annotations

import asyncio
import io
import json

import numpy as np
import pytest

from fedinfer_flower.errors import (
    QuorumNotMetError,
    QuotaExceededError,
    UnavailableError,
)
from fedinfer_flower.observability.metrics import GatewayMetrics
from fedinfer_flower.serving.config import GatewayConfig
from fedinfer_flower.serving.http_app import create_app
from fedinfer_flower.serving.jobs import Job, JobKind, JobState, Progress

QUERY = {"model": "wine", "inputs": [[1.0, 2.0], [3.0, 4.0]]}


def npy(array):
    file = io.BytesIO()
    np.save(file, array, allow_pickle=False)
    return file.getvalue()


def run(coroutine):
    return asyncio.run(coroutine)


def test_json_query_is_answered(client, board):
    reply = run(client.post("/v1/query", json=QUERY))
    assert reply.status_code == 200
    job = reply.json()
    assert job["state"] == "done"
    assert job["answer"]["labels"] == ["a", "a"]
    [request] = board.requests
    assert request.kind is JobKind.ROWS
    assert request.facts == {"dtype": "float32", "shape": [2, 2]}
    assert request.body == np.array(QUERY["inputs"], dtype="<f4").tobytes()
    assert reply.headers["cache-control"] == "no-store"
    assert reply.headers["x-content-type-options"] == "nosniff"
    assert "server" not in reply.headers


@pytest.mark.parametrize("order", ["C", "F"])
@pytest.mark.parametrize("dtype", ["float32", "float64", ">f4", "int64", "uint8", "bool"])
def test_npy_query_keeps_its_values(client, board, dtype, order):
    array = np.asarray(np.arange(6).reshape(2, 3), dtype=dtype, order=order)
    headers = {"Content-Type": "application/octet-stream"}
    reply = run(client.post("/v1/query?model=wine", content=npy(array), headers=headers))
    assert reply.status_code == 200, reply.text
    [request] = board.requests
    assert request.facts["shape"] == [2, 3]
    read = np.frombuffer(request.body, dtype=request.facts["dtype"]).reshape(2, 3)
    assert (read == array).all()


def npy_header(kind, shape="(1,)"):
    data = f"{{'descr': {kind}, 'fortran_order': False, 'shape': {shape}, }}\n".encode()
    return b"\x93NUMPY\x01\x00" + len(data).to_bytes(2, "little") + data


@pytest.mark.parametrize(
    ("body", "code"),
    [
        (b"", "FI301"),
        (b"\x93NUMPY", "FI301"),
        (npy(np.ones((2, 2)))[:-1], "FI304"),
        (npy(np.ones((0, 2), dtype=np.float32)), "FI304"),
        (npy(np.array(1.0)), "FI304"),
        (npy(np.array([[np.nan]], dtype=np.float32)), "FI202"),
        (npy(np.array(["text"])), "FI301"),
        (npy(np.zeros(2, dtype=[("a", "<f4")])), "FI301"),
        (npy(np.ones(2, dtype=np.complex64)), "FI301"),
        (npy_header("'|O'"), "FI301"),
        (npy_header("'<f4'", "(9999999999,)"), "FI304"),
        (npy_header("'<f3'"), "FI301"),
        (npy_header("__import__('os')"), "FI301"),
    ],
    ids=[
        *("empty", "magic-only", "short", "no-rows", "scalar", "nan", "text", "structured"),
        *("complex", "objects", "huge-shape", "odd-dtype", "code"),
    ],
)
def test_bad_npy_is_refused(client, body, code):
    headers = {"Content-Type": "application/octet-stream"}
    reply = run(client.post("/v1/query?model=wine", content=body, headers=headers))
    assert reply.status_code == 400
    assert reply.json()["error"]["code"] == code


@pytest.mark.parametrize(
    ("body", "status"),
    [
        (b"", 400),
        (b"{", 400),
        (b"[1]", 422),
        (b'{"model": "wine"}', 422),
        (b'{"model": "wine", "inputs": [[1]], "more": 1}', 422),
        (b'{"model": "wine", "inputs": [[NaN]]}', 400),
        (b'{"model": "wine", "inputs": [[1e999]]}', 400),
        (b'{"model": "wine", "inputs": [[1e39]]}', 400),
        (b'{"model": "wine", "inputs": [["1"]]}', 400),
        (b'{"model": "wine", "inputs": [[1], [1, 2]]}', 400),
        (b'{"model": "wine", "inputs": []}', 400),
        (b'{"model": "wine", "inputs": [[null]]}', 400),
        (b'{"model": "wine", "inputs": [[1]], "dtype": "object"}', 400),
        (b'{"model": "wine", "inputs": [[300]], "dtype": "uint8"}', 400),
        (b'{"model": "wine", "model": "wine", "inputs": [[1]]}', 400),
        (b'{"model": "wine", "inputs": "' + b"[" * 2000 + b'"}', 400),
        (b'{"model": "wine", "inputs": ' + b"[" * 500 + b"1" + b"]" * 500 + b"}", 400),
        (b'{"model": "wine", "inputs": ' + b"[" * 99999 + b"}", 400),
        (b'{"model": "wine", "inputs": [[1]], "timeout_s": 0}', 422),
        (b'{"model": "wine", "inputs": [[1]], "timeout_s": 21}', 400),
        (b'{"model": "wine", "inputs": [[1]], "wait_s": true}', 422),
        (b'{"model": "\\ud800", "inputs": [[1]]}', 400),
        (b'{"model": "none", "inputs": [[1]]}', 404),
        (b'{"model": "sealed-only", "inputs": [[1]]}', 403),
        (b'{"model": "wine", "inputs": [[' + b"9" * 5000 + b"]]}", 400),
    ],
    ids=[
        *("empty", "cut", "list", "no-inputs", "unknown-field", "nan", "overflow", "too-large"),
        *("text", "ragged", "no-rows", "null", "dtype", "range", "twice", "brackets-in-text"),
        *("deep", "very-deep", "no-time", "too-long", "bool", "surrogate", "no-model"),
        *("not-in-clear", "long-number"),
    ],
)
def test_bad_json_is_refused(client, board, body, status):
    headers = {"Content-Type": "application/json"}
    reply = run(client.post("/v1/query", content=body, headers=headers))
    assert reply.status_code == status, reply.text
    assert set(reply.json()["error"]) == {"code", "type", "message", "hint"}
    assert not board.requests


def test_other_bodies_are_refused(client):
    reply = run(client.post("/v1/query", content=b"a=1", headers={"Content-Type": "text/plain"}))
    assert reply.status_code == 415


def test_query_that_takes_longer_is_accepted_and_watched(client, board):
    board.answering = False

    async def ask():
        reply = await client.post("/v1/query", json=QUERY | {"wait_s": 0})
        assert reply.status_code == 202
        job_id = reply.json()["id"]
        assert reply.headers["location"] == f"/v1/queries/{job_id}"
        waiting = asyncio.create_task(client.get(f"/v1/queries/{job_id}?wait_s=20"))
        while not board.n_listeners():
            await asyncio.sleep(0.01)
        await asyncio.to_thread(board.finish, job_id)
        assert (await waiting).json()["state"] == "done"
        assert (await client.get(f"/v1/queries/{job_id}/answer")).json()["labels"] == ["a", "a"]

    run(ask())
    assert board.n_listeners() == 0


def test_receipt_is_passed_on(client, board):
    board.answering = False

    async def ask():
        job_id = (await client.post("/v1/query", json=QUERY | {"wait_s": 0})).json()["id"]
        assert (await client.get(f"/v1/queries/{job_id}/receipt")).status_code == 202
        board.finish(job_id, receipt=b'{"signed": true}')
        assert (await client.get(f"/v1/queries/{job_id}/receipt")).json() == {"signed": True}

    run(ask())


def test_query_without_receipt_says_so(client):
    async def ask():
        job_id = (await client.post("/v1/query", json=QUERY)).json()["id"]
        return await client.get(f"/v1/queries/{job_id}/receipt")

    assert run(ask()).status_code == 404


def test_failed_query_has_the_status_of_its_error(client, board):
    board.answering = False
    error = Job.error_facts(QuorumNotMetError("1 of 3 sites answered", hint="ask later"))

    async def ask():
        job_id = (await client.post("/v1/query", json=QUERY | {"wait_s": 0})).json()["id"]
        board.finish(job_id, state=JobState.FAILED, error=error)
        looked = await client.get(f"/v1/queries/{job_id}")
        return job_id, looked, await client.get(f"/v1/queries/{job_id}/answer")

    job_id, looked, answer = run(ask())
    assert looked.status_code == 200
    assert looked.json()["error"]["code"] == "FI402"
    assert answer.status_code == 503
    assert answer.json()["error"] == error | {"query_id": job_id}


def test_query_is_called_off_by_its_owner_alone(client, board, app, keys, bearer, client_of):
    board.answering = False
    other = client_of(app, bearer(keys.create("other", scopes=["query"])))

    async def ask():
        job_id = (await client.post("/v1/query", json=QUERY | {"wait_s": 0})).json()["id"]
        for part in ("", "/answer", "/receipt", "/events"):
            reply = await other.get(f"/v1/queries/{job_id}{part}")
            assert (reply.status_code, reply.json()["error"]["code"]) == (404, "FI418")
        assert (await other.delete(f"/v1/queries/{job_id}")).status_code == 404
        assert (await client.delete(f"/v1/queries/{job_id}")).json()["state"] == "cancelled"
        answer = await client.get(f"/v1/queries/{job_id}/answer")
        assert (answer.status_code, answer.json()["error"]["code"]) == (409, "FI416")

    run(ask())


def test_idempotency_key_gives_one_job(client, board):
    headers = {"Idempotency-Key": "once"}

    async def ask():
        first = await client.post("/v1/query", json=QUERY, headers=headers)
        again = await client.post("/v1/query", json=QUERY, headers=headers)
        other = await client.post("/v1/query", json=QUERY | {"inputs": [[9.0]]}, headers=headers)
        return first.json()["id"], again.json()["id"], other

    first, again, other = run(ask())
    assert first == again
    assert len(board.requests) == 1
    assert (other.status_code, other.json()["error"]["code"]) == (409, "FI303")


@pytest.mark.parametrize("text", ["ü", "a b", "x" * 256], ids=["umlaut", "space", "long"])
def test_odd_idempotency_keys_are_refused(client, text):
    headers = {"Idempotency-Key": text.encode()}
    assert run(client.post("/v1/query", json=QUERY, headers=headers)).status_code == 422


# -- events ------------------------------------------------------------------------------


def events_of(text):
    blocks = [block for block in text.split("\n\n") if block]
    lines = [dict(line.split(": ", 1) for line in b.split("\n")) for b in blocks]
    return [(line.get("event"), json.loads(line.get("data", "null"))) for line in lines]


def test_events_tell_progress_and_then_the_answer(client, board):
    board.answering = False

    async def ask():
        job_id = (await client.post("/v1/query", json=QUERY | {"wait_s": 0})).json()["id"]
        listening = asyncio.create_task(client.get(f"/v1/queries/{job_id}/events"))
        while not board.n_listeners():
            await asyncio.sleep(0.01)
        await asyncio.sleep(0.05)
        progress = Progress(rows=2, sites_asked=3, sites_answered=1)
        board.change(job_id, state=JobState.ASKING, progress=progress)
        await asyncio.sleep(0.05)
        board.finish(job_id)
        return (await listening).text

    events = events_of(run(ask()))
    assert [name for name, _ in events] == ["progress", "progress", "answer"]
    assert events[1][1]["progress"]["sites_answered"] == 1
    assert events[0][1]["answer"] is None
    assert events[2][1]["answer"]["labels"] == ["a", "a"]
    assert board.n_listeners() == 0


def test_events_of_a_failed_query_end_with_its_error(client, board):
    board.answering = False

    async def ask():
        job_id = (await client.post("/v1/query", json=QUERY | {"wait_s": 0})).json()["id"]
        error = Job.error_facts(QuorumNotMetError("too few"))
        board.finish(job_id, state=JobState.FAILED, error=error)
        return (await client.get(f"/v1/queries/{job_id}/events")).text

    [(name, value)] = events_of(run(ask()))
    assert (name, value["error"]["code"]) == ("error", "FI402")


# -- models, health ----------------------------------------------------------------------


def test_models_have_the_shape_that_openai_clients_read(client, keys, app, bearer, client_of):
    listed = run(client.get("/v1/models")).json()
    assert listed["object"] == "list"
    assert {m["id"] for m in listed["data"]} == {"wine", "sealed-only"}
    assert {m["owned_by"] for m in listed["data"]} == {"federation"}
    narrow = client_of(app, bearer(keys.create("narrow", scopes=["query"], models=["wine"])))
    assert [m["id"] for m in run(narrow.get("/v1/models")).json()["data"]] == ["wine"]
    narrow = client_of(app, bearer(keys.create("narrow", scopes=["query"], models=["wine"])))
    assert run(narrow.get("/v1/models/sealed-only")).status_code == 404


def test_directory_is_passed_on(client):
    async def ask():
        return (
            await client.get("/v1/models/wine/directory"),
            await client.get("/v1/models/none/directory"),
        )

    found, missing = run(ask())
    assert found.content == b"directory bytes"
    assert missing.status_code == 404


def test_health_and_readiness_need_no_key(app, board, client_of):
    async def ask():
        async with client_of(app) as client:
            health, ready = await client.get("/health"), await client.get("/ready")
            board.is_ready, board.why = False, "closing"
            return health, ready, await client.get("/ready")

    health, ready, closing = run(ask())
    assert health.json() == {"ok": True}
    assert ready.json() == {"ready": True, "why": ""}
    assert closing.status_code == 503
    assert closing.json() == {"ready": False, "why": "closing"}


@pytest.mark.parametrize("public", [True, False], ids=["public", "with-key"])
def test_metrics_are_public_only_where_that_is_set(
    board, keys, public, client_of, tmp_path, key, bearer
):
    own = {"public_metrics": public, "state": "state"}
    config = GatewayConfig.from_mapping({"gateway": own, "models": {"wine": {}}}, folder=tmp_path)
    app = create_app(board, config, keys=keys, metrics=GatewayMetrics())

    async def ask():
        async with client_of(app) as client:
            with_key = await client.get("/metrics", headers=bearer(key))
            return await client.get("/metrics"), with_key

    bare, with_key = run(ask())
    assert with_key.status_code in (200, 501)  # prometheus_client may not be installed
    assert bare.status_code == (with_key.status_code if public else 401)


@pytest.mark.parametrize(
    ("error", "status"),
    [(QuotaExceededError("the queue is full"), 429), (UnavailableError("closing"), 503)],
    ids=["full", "closing"],
)
def test_refusals_of_the_board_say_when_to_come_back(client, board, error, status):
    board.error = error
    reply = run(client.post("/v1/query", json=QUERY))
    assert reply.status_code == status
    assert int(reply.headers["retry-after"]) >= 1


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [("GET", "/none", 404), ("GET", "/v1/none", 404), ("PUT", "/v1/query", 405)],
)
def test_unknown_routes_answer_in_the_same_shape(client, method, path, status):
    reply = run(client.request(method, path))
    assert reply.status_code == status
    assert set(reply.json()["error"]) == {"code", "type", "message", "hint"}


def test_methods_of_a_path_are_all_named(client):
    reply = run(client.request("PUT", f"/v1/queries/{'0' * 32}"))
    assert reply.headers["allow"] == "DELETE, GET"


def test_openai_routes_have_the_errors_that_their_clients_read(app, client_of):
    async def ask():
        async with client_of(app) as client:
            return await client.post("/v1/chat/completions", json={})

    assert set(run(ask()).json()["error"]) == {"message", "type", "param", "code"}


def test_schema_names_every_route_and_its_errors(client):
    schema = run(client.get("/openapi.json")).json()
    query = schema["paths"]["/v1/query"]["post"]
    assert {"200", "202", "400", "401", "403", "413", "415", "422", "429", "503"} <= set(
        query["responses"]
    )
    assert set(query["requestBody"]["content"]) == {
        "application/json",
        "application/octet-stream",
        "application/vnd.fedinfer.sealed-job",
    }
    assert "HTTPValidationError" not in json.dumps(schema)
