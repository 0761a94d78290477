"""Models behind an OpenAI-compatible server: a real one on loopback, with a real small model."""

from __future__ import annotations

import json
import logging
import math
import socket
import threading
import time
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest

from fedinfer_flower.clients.adapters import make_model
from fedinfer_flower.clients.adapters.openai import chat, detect
from fedinfer_flower.clients.adapters.upstream import Upstream, read_api_key
from fedinfer_flower.clients.site_model import prepare
from fedinfer_flower.errors import (
    FedInferError,
    InvalidValueError,
    ModelAnswerError,
    ModelError,
)
from fedinfer_flower.query import CountsKind
from fedinfer_flower.wire.text_rows import text_rows

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

import uvicorn  # noqa: E402
from fastapi import FastAPI, Request  # noqa: E402
from fastapi.responses import JSONResponse, Response  # noqa: E402

CANARY = "canary-7f31"
KEY = "key-" + "5" * 20
QUESTIONS = [f"who is {CANARY} ?", "the of is", "is is is is"]
CANDIDATES = ["butor", "the is", "of"]
"""One of them is two tokens."""


class TinyServer:
    """Speak the protocol as one of three servers does, with a model of the package.

    `manner`: ``"vllm"`` tells a prompt's tokens, ``"vllm-0.4"`` not with ``max_tokens`` 0,
    ``"vllm-chat"`` by ``prompt_logprobs`` only; ``"llama.cpp"`` refuses ``echo`` and has the
    form of chat completions; ``"deaf"`` ignores what it does not know.
    """

    def __init__(self, manner: str) -> None:
        from fedinfer_flower.simulation.facts.checkpoints import load

        self.manner, self.language = manner, load("qwen3")
        self.seen: list[dict[str, Any]] = []
        self.keys: list[str] = []
        self.spoil: Any = None
        self.statuses: list[int] = []
        self.lock = threading.Lock()

    def app(self) -> FastAPI:
        app = FastAPI()

        @app.post("/v1/completions")
        def completions(body: dict[str, Any], request: Request) -> Response:
            return self.reply(body, request, self.completions)

        @app.post("/v1/chat/completions")
        def chats(body: dict[str, Any], request: Request) -> Response:
            return self.reply(body, request, self.chats)

        return app

    def reply(self, body: dict[str, Any], request: Request, work: Any) -> Response:
        with self.lock:
            self.seen.append(body)
            self.keys.append(request.headers.get("authorization", ""))
            status = self.statuses.pop(0) if self.statuses else 200
            if status != 200:
                text = f"failed on {body}"
                return JSONResponse({"error": text}, status, headers={"location": "/elsewhere"})
            try:
                content = work(body)
            except ValueError as exc:
                return JSONResponse({"error": f"{exc}: {body}"}, 400)
            data = json.dumps(content) if self.spoil is None else self.spoil(content)
            return Response(data, media_type="application/json")

    @torch.no_grad()
    def completions(self, body: dict[str, Any]) -> dict[str, Any]:
        if self.manner == "llama.cpp" and body.get("echo"):
            raise ValueError("Only no echo is supported")
        if self.manner == "vllm-0.4" and not body["max_tokens"]:
            raise ValueError("max_tokens must be at least 1")
        tokenizer = self.language.tokenizer
        ids = tokenizer(body["prompt"])["input_ids"]
        logp = self.language.model(torch.tensor([ids])).logits[0].double().log_softmax(-1)
        best = int(logp[-1].argmax())
        echo = bool(body.get("echo")) and self.manner in ("vllm", "vllm-0.4")
        told = ids if echo else []
        values = [None, *(float(logp[i, t]) for i, t in enumerate(ids[1:]))] if echo else []
        if body["max_tokens"]:
            told, values = [*told, best], [*values, float(logp[-1, best])]
        choice: dict[str, Any] = {
            "index": 0,
            "text": (body["prompt"] if echo else "") + tokenizer.decode(told[-1:]),
            "finish_reason": "length",
        }
        if echo and not body["max_tokens"]:
            choice["text"] = body["prompt"]
        if body.get("logprobs"):
            n = min(int(body["logprobs"]), logp.shape[1])
            top = logp[-1].topk(n)
            pairs = [
                (tokenizer.decode([t]), v)
                for v, t in zip(*map(torch.Tensor.tolist, top), strict=True)
            ]
            if self.manner == "llama.cpp":
                entry = {"token": pairs[0][0], "logprob": pairs[0][1]}
                entry["top_logprobs"] = [{"token": t, "logprob": v, "id": 1} for t, v in pairs]
                choice["logprobs"] = {"content": [entry]}
            else:
                choice["logprobs"] = {
                    "tokens": tokenizer.convert_ids_to_tokens(told),
                    "token_logprobs": values,
                    "top_logprobs": [None] * (len(told) - 1) + [dict(pairs)],
                }
        if "prompt_logprobs" in body and self.manner == "vllm-chat":
            choice["prompt_logprobs"] = [
                None,
                *(
                    {str(t): {"logprob": float(logp[i, t]), "rank": 1, "decoded_token": "x"}}
                    for i, t in enumerate(ids[1:])
                ),
            ]
        return {"object": "text_completion", "choices": [choice]}

    def chats(self, body: dict[str, Any]) -> dict[str, Any]:
        from fedinfer_flower.language.decoding import Decoding

        n = body["max_tokens"]
        (text,) = self.language.generate(
            [body["messages"][-1]["content"]], Decoding(max_new_tokens=n)
        )
        message = {"role": "assistant", "content": text}
        return {"choices": [{"index": 0, "message": message, "finish_reason": "length"}]}


@contextmanager
def running(manner: str):
    tiny = TinyServer(manner)
    listener = socket.socket()
    listener.bind(("127.0.0.1", 0))
    config = uvicorn.Config(tiny.app(), log_config=None, lifespan="off", ws="none")
    server = uvicorn.Server(config)
    thread = threading.Thread(target=lambda: server.run(sockets=[listener]), daemon=True)
    thread.start()
    until = time.monotonic() + 30
    while not server.started:
        assert thread.is_alive(), "the server ended"
        assert time.monotonic() < until, "the server did not start"
        time.sleep(0.01)
    tiny.url = f"http://127.0.0.1:{listener.getsockname()[1]}/v1"
    try:
        yield tiny
    finally:
        server.should_exit = True
        thread.join(20)
        listener.close()


@pytest.fixture(scope="module", params=["vllm", "vllm-0.4", "vllm-chat"])
def exact(request):
    with running(request.param) as tiny:
        yield tiny


@pytest.fixture(scope="module")
def shared_tiny():
    with running("vllm") as tiny:
        yield tiny


@pytest.fixture
def tiny(shared_tiny):
    shared_tiny.seen.clear()
    shared_tiny.keys.clear()
    yield shared_tiny
    shared_tiny.spoil, shared_tiny.statuses = None, []


def options(tiny, **more) -> dict[str, Any]:
    return {"url": tiny.url, "model": "tiny", "candidates": CANDIDATES, **more}


def rows(texts, after=None):
    return text_rows(texts, after or [""] * len(texts))


def upstream(tiny, **more) -> Upstream:
    return Upstream(url=tiny.url, model="tiny", **more)


def truth(tiny, prompts: list[str], candidates: list[str]) -> np.ndarray:
    """Return what the package's own model says, by another way than the server's."""
    found = [
        tiny.language.score([prompt], [f" {text}" for text in candidates])[0].numpy()
        for prompt in prompts
    ]
    return np.array(found)


# -- answers -----------------------------------------------------------------------------


def test_candidates_are_scored_as_the_model_itself_scores_them(exact):
    site = prepare(
        make_model("openai", options(exact)), name="north", share_counts=CountsKind.WITHHELD
    )

    found = site.adapter.logits(rows(QUESTIONS))

    prompts = [f"Question: {text}\nAnswer:" for text in QUESTIONS]
    np.testing.assert_allclose(found, truth(exact, prompts, CANDIDATES), atol=1e-4)
    assert site.adapter.classes == tuple(CANDIDATES)
    wanted = "prompt-logprobs" if exact.manner == "vllm-chat" else "echo"
    assert site.profile.model_card["logprobs"] == wanted


def test_the_text_so_far_is_part_of_the_prompt(tiny):
    local = make_model("openai", options(tiny, prompt="say : {question}"))

    found = local.model(rows(["is is"], ["the of"]))

    expected = truth(tiny, ["say : is is the of"], CANDIDATES)
    np.testing.assert_allclose(found, expected, atol=1e-4)


@pytest.mark.parametrize("manner", ["llama.cpp", "deaf"])
def test_a_server_that_tells_only_first_tokens_is_still_used(manner):
    words = ["butor", "of", "is"]
    with running(manner) as tiny:
        local = make_model("openai", options(tiny, candidates=words, top=199))
        few = make_model("openai", options(tiny, candidates=words, top=2))
        found, bounded = local.model(rows(QUESTIONS)), few.model(rows(QUESTIONS))
        prompts = [f"Question: {text}\nAnswer:" for text in QUESTIONS]
        expected = truth(tiny, prompts, words)

    assert local.model_card["logprobs"] == "top-logprobs"
    np.testing.assert_allclose(found, expected, atol=1e-4)
    # What is not told is bounded from above, and never above what is told.
    assert (bounded >= expected - 1e-4).all()


def test_a_server_that_tells_nothing_is_refused(tiny):
    tiny.spoil = lambda content: json.dumps(
        {"choices": [{**content["choices"][0], "logprobs": None}]}
    )

    with pytest.raises(ModelError, match="no log-probabilities"):
        detect(upstream(tiny))


def test_a_dialect_may_be_demanded(tiny):
    with pytest.raises(ModelError, match="by prompt-logprobs"):
        make_model("openai", options(tiny, dialect="prompt-logprobs"))


def test_texts_are_written_by_chat_completions(tiny):
    found = chat(upstream(tiny), "is is", system="be brief", max_new_tokens=3)

    (expected,) = tiny.language.generate(["is is"], _three())
    assert (found.text, found.finish) == (expected, "length")
    assert [m["role"] for m in tiny.seen[-1]["messages"]] == ["system", "user"]


def _three():
    from fedinfer_flower.language.decoding import Decoding

    return Decoding(max_new_tokens=3)


# -- keys and places ---------------------------------------------------------------------


def test_the_key_is_sent_and_shown_nowhere(tiny, monkeypatch, tmp_path):
    monkeypatch.setenv("SITE_MODEL_KEY", KEY)
    local = make_model("openai", options(tiny, **{"api-key-env": "SITE_MODEL_KEY"}))
    assert set(tiny.keys) == {f"Bearer {KEY}"}
    assert KEY not in repr(local) + repr(upstream(tiny, api_key=KEY))

    file = tmp_path / "key"
    file.write_text(KEY + "\n")
    file.chmod(0o600)
    assert read_api_key(env="", file=file) == KEY
    file.chmod(0o644)
    with pytest.raises(ModelError, match="by others"):
        read_api_key(env="", file=file)


@pytest.mark.parametrize("value", ["", "two words", "é", "a\nb"], ids=repr)
def test_what_is_no_key_is_refused_unshown(monkeypatch, value):
    monkeypatch.setenv("SITE_MODEL_KEY", value)

    with pytest.raises(ModelError, match="holds no API key") as caught:
        read_api_key(env="SITE_MODEL_KEY", file=None)
    assert not value or value not in str(caught.value)


@pytest.mark.parametrize(
    "url",
    [
        "http://192.0.2.1/v1",
        "http://models.example/v1",
        "http://localhost.example/v1",
        "ftp://127.0.0.1/v1",
        f"https://me:{CANARY}@models.example/v1",
        f"https://models.example/v1?key={CANARY}",
        "https:///v1",
        "http://[::1/v1",
        "https://models.example:99999/v1",
    ],
    ids=[
        *("address", "name", "false-localhost", "ftp", "password", "query", "no-host", "broken"),
        "port",
    ],
)
def test_urls_that_questions_must_not_go_to_are_refused(url):
    with pytest.raises(InvalidValueError) as caught:
        Upstream(url=url, model="tiny")
    assert CANARY not in str(caught.value)


@pytest.mark.parametrize(
    "url", ["https://models.example/v1", "http://[::1]:8000/v1", "http://localhost:8000/v1"]
)
def test_urls_over_https_or_of_this_machine_are_taken(url):
    assert Upstream(url=url, model="tiny").url == url


def test_plain_http_to_another_machine_must_be_allowed():
    assert Upstream(url="http://192.0.2.1/v1", model="tiny", allow_http=True).allow_http


def test_proxies_and_redirects_are_not_followed(tiny, monkeypatch):
    monkeypatch.setenv("HTTP_PROXY", "http://127.0.0.1:9")
    monkeypatch.setenv("ALL_PROXY", "http://127.0.0.1:9")
    assert upstream(tiny).post("completions", {"prompt": "is", "max_tokens": 1})

    tiny.statuses = [307]
    with pytest.raises(ModelAnswerError, match="answered 307"):
        upstream(tiny).post("completions", {"prompt": "is", "max_tokens": 1})


# -- failures ----------------------------------------------------------------------------


def test_a_busy_server_is_asked_again_so_often_and_no_more(tiny):
    tiny.statuses = [503, 429]
    upstream(tiny).post("completions", {"prompt": "is", "max_tokens": 1})
    assert len(tiny.seen) == 3

    tiny.seen.clear()
    tiny.statuses = [503] * 9
    with pytest.raises(ModelAnswerError, match="answered 503"):
        upstream(tiny, attempts=2).post("completions", {"prompt": CANARY, "max_tokens": 1})
    assert len(tiny.seen) == 2


@pytest.mark.parametrize("status", [400, 401, 404, 422, 500])
def test_an_error_of_the_server_is_not_repeated_and_not_quoted(tiny, status):
    tiny.statuses = [status] * 5
    with pytest.raises(ModelAnswerError) as caught:
        upstream(tiny).post("completions", {"prompt": CANARY, "max_tokens": 1})

    assert len(tiny.seen) == 1
    assert str(status) in str(caught.value)
    assert CANARY not in str(caught.value)


def test_a_wrong_key_is_an_error_and_not_a_lack_of_log_probabilities(tiny):
    tiny.statuses = [401] * 5

    with pytest.raises(ModelAnswerError, match="answered 401"):
        detect(upstream(tiny))


def test_a_server_that_is_not_there_is_a_typed_error():
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))  # bound, and nobody listens
        url = f"http://127.0.0.1:{taken.getsockname()[1]}/v1"
        with pytest.raises(ModelAnswerError, match="not reached"):
            Upstream(url=url, model="tiny", attempts=1).post("completions", {})


def test_a_server_that_drips_is_cut_off_in_time():
    stop = threading.Event()
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def drip() -> None:
            with listener.accept()[0] as peer:
                peer.sendall(b"HTTP/1.1 200 OK\r\ncontent-length: 100000\r\n\r\n")
                while not stop.wait(0.05):
                    try:
                        peer.sendall(b" ")
                    except OSError:
                        return

        thread = threading.Thread(target=drip, daemon=True)
        thread.start()
        url = f"http://127.0.0.1:{listener.getsockname()[1]}/v1"
        try:
            with pytest.raises(ModelAnswerError, match="not done in time"):
                Upstream(url=url, model="tiny", timeout_s=0.4).post("completions", {})
        finally:
            stop.set()
            thread.join(10)


def test_a_reply_that_is_too_long_is_refused(tiny):
    tiny.spoil = lambda content: json.dumps({**content, "x": "y" * 5000})

    with pytest.raises(ModelAnswerError, match="too much"):
        upstream(tiny, max_reply_bytes=4096).post("completions", {"prompt": "is", "max_tokens": 1})


def _changed(change):
    """Return a spoiler that changes the log-probabilities of an echoed prompt."""

    def spoil(content):
        logprobs = content["choices"][0]["logprobs"]
        change(content, logprobs)
        return json.dumps(content)

    return spoil


def _set(values, place, value):
    values[place] = value


SPOILED = {
    "nan": _changed(lambda c, x: _set(x["token_logprobs"], -1, math.nan)),
    "infinite": _changed(lambda c, x: _set(x["token_logprobs"], -1, -math.inf)),
    "positive": _changed(lambda c, x: _set(x["token_logprobs"], -1, 3.0)),
    "huge": _changed(lambda c, x: _set(x["token_logprobs"], -1, -(10**400))),
    "text": _changed(lambda c, x: _set(x["token_logprobs"], -1, CANARY)),
    "bool": _changed(lambda c, x: _set(x["token_logprobs"], -1, False)),
    "none": _changed(lambda c, x: _set(x["token_logprobs"], -1, None)),
    "shorter": _changed(lambda c, x: x["token_logprobs"].pop()),
    "no-tokens": _changed(lambda c, x: x.pop("tokens")),
    "other-tokens": _changed(lambda c, x: _set(x["tokens"], 0, str(len(x["tokens"])))),
    "fewer-tokens": _changed(lambda c, x: (x["tokens"].clear(), x["token_logprobs"].clear())),
    "no-echo": _changed(lambda c, x: _set(c["choices"][0], "text", CANARY)),
    "two-choices": _changed(lambda c, x: c["choices"].append(c["choices"][0])),
    "no-choices": _changed(lambda c, x: c["choices"].clear()),
    "list": lambda content: "[]",
    "no-json": lambda content: CANARY,
    "deep": lambda content: "[" * 100_000,
}


@pytest.mark.parametrize("name", SPOILED)
def test_a_reply_of_another_form_is_a_typed_error_with_fixed_words(tiny, name, caplog):
    caplog.set_level(logging.DEBUG)
    local = make_model("openai", options(tiny))
    tiny.spoil = SPOILED[name]

    with pytest.raises(ModelAnswerError) as caught:
        local.model(rows([f"is {CANARY} ?"]))

    assert CANARY not in str(caught.value)
    assert CANARY not in caplog.text


def test_a_site_answers_with_a_typed_error_when_its_server_is_gone(tiny):
    site = prepare(
        make_model("openai", options(tiny)), name="north", share_counts=CountsKind.WITHHELD
    )
    from fedinfer_flower.clients.site_model import checked_logits

    tiny.statuses = [500] * 50
    with pytest.raises(ModelAnswerError, match="the local model failed"):
        checked_logits(site.adapter, rows(QUESTIONS))


@pytest.mark.parametrize(
    "more",
    [
        {"candidates": ["one"]},
        {"candidates": ["one", " one"]},
        {"candidates": ["one", " "]},
        {"prompt": "none"},
        {"prompt": "{question} {question}"},
        {"dialect": "guess"},
        {"top": 0},
        {"parallel": 0},
        {"timeout-s": 0},
        {"attempts": 99},
        {"model": ""},
    ],
    ids=str,
)
def test_options_out_of_range_are_refused_before_anything_is_sent(tiny, more):
    with pytest.raises(FedInferError):
        make_model("openai", options(tiny, **more))
    assert not tiny.seen
