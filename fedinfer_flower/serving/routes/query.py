"""Queries: hand one in, look how far it is, fetch its answer, call it off."""

import json
from collections.abc import Mapping
from typing import Annotated, Any, Final

from fastapi import Depends, FastAPI, Header, Path, Query, Request, Response
from pydantic import BaseModel
from starlette.concurrency import run_in_threadpool
from starlette.responses import JSONResponse

from fedinfer_flower.errors import (
    EnvelopeError,
    InvalidValueError,
    QueryCancelledError,
    UnknownNameError,
    error_class,
)
from fedinfer_flower.serving.auth import Caller
from fedinfer_flower.serving.body_limits import array_of_json, array_of_npy, parse_json
from fedinfer_flower.serving.desk import Desk
from fedinfer_flower.serving.jobs import Job, JobKind, JobRequest, JobState
from fedinfer_flower.serving.problem import HttpProblem, body_of
from fedinfer_flower.serving.sse import BEAT_S, job_events, stream
from fedinfer_flower.wire.arrays import DTYPES, array_to_bytes
from fedinfer_flower.wire.sealed_job import SealedJob

__all__ = ["add_routes", "job_as_json"]

ANSWER: Final = "application/vnd.fedinfer.answer"
SEALED: Final = "application/vnd.fedinfer.sealed-job"
_MAX_WAIT_S: Final = 60.0
_FIELDS: Final = {"model", "inputs", "dtype", "timeout_s", "wait_s"}

Id = Annotated[str, Path(pattern="^[0-9a-f]{32}$", description="id of a query")]
WaitS = Annotated[float, Query(ge=0.0, le=_MAX_WAIT_S, description="wait so long for the end")]


class ProgressView(BaseModel):
    """How far a query is."""

    rows_done: int
    rows: int
    sites_asked: int
    sites_answered: int


class JobView(BaseModel):
    """A query as it stands."""

    id: str
    model: str
    state: JobState
    n_rows: int
    accepted_at: float
    deadline_at: float
    ended_at: float
    progress: ProgressView
    answer: dict[str, Any] | None
    provenance: dict[str, Any]
    error: dict[str, str] | None


_BODY: Final = {
    "required": True,
    "content": {
        "application/json": {
            "schema": {
                "type": "object",
                "required": ["inputs"],
                "additionalProperties": False,
                "properties": {
                    "model": {"type": "string", "maxLength": 64},
                    "inputs": {"$ref": "#/components/schemas/Numbers"},
                    "dtype": {"enum": list(DTYPES), "default": "float32"},
                    "timeout_s": {"type": "number", "exclusiveMinimum": 0},
                    "wait_s": {"type": "number", "minimum": 0, "maximum": _MAX_WAIT_S},
                },
            }
        },
        "application/octet-stream": {"schema": {"type": "string", "format": "binary"}},
        SEALED: {"schema": {"type": "string", "format": "binary"}},
    },
}
_PENDING: Final[dict[int | str, dict[str, Any]]] = {
    202: {"model": JobView, "description": "Accepted; it has not ended"},
    415: {
        "description": "A body of another type",
        "content": {"application/json": {"schema": {"$ref": "#/components/schemas/Error"}}},
    },
}


def job_as_json(job: Job, *, answer: bool = True) -> dict[str, Any]:
    """Return what the owner of a job is shown of it, as JSON values.

    Parameters
    ----------
    answer : bool
        Whether with the answer; that of a sealed job is bytes, and has a route of its own.
    """
    is_shown = answer and job.state is JobState.DONE and job.kind is not JobKind.SEALED
    progress = job.progress
    return {
        "id": job.job_id,
        "model": job.model,
        "state": job.state.value,
        "n_rows": job.n_rows,
        "accepted_at": job.accepted_at,
        "deadline_at": job.deadline_at,
        "ended_at": job.ended_at,
        "progress": {
            "rows_done": progress.rows_done,
            "rows": progress.rows,
            "sites_asked": progress.sites_asked,
            "sites_answered": progress.sites_answered,
        },
        "answer": json.loads(job.answer) if is_shown else None,
        "provenance": dict(job.provenance),
        "error": dict(job.error) or None,
    }


def error_of(job: Job) -> HttpProblem:
    """Return the error of a job that failed or was called off."""
    if job.state is JobState.CANCELLED and not job.error:
        return HttpProblem(QueryCancelledError("the query was called off"))
    facts = job.error
    kind = error_class(str(facts.get("code", "")))
    return HttpProblem(kind(facts.get("message", ""), hint=facts.get("hint", "")))


def add_routes(app: FastAPI, desk: Desk) -> None:
    """Add ``/v1/query`` and ``/v1/queries``."""
    anyone = Depends(desk.caller())

    def response(job: Job, *, raises: bool) -> Response:
        if raises and job.state in (JobState.FAILED, JobState.CANCELLED):
            return desk.problem(error_of(job), query_id=job.job_id)
        status = 200 if job.state.ended or not raises else 202
        headers = {} if status == 200 else {"Location": f"/v1/queries/{job.job_id}"}
        return JSONResponse(job_as_json(job), status_code=status, headers=headers)

    @app.post(
        "/v1/query",
        tags=["queries"],
        response_model=JobView,
        responses=_PENDING,
        openapi_extra={"requestBody": _BODY},
    )
    async def query(
        request: Request,
        caller: Annotated[Caller, anyone],
        model: Annotated[str, Query(max_length=64)] = "",
        wait_s: Annotated[float | None, Query(ge=0.0, le=_MAX_WAIT_S)] = None,
        timeout_s: Annotated[float | None, Query(gt=0.0, le=86_400.0)] = None,
        idempotency_key: Annotated[
            str, Header(max_length=255, pattern="^[!-~]*$", description="one job for one key")
        ] = "",
    ) -> Response:
        """Ask, and wait up to `wait_s` (default 30) for the answer.

        JSON or a .npy: the gateway reads the query, scope ``query``. A sealed job: it does not,
        scope ``sealed``.
        """
        given = {"model": model, "wait_s": wait_s, "timeout_s": timeout_s}
        made, waits = await _made(request, caller, desk, given, idempotency_key)
        return response(await desk.submit_and_wait(made, caller, waits), raises=True)

    @app.get("/v1/queries/{id}", tags=["queries"], response_model=JobView)
    async def look(id: Id, caller: Annotated[Caller, anyone], wait_s: WaitS = 0.0) -> Response:
        """Return a query as it stands after at most `wait_s`."""
        job = await run_in_threadpool(desk.board.find, id, owner=caller.key_id)
        return response(await desk.wait(job, caller, wait_s), raises=False)

    @app.delete("/v1/queries/{id}", tags=["queries"], response_model=JobView)
    async def cancel(id: Id, caller: Annotated[Caller, anyone]) -> Response:
        """Call a query off; sites that were asked may answer, and charge, all the same."""
        job = await run_in_threadpool(desk.board.cancel, id, owner=caller.key_id)
        return response(job, raises=False)

    @app.get(
        "/v1/queries/{id}/answer",
        tags=["queries"],
        response_class=Response,
        responses={
            200: {
                "content": {
                    ANSWER: {"schema": {"type": "string", "format": "binary"}},
                    "application/json": {"schema": {"type": "object"}},
                }
            },
            202: {"model": JobView, "description": "It has not ended"},
        },
    )
    async def answer(id: Id, caller: Annotated[Caller, anyone]) -> Response:
        """Return the answer: bytes for the querier's key where the query was sealed."""
        job = await run_in_threadpool(desk.board.find, id, owner=caller.key_id)
        if job.state is not JobState.DONE:
            return response(job, raises=True)
        media_type = ANSWER if job.kind is JobKind.SEALED else "application/json"
        return Response(job.answer, media_type=media_type)

    @app.get(
        "/v1/queries/{id}/receipt",
        tags=["queries"],
        response_class=Response,
        responses={
            200: {"content": {"application/json": {"schema": {}}}},
            202: {"model": JobView, "description": "It has not ended"},
        },
    )
    async def receipt(id: Id, caller: Annotated[Caller, anyone]) -> Response:
        """Return what the sites signed; 404 where they signed nothing."""
        job = await run_in_threadpool(desk.board.find, id, owner=caller.key_id)
        if job.state is not JobState.DONE:
            return response(job, raises=True)
        if not job.receipt:
            raise HttpProblem(UnknownNameError("the query has no receipt"), status=404)
        return Response(job.receipt, media_type="application/json")

    @app.get(
        "/v1/queries/{id}/events",
        tags=["queries"],
        response_class=Response,
        responses={200: {"content": {"text/event-stream": {"schema": {"type": "string"}}}}},
    )
    async def events(id: Id, caller: Annotated[Caller, anyone]) -> Response:
        """Return events: ``progress`` as it goes, then one ``answer`` or ``error``."""
        await run_in_threadpool(desk.board.find, id, owner=caller.key_id)

        def shown(job: Job) -> dict[str, Any]:
            return job_as_json(job, answer=False)

        def ended(job: Job) -> tuple[str, dict[str, Any]]:
            if job.state is JobState.DONE:
                return "answer", job_as_json(job)
            return "error", body_of(error_of(job).error, query_id=job.job_id)

        states = desk.watch(id, caller, beat_s=BEAT_S)
        return stream(job_events(states, shown=shown, ended=ended))


async def _made(
    request: Request, caller: Caller, desk: Desk, given: Mapping[str, Any], idempotency_key: str
) -> tuple[JobRequest, float]:
    kind = request.headers.get("content-type", "").split(";", maxsplit=1)[0].strip().lower()
    kinds = {"application/json", "application/octet-stream", SEALED}
    if kind not in kinds:
        raise HttpProblem(
            EnvelopeError(f"the body of a query is one of {', '.join(sorted(kinds))}"), status=415
        )
    job_kind = JobKind.SEALED if kind == SEALED else JobKind.ROWS
    if given["model"]:  # before the body is read: what is refused need not be sent
        desk.may_use(caller, given["model"], job_kind)
    data = await request.body()
    if kind == "application/json":
        fields = _fields(await run_in_threadpool(parse_json, data), given)
    else:
        fields = dict(given)
    model = fields["model"]
    desk.may_use(caller, model, job_kind)
    served = desk.config.models[model]
    if served.kind == "language" and job_kind is JobKind.ROWS:
        raise InvalidValueError(
            "this is a language model", hint="POST /v1/chat/completions or /v1/responses"
        )
    timeout_s = fields["timeout_s"] or served.timeout_s
    if timeout_s > served.timeout_s:
        raise InvalidValueError(f"this model takes a timeout_s of at most {served.timeout_s:g}")
    body, facts, n_rows = await run_in_threadpool(_read, kind, data, fields)
    made = JobRequest(
        owner=caller.key_id,
        model=model,
        kind=job_kind,
        body=body,
        facts=facts,
        n_rows=n_rows,
        timeout_s=timeout_s,
        idempotency_key=idempotency_key,
    )
    waits = fields["wait_s"]
    return made, 30.0 if waits is None else waits


def _read(kind: str, data: bytes, fields: Mapping[str, Any]) -> tuple[bytes, dict[str, Any], int]:
    """Return (body, facts, rows) of a job."""
    if kind == SEALED:
        # Rows are what the querier says; a site counts those that it opens.
        n_rows = sum(batch.n_queries for batch in SealedJob.from_bytes(data).batches)
        return data, {}, n_rows
    if kind == "application/json":
        array = array_of_json(fields["inputs"], dtype=fields["dtype"])
    else:
        array = array_of_npy(data)
    dtype, body = array_to_bytes(array)
    return body, {"dtype": dtype, "shape": list(array.shape)}, array.shape[0]


def _fields(value: Any, given: Mapping[str, Any]) -> dict[str, Any]:
    """Return the fields of a JSON body, with those of the query string where it has none."""
    if not isinstance(value, dict) or "inputs" not in value or set(value) - _FIELDS:
        raise HttpProblem(
            EnvelopeError(f"the JSON body has 'inputs', and of {', '.join(sorted(_FIELDS))}"),
            status=422,
        )
    fields = {"dtype": "float32"} | dict(given) | value
    for name in ("model", "dtype"):
        if not isinstance(fields[name], str):
            raise HttpProblem(InvalidValueError(f"{name} is a text"), status=422)
    for name, least, most in (("timeout_s", 0.0, 86_400.0), ("wait_s", 0.0, _MAX_WAIT_S)):
        number = fields[name]
        is_number = isinstance(number, int | float) and not isinstance(number, bool)
        fits = is_number and least <= number <= most and (number or name == "wait_s")
        if number is not None and not fits:
            raise HttpProblem(
                InvalidValueError(f"{name} is a number from {least:g} to {most:g}"), status=422
            )
    for name in ("model", "timeout_s", "wait_s"):
        if name in value and given[name] and value[name] != given[name]:
            raise InvalidValueError(f"{name} differs in the body and in the query string")
    return fields
