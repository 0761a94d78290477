"""Whether the gateway lives, whether it would answer, and its metrics."""

from typing import Annotated

from fastapi import Depends, FastAPI, Response
from pydantic import BaseModel
from starlette.concurrency import run_in_threadpool

from fedinfer_flower.serving.auth import Caller
from fedinfer_flower.serving.desk import Desk

__all__ = ["add_routes"]


class Health(BaseModel):
    """That the process lives."""

    ok: bool


class Ready(BaseModel):
    """Whether queries would be answered now."""

    ready: bool
    why: str


def add_routes(app: FastAPI, desk: Desk) -> None:
    """Add ``/health``, ``/ready``, ``/metrics`` and ``/v1/status``."""

    @app.get("/health", tags=["operation"])
    async def health() -> Health:
        """Whether the process lives."""
        return Health(ok=True)

    @app.get(
        "/ready",
        tags=["operation"],
        responses={503: {"model": Ready, "description": "Not now; `why` says why not"}},
    )
    async def ready(response: Response) -> Ready:
        """Whether queries would be answered now."""
        is_ready, why = await run_in_threadpool(desk.board.ready)
        if not is_ready:
            response.status_code = 503
            response.headers["Retry-After"] = "5"
        return Ready(ready=is_ready, why=why)

    async def rendered() -> Response:
        """Return all metrics in the text format of Prometheus."""
        if desk.metrics is None:
            return Response(b"", media_type="text/plain")
        body, content_type = await run_in_threadpool(desk.metrics.render)
        return Response(body, headers={"Content-Type": content_type})

    needed = [] if desk.config.public_metrics else [Depends(desk.caller("metrics"))]
    app.get(
        "/metrics",
        tags=["operation"],
        dependencies=needed,
        response_class=Response,
        responses={200: {"content": {"text/plain": {"schema": {"type": "string"}}}}},
    )(rendered)

    @app.get("/v1/status", tags=["operation"], response_model=dict[str, object])
    async def status(_: Annotated[Caller, Depends(desk.caller("status"))]) -> object:
        """Return what the dashboard shows; scope ``status``."""
        return await run_in_threadpool(desk.board.status)
