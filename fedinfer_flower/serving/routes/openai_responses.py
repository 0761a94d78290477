"""`POST /v1/responses`: the federation, for whoever speaks the Open Responses API."""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping
from typing import Any, Final

from fastapi import Depends, FastAPI, Request
from starlette.responses import JSONResponse, Response, StreamingResponse

from fedinfer_flower.errors import ConfigError, FedInferError, ProtocolError
from fedinfer_flower.serving.auth import Caller
from fedinfer_flower.serving.chat_prompt import ChatMessage, question_of
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
from fedinfer_flower.serving.text_job import TextJob

__all__ = ["add_routes", "read_input"]

_OPTIONS: Final = {
    "max_output_tokens": "max_new_tokens",
    "temperature": "temperature",
    "top_p": "top_p",
}
_READ: Final = (
    "model",
    "input",
    "instructions",
    "metadata",
    "stream",
    "stream_options",
    *_OPTIONS,
)
_ROLES: Final = ("system", "developer", "user", "assistant")
_ITEM: Final = {"type", "role", "content", "id", "status", "phase"}
_MOST_METADATA: Final = 16

_SHOWN: Final = {
    "requestBody": {
        "required": True,
        "content": {
            "application/json": {
                "schema": {
                    "type": "object",
                    "required": ["model", "input"],
                    "properties": {
                        "model": {"type": "string", "maxLength": 64},
                        "input": {"type": ["string", "array"]},
                        "stream": {"type": "boolean", "default": False},
                    },
                }
            }
        },
    }
}


def add_routes(app: FastAPI, desk: Desk) -> None:
    """Add ``POST /v1/responses``.

    Parameters
    ----------
    app : FastAPI
    desk : Desk

    Privacy
    -------
    As ``POST /v1/chat/completions``. ``store`` counts as false whatever it says: there is no
    way to get a response again, and none to go on from one.
    """
    chatting = Depends(desk.caller("chat"))

    @app.post("/v1/responses", response_model=None, tags=["openai"], openapi_extra=_SHOWN)
    async def responses(request: Request, caller: Caller = chatting) -> Response:
        try:
            values = kept_fields(await body_of(request), read=_READ, dropped=("store",))
            stream, _ = stream_of(values)
            asked = TextJob(
                questions=[question_of(read_input(values))], options=options_of(values, _OPTIONS)
            )
            _require_metadata(values.get("metadata", {}))
            job = await handed_in(desk, caller, request, model=values.get("model"), job=asked)
            if stream:
                events = _events(desk, caller, job, asked, values)
                return StreamingResponse(
                    events, media_type="text/event-stream", headers=sse_headers()
                )
            job = await ended(desk, caller, job)
            return JSONResponse(_response(job, values, answered(job, asked)))
        except (FedInferError, HttpProblem, Refused) as exc:
            return refusal(desk, exc)


def read_input(values: Mapping[str, Any]) -> list[ChatMessage]:
    """Read input and instructions as messages.

    Raises
    ------
    Refused
        Naming the field, for what cannot be put to a federation.

    Examples
    --------
    >>> [m.role for m in read_input({"input": "why ?", "instructions": "Be brief."})]
    ['system', 'user']
    """
    given, messages = values.get("input"), []
    if "instructions" in values:
        if not isinstance(values["instructions"], str):
            raise Refused.because("instructions", "a text")
        messages.append(_message("system", values["instructions"], "instructions"))
    if isinstance(given, str):
        messages.append(_message("user", given, "input"))
    elif isinstance(given, list) and given:
        messages += [_item(each, f"input[{n}]") for n, each in enumerate(given)]
    else:
        raise Refused.because("input", "a text, or a list of messages that is not empty")
    try:
        question_of(messages)
    except (ConfigError, ProtocolError) as exc:
        raise Refused(exc, param="input") from None
    return messages


def _item(given: object, where: str) -> ChatMessage:
    if not isinstance(given, dict):
        raise Refused.because(where, "an object")
    if given.get("type", "message") != "message":
        raise Refused.because(f"{where}.type", "messages alone; no tool calls, no references")
    unknown = sorted(k for k, v in given.items() if v is not None and k not in _ITEM)
    if unknown:
        raise Refused.because(f"{where}.{unknown[0][:64]}", "not honoured here")
    if given.get("role") not in _ROLES:
        raise Refused.because(f"{where}.role", f"one of {', '.join(_ROLES)}")
    return _message(str(given["role"]), text_of(given.get("content"), where), where)


def _message(role: str, text: str, where: str) -> ChatMessage:
    try:
        return ChatMessage(role=role, text=text)
    except ConfigError as exc:
        raise Refused(exc, param=where) from None


def _require_metadata(given: object) -> None:
    texts = isinstance(given, dict) and all(
        isinstance(v, str) and len(k) <= 64 and len(v) <= 512 for k, v in given.items()
    )
    if not texts or not isinstance(given, dict) or len(given) > _MOST_METADATA:
        raise Refused.because("metadata", f"at most {_MOST_METADATA} short texts")


def _response(
    job: Job,
    values: Mapping[str, Any],
    said: Answered | None = None,
    *,
    error: FedInferError | None = None,
) -> dict[str, Any]:
    cut = said is not None and said.finish == "length"
    status = "in_progress" if said is None else "incomplete" if cut else "completed"
    if error is not None:
        status = "failed"
    return {
        "id": f"resp_{job.job_id}",
        "object": "response",
        "created_at": int(job.accepted_at),
        "completed_at": int(job.ended_at) if said is not None else None,
        "status": status,
        "background": False,
        "error": None if error is None else {"code": error.code, "message": error.message},
        "incomplete_details": {"reason": "max_output_tokens"} if cut else None,
        "instructions": values.get("instructions"),
        "max_output_tokens": values.get("max_output_tokens"),
        "metadata": values.get("metadata", {}),
        "model": job.model,
        "output": [] if said is None else [_output(job, said.text, status)],
        "parallel_tool_calls": False,
        "previous_response_id": None,
        "reasoning": {"effort": None, "summary": None},
        "service_tier": "default",
        "store": False,
        "temperature": values.get("temperature"),
        "text": {"format": {"type": "text"}},
        "tool_choice": "none",
        "tools": [],
        "top_p": values.get("top_p"),
        "truncation": "disabled",
        "usage": None if said is None else _usage(said),
        "fedinfer": {} if said is None else dict(said.facts),
    }


def _usage(said: Answered) -> dict[str, Any]:
    return {
        "input_tokens": said.words_in,
        "input_tokens_details": {"cached_tokens": 0},
        "output_tokens": said.words_out,
        "output_tokens_details": {"reasoning_tokens": 0},
        "total_tokens": said.words_in + said.words_out,
    }


def _output(job: Job, text: str | None, status: str) -> dict[str, Any]:
    return {
        "id": f"msg_{job.job_id}",
        "type": "message",
        "role": "assistant",
        "status": status,
        "content": [] if text is None else [_part(text)],
    }


def _part(text: str) -> dict[str, Any]:
    return {"type": "output_text", "text": text, "annotations": [], "logprobs": []}


async def _events(
    desk: Desk, caller: Caller, job: Job, asked: TextJob, values: Mapping[str, Any]
) -> AsyncIterator[str]:
    number = -1
    here = {"item_id": f"msg_{job.job_id}", "output_index": 0, "content_index": 0}

    def event(kind: str, **facts: object) -> str:
        nonlocal number
        number += 1
        return frame({"type": kind, "sequence_number": number, **facts}, event=kind)

    for kind in ("response.created", "response.in_progress"):
        yield event(kind, response=_response(job, values))
    item = _output(job, None, "in_progress")
    yield event("response.output_item.added", output_index=0, item=item)
    yield event("response.content_part.added", **here, part=_part(""))
    try:
        async for each in growing(desk, caller, job):
            if each is None:
                yield COMMENT
            elif isinstance(each, str):
                yield event("response.output_text.delta", **here, delta=each, logprobs=[])
            else:
                said = answered(each, asked)
                whole = _response(each, values, said)
                done = whole["output"][0]
                yield event("response.output_text.done", **here, text=said.text, logprobs=[])
                yield event("response.content_part.done", **here, part=_part(said.text))
                yield event("response.output_item.done", output_index=0, item=done)
                yield event(f"response.{whole['status']}", response=whole)
    except (FedInferError, HttpProblem) as exc:
        error = exc.error if isinstance(exc, HttpProblem) else exc
        yield event("response.failed", response=_response(job, values, error=error))
    yield frame("[DONE]")
