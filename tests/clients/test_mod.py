"""`InferenceMod` in every kind of ClientApp; whatever fails at a site, nothing leaks."""

from __future__ import annotations

import logging

import numpy as np
import pytest
from flwr.app import ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict
from flwr.client import NumPyClient
from flwr.clientapp import ClientApp

from fedinfer_flower import FedEnsemble, InferenceMod, LocalModel, inference
from fedinfer_flower.errors import (
    ConfigError,
    InvalidValueError,
    ModelError,
    NotRegisteredError,
    QuorumNotMetError,
)
from fedinfer_flower.query import CountsKind
from fedinfer_flower.simulation.local_grid import LocalGrid, over_the_wire
from fedinfer_flower.strategies.onboarding import read_arrival
from fedinfer_flower.strategies.pull_loop import stream_replies
from fedinfer_flower.wire import messages
from fedinfer_flower.wire.actions import ACTIONS, HELLO, PING, PREDICT, message_type
from fedinfer_flower.wire.envelope import DEFAULT_LIMITS, Envelope, Kind, WireLimits
from fedinfer_flower.wire.messages import Question
from fedinfer_flower.wire.records import pack, packed_bytes, unpack

CANARY = "CANARY-1f9b"
CANARY_NUMBER = 1234.56789  # its digits, and its bytes, must not be in a reply
QUERIES = np.array([[1.0, 0.0], [0.0, 2.0]])


def model(rows):
    return np.column_stack([rows[:, 0] + 1.0, rows[:, 1] + 1.0]) / (2.0 + rows.sum(axis=1))[:, None]


def load_model(context):
    return LocalModel(model=model, classes=["a", "b"])


def trained(message: Message, context) -> Message:
    return Message(RecordDict({"m": MetricRecord({"loss": 0.5})}), reply_to=message)


class Client(NumPyClient):
    def fit(self, parameters, config):
        return [np.full(2, 7.0)], 3, {"loss": 0.5}


def attached() -> ClientApp:
    app = InferenceMod(load_model).attach(ClientApp())
    app.train()(trained)
    return app


def decorated() -> ClientApp:
    app = ClientApp()
    app.train()(trained)
    inference(app)(load_model)
    return app


def legacy() -> ClientApp:
    return ClientApp(lambda context: Client().to_client(), mods=[InferenceMod(load_model)])


@pytest.mark.parametrize("make_app", [attached, decorated, legacy])
def test_mod_in_any_app_answers_queries(make_app):
    with LocalGrid(make_app(), num_supernodes=3) as grid:
        result = FedEnsemble(rule="mean-probability", min_available_nodes=3).start(grid, QUERIES)

    assert not result.degraded
    # 1e-6: three float32 roundings.
    np.testing.assert_allclose(result.prediction.probabilities, model(QUERIES), atol=1e-6)


@pytest.mark.parametrize("make_app", [attached, decorated])
def test_mod_in_message_app_leaves_training_alone(make_app):
    with LocalGrid(make_app(), num_supernodes=1) as grid:
        message = Message(RecordDict({"c": ConfigRecord({"lr": 0.1})}), 1000, "train")
        (reply,) = grid.send_and_receive([message], timeout=10.0)
    assert reply.content["m"]["loss"] == 0.5


def test_mod_in_legacy_app_leaves_training_alone():
    with LocalGrid(legacy(), num_supernodes=1) as grid:
        content = RecordDict(
            {
                "fitins.parameters": ArrayRecord([np.zeros(2)]),
                "fitins.config": ConfigRecord({}),
            }
        )
        (reply,) = grid.send_and_receive([Message(content, 1000, "train")], timeout=10.0)

    assert not reply.has_error(), reply.error
    assert reply.content["fitres.num_examples"]["num_examples"] == 3


def test_attach_returns_the_app_and_registers_every_action(make_site):
    app = ClientApp()
    assert InferenceMod(load_model).attach(app) is app
    with LocalGrid(app, num_supernodes=1) as grid:
        for action in ACTIONS:
            hello = pack(Envelope(kind=Kind.HELLO, run_id=grid.run_id))
            (reply,) = grid.send_and_receive([Message(hello, 1000, message_type(action))])
            assert not reply.has_error()


def test_attach_to_a_legacy_app_is_refused_with_the_other_way():
    with pytest.raises(ConfigError) as caught:
        InferenceMod(load_model).attach(ClientApp(lambda context: Client().to_client()))
    assert "mods=[InferenceMod(load_model)]" in caught.value.hint


def test_app_without_the_mod_is_not_registered_error_at_the_coordinator():
    app = ClientApp()
    app.train()(trained)
    with LocalGrid(app, num_supernodes=2) as grid:
        message = Message(
            pack(Envelope(kind=Kind.HELLO, run_id=grid.run_id)), 1000, "query.fi_hello"
        )
        (arrival,) = stream_replies(grid, [message], timeout_s=10.0)
        with pytest.raises(NotRegisteredError) as caught:
            read_arrival(arrival, run_id=grid.run_id, limits=DEFAULT_LIMITS)
        assert "attach(app)" in caught.value.hint
        with pytest.raises(QuorumNotMetError, match="FI406"):
            FedEnsemble(min_available_nodes=2).start(grid, QUERIES)


# -- faults ------------------------------------------------------------------------------


def raises(rows):
    raise ValueError(f"{CANARY} {rows}")


def exits(rows):
    raise SystemExit(CANARY)


class Panic(BaseException):
    """As a tokenizer written in Rust raises it."""


def panics(rows):
    raise Panic(CANARY)


def raises_our_own(rows):
    raise QuorumNotMetError(f"{CANARY} {rows}", hint=CANARY)


def odd_error(rows):
    raise type(CANARY.replace("-", "_"), (Exception,), {})(CANARY)


def recurses(rows):
    return recurses(rows)


FAULTY_MODELS = {
    "raises": raises,
    "raises SystemExit": exits,
    "panics": panics,
    "raises an error of this package": raises_our_own,
    "raises an error named at run time": odd_error,
    "recurses": recurses,
    "returns None": lambda rows: None,
    "returns text": lambda rows: [[CANARY, CANARY]] * len(rows),
    "returns objects": lambda rows: np.array([[object(), {}]] * len(rows), dtype=object),
    "returns complex": lambda rows: np.full((len(rows), 2), 1j).tolist(),
    "returns a ragged list": lambda rows: [[1.0], [1.0, 2.0]],
    "returns NaN": lambda rows: np.full((len(rows), 2), np.nan),
    "returns infinity": lambda rows: np.full((len(rows), 2), np.inf),
    "returns one column": lambda rows: np.full((len(rows), 1), CANARY_NUMBER),
    "returns three columns": lambda rows: np.full((len(rows), 3), CANARY_NUMBER),
    "returns a row too few": lambda rows: np.full((len(rows) - 1, 2), CANARY_NUMBER),
    "returns one dimension": lambda rows: np.full(len(rows), CANARY_NUMBER),
    "returns a scalar": lambda rows: CANARY_NUMBER,
}


def assert_clean(message: Message, caplog) -> None:
    """Require that no canary is in the bytes of a reply or in any log record."""
    copy, _ = over_the_wire(message)
    data = packed_bytes(copy.content)
    needles = [CANARY.encode(), CANARY.replace("-", "_").encode(), b"1234.56"]
    needles += [np.array(CANARY_NUMBER, dtype=t).tobytes() for t in ("<f4", "<f8")]
    for needle in needles:
        assert needle not in data
    # The name of an error's class may be in the site's own log, its text may not.
    assert CANARY not in caplog.text
    assert "1234.56" not in caplog.text
    assert all(not record.exc_info for record in caplog.records)


@pytest.mark.parametrize("outputs", ["probabilities", "logits"])
@pytest.mark.parametrize("faulty", FAULTY_MODELS.values(), ids=FAULTY_MODELS)
def test_faulty_model_gives_a_typed_error_and_leaks_nothing(make_site, caplog, faulty, outputs):
    caplog.set_level(logging.DEBUG)
    site = make_site(lambda context: LocalModel(model=faulty, classes=["a", "b"], outputs=outputs))
    asked = Question(
        query_id="q-0",
        inputs=np.full((2, 2), CANARY_NUMBER),
        classes=("a", "b"),
        n_sites=3,
        rule="mean-probability",
        protection="plain",
    )
    reply = site.reply(messages.question(asked, run_id=site.run_id), PREDICT)

    error = messages.read_error(unpack(reply.content), run_id=site.run_id, sender=1000)
    assert error.code in {"FI404", "FI306"}
    assert reply.metadata.reply_to_message_id is not None
    assert_clean(reply, caplog)


def load_nothing(context):
    return None


def load_raises(context):
    raise OSError(CANARY)


def load_exits(context):
    raise SystemExit(CANARY)


def load_raises_our_own(context):
    raise QuorumNotMetError(CANARY, hint=CANARY)


def load_text(context):
    return CANARY


FAULTY_LOADERS = {
    "returns None": (load_nothing, "FI208"),
    "raises": (load_raises, "FI403"),
    "raises SystemExit": (load_exits, "FI403"),
    "raises an error of this package": (load_raises_our_own, "FI403"),
    "returns text": (load_text, "FI208"),
    "no classes": (lambda context: model, "FI208"),
    "class twice": (lambda context: LocalModel(model=model, classes=["a", "a"]), "FI208"),
    "model None": (lambda context: LocalModel(model=None, classes=["a"]), "FI208"),
    "odd outputs": (
        lambda context: LocalModel(model=model, classes=["a", "b"], outputs="votes"),
        "FI208",
    ),
    "counts of other length": (
        lambda context: LocalModel(model=model, classes=["a", "b"], class_counts=[1, 2, 3]),
        "FI208",
    ),
    "negative price": (
        lambda context: LocalModel(model=model, classes=["a", "b"], price_per_query=-1.0),
        "FI208",
    ),
    "holdout of text": (
        lambda context: LocalModel(
            model=model, classes=["a", "b"], holdout=([[CANARY]] * 20, ["a"] * 20)
        ),
        "FI404",
    ),
}


@pytest.mark.parametrize(("loader", "code"), FAULTY_LOADERS.values(), ids=FAULTY_LOADERS)
def test_faulty_loader_gives_a_typed_error_and_leaks_nothing(make_site, caplog, loader, code):
    caplog.set_level(logging.DEBUG)
    site = make_site(loader, share_counts="counts")
    reply = site.reply(Envelope(kind=Kind.HELLO, run_id=site.run_id), HELLO)

    error = messages.read_error(unpack(reply.content), run_id=site.run_id, sender=1000)
    assert error.code == code
    assert_clean(reply, caplog)


@pytest.mark.parametrize(
    "augment",
    [
        raises,
        raises_our_own,
        lambda rows: [],
        lambda rows: None,
        lambda rows: [rows[:1]],
        lambda rows: [[[CANARY, CANARY]] * 2],
        lambda rows: [np.full((2, 3), CANARY_NUMBER)],
    ],
)
def test_faulty_augment_gives_a_typed_error_and_leaks_nothing(make_site, caplog, augment):
    caplog.set_level(logging.DEBUG)

    def picky(rows):
        if rows.shape != (2, 2):
            raise ValueError(f"{CANARY} {rows}")
        return model(rows)

    site = make_site(lambda context: LocalModel(model=picky, classes=["a", "b"], augment=augment))
    asked = Question(
        query_id="q-0",
        inputs=np.full((2, 2), CANARY_NUMBER),
        classes=("a", "b"),
        n_sites=3,
        rule="tta-kl",
        protection="plain",
    )
    reply = site.reply(messages.question(asked, run_id=site.run_id), PREDICT)

    error = messages.read_error(unpack(reply.content), run_id=site.run_id, sender=1000)
    assert error.code in {"FI202", "FI304", "FI404"}
    assert_clean(reply, caplog)


def test_site_log_says_where_a_model_failed_but_not_why(make_site, caplog):
    make_site(lambda context: LocalModel(model=raises, classes=["a", "b"])).error()
    (record,) = [r for r in caplog.records if r.levelno == logging.ERROR]
    assert "ValueError at test_mod.py:" in record.getMessage()


def test_good_answer_leaks_no_inputs(make_site, caplog):
    caplog.set_level(logging.DEBUG)
    site = make_site(load_model)
    asked = Question(
        query_id="q-0",
        inputs=np.array([[CANARY_NUMBER, 1.0]]),
        classes=("a", "b"),
        n_sites=3,
        rule="mean-probability",
        protection="plain",
    )
    reply = site.reply(messages.question(asked, run_id=site.run_id), PREDICT)
    assert unpack(reply.content).kind is Kind.ANSWER
    assert_clean(reply, caplog)


@pytest.mark.parametrize(
    "facts",
    [
        {"price_per_query": np.float32(1.5)},
        {"price_per_query": 1},
        {"model_card": {"trees": 100, "id": np.int64(3)}},
        {"class_counts": {"a": np.int64(3), "b": np.float32(2)}},
    ],
    ids=str,
)
def test_profile_of_numbers_of_any_kind_travels_and_its_answers_are_believed(facts):
    def load(context):
        return LocalModel(model=model, classes=["a", "b"], **facts)

    app = InferenceMod(load, share_counts="counts").attach(ClientApp())
    with LocalGrid(app, num_supernodes=2) as grid:
        result = FedEnsemble(rule="mean-probability", min_available_nodes=2).start(grid, QUERIES)
    assert not result.degraded, result.summary()


# -- messages that a site does not believe -----------------------------------------------


def test_message_of_another_run_is_refused(make_site):
    site = make_site(load_model)
    reply = site.reply(Envelope(kind=Kind.HELLO, run_id=site.run_id + 1), HELLO)
    assert unpack(reply.content).meta["code"] == "FI303"


@pytest.mark.parametrize(
    ("kind", "action"),
    [
        (Kind.HELLO, PREDICT),
        (Kind.QUERY, HELLO),
        (Kind.ANSWER, PREDICT),
        (Kind.JOB, PREDICT),
        (Kind.HELLO, PING),
        (Kind.HELLO, "fi_unknown"),
    ],
)
def test_envelope_of_a_kind_that_the_action_does_not_take_is_refused(make_site, kind, action):
    site = make_site(load_model)
    reply = site.reply(Envelope(kind=kind, run_id=site.run_id), action)
    assert unpack(reply.content).meta["code"] == "FI301"


@pytest.mark.parametrize(
    "content", [RecordDict(), RecordDict({"fedinfer": ConfigRecord({"x": CANARY})})], ids=str
)
def test_content_that_is_no_envelope_is_refused_with_a_valid_reply(make_site, content, caplog):
    site = make_site(load_model)
    reply = site.mod.handle(Message(content, 1000, message_type(PREDICT)), site.context)
    assert unpack(reply.content).meta["code"] == "FI301"
    assert_clean(reply, caplog)


def test_message_above_the_sites_limits_is_refused(make_site):
    site = make_site(load_model, limits=WireLimits(max_rows=1))
    assert site.error().code == "FI305"


def test_ping_is_answered_without_loading_the_model(make_site):
    site = make_site(load_raises)
    reply = site.reply(Envelope(kind=Kind.PING, run_id=site.run_id), PING)
    envelope = unpack(reply.content)
    assert (envelope.kind, envelope.sender) == (Kind.PING, 1000)


@pytest.mark.parametrize(
    ("changes", "code"),
    [
        ({"rule": "no-such-rule"}, "FI201"),
        ({"rule_options": {"x": 1}}, "FI202"),
        ({"protection": "no-such-protection"}, "FI201"),
        ({"protection": "dp", "protection_options": {"epsilon": -1.0}}, "FI202"),
        ({"protection": "dp", "rule": "mean-logit"}, "FI203"),
        ({"protection": "he", "rule": "median"}, "FI203"),
        ({"protection": "he"}, "FI301"),  # no key
        ({"protection": "he", "public_key": b"x" * 100, "key_id": "0f" * 32}, "FI303"),
        ({"rule": "tta-kl"}, "FI202"),
        ({"rule": "open-set"}, "FI202"),
        ({"rule": "class-share"}, "FI202"),
        ({"classes": ("x", "y")}, "FI309"),
    ],
    ids=str,
)
def test_question_that_cannot_be_answered_gives_a_typed_error(make_site, changes, code):
    assert make_site(load_model).error(**changes).code == code


@pytest.mark.parametrize(
    "options",
    [
        {"share_counts": "all"},
        {"share_counts": "COUNTS"},
        {"protections": "he"},
        {"querier_key_ids": "0f"},
        {"max_models": 0},
    ],
    ids=str,
)
def test_mod_with_an_option_out_of_range_is_refused(options):
    with pytest.raises(InvalidValueError):
        InferenceMod(load_model, **options)


def test_mod_without_a_function_is_refused():
    with pytest.raises(InvalidValueError):
        InferenceMod(model_of_nothing)  # type: ignore[arg-type]


model_of_nothing = None


# -- names and counts --------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "node_config", "name"),
    [
        ({}, {"partition-id": 4}, "site-4"),
        ({}, {}, "site-1000"),
        ({}, {"name": "Charité"}, "Charité"),
        ({"name": "own"}, {"name": "other"}, "own"),
        ({"name": "x" * 500}, {}, "x" * 128),
    ],
    ids=str,
)
def test_site_name_comes_from_the_mod_or_the_node(make_site, options, node_config, name):
    site = make_site(load_model, **options)
    site.context.node_config.clear()
    site.context.node_config.update(node_config)
    assert site.profile().name == name


def test_site_name_with_control_characters_is_refused(make_site):
    envelope = make_site(load_model, name="a\x1b[2Jb").hello()
    assert envelope.meta["code"] == ModelError.code


def counted(context):
    return LocalModel(model=model, classes=["b", "a"], class_counts={"a": 17041, "b": 0})


@pytest.mark.parametrize(
    ("share", "kind", "counts"),
    [
        (None, "presence", (0.0, 1.0)),
        ("presence", "presence", (0.0, 1.0)),
        ("counts", "counts", (0.0, 17041.0)),
        ("withheld", "withheld", None),
    ],
)
def test_counts_leave_the_site_as_far_as_consented(make_site, share, kind, counts):
    options = {} if share is None else {"share_counts": share}
    site = make_site(counted, **options)

    profile = site.profile()

    assert (profile.counts_kind, profile.class_counts) == (kind, counts)
    assert ("17041" in str(dict(site.hello().meta))) == (share == "counts")


def test_presence_site_asked_with_totals_of_counts_refuses(make_site):
    site = make_site(counted)
    for rule in ("class-share", "mean-probability"):
        changes = {"rule": rule, "query_id": f"q-{rule}"}
        error = site.error(
            class_totals=np.array([20000.0, 5.0]), counts_kind=CountsKind.COUNTS, **changes
        )
        assert error.code == "FI202"
        assert "17041" not in str(error)


def test_counts_of_a_site_without_any_are_presence_bits(make_site):
    profile = make_site(load_model, share_counts="counts").profile()
    assert (profile.counts_kind, profile.class_counts) == ("presence", (1.0, 1.0))
