"""A gateway's HTTP application over three sites in this process, with faults on demand."""

from __future__ import annotations

import json
import secrets
import socket
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import uvicorn
from flwr.clientapp import ClientApp

from fedinfer_flower import FedEnsemble, InferenceMod, LocalModel
from fedinfer_flower.clients import model_cache
from fedinfer_flower.errors import (
    BindingError,
    FedInferError,
    QueryCancelledError,
    UnknownQueryError,
)
from fedinfer_flower.privacy.base import make_protection
from fedinfer_flower.query import Deadline
from fedinfer_flower.serving.config import GatewayConfig
from fedinfer_flower.serving.http_app import create_app
from fedinfer_flower.serving.jobs import Job, JobKind, JobRequest, JobState, Progress
from fedinfer_flower.serving.key_store import KeyStore
from fedinfer_flower.simulation.local_grid import LocalGrid
from fedinfer_flower.wire.arrays import array_from_bytes
from fedinfer_flower.wire.sealed_job import SealedJob

N_SITES, N_FEATURES, CLASSES = 3, 4, ("0", "1", "2")
ROWS = np.random.default_rng(11).standard_normal((6, N_FEATURES)).astype(np.float32)
WEIGHTS = np.random.default_rng(5).standard_normal((N_FEATURES, len(CLASSES)))
LABELS = (ROWS @ WEIGHTS).argmax(axis=1)


def load_model(context: Any) -> LocalModel:
    return LocalModel(
        model=lambda rows: np.asarray(rows, dtype=float) @ WEIGHTS,
        classes=CLASSES,
        outputs="logits",
        digest="one",
    )


class TestBoard:
    """Runs every job when it is submitted, on sites in this process."""

    __test__ = False

    def __init__(self, *, protection: str = "secagg") -> None:
        self.protection = protection
        self.jobs: dict[str, Job] = {}
        self.keys: dict[tuple[str, str], tuple[str, bytes]] = {}
        self.submitted = 0
        self.hold_s = 0.0
        self.edit: Callable[[Job], Job] = lambda job: job
        self.restart()

    def restart(self) -> None:
        """Begin another run, as a gateway does that was started again."""
        model_cache.clear()
        app = ClientApp()
        InferenceMod(load_model).attach(app)
        self.grid = LocalGrid(app, num_supernodes=N_SITES)

    def strategy(self, protection: str) -> FedEnsemble:
        return FedEnsemble(
            protection=make_protection(protection, {}),
            deadline=Deadline(timeout_s=20.0, quorum=1),
            min_available_nodes=N_SITES,
        )

    def submit(self, request: JobRequest) -> Job:
        known = self.keys.get((request.owner, request.idempotency_key))
        if request.idempotency_key and known is not None:
            if known[1] != request.body:
                raise BindingError("the idempotency key was used with another request")
            return self.jobs[known[0]]
        self.submitted += 1
        now = time.time()
        job = Job(
            job_id=secrets.token_hex(16),
            owner=request.owner,
            model=request.model,
            kind=request.kind,
            n_rows=request.n_rows,
            state=JobState.ACCEPTED,
            accepted_at=now,
            deadline_at=now + request.timeout_s,
        )
        self.jobs[job.job_id] = job
        self.keys[request.owner, request.idempotency_key] = (job.job_id, request.body)
        if self.hold_s:
            later = threading.Timer(self.hold_s, self._run, (job.job_id, request))
            later.daemon = True
            later.start()
        else:
            self._run(job.job_id, request)
        return self.jobs[job.job_id]

    def _run(self, job_id: str, request: JobRequest) -> None:
        job = self.jobs[job_id]
        if job.state.ended:
            return
        try:
            facts = self._sealed(request) if request.kind is JobKind.SEALED else _clear(request)
            facts |= {"state": JobState.DONE, "provenance": {"sites_asked": N_SITES}}
        except FedInferError as exc:
            facts = {"state": JobState.FAILED, "error": Job.error_facts(exc)}
        done = Progress(rows_done=job.n_rows, rows=job.n_rows, sites_asked=3, sites_answered=3)
        ended = Job(**{**vars(job), **facts, "progress": done, "ended_at": time.time()})
        self.jobs[job_id] = self.edit(ended)

    def _sealed(self, request: JobRequest) -> dict[str, Any]:
        sealed = SealedJob.from_bytes(request.body)
        result = self.strategy(sealed.protection).start(self.grid, sealed)
        assert result.combined is not None
        assert result.receipt is not None
        return {"answer": result.combined.to_bytes(), "receipt": result.receipt.to_bytes()}

    def find(self, job_id: str, *, owner: str) -> Job:
        job = self.jobs.get(job_id)
        if job is None or job.owner != owner:
            raise UnknownQueryError("there is no query of that id")
        return job

    def cancel(self, job_id: str, *, owner: str) -> Job:
        job = self.find(job_id, owner=owner)
        if not job.state.ended:
            error = Job.error_facts(QueryCancelledError("the query was called off"))
            job = Job(**{**vars(job), "state": JobState.CANCELLED, "error": error})
            self.jobs[job_id] = job
        return job

    def listen(self, job_id: str, *, owner: str, tell: Callable[[Job], None]) -> Any:
        job = self.find(job_id, owner=owner)
        tell(job)
        stop = threading.Event()

        def watch() -> None:
            seen = job
            while not stop.wait(0.02) and not seen.state.ended:
                now = self.jobs.get(job_id, seen)
                if now is not seen:
                    seen = now
                    tell(now)

        threading.Thread(target=watch, daemon=True).start()
        return stop.set

    def models(self) -> tuple[dict[str, Any], ...]:
        return (
            {"id": "triage", "kind": "classifier", "protection": self.protection, "rule": "auto"},
        )

    def directory(self, model: str) -> bytes:
        return self.strategy("secagg").directory(self.grid).to_bytes()

    def status(self) -> dict[str, Any]:
        return {}

    def ready(self) -> tuple[bool, str]:
        return True, ""


def _clear(request: JobRequest) -> dict[str, Any]:
    facts = request.facts
    rows = array_from_bytes(request.body, dtype=facts["dtype"], shape=tuple(facts["shape"]))
    logits = np.asarray(rows, dtype=float) @ WEIGHTS
    exp = np.exp(logits - logits.max(axis=1, keepdims=True))
    probabilities = exp / exp.sum(axis=1, keepdims=True)
    indices = probabilities.argmax(axis=1)
    answer = {
        "classes": list(CLASSES),
        "labels": [CLASSES[i] for i in indices],
        "indices": indices.tolist(),
        "probabilities": probabilities.tolist(),
        "margin": np.ptp(probabilities, axis=1).tolist(),
        "abstained": [False] * len(rows),
    }
    return {"answer": json.dumps(answer).encode()}


class Faults:
    """An ASGI application around another, in which requests go wrong as told.

    Parameters
    ----------
    app : ASGI application
    """

    def __init__(self, app: Any) -> None:
        self.app = app
        self.plan: list[tuple[str, str, Callable[..., Any]]] = []
        self.seen: list[tuple[str, str, dict[str, str]]] = []

    def on(self, method: str, path: str, fault: Callable[..., Any], *, times: int = 1) -> None:
        """Let the next requests of this method and beginning of path meet a fault."""
        self.plan += [(method, path, fault)] * times

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        headers = {k.decode(): v.decode() for k, v in scope["headers"]}
        self.seen.append((scope["method"], scope["path"], headers))
        for number, (method, path, fault) in enumerate(self.plan):
            if method == scope["method"] and scope["path"].startswith(path):
                del self.plan[number]
                await fault(self.app, scope, receive, send)
                return
        await self.app(scope, receive, send)

    def keys_used(self) -> list[str]:
        """Return the idempotency keys of all POST requests."""
        return [h["idempotency-key"] for m, _, h in self.seen if m == "POST"]


def replies(status: int, body: bytes = b"", **headers: str) -> Callable[..., Any]:
    """Return a fault that answers in the application's place."""

    async def fault(app: Any, scope: Any, receive: Any, send: Any) -> None:
        named = [(k.replace("_", "-").encode(), v.encode()) for k, v in headers.items()]
        named.append((b"content-length", str(len(body)).encode()))
        await send({"type": "http.response.start", "status": status, "headers": named})
        await send({"type": "http.response.body", "body": body})

    return fault


def changes(change: Callable[[bytes], bytes]) -> Callable[..., Any]:
    """Return a fault that lets the application answer, and changes what it says."""

    async def fault(app: Any, scope: Any, receive: Any, send: Any) -> None:
        parts: list[bytes] = []
        start: dict[str, Any] = {}

        async def take(message: Any) -> None:
            if message["type"] == "http.response.start":
                start.update(message)
            else:
                parts.append(message.get("body", b""))

        await app(scope, receive, take)
        body = change(b"".join(parts))
        kept = [(k, v) for k, v in start["headers"] if k != b"content-length"]
        kept.append((b"content-length", str(len(body)).encode()))
        await send({**start, "headers": kept})
        await send({"type": "http.response.body", "body": body})

    return fault


async def drops(app: Any, scope: Any, receive: Any, send: Any) -> None:
    """Do what was asked, and cut the connection in the middle of the reply."""

    async def half(message: Any) -> None:
        if message["type"] == "http.response.start":
            await send(message)
            return
        await send({**message, "body": message.get("body", b"")[:3], "more_body": True})
        raise ConnectionAbortedError

    await app(scope, receive, half)


class Server:
    """A running gateway.

    Parameters
    ----------
    app : ASGI application
    """

    def __init__(self, app: Any) -> None:
        sock = socket.socket()
        sock.bind(("127.0.0.1", 0))
        self.port = sock.getsockname()[1]
        config = uvicorn.Config(app, log_config=None, ws="none", lifespan="off")
        self._server = uvicorn.Server(config)
        self._thread = threading.Thread(
            target=self._server.run, kwargs={"sockets": [sock]}, daemon=True
        )
        self._thread.start()
        while not self._server.started:
            time.sleep(0.01)
        self.url = f"http://127.0.0.1:{self.port}"

    def stop(self) -> None:
        self._server.should_exit = True
        self._server.force_exit = True
        self._thread.join(timeout=10.0)


class Site:
    """What a test needs: the board behind the gateway, the faults before it, its address."""

    def __init__(self, folder: Path) -> None:
        self.board = TestBoard()
        values = {"models": {"triage": {"protection": "secagg"}}}
        config = GatewayConfig.from_mapping(values, folder=folder)
        self.store = KeyStore(folder / "keys.db")
        self.key = self.store.create("tests", scopes=["query", "sealed", "status"])
        self.faults = Faults(create_app(self.board, config, keys=self.store))
        self.server = Server(self.faults)
        self.url = self.server.url


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    site = Site(tmp_path_factory.mktemp("gateway"))
    yield site
    site.server.stop()
    site.store.close()


@pytest.fixture
def site(running: Site) -> Site:
    """Return the running gateway with nothing planned, and nothing seen."""
    running.faults.plan.clear()
    running.faults.seen.clear()
    running.board.submitted = 0
    running.board.hold_s = 0.0
    running.board.edit = lambda job: job
    return running
