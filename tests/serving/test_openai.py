"""The routes of OpenAI's shape, asked by OpenAI's own client over a real socket."""

from __future__ import annotations

import json
import socket
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from typing import Any

import httpx
import pytest
import uvicorn

from fedinfer_flower.errors import FedInferError, QuorumNotMetError, UnknownQueryError
from fedinfer_flower.serving.config import GatewayConfig
from fedinfer_flower.serving.http_app import create_app
from fedinfer_flower.serving.jobs import Job, JobRequest, JobState, Progress, Unsubscribe
from fedinfer_flower.serving.key_store import KeyStore
from fedinfer_flower.serving.text_job import TextAnswer, TextJob

openai = pytest.importorskip("openai")

CONFIG = GatewayConfig.from_mapping(
    {
        "models": {
            "assistant": {"kind": "language", "strategy": "refine", "timeout-s": 5.0},
            "writers": {"kind": "language", "strategy": "decode", "timeout-s": 5.0},
            "triage": {},
            "shut": {"kind": "language", "strategy": "refine", "clear": False},
        }
    }
)
CANARY = "zanzibar-canary"


class ToyBoard:
    """Answers every question with words of its own, one after the other."""

    def __init__(self) -> None:
        self.jobs: dict[str, Job] = {}
        self.asked: list[JobRequest] = []
        self.tells: dict[str, list[Callable[[Job], None]]] = {}
        self.words: tuple[str, ...] = ("the", "Nile", "flows")
        self.finish = "stop"
        self.error: FedInferError | None = None
        self.pause_s = 0.005
        self.silent = False
        self.lock = threading.Lock()

    def submit(self, request: JobRequest) -> Job:
        self.asked.append(request)
        now = time.time()
        job = Job(
            job_id=f"{len(self.asked):032x}",
            owner=request.owner,
            model=request.model,
            kind=request.kind,
            n_rows=request.n_rows,
            state=JobState.ACCEPTED,
            accepted_at=now,
            deadline_at=now + request.timeout_s,
        )
        self.jobs[job.job_id] = job
        if not self.silent:
            threading.Thread(target=self._work, args=(job.job_id,), daemon=True).start()
        return job

    def _set(self, job_id: str, **facts: Any) -> None:
        with self.lock:
            if self.jobs[job_id].state.ended:
                return
            self.jobs[job_id] = replace(self.jobs[job_id], **facts)
            for tell in self.tells.get(job_id, []):
                tell(self.jobs[job_id])

    def _work(self, job_id: str) -> None:
        for n in range(1, len(self.words) + 1):
            time.sleep(self.pause_s)
            text = " ".join(self.words[:n])
            self._set(job_id, state=JobState.ASKING, progress=Progress(text=text))
        if self.error is not None:
            facts = Job.error_facts(self.error)
            self._set(job_id, state=JobState.FAILED, error=facts, ended_at=time.time())
            return
        answer = TextAnswer(
            texts=(" ".join(self.words),), used=(("south",),), finish=(self.finish,)
        )
        self._set(
            job_id,
            state=JobState.DONE,
            answer=answer.to_bytes(),
            ended_at=time.time(),
            provenance={"strategy": "refine", "receiver": "north"},
        )

    def find(self, job_id: str, *, owner: str) -> Job:
        job = self.jobs.get(job_id)
        if job is None or job.owner != owner:
            raise UnknownQueryError("no such query")
        return job

    def cancel(self, job_id: str, *, owner: str) -> Job:
        self.find(job_id, owner=owner)
        self._set(job_id, state=JobState.CANCELLED, ended_at=time.time())
        return self.jobs[job_id]

    def listen(self, job_id: str, *, owner: str, tell: Callable[[Job], None]) -> Unsubscribe:
        with self.lock:
            tell(self.find(job_id, owner=owner))
            self.tells.setdefault(job_id, []).append(tell)
        return lambda: None

    def models(self) -> tuple[Mapping[str, Any], ...]:
        return tuple({"id": n, "kind": m.kind} for n, m in CONFIG.models.items())

    def directory(self, model: str) -> bytes:
        raise UnknownQueryError(model)

    def status(self) -> Mapping[str, Any]:
        return {}

    def ready(self) -> tuple[bool, str]:
        return True, ""


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, ToyBoard, str, str]]:
    """A gateway on a real socket: its address, its board, a key, and a key without chat."""
    keys = KeyStore(tmp_path_factory.mktemp("state") / "keys.sqlite")
    key = keys.create("test", scopes=("chat",))
    narrow = keys.create("narrow", scopes=("query",))
    board = ToyBoard()
    server = uvicorn.Server(
        uvicorn.Config(
            create_app(board, CONFIG, keys=keys), log_level="critical", ws="none", lifespan="off"
        )
    )
    listener = socket.socket()
    listener.bind(("127.0.0.1", 0))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, daemon=True)
    thread.start()
    for _ in range(1000):
        if server.started:
            break
        time.sleep(0.01)
    assert server.started
    yield f"http://127.0.0.1:{listener.getsockname()[1]}", board, key, narrow
    server.should_exit = True
    thread.join(10)
    listener.close()
    keys.close()


@pytest.fixture
def board(place: tuple[str, ToyBoard, str, str]) -> ToyBoard:
    board = place[1]
    board.asked.clear()
    board.jobs.clear()
    board.words, board.finish, board.error = ("the", "Nile", "flows"), "stop", None
    board.silent, board.pause_s = False, 0.005
    return board


@pytest.fixture
def client(place: tuple[str, ToyBoard, str, str], board: ToyBoard) -> Iterator[Any]:
    with openai.OpenAI(base_url=f"{place[0]}/v1", api_key=place[2], max_retries=0) as made:
        yield made


def question(board: ToyBoard) -> str:
    return TextJob.from_bytes(board.asked[-1].body).questions[0]


def ask(place: tuple[str, ToyBoard, str, str], path: str, **body: Any) -> httpx.Response:
    headers = {"Authorization": f"Bearer {place[2]}"}
    return httpx.post(f"{place[0]}/v1/{path}", json=body, headers=headers)


CHAT = {"model": "assistant", "messages": [{"role": "user", "content": "which river ?"}]}
RESPONSES = {"model": "assistant", "input": "which river ?"}


# -- chat ---------------------------------------------------------------------------------


def test_chat_answers_openais_client(client: Any, board: ToyBoard) -> None:
    said = client.chat.completions.create(
        model="assistant",
        messages=[{"role": "user", "content": "which river ?"}],
        max_tokens=7,
        temperature=0,
        stop=".",
        seed=3,
    )

    assert said.choices[0].message.content == "the Nile flows"
    assert said.choices[0].finish_reason == "stop"
    assert (said.usage.prompt_tokens, said.usage.completion_tokens) == (3, 3)
    assert said.model_extra["fedinfer"]["provenance"]["receiver"] == "north"
    assert said.model_extra["fedinfer"]["used"] == ["south"]
    assert said.model_extra["fedinfer"]["usage_counts"] == "words"
    body = TextJob.from_bytes(board.asked[-1].body)
    assert body.questions == ("which river ?",)
    assert body.options == {"max_new_tokens": 7, "temperature": 0, "stop": ["."], "seed": 3}


def test_chat_streams_to_openais_client(client: Any, board: ToyBoard) -> None:
    board.pause_s = 0.03
    with client.chat.completions.create(
        model="assistant",
        messages=[{"role": "user", "content": "which river ?"}],
        stream=True,
        stream_options={"include_usage": True},
    ) as stream:
        chunks = list(stream)

    pieces = [c.choices[0].delta.content for c in chunks if c.choices]
    assert "".join(p for p in pieces if p) == "the Nile flows"
    assert sum(bool(p) for p in pieces) >= 2
    assert [c.choices[0].finish_reason for c in chunks if c.choices][-1] == "stop"
    assert chunks[-1].usage.total_tokens == 6
    assert chunks[-1].model_extra["fedinfer"]["provenance"]["strategy"] == "refine"
    assert len({c.id for c in chunks}) == 1


def test_a_stream_without_usage_ends_with_provenance(
    place: tuple[str, ToyBoard, str, str], board: ToyBoard
) -> None:
    lines = ask(place, "chat/completions", **CHAT, stream=True).text.split("\n\n")
    events = [line.removeprefix("data: ") for line in lines if line.startswith("data: ")]

    assert events[-1] == "[DONE]"
    last = json.loads(events[-2])
    assert last["choices"][0]["finish_reason"] == "stop"
    assert last["fedinfer"]["usage_counts"] == "words"
    assert all("usage" not in json.loads(event) for event in events[:-1])


def test_length_is_told(client: Any, board: ToyBoard) -> None:
    board.finish = "length"

    chat = client.chat.completions.create(**CHAT)
    response = client.responses.create(**RESPONSES)

    assert chat.choices[0].finish_reason == "length"
    assert response.status == "incomplete"
    assert response.incomplete_details.reason == "max_output_tokens"


def test_a_conversation_becomes_one_question(client: Any, board: ToyBoard) -> None:
    client.chat.completions.create(
        model="assistant",
        messages=[
            {"role": "developer", "content": "Be brief."},
            {"role": "user", "content": [{"type": "text", "text": "a"}]},
            {"role": "assistant", "content": "b"},
            {"role": "user", "content": "c"},
        ],
    )

    assert question(board).splitlines()[2:10] == [
        "(message 1 of 4, by the system)",
        "| Be brief.",
        "(message 2 of 4, by the user)",
        "| a",
        "(message 3 of 4, by the assistant)",
        "| b",
        "(message 4 of 4, by the user)",
        "| c",
    ]


# -- responses ----------------------------------------------------------------------------


def test_responses_answer_openais_client(client: Any, board: ToyBoard) -> None:
    said = client.responses.create(
        model="assistant", input="which river ?", max_output_tokens=7, metadata={"a": "b"}
    )

    assert said.output_text == "the Nile flows"
    assert said.status == "completed"
    assert said.error is None
    assert (said.usage.input_tokens, said.usage.output_tokens) == (3, 3)
    assert said.metadata == {"a": "b"}
    assert said.store is False
    assert said.model_extra["fedinfer"]["provenance"]["receiver"] == "north"
    assert TextJob.from_bytes(board.asked[-1].body).options == {"max_new_tokens": 7}


def test_responses_stream_to_openais_client(client: Any, board: ToyBoard) -> None:
    board.pause_s = 0.03
    with client.responses.stream(model="assistant", input="which river ?") as stream:
        events = list(stream)
        final = stream.get_final_response()

    kinds = [event.type for event in events]
    firsts = list(dict.fromkeys(kinds))
    assert firsts == [
        "response.created",
        "response.in_progress",
        "response.output_item.added",
        "response.content_part.added",
        "response.output_text.delta",
        "response.output_text.done",
        "response.content_part.done",
        "response.output_item.done",
        "response.completed",
    ]
    assert kinds.count("response.output_text.delta") >= 2
    assert [event.sequence_number for event in events] == list(range(len(events)))
    assert final.output_text == "the Nile flows"


def test_input_items_and_instructions_become_one_question(client: Any, board: ToyBoard) -> None:
    client.responses.create(
        model="assistant",
        instructions="Be brief.",
        input=[{"role": "user", "content": [{"type": "input_text", "text": "a"}]}],
    )

    assert question(board).splitlines()[2:6] == [
        "(message 1 of 2, by the system)",
        "| Be brief.",
        "(message 2 of 2, by the user)",
        "| a",
    ]


# -- what is refused ----------------------------------------------------------------------

_LATER = "max_completion_tokens"
USER = {"role": "user", "content": "why ?"}


@pytest.mark.parametrize(
    ("path", "body", "param"),
    [
        ("chat/completions", {"n": 2}, "n"),
        ("chat/completions", {"n": True}, "n"),
        ("chat/completions", {"logprobs": True}, "logprobs"),
        ("chat/completions", {"tools": [{"type": "function"}]}, "tools"),
        ("chat/completions", {"response_format": {"type": "json_object"}}, "response_format"),
        ("chat/completions", {"temperature": 3}, "temperature"),
        ("chat/completions", {"temperature": 1e-9}, "temperature"),
        ("chat/completions", {"max_tokens": 0}, "max_tokens"),
        (
            "chat/completions",
            {"max_tokens": 1, "max_completion_tokens": 2},
            "max_completion_tokens",
        ),
        ("chat/completions", {"stop": ["a"] * 5}, "stop"),
        ("chat/completions", {"store": True}, "store"),
        ("chat/completions", {"tempreature": 1}, "tempreature"),
        ("chat/completions", {"stream": "yes"}, "stream"),
        ("chat/completions", {"stream_options": {"include_usage": True}}, "stream_options"),
        ("chat/completions", {"messages": []}, "messages"),
        ("chat/completions", {"messages": [{"role": "assistant", "content": "x"}]}, "messages"),
        ("chat/completions", {"messages": [{"role": "boss", "content": "x"}]}, "messages[0].role"),
        (
            "chat/completions",
            {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]},
            "messages[0].content[0]",
        ),
        (
            "chat/completions",
            {"messages": [USER | {"tool_calls": [{}]}]},
            "messages[0].tool_calls",
        ),
        ("chat/completions", {"model": "triage"}, "model"),
        ("chat/completions", {"model": 3}, "model"),
        ("chat/completions", {"model": "writers", "temperature": 0.5}, "temperature"),
        ("responses", {"previous_response_id": "resp_1"}, "previous_response_id"),
        ("responses", {"background": True}, "background"),
        ("responses", {"conversation": "c"}, "conversation"),
        ("responses", {"text": {"format": {"type": "json_schema"}}}, "text"),
        ("responses", {"tools": [{"type": "web_search"}]}, "tools"),
        ("responses", {"input": [{"type": "function_call_output"}]}, "input[0].type"),
        ("responses", {"input": ""}, "input"),
        ("responses", {"metadata": {"a": 1}}, "metadata"),
    ],
    ids=lambda value: value if isinstance(value, str) else None,
)
def test_what_cannot_be_honoured_is_refused_by_name(
    place: tuple[str, ToyBoard, str, str],
    board: ToyBoard,
    path: str,
    body: dict[str, Any],
    param: str,
) -> None:
    whole = (CHAT if path.startswith("chat") else RESPONSES) | body

    answer = ask(place, path, **whole)

    assert answer.status_code == 400
    error = answer.json()["error"]
    assert error["param"] == param
    assert set(error) == {"message", "type", "param", "code"}
    assert error["code"].startswith("FI")
    assert not board.asked


def test_fields_that_change_nothing_are_taken(client: Any, board: ToyBoard) -> None:
    said = client.chat.completions.create(
        **CHAT,
        n=1,
        temperature=1,
        top_p=1,
        presence_penalty=0,
        logprobs=False,
        tools=[],
        response_format={"type": "text"},
        user="u",
        store=False,
        metadata={"a": "b"},
    )

    assert said.choices[0].message.content == "the Nile flows"


def test_typed_errors_of_openais_client(
    client: Any, place: tuple[str, ToyBoard, str, str], board: ToyBoard
) -> None:
    with pytest.raises(openai.NotFoundError):
        client.chat.completions.create(**(CHAT | {"model": "nobody"}))
    with pytest.raises(openai.PermissionDeniedError):
        client.chat.completions.create(**(CHAT | {"model": "shut"}))
    with pytest.raises(openai.PermissionDeniedError):
        client.with_options(api_key=place[3]).responses.create(**RESPONSES)
    with pytest.raises(openai.AuthenticationError):
        client.with_options(api_key="nothing").responses.create(**RESPONSES)
    assert not board.asked


def test_a_failed_job_has_the_status_of_its_error(client: Any, board: ToyBoard) -> None:
    board.error = QuorumNotMetError("0 of 1 receivers answered")

    with pytest.raises(openai.InternalServerError) as caught:
        client.chat.completions.create(**CHAT)

    assert caught.value.status_code == 503
    assert caught.value.code == "FI402"


def test_a_failure_in_a_stream_is_an_error_of_openais_client(client: Any, board: ToyBoard) -> None:
    board.error = QuorumNotMetError("0 of 1 receivers answered")

    with pytest.raises(openai.APIError, match="receivers answered"):
        list(client.chat.completions.create(**CHAT, stream=True))
    events = list(client.responses.create(**RESPONSES, stream=True))

    assert events[-1].type == "response.failed"
    assert events[-1].response.error.message == "0 of 1 receivers answered"


def test_who_goes_away_calls_the_job_off(
    place: tuple[str, ToyBoard, str, str], board: ToyBoard
) -> None:
    board.silent = True
    headers = {"Authorization": f"Bearer {place[2]}"}
    body = CHAT | {"stream": True}
    url = f"{place[0]}/v1/chat/completions"
    with httpx.stream("POST", url, json=body, headers=headers) as answer:
        next(answer.iter_lines())
    states = set()
    for _ in range(200):
        states = {job.state for job in board.jobs.values()}
        if states == {JobState.CANCELLED}:
            break
        time.sleep(0.02)

    assert states == {JobState.CANCELLED}


@pytest.mark.parametrize("data", [b"", b"[]", b'{"a":1,"a":2}', b"{" * 9000, b'{"n":NaN}'])
def test_bodies_that_are_no_object_are_refused(
    place: tuple[str, ToyBoard, str, str], board: ToyBoard, data: bytes
) -> None:
    headers = {"Authorization": f"Bearer {place[2]}", "Content-Type": "application/json"}

    answer = httpx.post(f"{place[0]}/v1/responses", content=data, headers=headers)

    assert answer.status_code == 400
    assert answer.json()["error"]["param"] is None


def test_bodies_of_another_type_are_refused(
    place: tuple[str, ToyBoard, str, str], board: ToyBoard
) -> None:
    # What a page of another origin can send without asking first.
    headers = {"Authorization": f"Bearer {place[2]}", "Content-Type": "text/plain"}

    answer = httpx.post(f"{place[0]}/v1/responses", content=json.dumps(RESPONSES), headers=headers)

    assert answer.status_code == 400
    assert not board.asked


def test_prompts_are_in_no_log_and_no_error(
    client: Any,
    place: tuple[str, ToyBoard, str, str],
    board: ToyBoard,
    caplog: pytest.LogCaptureFixture,
    capfd: pytest.CaptureFixture[str],
) -> None:
    caplog.set_level("DEBUG", logger="fedinfer_flower")
    message = {"role": "user", "content": CANARY}
    client.chat.completions.create(model="assistant", messages=[message])
    told = [
        ask(place, "chat/completions", model="assistant", messages=[message], n=2).text,
        ask(place, "chat/completions", model=CANARY, messages=[message]).text,
        ask(place, "chat/completions", model="assistant", messages=[message | {"x": CANARY}]).text,
        ask(place, "responses", model="assistant", input=f"{CANARY}\0").text,
    ]

    assert CANARY not in "".join(told)
    assert CANARY not in caplog.text
    assert CANARY not in "".join(capfd.readouterr())


def test_repeated_requests_carry_their_key(client: Any, board: ToyBoard) -> None:
    for _ in range(2):
        client.responses.create(**RESPONSES, extra_headers={"Idempotency-Key": "once"})

    assert [request.idempotency_key for request in board.asked] == ["once", "once"]
    assert board.asked[0].body == board.asked[1].body
