"""Three sites with small language models of three families, in one process."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from flwr.app import Context, Message
from flwr.clientapp import ClientApp

from fedinfer_flower.clients import language_state
from fedinfer_flower.clients.language_mod import LanguageMod, LanguagePolicy, LanguageSite
from fedinfer_flower.kv.fuser import FuserSpec, make_fuser
from fedinfer_flower.kv.fuser_bank import FuserBank
from fedinfer_flower.kv.share import ShareSpec
from fedinfer_flower.language.model import LanguageModel
from fedinfer_flower.query import Deadline
from fedinfer_flower.simulation.facts.families import FAMILIES, build
from fedinfer_flower.simulation.facts.prompts import FactPrompts
from fedinfer_flower.simulation.facts.world import FactWorld
from fedinfer_flower.simulation.local_grid import LocalGrid
from fedinfer_flower.strategies.fed_refine import FedRefine
from fedinfer_flower.wire.actions import LANGUAGE_ACTIONS
from fedinfer_flower.wire.records import unpack

NAMES = ("north", "south", "west")
OPEN = LanguagePolicy(cache=True, full_cache=True, text=True, share_speeds=False, max_rounds=4)
ALLOW_ALL = ("text", "cache")

Handle = Callable[[Message, Context], Message]
Intercept = Callable[[str, str, Message, Context, Handle], Message]


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def world() -> FactWorld:
    return FactWorld()


@pytest.fixture(scope="session")
def untrained(world: FactWorld) -> list[LanguageModel]:
    """One model of each family, with random weights: for everything but content."""
    prompts = FactPrompts(world.words)
    return [LanguageModel(*build(family, world), prompts=prompts) for family in FAMILIES]


def bank_for(
    receiver: LanguageModel, sharers: Sequence[LanguageModel], kind: str = "last-token"
) -> FuserBank:
    """Return untrained fusers from every other model to the receiver."""
    bank = FuserBank()
    for sharer in sharers:
        if sharer is not receiver:
            spec = FuserSpec.for_pair(
                kind,
                sharer.layout,
                receiver.layout,
                ShareSpec() if kind == "last-token" else ShareSpec(last=0, decode=0),
            )
            bank.add(make_fuser(spec, seed=1), {})
    return bank


@dataclass
class Federation:
    """Sites by name; each with a mod of its own, and what an experiment does to it."""

    models: Sequence[LanguageModel]
    names: Sequence[str] = NAMES
    options: dict[str, dict[str, Any]] = field(default_factory=dict)
    documents: dict[str, Callable[[str], Sequence[str]]] = field(default_factory=dict)
    fusers: bool = True
    intercept: Intercept | None = None
    seen: list[tuple[str, str, bytes]] = field(default_factory=list)

    def mod(self, place: int) -> LanguageMod:
        name, model = self.names[place], self.models[place]

        def load_model(context: Context) -> LanguageSite:
            return LanguageSite(model=model, documents=self.documents.get(name))

        load_model.__qualname__ = f"load_{name}"
        defaults: dict[str, Any] = {"policy": OPEN, "name": name}
        if self.fusers:
            defaults["fusers"] = bank_for(model, self.models)
        return LanguageMod(load_model, **(defaults | self.options.get(name, {})))

    @property
    def app(self) -> ClientApp:
        app, mods = ClientApp(), [self.mod(i) for i in range(len(self.models))]

        def handler(action: str) -> Handle:
            def handle(message: Message, context: Context) -> Message:
                place = int(context.node_config["partition-id"])
                self._note(self.names[place], message)
                if self.intercept is None:
                    reply = mods[place].handle(message, context)
                else:
                    reply = self.intercept(
                        action, self.names[place], message, context, mods[place].handle
                    )
                self._note(self.names[place], reply)
                return reply

            return handle

        for action in LANGUAGE_ACTIONS:
            app.query(action)(handler(action))
        return app

    def _note(self, name: str, message: Message) -> None:
        try:
            envelope = unpack(message.content)
        except Exception:
            return
        verb = str(envelope.meta.get("verb", envelope.kind.value))
        sections = b"".join(bytes(data) for _, data in envelope.sections)
        self.seen.append((name, verb, repr(dict(envelope.meta)).encode() + sections))

    def verbs(self, name: str) -> list[str]:
        """Return what a site was asked and replied, in order."""
        return [verb for site, verb, _ in self.seen if site == name]

    @contextmanager
    def grid(self, *, workers: int = 3, **options: Any) -> Iterator[LocalGrid]:
        with LocalGrid(
            self.app, num_supernodes=len(self.models), workers=workers, **options
        ) as grid:
            yield grid
        language_state.clear()

    def ask(self, questions: Sequence[str] | Any, **options: Any) -> Any:
        """Ask with settings that suit a test."""
        with self.grid() as grid:
            return strategy(**options).start(grid, questions)


def strategy(**options: Any) -> FedRefine:
    defaults: dict[str, Any] = {
        "receiver": "north",
        "allow": ALLOW_ALL,
        "medium": "cache",
        "rephrase": "none",
        "decoding": {"max_new_tokens": 4},
        "deadline": Deadline(timeout_s=30.0),
        "min_available_nodes": 3,
        "patience_s": 5.0,
    }
    return FedRefine(**(defaults | options))


@pytest.fixture
def federation(untrained: list[LanguageModel]) -> Federation:
    return Federation(untrained)


@pytest.fixture
def questions(world: FactWorld) -> list[str]:
    return [fact.question() for fact in world.facts(world.private[0])[:3]]
