"""A board in memory, and the application around it."""

from __future__ import annotations

import json
import secrets
import threading
import time

import httpx
import pytest

from fedinfer_flower.errors import BindingError, InvalidValueError, UnknownQueryError
from fedinfer_flower.serving.config import GatewayConfig
from fedinfer_flower.serving.http_app import create_app
from fedinfer_flower.serving.jobs import Job, JobKind, JobState, Progress
from fedinfer_flower.serving.key_store import KeyStore

MODELS = {"wine": {"timeout_s": 20.0}, "sealed-only": {"clear": False, "protection": "secagg"}}


class MemoryBoard:
    """Jobs in a dict; `answering` says whether they end at once."""

    def __init__(self):
        self.jobs, self.by_key, self.listeners, self.requests = {}, {}, {}, []
        self.answering, self.is_ready, self.why, self.error = True, True, "", None
        self.lock = threading.RLock()

    def submit(self, request):
        if self.error is not None:
            raise self.error
        known = (request.owner, request.idempotency_key)
        with self.lock:
            if request.idempotency_key and known in self.by_key:
                job_id, body = self.by_key[known]
                if body != request.body:
                    raise BindingError("the idempotency key was used with another request")
                if job_id in self.jobs:
                    return self.jobs[job_id]
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
                progress=Progress(rows=request.n_rows),
            )
            self.requests.append(request)
            self.by_key[known] = (job.job_id, request.body)
            self.jobs[job.job_id] = job
        if self.answering:
            self.finish(job.job_id)
        return self.jobs[job.job_id]

    def finish(self, job_id, *, answer=None, state=JobState.DONE, error=None, receipt=b""):
        job = self.jobs[job_id]
        if answer is None and state is JobState.DONE:
            text = json.dumps({"classes": ["a", "b"], "labels": ["a"] * job.n_rows})
            answer = b"sealed bytes" if job.kind is JobKind.SEALED else text.encode()
        self.change(
            job_id,
            state=state,
            answer=answer or b"",
            ended_at=time.time(),
            error=error or {},
            receipt=receipt,
        )

    def change(self, job_id, **changes):
        with self.lock:
            job = self.jobs[job_id]
            self.jobs[job_id] = job = Job(**{**vars(job), **changes})
            listeners = list(self.listeners.get(job_id, ()))
        for tell in listeners:
            tell(job)

    def find(self, job_id, *, owner):
        job = self.jobs.get(job_id)
        if job is None or job.owner != owner:
            raise UnknownQueryError("no query of that id, or it is another key's")
        return job

    def cancel(self, job_id, *, owner):
        if not self.find(job_id, owner=owner).state.ended:
            self.finish(job_id, state=JobState.CANCELLED)
        return self.jobs[job_id]

    def listen(self, job_id, *, owner, tell):
        job = self.find(job_id, owner=owner)
        with self.lock:
            self.listeners.setdefault(job_id, []).append(tell)
        tell(job)

        def stop():
            with self.lock:
                if tell in self.listeners.get(job_id, ()):
                    self.listeners[job_id].remove(tell)

        return stop

    def n_listeners(self):
        return sum(map(len, self.listeners.values()))

    def models(self):
        return tuple({"id": name, "kind": "classifier"} for name in MODELS)

    def directory(self, model):
        if model not in MODELS:
            raise InvalidValueError("no such model")
        return b"directory bytes"

    def status(self):
        return {"gateway": {"name": "gateway"}, "sites": []}

    def ready(self):
        return self.is_ready, self.why


@pytest.fixture
def board():
    return MemoryBoard()


@pytest.fixture
def config(tmp_path):
    limits = {"body_bytes": 1 << 20, "header_timeout_s": 1.0, "body_timeout_s": 1.0}
    return GatewayConfig.from_mapping(
        {"gateway": {"port": 0, "state": "state"}, "limits": limits, "models": MODELS},
        folder=tmp_path,
    )


@pytest.fixture
def keys(tmp_path):
    store = KeyStore(tmp_path / "keys.db")
    yield store
    store.close()


@pytest.fixture
def key(keys):
    return keys.create("lab", scopes=["query", "sealed", "chat", "status", "metrics"])


@pytest.fixture
def bearer():
    return lambda text: {"Authorization": f"Bearer {text}"}


@pytest.fixture
def app(board, config, keys):
    return create_app(board, config, keys=keys)


@pytest.fixture
def client_of():
    def make(app, headers=None):
        transport = httpx.ASGITransport(app=app)
        return httpx.AsyncClient(transport=transport, base_url="http://gw", headers=headers)

    return make


@pytest.fixture
def client(app, key, bearer, client_of):
    return client_of(app, bearer(key))
