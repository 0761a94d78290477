"""One site, asked directly: a message in, an envelope out."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np
import pytest
from flwr.app import Context, Message, RecordDict
from flwr.clientapp import ClientApp

from fedinfer_flower import InferenceMod
from fedinfer_flower.clients import model_cache
from fedinfer_flower.simulation.local_grid import LocalGrid
from fedinfer_flower.wire import messages
from fedinfer_flower.wire.actions import HELLO, PREDICT, message_type
from fedinfer_flower.wire.directory import read_site_card
from fedinfer_flower.wire.envelope import Envelope, Kind
from fedinfer_flower.wire.messages import Question
from fedinfer_flower.wire.records import pack, unpack

NODE = 1000


class Site:
    """A mod under test with the context that Flower would give it."""

    def __init__(self, load_model, **options) -> None:
        self.run_id = LocalGrid(ClientApp(), num_supernodes=1, workers=0).run_id
        self.mod = InferenceMod(load_model, **options)
        self.context = Context(
            run_id=self.run_id,
            node_id=NODE,
            state=RecordDict(),
            run_config={},
            node_config={"partition-id": 0, "num-partitions": 1},
        )

    def reply(self, envelope: Envelope, action: str) -> Message:
        message = Message(pack(envelope), NODE, message_type(action), ttl=60.0)
        return self.mod.handle(message, self.context)

    def hello(self) -> Envelope:
        return unpack(self.reply(Envelope(kind=Kind.HELLO, run_id=self.run_id), HELLO).content)

    def profile(self):
        return read_site_card(self.hello(), run_id=self.run_id, sender=NODE).profile

    def ask(self, **changes) -> Envelope:
        options = {
            "query_id": "q-0",
            "inputs": np.array([[1.0, 0.0], [0.0, 2.0]]),
            "classes": ("a", "b"),
            "n_sites": 3,
            "rule": "mean-probability",
            "protection": "plain",
        }
        asked = Question(**options | changes)
        return unpack(self.reply(messages.question(asked, run_id=self.run_id), PREDICT).content)

    def scores(self, **changes) -> np.ndarray:
        envelope = self.ask(**changes)
        assert envelope.kind is Kind.ANSWER, envelope.meta
        return np.frombuffer(envelope.section("scores"), "<f4").reshape(envelope.shape)

    def error(self, **changes):
        envelope = self.ask(**changes)
        assert envelope.kind is Kind.ERROR
        return messages.read_error(envelope, run_id=self.run_id, sender=NODE)


@pytest.fixture
def make_site() -> Iterator[Callable[..., Site]]:
    yield Site
    model_cache.clear()
