"""`POST /v1/chat/completions`: the federation, for whoever speaks OpenAI's chat API."""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping
from typing import Any, Final

from fastapi import Depends, FastAPI, Request
from starlette.responses import JSONResponse, Response, StreamingResponse

from fedinfer_flower.errors import ConfigError, FedInferError, ProtocolError
from fedinfer_flower.serving.auth import Caller
from fedinfer_flower.serving.chat_prompt import ROLES, ChatMessage, question_of
from fedinfer_flower.serving.desk import Desk
from fedinfer_flower.serving.jobs import Job
from fedinfer_flower.serving.openai_fields import (
    Refused,
    kept_fields,
    options_of,
    stream_of,
    text_of,
)
from fedinfer_flower.serving.openai_texts import (
    COMMENT,
    Answered,
    answered,
    body_of,
    ended,
    frame,
    growing,
    handed_in,
    refusal,
    sse_headers,
)
from fedinfer_flower.serving.problem import HttpProblem
from fedinfer_flower.serving.problem import body_of as problem_of
from fedinfer_flower.serving.text_job import TextJob

__all__ = ["add_routes", "read_messages"]

_OPTIONS: Final = {
    "max_tokens": "max_new_tokens",
    "max_completion_tokens": "max_new_tokens",
    "temperature": "temperature",
    "top_p": "top_p",
    "seed": "seed",
    "stop": "stop",
}
_READ: Final = ("model", "messages", "stream", "stream_options", *_OPTIONS)
_MESSAGE: Final = {"role", "content", "name", "tool_call_id"}

_SHOWN: Final = {
    "requestBody": {
        "required": True,
        "content": {
            "application/json": {
                "schema": {
                    "type": "object",
                    "required": ["model", "messages"],
                    "properties": {
                        "model": {"type": "string", "maxLength": 64},
                        "messages": {"type": "array", "minItems": 1},
                        "stream": {"type": "boolean", "default": False},
                    },
                }
            }
        },
    }
}


def add_routes(app: FastAPI, desk: Desk) -> None:
    """Add ``POST /v1/chat/completions``.

    Parameters
    ----------
    app : FastAPI
    desk : Desk

    Privacy
    -------
    The gateway reads the messages, and so does the site that answers. They are in no log,
    metric or error; they lie in the gateway's outbox until the job ends.
    """
    chatting = Depends(desk.caller("chat"))

    @app.post("/v1/chat/completions", response_model=None, tags=["openai"], openapi_extra=_SHOWN)
    async def chat_completions(request: Request, caller: Caller = chatting) -> Response:
        try:
            values = kept_fields(await body_of(request), read=_READ, dropped=("metadata",))
            stream, usage = stream_of(values)
            messages = read_messages(values.get("messages"))
            asked = TextJob(questions=[question_of(messages)], options=options_of(values, _OPTIONS))
            job = await handed_in(desk, caller, request, model=values.get("model"), job=asked)
            if stream:
                chunks = _chunks(desk, caller, job, asked, usage=usage)
                return StreamingResponse(
                    chunks, media_type="text/event-stream", headers=sse_headers()
                )
            job = await ended(desk, caller, job)
            return JSONResponse(_completion(job, answered(job, asked)))
        except (FedInferError, HttpProblem, Refused) as exc:
            return refusal(desk, exc)


def read_messages(given: object) -> list[ChatMessage]:
    """Read the messages of a chat.

    Raises
    ------
    Refused
        Naming the field, for what cannot be put to a federation.

    Examples
    --------
    >>> read_messages([{"role": "user", "content": [{"type": "text", "text": "why ?"}]}])[0].role
    'user'
    """
    if not isinstance(given, list) or not given:
        raise Refused.because("messages", "a list of messages that is not empty")
    messages = []
    for n, each in enumerate(given):
        where = f"messages[{n}]"
        if not isinstance(each, dict):
            raise Refused.because(where, "an object with role and content")
        unknown = sorted(k for k, v in each.items() if v is not None and k not in _MESSAGE)
        if unknown:
            raise Refused.because(f"{where}.{unknown[0][:64]}", "not honoured here")
        role = each.get("role")
        if role not in ROLES:
            raise Refused.because(f"{where}.role", f"one of {', '.join(ROLES)}")
        messages.append(_message(str(role), text_of(each.get("content"), where), where))
    try:
        question_of(messages)
    except (ConfigError, ProtocolError) as exc:
        raise Refused(exc, param="messages") from None
    return messages


def _message(role: str, text: str, where: str) -> ChatMessage:
    try:
        return ChatMessage(role=role, text=text)
    except ConfigError as exc:
        raise Refused(exc, param=f"{where}.content") from None


def _completion(job: Job, said: Answered) -> dict[str, Any]:
    message = {"role": "assistant", "content": said.text, "refusal": None}
    choice = {"index": 0, "message": message, "logprobs": None, "finish_reason": said.finish}
    return {
        "id": f"chatcmpl-{job.job_id}",
        "object": "chat.completion",
        "created": int(job.accepted_at),
        "model": job.model,
        "choices": [choice],
        "usage": _usage(said),
        "fedinfer": dict(said.facts),
    }


def _usage(said: Answered) -> dict[str, int]:
    return {
        "prompt_tokens": said.words_in,
        "completion_tokens": said.words_out,
        "total_tokens": said.words_in + said.words_out,
    }


def _chunk(job: Job, choices: list[dict[str, Any]], **more: object) -> dict[str, Any]:
    return {
        "id": f"chatcmpl-{job.job_id}",
        "object": "chat.completion.chunk",
        "created": int(job.accepted_at),
        "model": job.model,
        "choices": choices,
        **more,
    }


def _choice(delta: Mapping[str, str], finish: str | None = None) -> dict[str, Any]:
    return {"index": 0, "delta": dict(delta), "logprobs": None, "finish_reason": finish}


async def _chunks(
    desk: Desk, caller: Caller, job: Job, asked: TextJob, *, usage: bool
) -> AsyncIterator[str]:
    yield frame(_chunk(job, [_choice({"role": "assistant", "content": ""})]))
    try:
        async for each in growing(desk, caller, job):
            if each is None:
                yield COMMENT
            elif isinstance(each, str):
                yield frame(_chunk(job, [_choice({"content": each})]))
            else:
                said = answered(each, asked)
                facts = {"fedinfer": dict(said.facts)}
                last = [_choice({}, said.finish)]
                if usage:
                    yield frame(_chunk(job, last))
                    yield frame(_chunk(job, [], usage=_usage(said), **facts))
                else:
                    yield frame(_chunk(job, last, **facts))
    except HttpProblem as exc:
        yield frame(problem_of(exc.error, openai=True))
    except FedInferError as exc:
        yield frame(problem_of(exc, openai=True))
    yield frame("[DONE]")
