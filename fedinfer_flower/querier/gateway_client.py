"""`Gateway`: ask a federation over HTTPS, from any program."""

from __future__ import annotations

import threading
import time
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, NoReturn, Self, TypeVar

import httpx
import numpy.typing as npt

from fedinfer_flower.ensemble.base import EnsembleRule
from fedinfer_flower.errors import InvalidValueError
from fedinfer_flower.observability.tracing import span
from fedinfer_flower.privacy.base import Protection
from fedinfer_flower.querier.gateway_answering import cancel_talk, finish_talk
from fedinfer_flower.querier.gateway_asking import (
    Asking,
    Submitted,
    directory_talk,
    models_talk,
    submit_talk,
)
from fedinfer_flower.querier.gateway_http import access, lost, reply_of, require_room
from fedinfer_flower.querier.gateway_job import (
    Answer,
    GatewayJob,
    GatewayModel,
    ModelMemory,
    OnProgress,
)
from fedinfer_flower.querier.gateway_wire import Call, Pause, Reply, Talk, Terms
from fedinfer_flower.wire.directory import Directory
from fedinfer_flower.wire.identity import Identity
from fedinfer_flower.wire.pins import Pins

__all__ = ["Gateway", "PendingAnswer"]

T = TypeVar("T")


class Gateway:
    """Ask the sites of a federation through its gateway.

    Queries are sealed to the sites unless `seal` is off: the gateway passes them on and
    cannot read them. Threads may share one object.

    Parameters
    ----------
    url : str
        ``https://HOST:PORT``; ``http://`` on this machine only.
    api_key : str, optional
        Default the environment's ``FEDINFER_API_KEY``, or the file that
        ``FEDINFER_API_KEY_FILE`` names.
    api_key_file : Path, optional
        A file that only its owner can read, instead.
    ca : Path, optional
        PEM file of a private certificate authority.
    timeout_s : float
        Seconds for each call of a method, unless it is given there.
    retries : int
        Most repetitions of one request: when the connection fails, and on status 429, 502,
        503, 504. Repetitions carry the same idempotency key: the job is accepted once.
    insecure : bool
        Allow ``http://`` to another machine: only inside a tunnel that encrypts.

    Raises
    ------
    ConfigError
        For an address, key or certificate with which nothing can be asked.

    Privacy
    -------
    The gateway learns who asks, when, how many rows and which model. With ``seal=True`` it
    learns neither rows nor, under `secagg` and `he`, answers; in clear it reads both. It
    chooses which sites are in the directory: without `pins` it could make sites up, and
    read the queries that are sealed to them.

    Examples
    --------
    >>> Gateway("https://gateway.example:8443", api_key="fik_0a1b2c3d_secret")
    Gateway('https://gateway.example:8443')
    >>> Gateway("http://gateway.example", api_key="fik_x")  # doctest: +ELLIPSIS
    Traceback (most recent call last):
    ...
    fedinfer_flower.errors.ConfigError: FI200 ...
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
        self._timeout_s, self._retries = _positive(timeout_s), retries
        self._known = ModelMemory()
        self._client: httpx.Client | None = None
        self._lock = threading.Lock()

    def __repr__(self) -> str:
        return f"Gateway({self._access.url!r})"

    def __copy__(self) -> Self:
        return self

    def __deepcopy__(self, memo: Mapping[int, Any]) -> Self:
        # scikit-learn copies the parameters of what it clones; a connection is shared.
        return self

    def __reduce__(self) -> NoReturn:
        raise TypeError("a Gateway holds an API key, and does not travel: make one there")

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        exc: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close the connections; a later call opens new ones."""
        with self._lock:
            client, self._client = self._client, None
        if client is not None:
            client.close()

    def models(self) -> tuple[GatewayModel, ...]:
        """Return what the gateway serves to this key."""
        return self._carry_out(models_talk(terms := self._terms()), terms)

    def directory(self, model: str, *, pins: Pins | None = None) -> Directory:
        """Return the sites of a model: every signature verified, keys compared with `pins`.

        Raises
        ------
        UntrustedKeyError
            If a site is not pinned, or shows another key.
        """
        terms = self._terms()
        return self._carry_out(directory_talk(model, pins, terms), terms)

    def ask(
        self,
        inputs: npt.ArrayLike,
        *,
        model: str,
        seal: bool = True,
        protection: str | Protection | None = None,
        rule: str | EnsembleRule | None = None,
        pins: Pins | None = None,
        identity: Identity | None = None,
        on_progress: OnProgress | None = None,
        timeout_s: float | None = None,
        idempotency_key: str | None = None,
        receipt: str = "verify",
        reseals: int = 1,
        batch_size: int = 1024,
    ) -> Answer:
        """Ask, wait, open the answer, verify the receipt.

        Parameters
        ----------
        inputs : array of shape (n_queries, ...)
        model : str
            A name out of `models`.
        seal : bool
            Seal the queries to the sites; False lets the gateway read them.
        protection, rule : optional
            Of a sealed query; default what the gateway shows for the model.
        pins : Pins, optional
            Key ids of the sites, compared out of band.
        identity : Identity, optional
            Who the querier is to the sites; default a fresh one.
        on_progress : callable, optional
            Called with a `GatewayJob` about twice a second, in this thread.
        timeout_s : float, optional
            Seconds for everything; the gateway is told to end the job a tenth before, or
            when the model's own time is over.
        idempotency_key : str, optional
            In clear: an earlier request with this key and these rows is not asked again.
            Sealing makes other bytes each time, so across calls it helps in clear only.
        receipt : {"verify", "require", "skip"}
            A receipt that does not verify is an error under the first two; one that is
            missing under the second.
        reseals : int
            How often, 0 to 2, a sealed job is sealed anew when the federation turns out to
            have started another run. Sites charge their budgets and prices again for the
            rows of a job that they had answered before.
        batch_size : int
            Rows in one message to a site, sealed.

        Raises
        ------
        FedInferError
            Of the class that the gateway names; `GatewayError` if none can be had.
        ReceiptError
            If the receipt does not verify, or is of another job.
        """
        terms = self._terms(timeout_s)
        asking = Asking(
            inputs=inputs,
            model=model,
            seal=seal,
            protection=protection,
            rule=rule,
            pins=pins,
            identity=identity,
            on_progress=on_progress,
            idempotency_key=idempotency_key,
            receipt=receipt,
            reseals=reseals,
            batch_size=batch_size,
            timeout_s=timeout_s,
            known=self._known,
        )
        with span("querier.ask"):
            submitted = self._carry_out(submit_talk(asking, terms, wait_s=terms.timeout_s), terms)
            return self._carry_out(finish_talk(submitted, terms), terms)

    def submit(
        self, inputs: npt.ArrayLike, *, model: str, timeout_s: float | None = None, **options: Any
    ) -> PendingAnswer:
        """Hand a query in and return at once; options are those of `ask`.

        `timeout_s` is when the gateway ends the job.
        """
        terms = self._terms(timeout_s)
        asking = Asking(
            inputs=inputs, model=model, timeout_s=timeout_s, known=self._known, **options
        )
        submitted = self._carry_out(submit_talk(asking, terms), terms)
        return PendingAnswer(self, submitted, timeout_s=terms.timeout_s)

    def _terms(self, timeout_s: float | None = None) -> Terms:
        chosen = self._timeout_s if timeout_s is None else _positive(timeout_s)
        return Terms(timeout_s=chosen, retries=self._retries)

    def _carry_out(self, talk: Talk[T], terms: Terms) -> T:
        reply: Reply | None = None
        try:
            while True:
                step = talk.send(reply)
                if isinstance(step, Pause):
                    time.sleep(min(step.seconds, max(terms.left_s, 0.0)))
                    reply = None
                else:
                    reply = self._call(step)
        except StopIteration as stop:
            found: T = stop.value
            return found
        finally:
            talk.close()

    def _call(self, call: Call) -> Reply:
        client = self._connected()
        ends_at = time.monotonic() + call.timeout_s
        body = bytearray()
        try:
            response = client.send(self._access.request(client, call), stream=True)
            try:
                for part in response.iter_raw():
                    require_room(len(body) + len(part), call.max_bytes)
                    body += part
                    if time.monotonic() > ends_at:
                        # Each part came in time, and all of them together do not.
                        raise TimeoutError
            finally:
                response.close()
        except (httpx.HTTPError, TimeoutError) as exc:
            return lost(exc)
        return reply_of(response, bytes(body))

    def _connected(self) -> httpx.Client:
        with self._lock:
            if self._client is None:
                self._client = httpx.Client(**self._access.client_options())
            return self._client


class PendingAnswer:
    """A query that was handed in; see `Gateway.submit`.

    Keep the object: it holds the keys that open the answer of a sealed query.

    Parameters
    ----------
    job_id : str
        The gateway's id of the job.
    """

    def __init__(self, gateway: Gateway, submitted: Submitted, *, timeout_s: float) -> None:
        self._gateway, self._submitted, self._timeout_s = gateway, submitted, timeout_s

    def __repr__(self) -> str:
        return f"PendingAnswer(job_id={self.job_id!r})"

    @property
    def job_id(self) -> str:
        """The gateway's id of the job."""
        return self._submitted.job.job_id

    def wait(self, timeout_s: float | None = None) -> Answer:
        """Wait for the answer, at most so many seconds; see `Gateway.ask` for errors.

        May be called again after it ran out of time, while the gateway keeps results.
        """
        terms = self._gateway._terms(self._timeout_s if timeout_s is None else timeout_s)
        return self._gateway._carry_out(finish_talk(self._submitted, terms), terms)

    def cancel(self) -> GatewayJob:
        """Call the query off; return how it stands. Sites that were asked may still charge."""
        terms = self._gateway._terms()
        return self._gateway._carry_out(cancel_talk(self.job_id, terms), terms)


def _positive(timeout_s: float) -> float:
    if not 0.0 < timeout_s < float("inf"):
        raise InvalidValueError("timeout_s is a positive number of seconds")
    return timeout_s
