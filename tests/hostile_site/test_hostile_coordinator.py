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

from fedinfer_flower.clients import language_state, model_cache, policy_gate
from fedinfer_flower.clients.app_source import Bundle, ListedFabs
from fedinfer_flower.clients.worker import _Runs
from fedinfer_flower.clients.worker_reply import safe_reply
from fedinfer_flower.errors import DeploymentError, PolicyRefusedError
from fedinfer_flower.flower_internals.fab_app import app_of_fab
from fedinfer_flower.flower_internals.local_wire import over_the_wire
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
from fedinfer_flower.wire.records import unpack
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


@pytest.mark.parametrize("kind", list(Kind), ids=lambda kind: kind.value)
@pytest.mark.parametrize("action", [*ACTIONS, *LANGUAGE_ACTIONS, *STACK_ACTIONS])
def test_no_kind_of_envelope_under_any_action_reaches_the_model(make_site, ward, action, kind):
    """Under the default policy only a sealed query of a known querier does."""
    site = make_site()
    # What a question in clear says, which `require-seal` refuses; the kind is a lie.
    asked = messages.question(
        dataclasses.replace(site.question(), querier=None), run_id=site.run_id
    )
    message = site.message(dataclasses.replace(asked, kind=kind), message_type(action))
    reply = unpack(site.app(message, site.context).content)
    allowed = {Kind.ERROR}
    if action == HELLO and kind is Kind.HELLO:
        allowed = {Kind.PROFILE}
    if kind is Kind.PING:
        allowed |= {Kind.PING}
    assert reply.kind in allowed
    assert not ward.shown


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
    with zipfile.ZipFile(body, "w") as archive:
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
        lock_msg_store=threading.Lock(), msg_store={}, object_store=SimpleNamespace()
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
