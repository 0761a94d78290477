"""Three sites with small trained models, and a coordinator that relays by hand."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
from flwr.app import Context, Message, RecordDict
from flwr.clientapp import ClientApp

import fedinfer_flower
from fedinfer_flower.clients import language_state
from fedinfer_flower.clients.language_mod import LanguageMod, LanguagePolicy, LanguageSite
from fedinfer_flower.errors import FedInferError
from fedinfer_flower.simulation.facts.prompts import FactPrompts
from fedinfer_flower.simulation.facts.world import FactWorld
from fedinfer_flower.simulation.local_grid import LocalGrid
from fedinfer_flower.wire import messages
from fedinfer_flower.wire.actions import GENERATE, INTRODUCE, REFINE, REPHRASE, SHARE_CACHE
from fedinfer_flower.wire.actions import message_type as type_of
from fedinfer_flower.wire.envelope import Envelope, Kind
from fedinfer_flower.wire.language_card import LanguageCard, read_language_card
from fedinfer_flower.wire.records import pack, unpack
from fedinfer_flower.wire.refine_answers import AnswerReply, Answers, open_answers
from fedinfer_flower.wire.refine_asked import Asked, QuerierConsent
from fedinfer_flower.wire.refine_documents import (
    FetchRequest,
    RephraseReply,
    RephraseRequest,
    ShareOffer,
    ShareReply,
    ShareRequest,
    read_share_reply,
)
from fedinfer_flower.wire.refine_request import Part, RefineRequest
from fedinfer_flower.wire.refine_seats import SharerSeat

CHECKPOINTS = Path(fedinfer_flower.__file__).parent / "simulation" / "checkpoints"
FAMILIES = ("qwen3", "llama", "qwen2")
OPEN = LanguagePolicy(cache=True, full_cache=True, text=True, share_speeds=False, max_rounds=4)
_query_ids = (f"q-{n}" for n in itertools.count())


@dataclass
class Site:
    """A mod with the context that Flower would give it."""

    mod: LanguageMod
    context: Context

    def send(self, envelope: Envelope, action: str) -> Envelope:
        node = self.context.node_id
        message = Message(pack(envelope), node, type_of(action), ttl=60.0)
        reply = self.mod.handle(message, self.context)
        assert not reply.has_error()
        return unpack(reply.content)

    def answer(self, envelope: Envelope, action: str) -> Envelope:
        """Send, and raise what the site refuses with."""
        reply = self.send(envelope, action)
        if reply.kind is Kind.ERROR:
            raise messages.read_error(
                reply, run_id=self.context.run_id, sender=self.context.node_id
            )
        return reply

    @property
    def where(self) -> dict[str, int]:
        return {"run_id": self.context.run_id, "sender": self.context.node_id}

    @property
    def card(self) -> LanguageCard:
        hello = Envelope(kind=Kind.HELLO, run_id=self.context.run_id)
        return read_language_card(self.answer(hello, INTRODUCE), **self.where)


class Federation:
    """Sites of one run, in one process."""

    def __init__(self) -> None:
        self.run_id = LocalGrid(ClientApp(), num_supernodes=1, workers=0).run_id
        self._nodes = itertools.count(1000)

    def site(self, loaded, **options) -> Site:
        def load_model(context):
            return loaded() if callable(loaded) else loaded

        node = next(self._nodes)
        context = Context(
            run_id=self.run_id,
            node_id=node,
            state=RecordDict(),
            run_config={},
            node_config={"partition-id": node},
        )
        options.setdefault("policy", OPEN)
        return Site(LanguageMod(load_model, **options), context)


@dataclass
class Ask:
    """One batch, step by step: what a coordinator does."""

    receiver: Site
    sharers: list[Site]
    questions: tuple[str, ...]
    medium: str = "cache"
    allow: tuple[str, ...] = ("cache", "full-cache", "text")
    query_id: str = ""
    round_number: int = 1
    host: str = "receiver"
    rounds: int = 1
    rephrase: str = ""
    expires_at: float = 0.0
    batch: str = ""

    def __post_init__(self) -> None:
        self.query_id = self.query_id or next(_query_ids)

    @property
    def run_id(self) -> int:
        return self.receiver.context.run_id

    @property
    def consent(self) -> QuerierConsent:
        return QuerierConsent(
            run_id=self.run_id,
            query_id=self.query_id,
            batch=self.batch,
            allow=self.allow,
            max_rounds=self.rounds,
            expires_at=self.expires_at,
        )

    def asked(self, **changes) -> bytes:
        options = {"questions": self.questions, "consent": self.consent} | changes
        return Asked(**options).to_bytes()

    def seats(self, **changes) -> tuple[SharerSeat, ...]:
        return tuple(
            replace(SharerSeat(card=site.card, medium=self.medium), **changes)
            for site in self.sharers
        )

    def rephrased(self, **changes) -> RephraseReply:
        options = {
            "query_id": self.query_id,
            "round_number": self.round_number,
            "asked": self.asked(),
            "sealed": False,
            "sharers": self.seats(),
            "host": self.host,
            "rephrase": self.rephrase,
        }
        request = RephraseRequest(**options | changes)
        envelope = self.receiver.answer(request.to_envelope(run_id=self.run_id), REPHRASE)
        return RephraseReply.read(envelope, query_id=self.query_id, **self.receiver.where)

    def shared(
        self, reply: RephraseReply, *, sharer: Site | None = None
    ) -> ShareReply | ShareOffer:
        """Carry the ask to one sharer, by default the first."""
        site = sharer or self.sharers[0]
        (ask,) = (a for a in reply.asks if a.sharer == site.card.key_id)
        request = ShareRequest(
            query_id=self.query_id,
            medium=ask.medium,
            body=ask.body,
            sealed=self.host == "receiver",
        )
        action = SHARE_CACHE if ask.medium == "cache" else GENERATE
        envelope = site.answer(request.to_envelope(run_id=self.run_id), action)
        return read_share_reply(envelope, query_id=self.query_id, **site.where)

    def fetched(self, handle: str, *, sharer: Site | None = None, **changes) -> ShareReply:
        site = sharer or self.sharers[0]
        request = FetchRequest(query_id=self.query_id, handle=handle, **changes)
        envelope = site.answer(request.to_envelope(run_id=self.run_id), SHARE_CACHE)
        reply = read_share_reply(envelope, query_id=self.query_id, **site.where)
        assert isinstance(reply, ShareReply)
        return reply

    def parts(self, reply: RephraseReply) -> tuple[Part, ...]:
        """Carry all asks, and fetch what is offered."""
        parts = []
        for ask in reply.asks:
            (site,) = (s for s in self.sharers if s.card.key_id == ask.sharer)
            given = self.shared(reply, sharer=site)
            if isinstance(given, ShareOffer):
                given = self.fetched(given.handle, sharer=site)
            parts.append(Part(sharer=ask.sharer, medium=ask.medium, body=given.body))
        return tuple(parts)

    def refined(self, **changes) -> tuple[AnswerReply, Answers]:
        options = {
            "query_id": self.query_id,
            "round_number": self.round_number,
            "host": self.host,
        }
        request = RefineRequest(**options | changes)
        envelope = self.receiver.answer(request.to_envelope(run_id=self.run_id), REFINE)
        reply = AnswerReply.read(envelope, query_id=self.query_id, **self.receiver.where)
        answers = open_answers(
            reply.body,
            site=self.receiver.card.identity,
            run_id=self.run_id,
            query_id=self.query_id,
            round_number=self.round_number,
            rows=len(self.questions),
        )
        return reply, answers

    def whole(self, **changes) -> tuple[AnswerReply, Answers]:
        """Go through all steps."""
        reply = self.rephrased()
        return self.refined(handle=reply.handle, parts=self.parts(reply), **changes)


@pytest.fixture(scope="session")
def world() -> FactWorld:
    return FactWorld()


@pytest.fixture(scope="session")
def models(world):
    from fedinfer_flower.language.model import LanguageModel

    prompts = FactPrompts(world.words)
    return {
        name: LanguageModel.from_folder(CHECKPOINTS / name, prompts=prompts) for name in FAMILIES
    }


@pytest.fixture(scope="session")
def bank(models):
    """Untrained last-token fusers of every pair: what they say is noise, and that is enough."""
    from fedinfer_flower.kv.fuser import FuserSpec, make_fuser
    from fedinfer_flower.kv.fuser_bank import FuserBank

    found = FuserBank()
    for a, b in itertools.permutations(models.values(), 2):
        spec = FuserSpec.for_pair("last-token", a.layout, b.layout, width=16, depth=1)
        found.add(make_fuser(spec, seed=0))
    return found


@pytest.fixture
def federation() -> Iterator[Federation]:
    yield Federation()
    language_state.clear()


@pytest.fixture
def questions(world) -> tuple[str, ...]:
    return tuple(fact.question() for fact in world.facts(world.private[1])[:3])


@pytest.fixture
def pair(federation, models, bank) -> tuple[Site, Site]:
    """A receiver with fusers, and a sharer."""
    return federation.site(models["qwen3"], fusers=bank), federation.site(models["llama"])


@pytest.fixture
def make_ask() -> Callable[..., Ask]:
    return Ask


@pytest.fixture
def open_policy() -> LanguagePolicy:
    return OPEN


@pytest.fixture
def make_site_of() -> type[LanguageSite]:
    return LanguageSite


@pytest.fixture
def refusal() -> Callable[..., FedInferError]:
    """Return the error with which a step is refused."""

    def caught(step: Callable[[], object], expected: type[FedInferError]) -> FedInferError:
        with pytest.raises(expected) as info:
            step()
        assert type(info.value) is expected
        return info.value

    return caught
