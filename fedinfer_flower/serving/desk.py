"""What the HTTP routes share: who asks, how a job is handed in, how it is watched."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import AsyncGenerator, Awaitable, Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final

from fastapi import Request
from starlette.concurrency import run_in_threadpool
from starlette.responses import Response

from fedinfer_flower.errors import (
    AuthenticationError,
    FedInferError,
    ProtectionRefusedError,
    UnknownNameError,
)
from fedinfer_flower.serving.auth import Caller
from fedinfer_flower.serving.config import GatewayConfig
from fedinfer_flower.serving.jobs import Board, Job, JobKind, JobRequest
from fedinfer_flower.serving.problem import HttpProblem, problem_response
from fedinfer_flower.serving.rate_limit import Quotas

if TYPE_CHECKING:
    from fedinfer_flower.observability.audit_log import AuditLog
    from fedinfer_flower.observability.metrics import GatewayMetrics
    from fedinfer_flower.serving.key_store import KeyStore

__all__ = ["Desk"]

_LOG: Final = logging.getLogger(__name__)
_SCOPES: Final = {JobKind.ROWS: "query", JobKind.SEALED: "sealed", JobKind.TEXT: "chat"}


@dataclass(frozen=True, kw_only=True)
class Desk:
    """What a route needs.

    Parameters
    ----------
    board : Board
    config : GatewayConfig
    keys : KeyStore
    quotas : Quotas
    metrics : GatewayMetrics, optional
    audit : AuditLog, optional
    """

    board: Board
    config: GatewayConfig
    keys: KeyStore
    quotas: Quotas = field(repr=False)
    metrics: GatewayMetrics | None = None
    audit: AuditLog | None = None

    def caller(self, scope: str = "") -> Callable[[Request], Awaitable[Caller]]:
        """Return a FastAPI dependency: the `Caller`, whose key must have the scope.

        Parameters
        ----------
        scope : str
            Empty for any valid key.
        """

        async def caller(request: Request) -> Caller:
            found = getattr(request.state, "caller", None)
            if not isinstance(found, Caller):
                raise HttpProblem(AuthenticationError("this needs an API key"), status=401)
            if scope and scope not in found.scopes:
                self.note_refusal(AuthenticationError.code, found)
                raise HttpProblem(
                    AuthenticationError(f"the API key does not have the scope {scope!r}"),
                    status=403,
                )
            return found

        return caller

    def may_use(self, caller: Caller, model: str, kind: JobKind) -> None:
        """Require that the model is served in this way, and to this caller.

        Raises
        ------
        HttpProblem
            401 or 403 of `AuthenticationError`, 403 of `ProtectionRefusedError`, or 404 for a
            model that is not served.
        """
        scope = _SCOPES[kind]
        if scope not in caller.scopes:
            error = AuthenticationError(f"the API key does not have the scope {scope!r}")
            self.note_refusal(error.code, caller)
            raise HttpProblem(error, status=403)
        # First, so that a key learns nothing of models that it is not meant for.
        if caller.models is not None and model not in caller.models:
            self.note_refusal(AuthenticationError.code, caller)
            raise HttpProblem(
                AuthenticationError("the API key is not meant for this model"), status=403
            )
        served = self.config.models.get(model)
        if served is None:
            raise HttpProblem(
                UnknownNameError("this gateway serves no such model", hint="GET /v1/models"),
                status=404,
            )
        allowed = served.sealed if kind is JobKind.SEALED else served.clear
        if not allowed:
            how = "sealed" if kind is JobKind.SEALED else "in clear"
            raise HttpProblem(ProtectionRefusedError(f"this model takes no queries {how}"))

    async def submit(self, request: JobRequest, caller: Caller) -> Job:
        """Hand a job in; its rows are counted once, however often it is handed in.

        Raises
        ------
        HttpProblem, FedInferError
            As `may_use` and `Board.submit`, or if a quota is used up.
        """
        self.may_use(caller, request.model, request.kind)
        try:
            return await run_in_threadpool(self.quotas.submit, self.board, request, caller)
        except (FedInferError, HttpProblem) as exc:
            error = exc.error if isinstance(exc, HttpProblem) else exc
            self.note_refusal(error.code, caller, n_rows=request.n_rows)
            raise

    async def submit_and_wait(self, request: JobRequest, caller: Caller, wait_s: float) -> Job:
        """Hand a job in and wait up to `wait_s` seconds for its end; return it as it stands."""
        job = await self.submit(request, caller)
        return await self.wait(job, caller, wait_s)

    async def wait(self, job: Job, caller: Caller, wait_s: float) -> Job:
        """Wait up to `wait_s` seconds for a job's end; return it as it stands then."""
        if job.state.ended or wait_s <= 0.0:
            return job
        latest = job
        with contextlib.suppress(TimeoutError):
            async with (
                asyncio.timeout(wait_s),
                contextlib.aclosing(self.watch(job.job_id, caller)) as states,
            ):
                async for state in states:
                    latest = state
        return latest

    async def watch(
        self, job_id: str, caller: Caller, *, beat_s: float | None = None
    ) -> AsyncGenerator[Job, None]:
        """Yield a job as it stands, then at changes, and last at its end.

        What changes while the consumer is busy is put together: one that reads slowly sees
        fewer states, and nothing is kept for it but the latest.

        Parameters
        ----------
        beat_s : float, optional
            Yield the same state again after so many seconds without a change.
        """
        loop = asyncio.get_running_loop()
        changed = asyncio.Event()
        latest: list[Job] = []

        def take(job: Job) -> None:
            # A late change must not hide the end.
            if not (latest and latest[0].state.ended):
                latest[:] = [job]
            changed.set()

        def tell(job: Job) -> None:
            with contextlib.suppress(RuntimeError):  # the loop has ended, and the watcher with it
                loop.call_soon_threadsafe(take, job)

        stop = await run_in_threadpool(self.board.listen, job_id, owner=caller.key_id, tell=tell)
        try:
            while True:
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(beat_s):
                        await changed.wait()
                changed.clear()
                if latest:
                    job = latest[0]
                    yield job
                    if job.state.ended:
                        return
        finally:
            stop()

    def problem(
        self, exc: FedInferError | HttpProblem, *, query_id: str = "", openai: bool = False
    ) -> Response:
        """Return the response that tells an error."""
        return problem_response(exc, query_id=query_id, openai=openai)

    def note_refusal(self, code: str, caller: Caller, *, n_rows: int = 0) -> None:
        """Write down that a caller with a valid key was refused; on the event loop only.

        A caller that is refused without end fills no disk: a few a minute are written.
        """
        if self.audit is not None and self.quotas.may_note(caller.key_id):
            asyncio.get_running_loop().run_in_executor(
                None, _append, self.audit, code, caller.key_id, n_rows
            )


def _append(audit: AuditLog, code: str, key_id: str, n_rows: int) -> None:
    try:
        audit.append("refused", code=code, querier=key_id, n_rows=n_rows)
    except FedInferError as exc:
        # Nothing was asked, so nothing goes out unrecorded.
        _LOG.error("a refusal could not be written down: %s", exc.code)
