"""One site under a policy, as `site_app` makes it, and a querier whom it knows."""

from __future__ import annotations

import dataclasses
import json
import sys
import types
import uuid
from pathlib import Path

import numpy as np
import pytest
from flwr.app import Context, Message, RecordDict
from flwr.clientapp import ClientApp

from fedinfer_flower import LocalModel
from fedinfer_flower.clients import language_state, model_cache, policy_gate
from fedinfer_flower.clients.policy import SitePolicy
from fedinfer_flower.clients.site_app import site_app
from fedinfer_flower.simulation.local_grid import LocalGrid
from fedinfer_flower.wire import messages
from fedinfer_flower.wire.actions import HELLO, PREDICT, message_type
from fedinfer_flower.wire.directory import read_site_card
from fedinfer_flower.wire.envelope import Envelope, Kind
from fedinfer_flower.wire.identity import Identity
from fedinfer_flower.wire.messages import Question
from fedinfer_flower.wire.records import pack, unpack
from fedinfer_flower.wire.roster import Roster, Seat
from fedinfer_flower.wire.sealed_query import seal_question, sealed_query_envelope

NODE = 1000
CANARY = 1234.5625
"""Exact in float32 and float64: its bytes and its digits can be searched for."""
CANARY_TEXT = "CANARY-7c21"


class Ward(types.ModuleType):
    """The package of a site, with its model."""

    def __init__(self) -> None:
        super().__init__("hostile_ward")
        self.shown: list[np.ndarray] = []
        self.contexts: list[Context] = []
        self.answer = lambda rows: np.full((len(rows), 2), 0.5)

    def load_model(self, context):
        self.contexts.append(context)

        def model(rows):
            self.shown.append(np.array(rows))
            return self.answer(rows)

        return LocalModel(model=model, classes=["a", "b"], digest="version-1")


@pytest.fixture
def ward(monkeypatch):
    made = Ward()
    monkeypatch.setitem(sys.modules, "hostile_ward", made)
    yield made
    model_cache.clear()
    language_state.clear()
    policy_gate._gates.cache_clear()


@dataclasses.dataclass
class Site:
    """A site under a policy, in this process."""

    folder: Path
    querier: Identity
    tables: dict
    run_config: dict = dataclasses.field(default_factory=dict)

    def __post_init__(self) -> None:
        self.run_id = LocalGrid(ClientApp(), num_supernodes=1, workers=0).run_id
        self.policy = SitePolicy.from_mapping(self.tables, folder=self.folder)
        self.app = site_app(self.policy)
        self.context = Context(self.run_id, NODE, {}, RecordDict(), self.run_config)

    def message(self, envelope: Envelope, kind: str) -> Message:
        message = Message(pack(envelope), NODE, kind, ttl=60.0)
        message.metadata.__dict__["_message_id"] = message.object_id
        return message

    def send(self, envelope: Envelope, action: str) -> Envelope:
        reply = self.app(self.message(envelope, message_type(action)), self.context)
        return unpack(reply.content)

    def seat(self) -> Seat:
        hello = Envelope(kind=Kind.HELLO, run_id=self.run_id)
        return read_site_card(self.send(hello, HELLO), run_id=self.run_id, sender=NODE).seat

    def question(self, **changes) -> Question:
        n_sites = changes.pop("n_sites", 3)
        others = [
            Seat(identity=Identity.generate().public, commitment="0" * 64)
            for _ in range(n_sites - 1)
        ]
        options = {
            "query_id": f"{uuid.uuid4().hex}-1",
            "inputs": np.array([[CANARY, 0.0], [0.0, CANARY]]),
            "classes": ("a", "b"),
            "n_sites": n_sites,
            "rule": "mean-probability",
            "protection": "plain",
            "roster": Roster((self.seat(), *others)),
            "querier": self.querier.public,
        }
        return Question(**options | changes)

    def sealed(self, asked: Question) -> Envelope:
        body = seal_question(asked, identity=self.querier, run_id=self.run_id)
        return sealed_query_envelope(body, query_id=asked.query_id, run_id=self.run_id)

    def ask(self, **changes) -> Envelope:
        return self.send(self.sealed(self.question(**changes)), PREDICT)

    def refusal(self, envelope: Envelope):
        assert envelope.kind is Kind.ERROR, envelope.kind
        return messages.read_error(envelope, run_id=self.run_id, sender=NODE)

    def audit(self) -> list[dict]:
        lines = (self.folder / "state" / "audit.jsonl").read_text().splitlines()
        return [json.loads(line) for line in lines]


@pytest.fixture
def make_site(tmp_path, ward):
    querier = Identity.generate()

    def make(*, run_config=None, **changes) -> Site:
        tables = {
            "site": {"name": "north", "home": "state"},
            "model": {"loader": "hostile_ward:load_model"},
            "answers": {"protections": ["plain"]},
            "queriers": {"registry": querier.key_id},
        }
        for name, table in changes.items():
            tables[name] = {**tables.get(name, {}), **table}
        return Site(tmp_path, querier, tables, run_config or {})

    return make
