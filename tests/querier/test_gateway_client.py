"""`Gateway` against the gateway's own HTTP application, with and without faults."""

from __future__ import annotations

import asyncio
import dataclasses
import json
import time

import numpy as np
import pytest

from fedinfer_flower.errors import (
    AuthenticationError,
    BindingError,
    EnvelopeError,
    FedInferError,
    GatewayError,
    InvalidScoresError,
    InvalidValueError,
    ProtocolError,
    QueryCancelledError,
    QuorumNotMetError,
    QuotaExceededError,
    ReceiptError,
    ShapeError,
    SizeLimitError,
    UnknownQueryError,
    UntrustedKeyError,
)
from fedinfer_flower.querier.async_gateway_client import AsyncGateway
from fedinfer_flower.querier.gateway_client import Gateway
from fedinfer_flower.serving.jobs import Job, JobState
from fedinfer_flower.wire.pins import Pins

from .conftest import CLASSES, LABELS, ROWS, changes, drops, replies

SEALED_ANSWER = "/v1/queries/"


@pytest.fixture
def gateway(site):
    with Gateway(site.url, api_key=site.key, timeout_s=20.0) as found:
        yield found


def problem(code: str, message: str = "words", **more: str) -> bytes:
    return json.dumps({"error": {"code": code, "message": message, **more}}).encode()


# -- what it is for ----------------------------------------------------------------------


@pytest.mark.parametrize("seal", [True, False], ids=["sealed", "clear"])
def test_ask_returns_the_joint_answer(gateway, seal):
    answer = gateway.ask(ROWS, model="triage", seal=seal)
    assert answer.prediction.labels.tolist() == LABELS.tolist()
    assert answer.prediction.classes == CLASSES
    assert answer.provenance["sites_asked"] == 3
    assert answer.asked_times == 1


def test_sealed_answer_comes_with_a_receipt_that_was_checked(gateway):
    pins = Pins(
        sites={card.profile.name: card.key_id for card in gateway.directory("triage").cards}
    )
    answer = gateway.ask(ROWS, model="triage", pins=pins)
    assert answer.checks is not None
    assert answer.checks.ok
    assert [check.name for check in answer.checks.not_checked] == ["coordinator", "querier pin"]
    assert answer.checks.receipt.batches[0].n_rows == len(ROWS)


def test_gateway_sees_no_row_of_a_sealed_query(gateway, site):
    bodies = []
    submit = type(site.board).submit
    site.board.submit = lambda request: bodies.append(request.body) or submit(site.board, request)
    try:
        gateway.ask(ROWS, model="triage")
        gateway.ask(ROWS, model="triage", seal=False)
    finally:
        del site.board.submit
    assert [ROWS[0].tobytes() in body for body in bodies] == [False, True]


def test_directory_with_a_site_that_is_not_pinned_is_refused(gateway):
    with pytest.raises(UntrustedKeyError):
        gateway.directory("triage", pins=Pins(sites={"site-0": "0" * 64}))
    with pytest.raises(UntrustedKeyError):
        gateway.ask(ROWS, model="triage", pins=Pins(sites={"site-0": "0" * 64}))


def test_models_are_listed(gateway):
    [model] = gateway.models()
    assert (model.name, model.kind, model.protection) == ("triage", "classifier", "secagg")


def test_models_are_asked_for_once_in_a_minute(gateway, site):
    for _ in range(3):
        gateway.ask(ROWS, model="triage")
    assert [path for _, path, _ in site.faults.seen].count("/v1/models") == 1


def test_progress_is_told_until_the_end(gateway, site):
    site.board.hold_s = 0.7
    told = []
    gateway.ask(ROWS, model="triage", seal=False, on_progress=told.append)
    assert told[0].state == "accepted"
    assert (told[-1].state, told[-1].sites_answered) == ("done", 3)


def test_submitted_query_is_waited_for_later(gateway, site):
    site.board.hold_s = 0.2
    pending = gateway.submit(ROWS, model="triage")
    assert pending.wait().prediction.labels.tolist() == LABELS.tolist()
    assert pending.wait().job_id == pending.job_id


def test_submitted_query_can_be_called_off(gateway, site):
    site.board.hold_s = 60.0
    pending = gateway.submit(ROWS, model="triage")
    assert pending.cancel().state == "cancelled"
    with pytest.raises(QueryCancelledError):
        pending.wait()


def test_async_gateway_does_the_same(site):
    async def both():
        async with AsyncGateway(site.url, api_key=site.key, timeout_s=20.0) as gateway:
            asked = await asyncio.gather(
                gateway.ask(ROWS, model="triage"), gateway.ask(ROWS, model="triage", seal=False)
            )
            pending = await gateway.submit(ROWS, model="triage")
            return [*asked, await pending.wait()], await gateway.directory("triage")

    answers, directory = asyncio.run(both())
    assert [a.prediction.labels.tolist() for a in answers] == [LABELS.tolist()] * 3
    assert len(directory.cards) == 3


def test_async_gateway_repeats_and_raises_the_same_errors(site):
    async def asked(fault, **options):
        site.faults.on("POST", "/v1/query", fault)
        async with AsyncGateway(site.url, api_key=site.key, timeout_s=20.0) as gateway:
            return await gateway.ask(ROWS, model="triage", **options)

    assert len(asyncio.run(asked(drops)).prediction) == len(ROWS)
    with pytest.raises(QuorumNotMetError):
        asyncio.run(asked(replies(503, problem("FI402", query_id="0" * 32))))
    pending = []

    async def called_off():
        site.board.hold_s = 60.0
        async with AsyncGateway(site.url, api_key=site.key, timeout_s=20.0) as gateway:
            pending.append(await gateway.submit(ROWS, model="triage"))
            return await pending[0].cancel()

    assert asyncio.run(called_off()).state == "cancelled"


# -- the network fails -------------------------------------------------------------------


@pytest.mark.parametrize("seal", [True, False], ids=["sealed", "clear"])
def test_reply_cut_off_is_asked_for_again_under_the_same_key(gateway, site, seal):
    site.faults.on("POST", "/v1/query", drops)
    answer = gateway.ask(ROWS, model="triage", seal=seal)
    assert len(answer.prediction) == len(ROWS)
    first, second = site.faults.keys_used()
    assert first == second
    assert site.board.submitted == 1


@pytest.mark.parametrize(
    "fault",
    [
        replies(503, problem("FI417")),
        replies(502, b"<html>bad gateway</html>"),
        replies(504),
        replies(429, problem("FI415"), retry_after="0"),
    ],
    ids=["unavailable", "proxy", "no body", "quota"],
)
def test_busy_gateway_is_asked_again(gateway, site, fault):
    site.faults.on("POST", "/v1/query", fault, times=2)
    assert len(gateway.ask(ROWS, model="triage").prediction) == len(ROWS)
    assert len(set(site.faults.keys_used())) == 1
    assert len(site.faults.keys_used()) == 3


def test_long_retry_after_ends_the_query_at_once(gateway, site):
    site.faults.on("POST", "/v1/query", replies(429, problem("FI415"), retry_after="3600"))
    with pytest.raises(QuotaExceededError):
        gateway.ask(ROWS, model="triage")
    assert len(site.faults.keys_used()) == 1


def test_what_a_query_ended_with_is_not_asked_again(gateway, site):
    fault = replies(503, problem("FI402", query_id="0" * 32))
    site.faults.on("POST", "/v1/query", fault)
    with pytest.raises(QuorumNotMetError, match="the gateway: words"):
        gateway.ask(ROWS, model="triage")
    assert len(site.faults.keys_used()) == 1


def test_answer_cut_off_is_fetched_again(gateway, site):
    site.faults.on("GET", "/v1/queries/", drops, times=2)
    assert len(gateway.ask(ROWS, model="triage").prediction) == len(ROWS)


def test_gateway_that_is_not_there_is_a_typed_error():
    gateway = Gateway("http://127.0.0.1:9", api_key="fik_x", timeout_s=5.0, retries=1)
    with pytest.raises(GatewayError, match="ConnectError"):
        gateway.models()


def test_slow_gateway_ends_by_the_time_given(gateway, site):
    async def slow(app, scope, receive, send):
        await asyncio.sleep(3.0)

    site.faults.on("POST", "/v1/query", slow, times=9)
    began = time.monotonic()
    with pytest.raises(GatewayError):
        gateway.ask(ROWS, model="triage", timeout_s=0.6)
    assert time.monotonic() - began < 2.5  # before the slow server would have answered


def test_trickling_reply_ends_by_the_time_given(gateway, site):
    async def trickle(app, scope, receive, send):
        await send({"type": "http.response.start", "status": 200, "headers": []})
        for _ in range(60):
            await send({"type": "http.response.body", "body": b" ", "more_body": True})
            await asyncio.sleep(0.05)

    site.faults.on("GET", "/v1/models", trickle, times=9)
    with (
        Gateway(site.url, api_key=site.key, timeout_s=0.5) as fresh,
        pytest.raises(GatewayError),
    ):
        fresh.models()


# -- another run -------------------------------------------------------------------------


def test_job_of_an_ended_run_is_sealed_anew_under_another_key(gateway, site):
    submit = type(site.board).submit

    def restarts_once(request):
        del site.board.submit
        site.board.restart()
        return submit(site.board, request)

    site.board.submit = restarts_once
    answer = gateway.ask(ROWS, model="triage")
    assert answer.asked_times == 2
    assert answer.prediction.labels.tolist() == LABELS.tolist()
    first, second = site.faults.keys_used()
    assert first != second


def test_job_of_an_ended_run_is_not_sealed_anew_when_told_not_to(gateway, site):
    site.board.hold_s = 0.3
    pending = gateway.submit(ROWS, model="triage", reseals=0)
    site.board.restart()
    with pytest.raises(BindingError):
        pending.wait()
    assert site.board.submitted == 1


def test_pending_job_of_an_ended_run_is_sealed_anew(gateway, site):
    site.board.hold_s = 0.3
    pending = gateway.submit(ROWS, model="triage")
    site.board.restart()
    assert pending.wait().asked_times == 2


def test_binding_error_in_the_same_run_is_not_sealed_anew(gateway, site):
    site.faults.on("POST", "/v1/query", replies(409, problem("FI303")), times=3)
    with pytest.raises(BindingError):
        gateway.ask(ROWS, model="triage")
    assert len(site.faults.keys_used()) == 1


# -- the gateway lies --------------------------------------------------------------------


def flipped(data: bytes) -> bytes:
    return data[:-9] + bytes([data[-9] ^ 1]) + data[-8:]


def test_tampered_combined_answer_is_refused(gateway, site):
    site.board.edit = lambda job: dataclasses.replace(job, answer=flipped(job.answer))
    with pytest.raises(ProtocolError):
        gateway.ask(ROWS, model="triage")


def test_answer_to_another_job_is_refused(gateway, site):
    kept = []

    def first_for_all(job: Job) -> Job:
        kept.append(job.answer)
        return dataclasses.replace(job, answer=kept[0])

    site.board.edit = first_for_all
    gateway.ask(ROWS, model="triage")
    with pytest.raises(BindingError):
        gateway.ask(ROWS, model="triage", reseals=0)


@pytest.mark.parametrize(
    ("old", "new"),
    [('"n_rows": 6', '"n_rows": 5'), ('"signature": "', '"signature": "00')],
    ids=["rows", "signature"],
)
def test_tampered_receipt_is_refused(gateway, site, old, new):
    def tampered(job: Job) -> Job:
        assert old in job.receipt.decode()
        return dataclasses.replace(job, receipt=job.receipt.decode().replace(old, new).encode())

    site.board.edit = tampered
    with pytest.raises(ProtocolError):
        gateway.ask(ROWS, model="triage")


def test_receipt_of_another_job_is_refused(gateway, site):
    kept = []

    def first_for_all(job: Job) -> Job:
        kept.append(job.receipt)
        return dataclasses.replace(job, receipt=kept[0])

    site.board.edit = first_for_all
    gateway.ask(ROWS, model="triage")
    with pytest.raises(ReceiptError, match="another job"):
        gateway.ask(ROWS, model="triage")
    assert len(gateway.ask(ROWS, model="triage", receipt="skip").prediction) == len(ROWS)


def test_missing_receipt_is_an_error_only_where_one_is_required(gateway, site):
    site.board.edit = lambda job: dataclasses.replace(job, receipt=b"")
    assert gateway.ask(ROWS, model="triage").checks is None
    with pytest.raises(ReceiptError):
        gateway.ask(ROWS, model="triage", receipt="require")


@pytest.mark.parametrize(
    ("change", "error"),
    [
        (lambda a: a["indices"].append(0), ShapeError),
        (lambda a: a["indices"].__setitem__(0, 3), ShapeError),
        (lambda a: a["labels"].__setitem__(0, "other"), ShapeError),
        (lambda a: a["probabilities"].__setitem__(0, [0.5, 0.5]), ShapeError),
        (lambda a: a["probabilities"].__setitem__(0, [9.0, 0.0, 0.0]), InvalidScoresError),
        (lambda a: a["probabilities"].__setitem__(0, [-1.0, 1.0, 1.0]), InvalidScoresError),
        (lambda a: a["probabilities"].__setitem__(0, ["1", 0, 0]), EnvelopeError),
        (lambda a: a["margin"].__setitem__(0, float("inf")), EnvelopeError),
        (lambda a: a["abstained"].__setitem__(0, 1), EnvelopeError),
        (lambda a: a["classes"].__setitem__(0, "1"), ShapeError),
        (lambda a: a.clear(), EnvelopeError),
    ],
    ids=[
        *("rows", "index", "label", "width", "sum", "negative", "text", "infinite"),
        *("flag", "twice", "empty"),
    ],
)
def test_answer_in_clear_is_read_as_a_strangers(gateway, site, change, error):
    def edited(job: Job) -> Job:
        answer = json.loads(job.answer)
        change(answer)
        return dataclasses.replace(job, answer=json.dumps(answer).encode())

    # Infinity is nothing that the server's JSON can carry: it is put in on the way.
    def on_the_way(body: bytes) -> bytes:
        plain = json.loads(body)
        change(plain["answer"])
        return json.dumps(plain).encode()

    site.faults.on("POST", "/v1/query", changes(on_the_way))
    with pytest.raises(error):
        gateway.ask(ROWS, model="triage", seal=False)


@pytest.mark.parametrize(
    "body",
    [b"", b"[]", b"nonsense", b"[" * 100_000, b'{"id": "x", "state": "done"}', b'{"id": 1}'],
    ids=["empty", "list", "words", "deep", "no id", "number"],
)
def test_reply_that_is_no_job_is_refused(gateway, site, body):
    site.faults.on("POST", "/v1/query", replies(200, body))
    with pytest.raises(EnvelopeError):
        gateway.ask(ROWS, model="triage", seal=False)


def test_reply_that_is_too_large_is_not_read_to_its_end(gateway, site):
    site.faults.on("GET", "/v1/models", replies(200, b" " * (5 << 20)))
    with pytest.raises(SizeLimitError):
        gateway.models()


def test_compressed_reply_is_refused(gateway, site):
    site.faults.on("GET", "/v1/models", replies(200, b"x", content_encoding="gzip"))
    with pytest.raises(GatewayError, match="compressed"):
        gateway.models()


@pytest.mark.parametrize("status", [301, 302, 307, 308])
def test_redirect_is_not_followed(gateway, site, status):
    elsewhere = replies(status, location=f"{site.url}/v1/models")
    site.faults.on("GET", "/v1/models", elsewhere)
    with pytest.raises(GatewayError, match="redirect"):
        gateway.models()
    assert len(site.faults.seen) == 1


def test_error_text_of_the_gateway_is_bounded_and_clean(gateway, site):
    text = "\x1b[2J" + "x" * 10_000
    site.faults.on("GET", "/v1/models", replies(400, problem("FI202", text, hint=text)))
    with pytest.raises(InvalidValueError) as caught:
        gateway.models()
    assert len(str(caught.value)) < 1200
    assert "\x1b" not in str(caught.value)


@pytest.mark.parametrize("code", ["FI999", "", "__class__", 7, None])
def test_error_code_that_nobody_knows_is_still_typed(gateway, site, code):
    body = json.dumps({"error": {"code": code, "message": "words"}}).encode()
    site.faults.on("GET", "/v1/models", replies(400, body))
    with pytest.raises(FedInferError):
        gateway.models()


def test_failed_job_raises_its_error(gateway, site):
    error = Job.error_facts(QuorumNotMetError("two of five", hint="ask later"))
    site.board.edit = lambda job: dataclasses.replace(job, state=JobState.FAILED, error=error)
    with pytest.raises(QuorumNotMetError, match="two of five"):
        gateway.ask(ROWS, model="triage")
    pending = gateway.submit
    site.board.hold_s = 0.1
    with pytest.raises(QuorumNotMetError, match="two of five"):
        pending(ROWS, model="triage").wait()


# -- who asks, and what ------------------------------------------------------------------


def test_unknown_key_is_refused(site):
    other = site.key[:-4] + "AAAA"
    with Gateway(site.url, api_key=other) as gateway, pytest.raises(AuthenticationError):
        gateway.models()


def test_result_of_another_key_is_not_there(gateway, site):
    pending = gateway.submit(ROWS, model="triage")
    key = site.store.create("other", scopes=["query", "sealed"])
    with Gateway(site.url, api_key=key) as other:
        pending._gateway = other
        with pytest.raises(UnknownQueryError):
            pending.cancel()


@pytest.mark.parametrize(
    "options",
    [
        {"model": "other"},
        {"model": "../x"},
        {"model": "triage", "receipt": "maybe"},
        {"model": "triage", "reseals": 9},
        {"model": "triage", "seal": False, "protection": "he"},
        {"model": "triage", "idempotency_key": "a b"},
        {"model": "triage", "timeout_s": 0.0},
    ],
    ids=["model", "path", "receipt", "reseals", "clear", "key", "time"],
)
def test_wrong_options_are_refused_before_anything_is_sent(gateway, site, options):
    with pytest.raises(InvalidValueError):
        gateway.ask(ROWS, **options)
    assert not site.faults.keys_used()


@pytest.mark.parametrize(
    "rows",
    [np.zeros(4), np.zeros((0, 4)), np.full((1, 4), np.nan), np.array([["a"]])],
    ids=["one row", "none", "nan", "text"],
)
@pytest.mark.parametrize("seal", [True, False], ids=["sealed", "clear"])
def test_rows_that_do_not_travel_are_refused(gateway, site, rows, seal):
    with pytest.raises(InvalidValueError):
        gateway.ask(rows, model="triage", seal=seal)
    assert not site.faults.keys_used()


def test_same_idempotency_key_in_clear_is_one_job(gateway, site):
    first, second = (
        gateway.ask(ROWS, model="triage", seal=False, idempotency_key="mine") for _ in range(2)
    )
    assert first.job_id == second.job_id
    assert site.board.submitted == 1
