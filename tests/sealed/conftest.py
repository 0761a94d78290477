"""Five small sites asked under seal; every message that passes the coordinator is kept."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from flwr.app import Message
from flwr.clientapp import ClientApp

from fedinfer_flower import FedEnsemble, InferenceMod, LocalModel, Querier
from fedinfer_flower.clients import model_cache
from fedinfer_flower.errors import FedInferError
from fedinfer_flower.privacy.base import make_protection
from fedinfer_flower.query import Deadline
from fedinfer_flower.simulation.local_grid import LocalGrid
from fedinfer_flower.wire.directory import Directory
from fedinfer_flower.wire.envelope import Envelope
from fedinfer_flower.wire.identity import Identity
from fedinfer_flower.wire.records import pack, packed_bytes, unpack
from fedinfer_flower.wire.sealed_job import SealedJob

N_SITES, N_FEATURES = 5, 4
CLASSES = ("a", "b", "c")
CANARY_NUMBER = 1234.5625
"""Exact in float32 and float64, so that its bytes can be searched for."""

ROWS = np.random.default_rng(7).standard_normal((6, N_FEATURES))

PROTECTIONS: Mapping[str, Mapping[str, Any]] = {
    "plain": {},
    "dp": {"epsilon": 60.0},
    "secagg": {},
    "secagg+dp": {"epsilon": 24.0},
    "he": {},
}

Wrap = Callable[[str, int, Message, Any, Callable[..., Message]], Message]


class RecordingGrid(LocalGrid):
    """Keeps the bytes of every envelope that passes, in both directions.

    `on_push` and `on_pull` are the hostile coordinator: they may replace messages.
    """

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.sent: list[bytes] = []
        self.received: list[bytes] = []
        self.on_push: Callable[[Envelope], Envelope] = lambda envelope: envelope

    def push_messages(self, messages):
        out = list(messages)
        for message in out:
            envelope = unpack(message.content)
            changed = self.on_push(envelope)
            if changed is not envelope:
                message.content = pack(changed)
            self.sent.append(packed_bytes(message.content))
        return super().push_messages(out)

    def pull_messages(self, message_ids):
        replies = list(super().pull_messages(message_ids))
        for reply in replies:
            if reply.has_content():
                self.received.append(packed_bytes(reply.content))
        return replies

    @property
    def seen(self) -> list[bytes]:
        """Everything that the coordinator held."""
        return [*self.sent, *self.received]

    def errors(self) -> list[str]:
        """Codes of the typed errors that sites sent."""
        found = []
        for data in self.received:
            from fedinfer_flower.wire.envelope import decode

            envelope = decode(data)
            if envelope.kind.value == "error":
                found.append(envelope.meta["code"])
        return found


class Federation:
    """Sites, a grid and the usual way of asking them."""

    def __init__(
        self,
        *,
        n_sites: int = N_SITES,
        wrap: Wrap | None = None,
        versions: Mapping[int, int] | None = None,
        per_site: Mapping[int, Mapping[str, Any]] | None = None,
        latency_s: Callable[[int], float] = lambda node_id: 0.0,
        timeout_s: float = 20.0,
        **options: Any,
    ) -> None:
        self.n_sites = n_sites
        self.versions = dict(versions or {})
        self.seen_inputs: list[np.ndarray] = []
        self.timeout_s = timeout_s
        self.options, self.per_site = options, dict(per_site or {})
        self.restart()
        app = ClientApp()
        for action in ("fi_hello", "fi_predict", "fi_recover", "fi_ping"):

            @app.query(action)
            def handle(message, context, action=action):
                partition = context.node_config["partition-id"]
                inner = self.mods[partition].handle
                if wrap is None:
                    return inner(message, context)
                return wrap(action, partition, message, context, inner)

        self.grid = RecordingGrid(app, num_supernodes=n_sites, latency_s=latency_s)

    def restart(self) -> None:
        """Begin again at every site with what is on disk alone."""
        model_cache.clear()
        self.mods = {
            k: InferenceMod(self.load_model, **{**self.options, **self.per_site.get(k, {})})
            for k in range(self.n_sites)
        }

    def forget_contexts(self) -> None:
        """Throw away what Flower keeps for the sites between messages."""
        for context in self.grid._contexts.values():
            context.state.clear()

    def weights(self, partition: int) -> np.ndarray:
        version = self.versions.get(partition, 0)
        rng = np.random.default_rng([partition, version])
        return rng.standard_normal((N_FEATURES, len(CLASSES)))

    def load_model(self, context: Any) -> LocalModel:
        partition = context.node_config["partition-id"]
        weights = self.weights(partition)

        def logits(rows):
            self.seen_inputs.append(np.array(rows))
            return np.asarray(rows, dtype=float) @ weights

        return LocalModel(
            model=logits,
            classes=CLASSES,
            outputs="logits",
            digest=f"version-{self.versions.get(partition, 0)}",
        )

    def probabilities(self, rows: np.ndarray = ROWS) -> np.ndarray:
        """Return what the sites send under mean-probability, shape (n_sites, n_queries, 3)."""
        logits = np.stack([rows @ self.weights(k) for k in range(self.n_sites)])
        exp = np.exp(logits - logits.max(axis=2, keepdims=True))
        return exp / exp.sum(axis=2, keepdims=True)

    def strategy(self, protection: Any = "secagg", **options: Any) -> FedEnsemble:
        if isinstance(protection, str):
            protection = make_protection(protection, PROTECTIONS[protection])
        defaults: dict[str, Any] = {
            "deadline": Deadline(timeout_s=self.timeout_s, quorum=1),
            "min_available_nodes": self.n_sites,
            "allow_coordinator_key": protection.name.startswith("he"),
        }
        return FedEnsemble(protection=protection, **defaults | options)

    def ask(
        self,
        strategy: FedEnsemble,
        rows: np.ndarray = ROWS,
        *,
        querier: Querier | None = None,
        identity: Identity | None = None,
        only: tuple[str, ...] = (),
        tamper: Callable[[SealedJob], SealedJob] = lambda job: job,
        rule: str = "mean-probability",
        **options: Any,
    ):
        """Ask under seal; return (querier, job, result)."""
        directory = Directory.from_bytes(strategy.directory(self.grid).to_bytes())
        if only:
            directory = directory.only(only)
        if querier is None:
            querier = Querier(protection=strategy.protection, identity=identity)
        job = querier.ask(rows, directory=directory, rule=rule, **options)
        result = strategy.start(self.grid, tamper(SealedJob.from_bytes(job.to_bytes())))
        return querier, job, result

    def labels(self, querier: Querier, result) -> np.ndarray:
        return querier.open(result.combined).labels


@pytest.fixture
def make_federation() -> Iterator[Callable[..., Federation]]:
    made: list[Federation] = []

    def build(**options: Any) -> Federation:
        made.append(Federation(**options))
        return made[-1]

    yield build
    for federation in made:
        federation.grid.close()
    model_cache.clear()


@pytest.fixture
def home(tmp_path: Path) -> Path:
    return tmp_path / "home"


def needles_of(*arrays: np.ndarray) -> list[bytes]:
    """Return the bytes of every number of the arrays, as float32 and as float64."""
    numbers = {float(x) for array in arrays for x in np.ravel(array)} - {0.0, 1.0, -1.0}
    return [np.array(x, dtype=t).tobytes() for x in numbers for t in ("<f4", "<f8")]


def assert_unreadable(seen: list[bytes], *arrays: np.ndarray) -> None:
    """Require that no number of the arrays occurs in what was seen."""
    haystack = b"".join(seen)
    assert haystack
    for needle in needles_of(*arrays):
        assert needle not in haystack


def replaced(envelope: Envelope, **changes: Any) -> Envelope:
    """Return an envelope with other fields or sections; its digest is made afresh."""
    sections = changes.pop("sections", {})
    merged = tuple((n, sections.get(n, data)) for n, data in envelope.sections)
    return dataclasses.replace(envelope, sections=merged, **changes)


def refusal(call: Callable[[], object]) -> FedInferError:
    with pytest.raises(FedInferError) as caught:
        call()
    return caught.value


@pytest.fixture
def debug_log(caplog: pytest.LogCaptureFixture) -> pytest.LogCaptureFixture:
    caplog.set_level(logging.DEBUG)
    return caplog
