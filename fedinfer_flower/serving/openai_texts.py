"""What the routes of OpenAI's shape share: a question in, an answer out, whole or as it grows."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass
from typing import Any, Final

from starlette.requests import Request
from starlette.responses import Response

from fedinfer_flower.errors import (
    EnvelopeError,
    FedInferError,
    GatewayError,
    InvalidValueError,
    QueryCancelledError,
    error_class,
)
from fedinfer_flower.serving.auth import Caller
from fedinfer_flower.serving.body_limits import read_json
from fedinfer_flower.serving.desk import Desk
from fedinfer_flower.serving.jobs import Job, JobKind, JobRequest, JobState
from fedinfer_flower.serving.openai_fields import Refused
from fedinfer_flower.serving.problem import HttpProblem
from fedinfer_flower.serving.text_job import TextAnswer, TextJob
from fedinfer_flower.serving.text_options import require_askable

__all__ = [
    "COMMENT",
    "Answered",
    "answered",
    "body_of",
    "ended",
    "error_of",
    "frame",
    "growing",
    "handed_in",
    "refusal",
    "sse_headers",
]

_BEAT_S: Final = 10.0
"""Seconds after which a quiet stream says that it lives: proxies close those that do not."""

_LONGEST_KEY: Final = 255
_AFTER_S: Final = 5.0

COMMENT: Final = ": the federation is being asked\n\n"


@dataclass(frozen=True, kw_only=True)
class Answered:
    """The end of a job in text.

    Parameters
    ----------
    text : str
    finish : {"stop", "length"}
    words_in, words_out : int
    facts : mapping
        What the field ``fedinfer`` shows.
    """

    text: str
    finish: str
    words_in: int
    words_out: int
    facts: Mapping[str, Any]


async def body_of(request: Request) -> dict[str, Any]:
    """Read the JSON body.

    Raises
    ------
    Refused
        If it is another type, or no JSON object.
    """
    kind = request.headers.get("content-type", "").split(";")[0].strip().lower()
    if kind != "application/json":
        raise Refused(EnvelopeError("the body is application/json"), param="")
    # Strict, counted before anything is made of it, and not on the event loop if it is large.
    values = await read_json(request)
    if not isinstance(values, dict):
        raise EnvelopeError("the body is not a JSON object in UTF-8")
    return values


async def handed_in(
    desk: Desk, caller: Caller, request: Request, *, model: object, job: TextJob
) -> Job:
    """Hand a question in; the job as it was accepted.

    Raises
    ------
    Refused, HttpProblem, FedInferError
        Before anything is asked.
    """
    if not isinstance(model, str) or not model:
        raise Refused.because("model", "the name of a model", hint="GET /v1/models")
    desk.may_use(caller, model, JobKind.TEXT)
    served = desk.config.models[model]
    if served.kind != "language":
        raise Refused.because(
            "model", "a classifier, which answers no questions", hint="POST /v1/query"
        )
    try:
        require_askable(served, job)
    except InvalidValueError as exc:
        raise Refused(exc, param=exc.message.split(" ", maxsplit=1)[0]) from None
    key = request.headers.get("idempotency-key", "")
    if len(key) > _LONGEST_KEY or not key.isprintable() or not key.isascii():
        raise Refused.because("Idempotency-Key", f"at most {_LONGEST_KEY} ASCII characters")
    asked = JobRequest(
        owner=caller.key_id,
        model=model,
        kind=JobKind.TEXT,
        body=job.to_bytes(),
        n_rows=1,
        timeout_s=served.timeout_s,
        idempotency_key=key,
    )
    return await desk.submit_and_wait(asked, caller, 0.0)


async def ended(desk: Desk, caller: Caller, job: Job) -> Job:
    """Return a job at its end, or as it stands some seconds after its deadline."""
    wait_s = max(0.0, job.deadline_at - job.accepted_at) + _AFTER_S
    return await desk.wait(job, caller, wait_s)


def answered(job: Job, asked: TextJob) -> Answered:
    """Return what a job's end says.

    Raises
    ------
    FedInferError
        The job's error, if it did not come to an answer.
    """
    if job.state is not JobState.DONE:
        raise error_of(job)
    answer = TextAnswer.from_bytes(job.answer)
    text = answer.texts[0] or ""
    return Answered(
        text=text,
        finish=answer.finish[0],
        words_in=len(asked.questions[0].split()),
        words_out=len(text.split()),
        facts={
            "job_id": job.job_id,
            "used": list(answer.used[0]),
            # Models of several sites have several tokenizers, and none of them is here.
            "usage_counts": "words",
            "provenance": dict(job.provenance),
        },
    )


def error_of(job: Job) -> FedInferError:
    """Return the typed error of a job that did not come to an answer."""
    if not job.state.ended:
        return GatewayError("the job did not end by its deadline")
    facts = job.error
    if job.state is JobState.CANCELLED and not facts:
        return QueryCancelledError("the query was called off")
    code = facts.get("code", "")
    cls = error_class(code) if code else GatewayError
    return cls(facts.get("message", "the query failed"), hint=facts.get("hint", ""))


async def growing(desk: Desk, caller: Caller, job: Job) -> AsyncIterator[str | Job | None]:
    """Yield what is added to an answer, None where nothing was for a while, at last the job.

    If nobody listens any more, the job is called off.
    """
    sent, finished = "", False
    try:
        watching = desk.watch(job.job_id, caller, beat_s=_BEAT_S)
        async with contextlib.aclosing(watching) as states:
            async for state in states:
                finished = state.state.ended
                text = _text_of(state)
                added = text[len(sent) :] if text.startswith(sent) else ""
                sent += added
                if finished and sent != text and state.state is JobState.DONE:
                    raise GatewayError("an answer that does not go on from what was sent of it")
                if added or not finished:
                    yield added or None
                if finished:
                    yield state
    finally:
        if not finished:
            _call_off(desk, caller, job)


def refusal(desk: Desk, exc: FedInferError | HttpProblem | Refused) -> Response:
    """Return an error in OpenAI's shape."""
    if not isinstance(exc, Refused):
        return desk.problem(exc, openai=True)
    response = desk.problem(exc.problem, openai=True)
    if exc.param:
        shown = json.loads(bytes(response.body))
        shown["error"]["param"] = exc.param
        response.body = json.dumps(shown, separators=(",", ":")).encode()
        response.headers["content-length"] = str(len(response.body))
    return response


def frame(value: Mapping[str, Any] | str, *, event: str = "") -> str:
    r"""Return one event of a stream.

    Examples
    --------
    >>> frame({"a": "1"}, event="x")
    'event: x\ndata: {"a":"1"}\n\n'
    """
    head = f"event: {event}\n" if event else ""
    # JSON escapes line breaks, so that an answer cannot end the event that it is in.
    data = value if isinstance(value, str) else json.dumps(value, separators=(",", ":"))
    return f"{head}data: {data}\n\n"


def sse_headers() -> dict[str, str]:
    """Return headers that keep proxies from holding a stream back."""
    return {"Cache-Control": "no-store", "X-Accel-Buffering": "no"}


def _text_of(job: Job) -> str:
    if job.state is JobState.DONE:
        return TextAnswer.from_bytes(job.answer).texts[0] or ""
    return job.progress.text


def _call_off(desk: Desk, caller: Caller, job: Job) -> None:
    def cancel() -> None:
        with contextlib.suppress(FedInferError):
            desk.board.cancel(job.job_id, owner=caller.key_id)

    # Not awaited: whoever would wait is being cancelled.
    with contextlib.suppress(RuntimeError):
        asyncio.get_running_loop().run_in_executor(None, cancel)
