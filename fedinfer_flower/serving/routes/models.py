"""What is served, in the shape of OpenAI's list, and the sites' keys for sealing."""

from typing import Annotated, Any

from fastapi import Depends, FastAPI, Path, Response
from pydantic import BaseModel, ConfigDict
from starlette.concurrency import run_in_threadpool

from fedinfer_flower.errors import ProtectionRefusedError, UnknownNameError
from fedinfer_flower.serving.auth import Caller
from fedinfer_flower.serving.desk import Desk
from fedinfer_flower.serving.problem import HttpProblem

__all__ = ["add_routes"]

ModelName = Annotated[str, Path(max_length=64, description="id of a model")]


class Model(BaseModel):
    """A model that is served."""

    model_config = ConfigDict(extra="allow")

    id: str
    object: str = "model"
    owned_by: str = "federation"
    kind: str


class Models(BaseModel):
    """All models that the key may use."""

    object: str = "list"
    data: list[Model]


def add_routes(app: FastAPI, desk: Desk) -> None:
    """Add ``/v1/models`` and what is below it."""
    anyone = Depends(desk.caller())

    async def shown(caller: Caller) -> list[dict[str, Any]]:
        frame = {"object": "model", "owned_by": "federation"}
        found = await run_in_threadpool(desk.board.models)
        return [
            frame | dict(model)
            for model in found
            if caller.models is None or model["id"] in caller.models
        ]

    @app.get("/v1/models", tags=["models"], response_model=Models)
    async def models(caller: Annotated[Caller, anyone]) -> object:
        """Return the models that the key may use."""
        return {"object": "list", "data": await shown(caller)}

    @app.get("/v1/models/{model}", tags=["models"], response_model=Model)
    async def model(model: ModelName, caller: Annotated[Caller, anyone]) -> object:
        """Return one model."""
        for found in await shown(caller):
            if found["id"] == model:
                return found
        raise _unknown()

    @app.get(
        "/v1/models/{model}/directory",
        tags=["models"],
        response_class=Response,
        responses={
            200: {
                "description": "`Directory.to_bytes`: the sites' signed keys and profiles",
                "content": {"application/octet-stream": {"schema": {"type": "string"}}},
            }
        },
    )
    async def directory(
        model: ModelName, caller: Annotated[Caller, Depends(desk.caller("sealed"))]
    ) -> Response:
        """Return the sites to seal a query to; scope ``sealed``.

        Compare their key ids with those that you got from the sites themselves.
        """
        if model not in {found["id"] for found in await shown(caller)}:
            raise _unknown()
        served = desk.config.models.get(model)
        if served is not None and not served.sealed:
            raise ProtectionRefusedError("this model takes no queries sealed")
        data = await run_in_threadpool(desk.board.directory, model)
        return Response(data, media_type="application/octet-stream")


def _unknown() -> HttpProblem:
    return HttpProblem(
        UnknownNameError("this gateway serves no such model", hint="GET /v1/models"), status=404
    )
