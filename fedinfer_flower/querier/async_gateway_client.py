"""`AsyncGateway`: the same as `Gateway`, for programs on asyncio."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, NoReturn, Self, TypeVar

import httpx
import numpy.typing as npt

from fedinfer_flower.errors import InvalidValueError
from fedinfer_flower.observability.tracing import span
from fedinfer_flower.querier.gateway_answering import cancel_talk, finish_talk
from fedinfer_flower.querier.gateway_asking import (
    Asking,
    Submitted,
    directory_talk,
    models_talk,
    submit_talk,
)
from fedinfer_flower.querier.gateway_http import access, lost, reply_of, require_room
from fedinfer_flower.querier.gateway_job import Answer, GatewayJob, GatewayModel, ModelMemory
from fedinfer_flower.querier.gateway_wire import Call, Pause, Reply, Talk, Terms
from fedinfer_flower.wire.directory import Directory
from fedinfer_flower.wire.pins import Pins

__all__ = ["AsyncGateway", "AsyncPendingAnswer"]

T = TypeVar("T")


class AsyncGateway:
    """Ask the sites of a federation through its gateway, on one event loop.

    Sealing and opening are arithmetic, and run on the loop: milliseconds under `secagg`,
    more under `he`.

    Parameters
    ----------
    url, api_key, api_key_file, ca, timeout_s, retries, insecure
        As for `Gateway`.

    Privacy
    -------
    As for `Gateway`.

    Examples
    --------
    >>> AsyncGateway("https://gateway.example:8443", api_key="fik_0a1b2c3d_secret")
    AsyncGateway('https://gateway.example:8443')
    """

    def __init__(
        self,
        url: str,
        *,
        api_key: str | None = None,
        api_key_file: str | Path | None = None,
        ca: str | Path | None = None,
        timeout_s: float = 60.0,
        retries: int = 8,
        insecure: bool = False,
    ) -> None:
        self._access = access(
            url,
            api_key=api_key,
            key_file=None if api_key_file is None else Path(api_key_file),
            ca=None if ca is None else Path(ca),
            insecure=insecure,
        )
        self._timeout_s, self._retries = timeout_s, retries
        self._terms()
        self._known = ModelMemory()
        self._client: httpx.AsyncClient | None = None

    def __repr__(self) -> str:
        return f"AsyncGateway({self._access.url!r})"

    def __copy__(self) -> Self:
        return self

    def __deepcopy__(self, memo: Mapping[int, Any]) -> Self:
        return self

    def __reduce__(self) -> NoReturn:
        raise TypeError("an AsyncGateway holds an API key, and does not travel: make one there")

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        exc: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        await self.close()

    async def close(self) -> None:
        """Close the connections; a later call opens new ones."""
        client, self._client = self._client, None
        if client is not None:
            await client.aclose()

    async def models(self) -> tuple[GatewayModel, ...]:
        """Return what the gateway serves to this key."""
        return await self._carry_out(models_talk(terms := self._terms()), terms)

    async def directory(self, model: str, *, pins: Pins | None = None) -> Directory:
        """Return the sites of a model; see `Gateway.directory`."""
        terms = self._terms()
        return await self._carry_out(directory_talk(model, pins, terms), terms)

    async def ask(
        self, inputs: npt.ArrayLike, *, model: str, timeout_s: float | None = None, **options: Any
    ) -> Answer:
        """Ask, wait, open the answer, verify the receipt; options are those of `Gateway.ask`."""
        terms = self._terms(timeout_s)
        asking = Asking(
            inputs=inputs, model=model, timeout_s=timeout_s, known=self._known, **options
        )
        with span("querier.ask"):
            talk = submit_talk(asking, terms, wait_s=terms.timeout_s)
            submitted = await self._carry_out(talk, terms)
            return await self._carry_out(finish_talk(submitted, terms), terms)

    async def submit(
        self, inputs: npt.ArrayLike, *, model: str, timeout_s: float | None = None, **options: Any
    ) -> AsyncPendingAnswer:
        """Hand a query in and return at once; options are those of `Gateway.ask`."""
        terms = self._terms(timeout_s)
        asking = Asking(
            inputs=inputs, model=model, timeout_s=timeout_s, known=self._known, **options
        )
        submitted = await self._carry_out(submit_talk(asking, terms), terms)
        return AsyncPendingAnswer(self, submitted, timeout_s=terms.timeout_s)

    def _terms(self, timeout_s: float | None = None) -> Terms:
        chosen = self._timeout_s if timeout_s is None else timeout_s
        if not 0.0 < chosen < float("inf"):
            raise InvalidValueError("timeout_s is a positive number of seconds")
        return Terms(timeout_s=chosen, retries=self._retries)

    async def _carry_out(self, talk: Talk[T], terms: Terms) -> T:
        reply: Reply | None = None
        try:
            while True:
                step = talk.send(reply)
                if isinstance(step, Pause):
                    await asyncio.sleep(min(step.seconds, max(terms.left_s, 0.0)))
                    reply = None
                else:
                    reply = await self._call(step)
        except StopIteration as stop:
            found: T = stop.value
            return found
        finally:
            talk.close()

    async def _call(self, call: Call) -> Reply:
        if self._client is None:
            self._client = httpx.AsyncClient(**self._access.client_options())
        client, body = self._client, bytearray()
        try:
            async with asyncio.timeout(call.timeout_s):
                response = await client.send(self._access.request(client, call), stream=True)
                try:
                    async for part in response.aiter_raw():
                        require_room(len(body) + len(part), call.max_bytes)
                        body += part
                finally:
                    await response.aclose()
        except (httpx.HTTPError, TimeoutError) as exc:
            return lost(exc)
        return reply_of(response, bytes(body))


class AsyncPendingAnswer:
    """A query that was handed in; see `AsyncGateway.submit`.

    Keep the object: it holds the keys that open the answer of a sealed query.

    Parameters
    ----------
    job_id : str
        The gateway's id of the job.
    """

    def __init__(self, gateway: AsyncGateway, submitted: Submitted, *, timeout_s: float) -> None:
        self._gateway, self._submitted, self._timeout_s = gateway, submitted, timeout_s

    def __repr__(self) -> str:
        return f"AsyncPendingAnswer(job_id={self.job_id!r})"

    @property
    def job_id(self) -> str:
        """The gateway's id of the job."""
        return self._submitted.job.job_id

    async def wait(self, timeout_s: float | None = None) -> Answer:
        """Wait for the answer, at most so many seconds; see `Gateway.ask` for errors."""
        terms = self._gateway._terms(self._timeout_s if timeout_s is None else timeout_s)
        return await self._gateway._carry_out(finish_talk(self._submitted, terms), terms)

    async def cancel(self) -> GatewayJob:
        """Call the query off; return how it stands. Sites that were asked may still charge."""
        terms = self._gateway._terms()
        return await self._gateway._carry_out(cancel_talk(self.job_id, terms), terms)
