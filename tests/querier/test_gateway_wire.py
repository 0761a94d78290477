"""Talks without a socket: repetitions, waiting, errors; addresses and keys."""

from __future__ import annotations

import contextlib
import copy
import json
import pickle

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedinfer_flower.errors import (
    ConfigError,
    EnvelopeError,
    FedInferError,
    GatewayError,
    ProtocolError,
    UnavailableError,
)
from fedinfer_flower.querier.async_gateway_client import AsyncGateway
from fedinfer_flower.querier.gateway_client import Gateway
from fedinfer_flower.querier.gateway_job import ModelMemory, read_job, read_models, read_prediction
from fedinfer_flower.querier.gateway_wire import Call, Pause, Reply, Terms, exchange, typed_error

KEY = "fik_0a1b2c3d_" + "s" * 43
BUSY = Reply(status=503, body=b'{"error": {"code": "FI417", "message": "not now"}}')
FINE = Reply(status=200, body=b"{}")


class Clock:
    """Seconds that pass only when a talk waits."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def carried_out(replies, *, timeout_s=60.0, retries=4, call=None):
    """Return (result or error, steps) of an exchange that is given these replies."""
    clock = Clock()
    terms = Terms(timeout_s=timeout_s, retries=retries, clock=clock, draw=lambda: 1.0)
    talk, steps, reply = exchange(call or Call(method="GET", path="/x"), terms), [], None
    try:
        while True:
            step = talk.send(reply)
            steps.append(step)
            if isinstance(step, Pause):
                clock.now += step.seconds
                reply = None
            else:
                clock.now += 0.01
                reply = replies.pop(0)
    except StopIteration as stop:
        return stop.value, steps
    except FedInferError as exc:
        return exc, steps


def pauses(steps):
    return [step.seconds for step in steps if isinstance(step, Pause)]


def test_exchange_waits_longer_each_time_and_ends_with_the_last_error():
    found, steps = carried_out([BUSY] * 9)
    assert type(found) is UnavailableError
    assert pauses(steps) == [0.25, 0.5, 1.0, 2.0]


def test_exchange_waits_at_least_as_long_as_it_is_told():
    told = Reply(status=503, body=BUSY.body, headers={"retry-after": "7"})
    found, steps = carried_out([told, FINE])
    assert found is FINE
    assert pauses(steps) == [7.25]


def test_exchange_does_not_wait_beyond_the_time_given():
    told = Reply(status=503, body=BUSY.body, headers={"retry-after": "7"})
    found, steps = carried_out([told, FINE], timeout_s=5.0)
    assert type(found) is UnavailableError
    assert pauses(steps) == []


def test_exchange_gives_each_call_no_more_time_than_is_left():
    _, steps = carried_out([Reply(lost="ReadTimeout"), FINE], timeout_s=2.0)
    calls = [step for step in steps if isinstance(step, Call)]
    assert [round(call.timeout_s, 2) for call in calls] == [2.0, 1.74]


@pytest.mark.parametrize(
    "reply",
    [
        Reply(status=400, body=BUSY.body),
        Reply(status=500),
        Reply(status=503, body=b'{"id": "a", "error": {"code": "FI417"}}'),
        Reply(status=503, body=b'{"error": {"code": "FI402", "query_id": "a"}}'),
        Reply(status=503, body=b'{"error": {"code": "FI417", "query_id": "a"}}'),
    ],
    ids=["bad request", "internal", "job", "quorum", "ended"],
)
def test_exchange_repeats_nothing_that_would_end_the_same(reply):
    found, steps = carried_out([reply])
    assert isinstance(found, FedInferError)
    assert len(steps) == 1


@pytest.mark.parametrize(
    "after", ["-1", "1e9", "inf", "nonsense", "9" * 40, "Wed, 99 Foo 2100 00:00:00 GMT", "²"]
)
def test_retry_after_of_any_form_is_survived(after):
    told = Reply(status=503, body=BUSY.body, headers={"retry-after": after})
    found, _ = carried_out([told, FINE])
    assert found is FINE


@given(status=st.integers(0, 999), body=st.binary(max_size=200))
def test_any_reply_ends_in_a_typed_error(status, body):
    assert isinstance(typed_error(Reply(status=status, body=body)), FedInferError)


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner),
    max_leaves=12,
)
NAMES = ("id", "state", "n_rows", "progress", "answer", "provenance", "error", "data", "model")


@given(plain=st.dictionaries(st.sampled_from(NAMES), json_values))
def test_any_json_is_a_job_or_a_typed_error(plain):
    body = json.dumps(plain).encode()
    for read in (read_job, read_models):
        with contextlib.suppress(ProtocolError):
            read(body)


@given(
    answer=st.dictionaries(
        st.sampled_from(("classes", "labels", "indices", "probabilities", "margin", "abstained")),
        json_values,
    )
)
def test_any_json_is_an_answer_or_a_typed_error(answer):
    try:
        found = read_prediction(answer, n_rows=1)
    except ProtocolError:
        return
    assert len(found) == 1


def test_models_are_remembered_for_a_minute():
    clock = Clock()
    memory = ModelMemory(clock)
    [model] = read_models(b'{"data": [{"id": "a", "kind": "classifier", "timeout_s": 5}]}')
    memory.note([model])
    clock.now = 59.0
    assert memory.get("a") is model
    clock.now = 61.0
    assert memory.get("a") is None
    assert model.timeout_s == 5.0


def test_models_without_a_name_are_refused():
    with pytest.raises(EnvelopeError):
        read_models(b'{"data": [{"id": "../x", "kind": "classifier"}]}')


# -- addresses and keys ------------------------------------------------------------------


@pytest.mark.parametrize(
    "url",
    [
        *("http://gateway.example:8443", "http://10.0.0.7", "http://127.0.0.1.example"),
        *("ftp://gateway.example", "gateway.example", "", "https://", "https://[x"),
        *("https://key@gateway.example", "https://g.example/?key=1", "https://g.example/#x"),
        "http://localhost.example",
    ],
)
@pytest.mark.parametrize("kind", [Gateway, AsyncGateway], ids=["sync", "async"])
def test_address_that_would_show_the_key_is_refused(kind, url):
    with pytest.raises(ConfigError):
        kind(url, api_key=KEY)


@pytest.mark.parametrize(
    "url",
    ["https://gateway.example", "http://127.0.0.1:8443", "http://[::1]:1", "http://localhost"],
)
def test_address_with_tls_or_on_this_machine_is_taken(url):
    assert KEY not in repr(Gateway(url, api_key=KEY))


def test_insecure_address_is_taken_where_it_is_asked_for():
    assert repr(Gateway("http://gateway.example", api_key=KEY, insecure=True))


def test_key_comes_from_the_environment_or_a_file(monkeypatch, tmp_path):
    for name in ("FEDINFER_API_KEY", "FEDINFER_API_KEY_FILE"):
        monkeypatch.delenv(name, raising=False)
    url, file = "https://gateway.example", tmp_path / "key"
    with pytest.raises(ConfigError, match="no API key"):
        Gateway(url)
    monkeypatch.setenv("FEDINFER_API_KEY", KEY)
    assert Gateway(url)._access.key == KEY
    file.write_text(f"{KEY}2\n")
    file.chmod(0o600)
    assert Gateway(url, api_key_file=file)._access.key == KEY + "2"
    monkeypatch.delenv("FEDINFER_API_KEY")
    monkeypatch.setenv("FEDINFER_API_KEY_FILE", str(file))
    assert Gateway(url)._access.key == KEY + "2"
    file.chmod(0o644)
    with pytest.raises(ConfigError, match="read by others"):
        Gateway(url)
    with pytest.raises(ConfigError, match="one of both"):
        Gateway(url, api_key=KEY, api_key_file=file)


@pytest.mark.parametrize(
    "key", ["", "a\nb", "ü", "x" * 300], ids=["none", "line", "letter", "long"]
)
def test_key_that_is_none_is_refused_without_being_shown(key):
    with pytest.raises(ConfigError) as caught:
        Gateway("https://gateway.example", api_key=key)
    assert not key or key not in str(caught.value)


def test_certificate_that_cannot_be_read_is_a_typed_error(tmp_path):
    with pytest.raises(ConfigError, match="certificate"):
        Gateway("https://gateway.example", api_key=KEY, ca=tmp_path / "none.pem")


@pytest.mark.parametrize("kind", [Gateway, AsyncGateway], ids=["sync", "async"])
def test_key_does_not_travel_with_the_object(kind):
    gateway = kind("https://gateway.example", api_key=KEY)
    assert copy.deepcopy(gateway) is gateway
    with pytest.raises(TypeError, match="does not travel"):
        pickle.dumps(gateway)


def test_gateway_error_is_what_silence_ends_in():
    found, _ = carried_out([Reply(lost="ConnectError")] * 9)
    assert type(found) is GatewayError
