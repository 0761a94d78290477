"""A coordinator, or SuperLink, that sends a site whatever it likes."""

from __future__ import annotations

import dataclasses
import hashlib
import io
import math
import threading
import zipfile
from types import SimpleNamespace

import pytest
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict
from flwr.common.config import get_fused_config_from_fab
from flwr.supercore.constant import TaskType
from flwr.supercore.fab import Fab
from flwr.supercore.object_store import ObjectStoreFactory
from flwr.supercore.run import Run
from flwr.supernode.nodestate import NodeStateFactory

from fedinfer_flower.clients import language_state, model_cache, policy_gate
from fedinfer_flower.clients.app_source import Bundle, ListedFabs
from fedinfer_flower.clients.policy_tables import LimitRules
from fedinfer_flower.clients.rate_guard import RateGuard
from fedinfer_flower.clients.worker import _Runs
from fedinfer_flower.clients.worker_reply import safe_reply
from fedinfer_flower.errors import DeploymentError, PolicyRefusedError
from fedinfer_flower.flower_internals.fab_app import app_of_fab, run_config_of
from fedinfer_flower.flower_internals.local_wire import over_the_wire, take_identity
from fedinfer_flower.flower_internals.node_desk import DeskLimits, NodeDesk
from fedinfer_flower.flower_internals.polling import bounded_s
from fedinfer_flower.wire import messages
from fedinfer_flower.wire.actions import (
    ACTIONS,
    HELLO,
    LANGUAGE_ACTIONS,
    PREDICT,
    message_type,
)
from fedinfer_flower.wire.envelope import Envelope, Kind
from fedinfer_flower.wire.identity import Identity
from fedinfer_flower.wire.records import unpack
from fedinfer_flower.wire.sealed_query import seal_question, sealed_query_envelope
from fedinfer_flower.wire.stack_messages import STACK_ACTIONS, TRAIN_ACTION

NODE = 1000
CANARY_TEXT = "CANARY-7c21"

FLOWER_TYPES = [
    *("train", "evaluate", "query", "system", "train.default", "evaluate.default"),
    *("query.default", "query.other", "system.reconnect", "system.fi_hello"),
    *(f"{kind}.{HELLO}" for kind in ("train", "evaluate", "system")),
    *(f"{kind}.{PREDICT}" for kind in ("train", "evaluate", "system")),
    f"evaluate.{TRAIN_ACTION}",
    f"query.{TRAIN_ACTION}",
    "query.fi_mpc",
]


# -- every way in --------------------------------------------------------------------------


@pytest.mark.parametrize("kind", FLOWER_TYPES)
def test_other_messages_of_flower_run_nothing_and_tell_nothing(make_site, ward, kind):
    site = make_site()
    asked = site.sealed(site.question())
    ward.contexts.clear()
    before = len(site.audit())
    message = site.message(asked, kind)
    safe = safe_reply(message, site.context, lambda: site.app)
    assert safe.failed
    assert not ward.shown
    assert not ward.contexts
    # Not even a line that it was refused: nothing of the site was asked.
    assert len(site.audit()) == before


@pytest.mark.parametrize("action", [*ACTIONS, *LANGUAGE_ACTIONS, *STACK_ACTIONS])
def test_no_kind_of_envelope_under_any_action_reaches_the_model(make_site, ward, action):
    """Under the default policy only a sealed query of a known querier does."""
    site = make_site()
    # What a question in clear says, which `require-seal` refuses; the kind is a lie.
    asked = messages.question(
        dataclasses.replace(site.question(), querier=None), run_id=site.run_id
    )
    for kind in Kind:
        message = site.message(dataclasses.replace(asked, kind=kind), message_type(action))
        reply = unpack(site.app(message, site.context).content)
        allowed = {Kind.ERROR}
        if action == HELLO and kind is Kind.HELLO:
            allowed = {Kind.PROFILE}
        if kind is Kind.PING:
            allowed |= {Kind.PING}
        assert reply.kind in allowed, kind
        assert not ward.shown, kind


CONTENTS = {
    "nothing": {},
    "config": {"fedinfer": ConfigRecord({"x": b"0" * 5000})},
    "metrics": {"fedinfer": MetricRecord({"x": [1.0] * 1000})},
    "two-records": {
        "fedinfer": ArrayRecord({"envelope": Array("uint8", (1,), "fedinfer.envelope", b"0")}),
        "more": ConfigRecord({"x": b"0" * 5000}),
    },
    "pickle": {
        "fedinfer": ArrayRecord(
            {"envelope": Array("uint8", (1,), "numpy.ndarray", b"\x80\x04cos\nsystem\n.")}
        )
    },
    "too-large": {
        "fedinfer": ArrayRecord(
            {"envelope": Array("uint8", (1,), "fedinfer.envelope", b"0" * 70_000)}
        )
    },
}


@pytest.mark.parametrize("name", CONTENTS)
def test_odd_content_is_refused_in_fixed_words_and_written_down(make_site, name):
    site = make_site(limits={"bytes-per-query": 65_536})
    message = Message(RecordDict(CONTENTS[name]), NODE, message_type(PREDICT), ttl=60.0)
    reply = unpack(site.app(message, site.context).content)
    assert reply.kind is Kind.ERROR
    facts = site.audit()[-1]["facts"]
    assert facts["code"] == reply.meta["code"]
    assert facts["code"] in ("FI301", "FI305")


# -- what a run brings ---------------------------------------------------------------------


def test_run_config_reaches_neither_the_loader_nor_the_home(make_site, ward, tmp_path):
    evil = {
        "fedinfer-home": str(tmp_path / "evil"),
        "fedinfer-policy": str(tmp_path / "evil.toml"),
        "partition-id": 7,
        "name": "evil",
        "model": "/evil",
    }
    site = make_site(run_config=evil)
    assert site.ask().kind is Kind.ANSWER
    assert [context.run_config for context in ward.contexts] == [{}]
    assert not (tmp_path / "evil").exists()
    assert site.context.run_config == evil  # Flower's own is left alone


def bundle_with(files: dict[str, str]) -> bytes:
    body = io.BytesIO()
    with zipfile.ZipFile(body, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, text in files.items():
            archive.writestr(name, text)
    return body.getvalue()


@pytest.mark.parametrize("listed", [False, True], ids=["unlisted", "other-bytes"])
def test_no_byte_of_a_bundle_is_unpacked_before_its_hash_is_known(tmp_path, monkeypatch, listed):
    monkeypatch.setenv("FLWR_HOME", str(tmp_path / "flower"))
    marker = tmp_path / "ran"
    code = f"open({str(marker)!r}, 'w')\n"
    content = bundle_with(
        {"pyproject.toml": "[project]\n", "numpy/__init__.py": code, "../escaped.py": code}
    )
    monkeypatch.setattr(zipfile, "ZipFile", lambda *_, **__: pytest.fail("unpacked"))
    source = ListedFabs(["ab" * 32])
    claimed = "ab" * 32 if listed else "cd" * 32
    bundle = Bundle(fab_id="../../etc/x", fab_version="1", fab_hash=claimed, content=content)
    with pytest.raises(DeploymentError if listed else PolicyRefusedError):
        source.get(7, bundle)
    assert not marker.exists()
    assert not (tmp_path / "flower").exists()


@pytest.mark.parametrize("fab_id", ["a/../../evil", "../evil/x", "evil", "a/b/c", "a/b", ""])
def test_name_that_the_superlink_gives_a_listed_bundle_leads_nowhere_else(
    tmp_path, monkeypatch, fab_id
):
    monkeypatch.setenv("FLWR_HOME", str(tmp_path / "flower"))
    marker = tmp_path / "ran"
    content = bundle_with({"x": "y"})
    digest = hashlib.sha256(content).hexdigest()
    for place in ("evil", "flower/apps/a", f"x.1.{digest[:8]}", f"evil.1.{digest[:8]}"):
        folder = tmp_path / place
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "pyproject.toml").write_text(EVIL_APP)
        (folder / "evil_app.py").write_text(f"open({str(marker)!r}, 'w')\n")
    with pytest.raises(BaseException):  # noqa: B017, PT011  click's errors among them
        app_of_fab(content, fab_id=fab_id, fab_version="1", fab_hash=digest)
    assert not marker.exists()


BUNDLES = {
    "no zip": b"no zip",
    "no settings": bundle_with({"other.py": ""}),
    "no toml": bundle_with({"pyproject.toml": "= ["}),
    "not an app": bundle_with({"pyproject.toml": "[project]\n"}),
    "deep": bundle_with({"pyproject.toml": "a = " + "[" * 100_000}),
    "bomb": bundle_with({"pyproject.toml": "#" * (64 << 20)}),
}


@pytest.mark.parametrize("name", BUNDLES)
def test_supernode_outlives_a_bundle_that_cannot_be_read(name):
    run = Run.create_empty(7)
    assert run_config_of(BUNDLES[name], run) == {}


def test_run_config_of_a_good_bundle_is_read_as_flower_reads_it():
    settings = EVIL_APP.replace("[project]", '[project]\nlicense = {text = "x"}')
    content = bundle_with({"pyproject.toml": settings + "[tool.flwr.app.config]\na = 1\n"})
    run = Run.create_empty(7)
    run.override_config = {"a": 2}
    assert run_config_of(content, run) == get_fused_config_from_fab(content, run) == {"a": 2}


EVIL_APP = """
[project]
name = "x"
version = "1"
[tool.flwr.app]
publisher = "a"
[tool.flwr.app.components]
serverapp = "evil_app:app"
clientapp = "evil_app:app"
"""


# -- time ----------------------------------------------------------------------------------


@pytest.mark.parametrize("ttl", [math.nan, math.inf, 1e300, 4000.0])
def test_time_to_live_without_end_has_one(ttl):
    """NaN compares false with everything, so a plain `min` would wait for ever."""
    assert bounded_s(ttl, most_s=3600.0) == 3600.0


@pytest.mark.parametrize("ttl", [math.nan, math.inf])
def test_supernode_does_not_wait_for_ever_for_a_model_that_never_ends(ttl, monkeypatch):
    ended = []
    monkeypatch.setattr(
        "fedinfer_flower.flower_internals.node_desk._end_with_error",
        lambda message, state, words: ended.append(words),
    )
    now = [0.0]
    desk = NodeDesk(limits=DeskLimits(task_s=5.0), clock=lambda: now[0])
    state = SimpleNamespace(
        lock_msg_store=threading.Lock(),
        msg_store={},
        object_store=SimpleNamespace(),
        get_tasks=lambda **_: [],
    )
    message = SimpleNamespace(metadata=SimpleNamespace(ttl=ttl))

    def tick() -> None:
        now[0] += 1.0
        assert now[0] < 20.0, "waits for ever"

    desk.wait_for_reply(message, state, tick=tick)
    assert len(ended) == 1


@pytest.mark.parametrize("ttl", [math.nan, -5.0, 1e300])
def test_reply_to_a_message_with_an_odd_time_to_live_can_be_sent(make_site, ttl):
    site = make_site()
    message = site.message(Envelope(kind=Kind.HELLO, run_id=site.run_id), message_type(HELLO))
    message.metadata.__dict__["_ttl"] = ttl
    safe = safe_reply(message, site.context, lambda: site.app)
    assert safe.reply.request.messages_list
    assert over_the_wire(safe.reply.message)[1] > 0


def test_message_of_an_agents_run_does_not_block_the_site_until_its_time_is_up():
    """Its task is of a type that no worker of a site takes, however often it asks."""
    take_identity(run_id=7)
    state = NodeStateFactory(ObjectStoreFactory()).state()
    state.set_node_id(NODE)
    message = Message(RecordDict(), NODE, "query.agent", ttl=3600.0)
    message.metadata.__dict__["_message_id"] = message.object_id
    state.create_task(TaskType.AGENT_APP, 7, state.store_fab(Fab("", b"x", {})))
    now = [0.0]
    desk = NodeDesk(clock=lambda: now[0])

    def tick() -> None:
        now[0] += 1.0
        assert now[0] < 60.0, "blocks the site"
        assert desk.take(state, worker="w", pinned="", with_fab=False, wait_s=0.0) is None

    desk.wait_for_reply(message, state, tick=tick)
    (reply,) = state.get_messages_legacy(is_reply=True)
    assert reply.has_error()


# -- thousands of runs ---------------------------------------------------------------------


def test_language_model_is_loaded_once_for_all_runs_of_a_sites_own_app():
    loads = []
    model_cache.keep_across_runs()
    try:
        for run in range(1, 2000):
            language_state.get_or_load((run, "0", "x"), lambda: loads.append(1), capacity=8)
        assert len(loads) == 1
        language_state.forget_other_runs([1])
        language_state.get_or_load((1, "0", "x"), lambda: loads.append(1), capacity=8)
        assert len(loads) == 1
    finally:
        model_cache.clear()
        language_state.clear()


def test_language_models_of_ended_runs_are_dropped():
    states = [object(), object()]
    try:
        for run, state in enumerate(states, start=1):
            language_state.get_or_load((run, "0", "x"), lambda s=state: s, capacity=8)
        language_state.forget_other_runs([2])
        assert list(language_state._states) == [(2, "0", "x")]
    finally:
        language_state.clear()


def test_worker_drops_both_kinds_of_models(monkeypatch):
    dropped = []
    for module in (model_cache, language_state):
        monkeypatch.setattr(module, "forget_other_runs", lambda runs: dropped.append(set(runs)))
    _Runs().seen(7)
    assert dropped == [{7}, {7}]


def test_greetings_of_any_number_of_runs_are_remembered_in_bounded_memory(make_site, monkeypatch):
    monkeypatch.setattr(policy_gate, "_MAX_GREETED", 50)
    site = make_site()
    gate = policy_gate.gate_of(site.policy)
    for run in range(500):
        passage = gate.passage(site.message(Envelope(kind=Kind.HELLO), message_type(HELLO)))
        passage.note(run_id=str(run))
        gate._knows(passage)
    assert len(gate._greeted) == 50


# -- the same again ------------------------------------------------------------------------


def test_query_is_answered_once_whatever_run_it_comes_in(make_site, ward):
    site = make_site()
    question = site.question()
    sealed = site.sealed(question)
    assert site.send(sealed, PREDICT).kind is Kind.ANSWER
    assert site.refusal(site.send(sealed, PREDICT)).code == "FI313"
    old = site.run_id
    site.run_id = site.context.run_id = old + 1
    # As it was: the message says which run it belongs to, in clear and under the seal.
    assert site.send(sealed, PREDICT).kind is Kind.ERROR
    relabelled = dataclasses.replace(sealed, run_id=site.run_id)
    assert site.send(relabelled, PREDICT).kind is Kind.ERROR
    # Sealed anew by its querier, in another run and another process: the home remembers.
    model_cache.clear()
    policy_gate._gates.cache_clear()
    assert site.refusal(site.send(site.sealed(question), PREDICT)).code == "FI313"
    assert len(ward.shown) == 1


# -- the audit log while the site runs -----------------------------------------------------


def test_site_that_cannot_write_its_log_answers_nothing_until_it_can(make_site, ward, tmp_path):
    site = make_site()
    question = site.question()
    log = tmp_path / "state" / "audit.jsonl"
    log.chmod(0o644)
    refused = site.refusal(site.send(site.sealed(question), PREDICT))
    assert refused.code == "FI323"
    log.chmod(0o600)
    assert site.ask().kind is Kind.ANSWER


def test_log_that_is_swapped_for_a_link_is_not_followed(make_site, tmp_path):
    site = make_site()
    question = site.question()
    log, elsewhere = tmp_path / "state" / "audit.jsonl", tmp_path / "elsewhere.jsonl"
    elsewhere.write_bytes(log.read_bytes())
    elsewhere.chmod(0o600)
    before = elsewhere.read_bytes()
    log.unlink()
    log.symlink_to(elsewhere)
    assert site.refusal(site.send(site.sealed(question), PREDICT)).code == "FI323"
    assert elsewhere.read_bytes() == before


def test_log_that_is_deleted_or_set_back_while_in_use_stops_the_site(make_site, tmp_path):
    site = make_site()
    log = tmp_path / "state" / "audit.jsonl"
    early = log.read_bytes()
    question = site.question()
    assert site.ask().kind is Kind.ANSWER
    for content in (early, b""):
        log.write_bytes(content)
        assert site.refusal(site.send(site.sealed(question), PREDICT)).code == "FI323"


# -- what else lies in the home ------------------------------------------------------------


def test_pins_in_the_home_do_not_widen_the_policy(make_site, ward, tmp_path):
    site = make_site()
    question = site.question()
    stranger = Identity.generate()
    for folder in (tmp_path, tmp_path / "state"):
        (folder / "pins.toml").write_text(f'[queriers]\nme = "{stranger.key_id}"\n')
    asked = dataclasses.replace(question, querier=stranger.public)
    body = seal_question(asked, identity=stranger, run_id=site.run_id)
    sealed = sealed_query_envelope(body, query_id=asked.query_id, run_id=site.run_id)
    assert site.refusal(site.send(sealed, PREDICT)).code == "FI311"
    assert not ward.shown
    assert site.ask().kind is Kind.ANSWER


def test_home_that_is_put_away_while_the_site_runs_is_not_begun_afresh(make_site, tmp_path):
    """Else whoever can rename it would set every counter back to zero."""
    site = make_site(limits={"rows-per-day": 2})
    assert site.ask().kind is Kind.ANSWER
    question = site.question()
    (tmp_path / "state").rename(tmp_path / "before")
    (tmp_path / "other").mkdir(mode=0o700)
    (tmp_path / "state").symlink_to(tmp_path / "other")
    assert site.send(site.sealed(question), PREDICT).kind is Kind.ERROR


@pytest.mark.parametrize("step_s", [-3600.0, -86_400.0, -10 * 86_400.0])
def test_clock_that_is_set_back_wins_no_room(tmp_path, step_s):
    now = [1_700_000_000.0]
    limits = LimitRules(rows_per_day=10, queries_per_minute=2)
    guard = RateGuard(tmp_path / "limits.sqlite", limits, clock=lambda: now[0])
    guard.count(querier="a", query_id="1", n_rows=5)
    guard.count(querier="a", query_id="2", n_rows=5)
    now[0] += step_s
    for name, rows in (("3", 0), ("4", 1)):
        with pytest.raises(PolicyRefusedError):
            guard.count(querier="a", query_id=name, n_rows=rows)


@pytest.mark.parametrize("second", [-1, 0, 1])
def test_no_day_that_begins_at_midnight_has_two_limits(tmp_path, second):
    midnight = 1_700_006_400.0
    now = [midnight - 1.0]
    guard = RateGuard(tmp_path / "limits.sqlite", LimitRules(rows_per_day=10), clock=lambda: now[0])
    guard.count(querier="a", query_id="1", n_rows=10)
    now[0] = midnight + second
    with pytest.raises(PolicyRefusedError):
        guard.count(querier="a", query_id="2", n_rows=1)
    now[0] = midnight + 23.9 * 3600
    with pytest.raises(PolicyRefusedError):
        guard.count(querier="a", query_id="3", n_rows=1)
