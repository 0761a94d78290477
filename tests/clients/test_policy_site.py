"""What a policy does not allow does not leave the site, whatever a message says."""

from __future__ import annotations

import dataclasses
import json
import logging
import multiprocessing
import sys
import types
import uuid
from pathlib import Path

import numpy as np
import pytest
from flwr.app import ArrayRecord, Context, Message, RecordDict
from flwr.clientapp import ClientApp
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fedinfer_flower import InferenceMod, LocalModel
from fedinfer_flower.clients import model_cache, policy_gate
from fedinfer_flower.clients.model_digest import model_digest
from fedinfer_flower.clients.policy import SitePolicy
from fedinfer_flower.clients.policy_kinds import ACTION_VERBS, kind_of, verb_of
from fedinfer_flower.clients.policy_tables import LimitRules
from fedinfer_flower.clients.rate_guard import RateGuard
from fedinfer_flower.clients.site_app import POLICY_KEY, app, site_app
from fedinfer_flower.ensemble.base import RULES, make_rule
from fedinfer_flower.errors import ConfigError, PolicyRefusedError
from fedinfer_flower.observability.audit_log import verify_audit_log
from fedinfer_flower.privacy.base import make_protection
from fedinfer_flower.simulation.local_grid import LocalGrid
from fedinfer_flower.wire import messages
from fedinfer_flower.wire.actions import (
    ACTIONS,
    HELLO,
    LANGUAGE_ACTIONS,
    PING,
    PREDICT,
    RECOVER,
    message_type,
)
from fedinfer_flower.wire.directory import read_site_card
from fedinfer_flower.wire.envelope import Envelope, Kind
from fedinfer_flower.wire.identity import Identity
from fedinfer_flower.wire.messages import Question
from fedinfer_flower.wire.records import pack, unpack
from fedinfer_flower.wire.roster import Roster, Seat
from fedinfer_flower.wire.sealed_query import seal_question, sealed_query_envelope
from fedinfer_flower.wire.stack_messages import STACK_ACTIONS

NODE = 1000
CANARY = 1234.5625
"""Exact in float32 and float64: its bytes and its digits can be searched for."""
CANARY_TEXT = "CANARY-7c21"


class Ward(types.ModuleType):
    """The package of a site, with its model."""

    def __init__(self) -> None:
        super().__init__("policy_ward")
        self.shown: list[np.ndarray] = []
        self.faulty = False

    def load_model(self, context):
        def model(rows):
            self.shown.append(np.array(rows))
            if self.faulty:
                raise ValueError(f"{CANARY_TEXT} {rows}")
            return np.full((len(rows), 2), 0.5)

        return LocalModel(model=model, classes=["a", "b"], digest="version-1")


@pytest.fixture
def ward(monkeypatch):
    made = Ward()
    monkeypatch.setitem(sys.modules, "policy_ward", made)
    yield made
    model_cache.clear()
    policy_gate._gates.cache_clear()


@dataclasses.dataclass
class Site:
    """A site under a policy, and a querier whom it knows."""

    folder: Path
    querier: Identity
    tables: dict
    node_config: dict = dataclasses.field(default_factory=dict)

    def __post_init__(self) -> None:
        self.run_id = LocalGrid(ClientApp(), num_supernodes=1, workers=0).run_id
        self.policy = SitePolicy.from_mapping(self.tables, folder=self.folder)
        self.app = site_app(self.policy)
        self.context = Context(
            run_id=self.run_id,
            node_id=NODE,
            state=RecordDict(),
            run_config={},
            node_config=self.node_config,
        )
        self.n_asked = 0

    def restarted(self, **changes) -> Site:
        """Begin again with what is on disk alone."""
        model_cache.clear()
        policy_gate._gates.cache_clear()
        tables = {n: {**self.tables.get(n, {}), **changes.get(n, {})} for n in self.tables}
        tables |= {n: t for n, t in changes.items() if n not in tables}
        return Site(self.folder, self.querier, tables)

    def send(self, envelope: Envelope, action: str) -> Envelope:
        message = Message(pack(envelope), NODE, message_type(action), ttl=60.0)
        return unpack(self.app(message, self.context).content)

    def seat(self) -> Seat:
        hello = Envelope(kind=Kind.HELLO, run_id=self.run_id)
        return read_site_card(self.send(hello, HELLO), run_id=self.run_id, sender=NODE).seat

    def question(self, **changes) -> Question:
        self.n_asked += 1
        n_sites = changes.pop("n_sites", 3)
        others = [
            Seat(identity=Identity.generate().public, commitment="0" * 64)
            for _ in range(n_sites - 1)
        ]
        options = {
            "query_id": f"{uuid.uuid4().hex}-{self.n_asked}",
            "inputs": np.array([[CANARY, 0.0], [0.0, CANARY]]),
            "classes": ("a", "b"),
            "n_sites": n_sites,
            "rule": "mean-probability",
            "protection": "plain",
            "roster": Roster((self.seat(), *others)),
            "querier": self.querier.public,
        }
        return Question(**options | changes)

    def ask(self, *, sealed: bool = True, **changes) -> Envelope:
        asked = self.question(**changes)
        return self.send(self.sealed(asked) if sealed else self.clear(asked), PREDICT)

    def sealed(self, asked: Question) -> Envelope:
        body = seal_question(asked, identity=self.querier, run_id=self.run_id)
        return sealed_query_envelope(body, query_id=asked.query_id, run_id=self.run_id)

    def clear(self, asked: Question) -> Envelope:
        open_question = dataclasses.replace(asked, querier=None)
        return messages.question(open_question, run_id=self.run_id)

    def refusal(self, envelope: Envelope):
        assert envelope.kind is Kind.ERROR, envelope.kind
        return messages.read_error(envelope, run_id=self.run_id, sender=NODE)

    def audit(self) -> list[dict]:
        lines = (self.folder / "state" / "audit.jsonl").read_text().splitlines()
        return [json.loads(line) for line in lines]

    def last(self) -> dict:
        """Facts of the last entry, with its event."""
        entry = self.audit()[-1]
        return {"event": entry["event"], **entry["facts"]}


@pytest.fixture
def make_site(tmp_path, ward):
    querier = Identity.generate()

    def make(*, node_config=None, **changes) -> Site:
        tables = {
            "site": {"name": "north", "home": "state"},
            "model": {"loader": "policy_ward:load_model"},
            "answers": {"protections": ["plain"]},
            "queriers": {"registry": querier.key_id},
        }
        for name, table in changes.items():
            tables[name] = {**tables.get(name, {}), **table}
        return Site(tmp_path, querier, tables, node_config or {})

    return make


def masked(name: str = "secagg", **options):
    keys = make_protection(name).make_keys()
    return {
        "protection": name,
        "protection_options": options,
        "public_key": keys.public_key,
        "key_id": keys.key_id,
    }


def assert_tells_nothing(error) -> None:
    for needle in ("1234", CANARY_TEXT):
        assert needle not in str(error)


def test_query_within_the_policy_is_answered_and_written_down(make_site, ward):
    site = make_site()
    envelope = site.ask()
    assert envelope.kind is Kind.ANSWER
    last = site.last()
    assert last["event"] == "answered"
    assert last["querier"] == site.querier.key_id
    assert (last["action"], last["rule"], last["protection"], last["n_rows"]) == (
        *("predict", "mean-probability", "plain"),
        2,
    )
    assert last["query_id"] == envelope.query_id
    assert verify_audit_log(site.folder / "state" / "audit.jsonl").ok
    assert len(ward.shown) == 1


# -- each rule has a refusal ---------------------------------------------------------------

REFUSALS = {
    "protections": ({}, masked(), "[answers] protections", "FI308"),
    "rules": (
        {"answers": {"rules": ["borda"], "kinds": ["ranks"]}},
        {},
        "[answers] rules",
        "FI322",
    ),
    "kinds": ({"answers": {"kinds": ["votes"]}}, {}, "[answers] kinds", "FI322"),
    "require-seal": ({}, {"sealed": False}, "[answers] require-seal", "FI308"),
    "min-cohort": (
        {"answers": {"protections": ["secagg"], "min-cohort": 5}},
        {**masked(dropout_share=0.2), "n_sites": 5},
        "[answers] min-cohort",
        "FI322",
    ),
    "max-epsilon": (
        {"answers": {"protections": ["dp"], "max-epsilon-per-query": 0.5}},
        {"protection": "dp", "protection_options": {"epsilon": 1.0}},
        "[answers] max-epsilon-per-query",
        "FI308",
    ),
    "self-mask": (
        {"answers": {"protections": ["secagg"], "require-self-mask": True}},
        masked(self_mask=False),
        "[answers] require-self-mask",
        "FI308",
    ),
    "max-delta": (
        {"answers": {"protections": ["dp"], "max-delta": 1e-7}},
        {"protection": "dp"},
        "[answers] max-delta",
        "FI308",
    ),
    "max-dropout-share": (
        {"answers": {"protections": ["secagg"], "max-dropout-share": 0.1}},
        masked(dropout_share=0.3),
        "[answers] max-dropout-share",
        "FI308",
    ),
    "queriers": ({"queriers": {"registry": "ab" * 32}}, {}, "[queriers]", "FI311"),
    "sites": (
        {"answers": {"protections": ["secagg"]}, "sites": {"south": "cd" * 32}},
        masked(),
        "[sites]",
        "FI311",
    ),
    "agrees-to": ({}, {"evidence": "clear"}, "[answers] agrees-to", "FI308"),
    "rows-per-query": ({"limits": {"rows-per-query": 1}}, {}, "[limits] rows-per-query", "FI305"),
    "bytes-per-query": (
        {"limits": {"bytes-per-query": 4096}},
        {"inputs": np.full((400, 2), CANARY)},
        "[limits] bytes-per-query",
        "FI305",
    ),
    "rows-per-day": ({"limits": {"rows-per-day": 1}}, {}, "[limits] rows-per-day", "FI322"),
    "rows-per-day-in-all": (
        {"limits": {"rows-per-day-in-all": 1}},
        {},
        "[limits] rows-per-day-in-all",
        "FI322",
    ),
}


@pytest.mark.parametrize("case", REFUSALS)
def test_refusal_names_the_rule_and_none_of_the_query(make_site, ward, case):
    tables, asked, rule, code = REFUSALS[case]
    site = make_site(**tables)

    error = site.refusal(site.ask(**asked))

    assert error.code == code
    assert rule in error.message
    assert_tells_nothing(error)
    assert ward.shown == []
    last = site.last()
    assert (last["event"], last["code"]) == ("refused", code)
    assert last["rule_name"] == rule


@pytest.mark.parametrize("case", ["rules", "min-cohort", "rows-per-day", "queriers"])
def test_refused_query_uses_nothing_up(make_site, case):
    tables, asked, _, _ = REFUSALS[case]
    site = make_site(**tables)
    refused = site.question(**{k: v for k, v in asked.items() if k != "sealed"})
    site.refusal(site.send(site.sealed(refused), PREDICT))

    wider = site.restarted(
        answers={
            "protections": ["plain", "secagg"],
            "kinds": ["scores"],
            "rules": [],
            "min-cohort": 0,
        },
        limits={"rows-per-day": 2},
        queriers={"registry": site.querier.key_id},
    )
    mine = wider.seat()
    others = [s for s in refused.roster.seats if s.identity != mine.identity]
    again = dataclasses.replace(refused, roster=Roster((mine, *others)))
    envelope = wider.send(wider.sealed(again), PREDICT)
    assert envelope.kind is Kind.ANSWER, envelope.meta


def test_model_of_another_digest_is_not_served(make_site, ward):
    wrong = make_site(model={"digest": "00" * 32})
    hello = Envelope(kind=Kind.HELLO, run_id=wrong.run_id)
    error = wrong.refusal(wrong.send(hello, HELLO))
    assert error.code == "FI322"
    assert "[model] digest" in error.message
    assert ward.shown == []


class Estimator:
    """As scikit-learn's: what it has learned is in its attributes."""

    def __init__(self, weight: float) -> None:
        self.weight = weight
        self.classes_ = np.array(["a", "b"])

    def get_params(self, deep=True):
        return {}

    def predict_proba(self, rows):
        return np.full((len(rows), 2), 0.5)


def test_digest_is_of_what_the_model_has_learned_not_of_what_the_loader_claims(
    make_site, ward, monkeypatch
):
    digest = model_digest(Estimator(1.0))
    monkeypatch.setattr(ward, "load_model", lambda context: Estimator(1.0), raising=False)
    site = make_site(model={"digest": digest})
    assert site.ask().kind is Kind.ANSWER
    claims = LocalModel(model=Estimator(2.0), digest=digest)
    monkeypatch.setattr(ward, "load_model", lambda context: claims, raising=False)
    other = site.restarted()
    hello = Envelope(kind=Kind.HELLO, run_id=other.run_id)
    assert "[model] digest" in other.refusal(other.send(hello, HELLO)).message


@pytest.mark.parametrize("action", [*ACTIONS, *LANGUAGE_ACTIONS, *STACK_ACTIONS])
def test_action_that_is_not_listed_is_refused_before_anything_is_read(make_site, ward, action):
    listed = ["hello"] if verb_of(action) != "hello" else ["predict"]
    site = make_site(answers={"actions": listed})
    before = len(site.audit())
    junk = Envelope(
        kind=Kind.QUERY,
        run_id=site.run_id,
        query_id="q",
        meta={CANARY_TEXT: CANARY_TEXT},
        sections=(("body", CANARY_TEXT.encode()),),
    )

    error = site.refusal(site.send(junk, action))

    assert error.code == "FI322"
    assert "[answers] actions" in error.message
    assert_tells_nothing(error)
    assert len(site.audit()) == before + 1
    assert site.last()["rule_name"] == "[answers] actions"


def test_ping_by_another_action_needs_ping_to_be_listed(make_site):
    site = make_site(answers={"actions": ["predict", "hello"]})
    error = site.refusal(site.send(Envelope(kind=Kind.PING, run_id=site.run_id), PREDICT))
    assert "[answers] actions" in error.message
    open_site = site.restarted(answers={"actions": ["ping", "predict"]})
    reply = open_site.send(Envelope(kind=Kind.PING, run_id=open_site.run_id), PING)
    assert reply.kind is Kind.PING


def test_training_of_stacks_is_refused_unless_agreed(make_site):
    site = make_site()
    content = RecordDict({"arrays": ArrayRecord([np.zeros(2)])})
    reply = site.app(Message(content, NODE, "train.fi_stack", ttl=60.0), site.context)
    assert reply.has_error()
    assert "FI322" in reply.error.reason
    assert site.last()["event"] == "refused"


def test_price_and_id_of_the_policy_are_in_the_profile(make_site):
    site = make_site(answers={"price-per-query": 0.25}, model={"id": "triage-7"})
    hello = Envelope(kind=Kind.HELLO, run_id=site.run_id)
    card = read_site_card(site.send(hello, HELLO), run_id=site.run_id, sender=NODE)
    assert card.profile.price_per_query == 0.25
    assert card.profile.model_card["id"] == "triage-7"
    assert card.profile.name == "north"


# -- no message can widen a policy ---------------------------------------------------------

PROTECTED = ("plain", "dp", "secagg", "secagg+dp")
questions = st.fixed_dictionaries(
    {
        "rule": st.sampled_from(["mean-probability", "majority-vote", "borda"])
        | st.sampled_from(sorted(RULES.names())),
        "protection": st.sampled_from(PROTECTED),
        "n_sites": st.integers(2, 6),
        "sealed": st.sampled_from([True, True, True, False]),
        "known": st.sampled_from([True, True, True, False]),
        "n_rows": st.integers(1, 5),
        "epsilon": st.sampled_from([0.1, 1.0, 30.0]),
        "evidence": st.sampled_from(["", "", "", "clear", "shares"]),
        "expired": st.sampled_from([False, False, False, True]),
        "relay": st.sampled_from([False, False, True]),
    }
)
policies = st.fixed_dictionaries(
    {
        "protections": st.lists(st.sampled_from(PROTECTED), min_size=2, unique=True),
        "kinds": st.lists(st.sampled_from(["votes", "ranks", "scores"]), min_size=2, unique=True),
        "require-seal": st.booleans(),
        "min-cohort": st.integers(0, 5),
        "max-epsilon-per-query": st.sampled_from([0.5, 5.0, 50.0]),
    }
)


def test_whatever_is_answered_satisfies_every_rule(make_site):
    outcomes = []

    @settings(
        max_examples=150,
        deadline=None,
        derandomize=True,
        suppress_health_check=[HealthCheck.function_scoped_fixture],
    )
    @given(answers=policies, asked=questions, rows_per_query=st.integers(2, 5))
    def check(answers, asked, rows_per_query):
        site = make_site(answers=answers, limits={"rows-per-query": rows_per_query})
        outcomes.append(require_allowed(site, answers, asked, rows_per_query))

    check()
    assert sum(outcomes) >= 15  # of both kinds there are enough to mean something
    assert len(outcomes) - sum(outcomes) >= 15


def require_allowed(site, answers, asked, rows_per_query) -> bool:
    """Ask, and require that an answer satisfies every rule; return whether there was one."""
    options = {"epsilon": asked["epsilon"]} if "dp" in asked["protection"] else {}
    if not asked["known"]:
        site.querier = Identity.generate()
    envelope = site.ask(
        sealed=asked["sealed"],
        rule=asked["rule"],
        n_sites=asked["n_sites"],
        inputs=np.ones((asked["n_rows"], 2)) * np.arange(1, asked["n_rows"] + 1)[:, None],
        evidence=asked["evidence"],
        relay=asked["relay"],
        expires_at=1.0 if asked["expired"] else 0.0,
        **masked(asked["protection"], **options),
    )
    last = site.last()
    assert last["event"] == ("refused" if envelope.kind is Kind.ERROR else "answered")
    if envelope.kind is Kind.ERROR:
        return False
    protection = make_protection(asked["protection"], options)
    assert asked["protection"] in answers["protections"]
    assert kind_of(make_rule(asked["rule"])) in answers["kinds"]
    # In clear nobody signs, and only the known querier is answered.
    assert asked["known"]
    assert asked["sealed"]
    assert asked["n_rows"] <= rows_per_query
    assert not asked["expired"]
    assert not asked["evidence"]
    if protection.min_cohort > 1:
        assert protection.least_sites(asked["n_sites"]) >= answers["min-cohort"]
    if options:
        assert asked["epsilon"] <= answers["max-epsilon-per-query"]
    return True


@settings(max_examples=60, deadline=None, derandomize=True)
@given(data=st.binary(max_size=300), verb=st.sampled_from(sorted(ACTION_VERBS)))
def test_junk_is_never_answered(tmp_path_factory, data, verb):
    folder = tmp_path_factory.mktemp("site")
    policy = SitePolicy.from_mapping(
        {
            "site": {"name": "n", "home": "state"},
            "model": {"loader": "math:sqrt"},
            "answers": {"protections": ["plain"], "actions": ["predict", "recover"]},
            "queriers": {"a": "ab" * 32},
        },
        folder=folder,
    )
    made = site_app(policy)
    run_id = LocalGrid(ClientApp(), num_supernodes=1, workers=0).run_id
    context = Context(
        run_id=run_id, node_id=NODE, state=RecordDict(), run_config={}, node_config={}
    )
    kind = Kind.SEALED_QUERY if len(data) % 2 else Kind.QUERY
    envelope = Envelope(
        kind=kind, run_id=run_id, query_id="q", sections=(("body", data), ("wraps", data))
    )
    action = next(
        a for a in (*ACTIONS, *LANGUAGE_ACTIONS, *STACK_ACTIONS, "") if verb_of(a) == verb or not a
    )
    if action:
        reply = made(Message(pack(envelope), NODE, message_type(action), ttl=60.0), context)
        assert unpack(reply.content).kind is Kind.ERROR


# -- counters ------------------------------------------------------------------------------


def test_rows_of_a_day_are_counted_across_restarts(make_site):
    site = make_site(limits={"rows-per-day": 5})
    assert site.ask().kind is Kind.ANSWER
    later = site.restarted()
    assert later.ask().kind is Kind.ANSWER
    last = later.restarted()
    error = last.refusal(last.ask())
    assert "1 are left" in error.message


def test_queries_of_a_minute_are_counted(make_site):
    site = make_site(limits={"queries-per-minute": 2})
    assert site.ask().kind is Kind.ANSWER
    assert site.ask().kind is Kind.ANSWER
    assert "[limits] queries-per-minute" in site.refusal(site.ask()).message


def test_replay_uses_up_no_room(make_site):
    site = make_site(limits={"rows-per-day": 4})
    asked = site.sealed(site.question())
    assert site.send(asked, PREDICT).kind is Kind.ANSWER
    for _ in range(5):
        assert site.refusal(site.send(asked, PREDICT)).code == "FI313"
    assert site.ask().kind is Kind.ANSWER


def _count(path: str, start, refused) -> None:
    guard = RateGuard(Path(path), LimitRules(rows_per_day=60), clock=lambda: 1e9)
    start.wait()
    for number in range(20):
        try:
            guard.count(
                querier="ab", query_id=f"{multiprocessing.current_process().pid}-{number}", n_rows=3
            )
        except PolicyRefusedError:
            refused.value += 1


def test_two_processes_share_one_limit(tmp_path):
    spawn = multiprocessing.get_context("spawn")
    path, start = str(tmp_path / "limits.sqlite"), spawn.Event()
    refused = [spawn.Value("i", 0) for _ in range(2)]
    workers = [spawn.Process(target=_count, args=(path, start, box)) for box in refused]
    for worker in workers:
        worker.start()
    start.set()
    for worker in workers:
        worker.join(60)
        assert worker.exitcode == 0
    guard = RateGuard(Path(path), LimitRules(rows_per_day=60), clock=lambda: 1e9)
    assert guard.rows_of_day("ab") == guard.rows_of_day() == 60
    assert sum(box.value for box in refused) == 40 - 20


class Clock:
    def __init__(self) -> None:
        self.now = 1e9

    def __call__(self) -> float:
        return self.now


@settings(max_examples=25, deadline=None, derandomize=True)
@given(
    steps=st.lists(
        st.tuples(st.integers(0, 40_000), st.sampled_from("ab"), st.integers(0, 6)), max_size=25
    ),
    limits=st.tuples(st.integers(1, 4), st.integers(1, 12), st.integers(1, 20)),
)
def test_no_window_holds_more_than_its_limit(tmp_path_factory, steps, limits):
    most = LimitRules(
        queries_per_minute=limits[0], rows_per_day=limits[1], rows_per_day_in_all=limits[2]
    )
    path, clock = tmp_path_factory.mktemp("home") / "limits.sqlite", Clock()
    passed: list[tuple[float, str, int]] = []
    for number, (wait_s, querier, rows) in enumerate(steps):
        clock.now += wait_s
        guard = RateGuard(path, most, clock=clock)  # a restart before every query
        try:
            guard.count(querier=querier, query_id=str(number), n_rows=rows)
        except PolicyRefusedError:
            continue
        passed.append((clock.now, querier, rows))
    for at, querier, _ in passed:
        day = [entry for entry in passed if at <= entry[0] < at + 86_400]
        assert sum(rows for _, _, rows in day) <= limits[2]
        assert sum(rows for _, who, rows in day if who == querier) <= limits[1]
        minute = [e for e in passed if at <= e[0] < at + 60 and e[1] == querier]
        assert len(minute) <= limits[0]


def test_room_comes_back_after_a_day_and_an_hour(tmp_path):
    clock = Clock()
    guard = RateGuard(tmp_path / "limits.sqlite", LimitRules(rows_per_day=2), clock=clock)
    guard.count(querier="a", query_id="1", n_rows=2)
    with pytest.raises(PolicyRefusedError):
        guard.count(querier="a", query_id="2", n_rows=1)
    guard.count(querier="b", query_id="2", n_rows=1)
    clock.now += 25 * 3600
    guard.count(querier="a", query_id="3", n_rows=2)


def test_same_query_with_more_rows_counts_the_surplus(tmp_path):
    guard = RateGuard(tmp_path / "limits.sqlite", LimitRules(rows_per_day=10))
    guard.count(querier="a", query_id="1", n_rows=2)
    guard.count(querier="a", query_id="1", n_rows=7)
    assert guard.rows_of_day("a") == 7
    with pytest.raises(PolicyRefusedError):
        guard.count(querier="a", query_id="1", n_rows=11)


def test_damaged_counters_stop_the_site(make_site):
    site = make_site(limits={"rows-per-day": 5})
    (site.folder / "state" / "limits.sqlite").write_bytes(b"junk" * 100)
    with pytest.raises(ConfigError):
        site.restarted()
    error = site.refusal(site.ask())
    assert error.code == "FI200"


# -- audit log: no entry, no answer --------------------------------------------------------


def break_log(site: Site) -> None:
    log = site.folder / "state" / "audit.jsonl"
    log.unlink()
    log.mkdir()


def test_answer_that_cannot_be_written_down_does_not_leave(make_site, ward):
    site = make_site()
    asked = site.sealed(site.question())
    break_log(site)
    error = site.refusal(site.send(asked, PREDICT))
    assert error.code == "FI323"
    assert_tells_nothing(error)


def test_refusal_that_cannot_be_written_down_is_still_a_refusal(make_site):
    site = make_site(answers={"kinds": ["votes"]})
    asked = site.sealed(site.question())
    break_log(site)
    assert site.refusal(site.send(asked, PREDICT)).code == "FI323"


def test_log_can_be_turned_off(make_site):
    site = make_site(audit={"enabled": False})
    assert site.ask().kind is Kind.ANSWER
    assert not (site.folder / "state" / "audit.jsonl").exists()


def test_hello_is_written_down_once_a_run_and_ping_never(make_site):
    site = make_site()
    for _ in range(3):
        site.seat()
        site.send(Envelope(kind=Kind.PING, run_id=site.run_id), PING)
    assert [entry["event"] for entry in site.audit()] == ["started", "answered"]
    assert site.audit()[0]["facts"]["policy_digest"] == site.policy.digest


# -- canaries ------------------------------------------------------------------------------


@pytest.mark.parametrize("faulty", [False, True], ids=["answers", "fails"])
def test_canary_is_in_no_log_audit_line_or_error(make_site, ward, caplog, faulty):
    caplog.set_level(logging.DEBUG)
    ward.faulty = faulty
    site = make_site(limits={"rows-per-day": 100})
    replies = [
        site.ask(),
        site.ask(sealed=False),
        site.ask(rule=CANARY_TEXT.lower()),
        site.ask(protection=CANARY_TEXT.lower()),
        site.ask(classes=("a", CANARY_TEXT)),
        site.ask(rule_options={CANARY_TEXT: 1}),
        site.send(
            Envelope(
                kind=Kind.RECOVER, run_id=site.run_id, query_id="x", meta={CANARY_TEXT: CANARY_TEXT}
            ),
            RECOVER,
        ),
    ]
    state = site.folder / "state"
    kept = b"".join(path.read_bytes() for path in state.iterdir() if path.suffix == ".jsonl")
    needles = [CANARY_TEXT.encode(), CANARY_TEXT.lower().encode(), b"1234.5"]
    needles += [np.array(CANARY, dtype=t).tobytes() for t in ("<f4", "<f8")]
    for needle in needles:
        assert needle not in kept
        assert needle not in caplog.text.encode()
    for reply in replies[1:2]:
        assert_tells_nothing(site.refusal(reply))
    assert replies[0].kind is (Kind.ERROR if faulty else Kind.ANSWER)
    counters = (state / "limits.sqlite").read_bytes()
    assert all(needle not in counters for needle in needles)


# -- the app of a FAB ----------------------------------------------------------------------


def test_app_of_a_fab_reads_the_policy_that_the_node_names(make_site, tmp_path, ward):
    site = make_site()
    file = tmp_path / "site.toml"
    file.write_text(
        'site = {name = "north", home = "state"}\nmodel.loader = "policy_ward:load_model"\n'
        'answers.protections = ["plain"]\n'
        f'queriers.registry = "{site.querier.key_id}"\n'
    )
    site.context.node_config = {POLICY_KEY: str(file)}
    site.app = app
    assert site.ask().kind is Kind.ANSWER
    assert site.refusal(site.ask(sealed=False)).code == "FI308"


@pytest.mark.parametrize("named", ["", "missing.toml"], ids=["none", "missing"])
def test_app_of_a_fab_without_a_policy_answers_nothing(make_site, tmp_path, named):
    site = make_site()
    asked = site.sealed(site.question())
    site.context.node_config = {POLICY_KEY: str(tmp_path / named)} if named else {}
    site.app = app
    error = site.refusal(site.send(asked, PREDICT))
    assert error.code == "FI209"
    assert str(tmp_path) not in str(error)


# -- options in code beside a policy -------------------------------------------------------


@pytest.mark.parametrize(
    "option",
    [{"require_seal": True}, {"protections": ("plain",)}, {"agrees_to": ("settlement",)}],
    ids=lambda option: next(iter(option)),
)
def test_mod_takes_a_policy_or_options_not_both(make_site, option):
    site = make_site()
    with pytest.raises(ConfigError, match="site policy"):
        InferenceMod(lambda context: None, site_policy=site.policy, **option)


def test_loader_that_cannot_be_imported_stops_the_start(make_site):
    with pytest.raises(ConfigError, match=r"\[model\] loader"):
        make_site(model={"loader": "policy_ward:no_such_function"})
    with pytest.raises(ConfigError, match=r"\[model\] loader"):
        make_site(model={"loader": "no_such_module_here:load"})
