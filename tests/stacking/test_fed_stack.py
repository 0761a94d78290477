"""End to end: sites train and answer under secure sums; nothing of one site is on the wire."""

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp

from fedinfer_flower import BudgetPolicy, FedEnsemble, InferenceMod, Querier
from fedinfer_flower.clients.stack_mod import StackingMod
from fedinfer_flower.ensemble.fitted import FittedAggregator
from fedinfer_flower.ensemble.stack_participation import load_stack
from fedinfer_flower.ensemble.stack_rule import exact_probabilities
from fedinfer_flower.errors import (
    BudgetExceededError,
    ConfigError,
    InvalidValueError,
    NotRegisteredError,
    ProtectionRefusedError,
    QueryError,
    UntrustedKeyError,
)
from fedinfer_flower.simulation.local_grid import LocalGrid
from fedinfer_flower.strategies.fed_stack import FedStack
from fedinfer_flower.strategies.stack_exchange import StackExchange
from fedinfer_flower.strategies.stack_trainer import StackGrid, TrainerOptions, run_rounds
from fedinfer_flower.wire.directory import Directory
from fedinfer_flower.wire.stack_messages import TRAIN, StackJob

from .conftest import (
    N_SITES,
    SMALL_CLASSES,
    RecordingGrid,
    made_up,
    small_app,
    small_holdout,
    small_model,
    small_weights,
)


def asked(grid, rule, inputs, n_sites, protection="secagg", classes=SMALL_CLASSES):
    strategy = FedEnsemble(
        rule=rule, protection=protection, min_available_nodes=n_sites, classes=list(classes)
    )
    return strategy.start(grid, inputs)


# -- accuracy ----------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["linear-stack", "deep-set"])
def test_trained_stack_answers_skewed_digits_under_secagg(kind, digits, digits_grid):
    dataset, _ = digits
    trained = FedStack(kind, rounds=40, min_available_nodes=N_SITES).start(digits_grid)
    assert not trained.refused
    assert trained.history[40] < trained.history[1]

    answer = asked(digits_grid, trained.rule, dataset.test_inputs, N_SITES, classes=dataset.classes)
    mean = asked(
        digits_grid, "mean-probability", dataset.test_inputs, N_SITES, classes=dataset.classes
    )

    # Measured 0.95 and 0.92 on this split against 0.71; the target is 0.90.
    assert answer.prediction.accuracy(dataset.test_labels) >= 0.90
    assert mean.prediction.accuracy(dataset.test_labels) < 0.80


# -- what is on the wire -----------------------------------------------------------------


def test_transcript_has_no_label_no_model_no_row_and_no_answer():
    with RecordingGrid(small_app(), num_supernodes=4) as grid:
        trained = FedStack("linear-stack", rounds=3, min_available_nodes=4).start(grid)
        seen = bytes(grid.transcript)
        # Positive control: what does travel is found, so the search works.
        assert trained.fitted.to_bytes() in seen
        inputs, _ = small_holdout(0)
        asked(grid, "mean-probability", inputs, 4, protection="plain")
        assert inputs[:2].tobytes() in bytes(grid.transcript)
    for site in range(4):
        weights, (rows, labels) = small_weights(site), small_holdout(site)
        columns = np.array([SMALL_CLASSES.index(label) for label in labels])
        for secret in (rows, weights):
            for dtype in (np.float64, np.float32):
                # Three numbers in a row of 64 bits do not occur by chance.
                assert secret.astype(dtype)[:1].tobytes() not in seen
        for dtype in (np.int64, np.int32, np.uint8, np.float64):
            assert columns.astype(dtype).tobytes() not in seen
        assert "".join(labels).encode() not in seen
        assert str(labels)[1:-1].encode() not in seen
        for other in range(4):
            answers = exact_probabilities(rows @ small_weights(other))
            assert answers[:1].tobytes() not in seen


def test_app_keeps_its_own_training():
    app = small_app()
    called = []

    @app.train()
    def train(message: Message, context) -> Message:
        called.append(message.metadata.message_type)
        return Message(RecordDict(), reply_to=message)

    with LocalGrid(app, num_supernodes=4) as grid:
        FedStack(rounds=2, min_available_nodes=4).start(grid)
        assert called == []
        node = next(iter(grid.get_node_ids()))
        list(grid.send_and_receive([Message(RecordDict(), node, "train")], timeout=10))
    assert called == ["train"]


def test_coordinator_gives_each_site_a_share_and_saves_the_card(tmp_path):
    with LocalGrid(small_app(), num_supernodes=4) as grid:
        trained = FedStack("gated-mixture", trainer="FedAvg", rounds=2).start(grid)
    trained.save(tmp_path)
    assert load_stack(tmp_path) == trained.rule
    card = FittedAggregator.load(tmp_path).card
    assert (card["trainer"], card["rounds"]) == ("FedAvg", 2)
    assert card["rows"] == 30 + 31 + 32 + 33
    assert "sites that refuse it: none" in trained.summary()
    assert list(trained.history) == [1, 2]


def test_mlp_stack_is_trained_and_asked_in_clear():
    with LocalGrid(small_app(), num_supernodes=4) as grid:
        trained = FedStack("mlp-stack", rounds=5, hidden=8).start(grid)
        answer = asked(grid, trained.rule, small_holdout(0)[0], 4, protection="plain")
    assert len(answer.prediction) == 30
    assert trained.participation is None


def test_sealed_query_names_the_stack_and_its_querier_decodes_the_sum():
    inputs, _ = small_holdout(1)
    with LocalGrid(small_app(), num_supernodes=4) as grid:
        trained = FedStack("deep-set", rounds=5, hidden=8).start(grid)
        strategy = FedEnsemble(protection="secagg", min_available_nodes=4)
        querier = Querier(protection="secagg")
        job = querier.ask(
            inputs,
            directory=strategy.directory(grid),
            classes=SMALL_CLASSES,
            rule=trained.rule,
        )
        result = strategy.start(grid, job)
        prediction = querier.open(result.combined)
        clear = asked(grid, trained.rule, inputs, 4)
    assert result.prediction is None  # the coordinator has no key
    assert (prediction.labels == clear.prediction.labels).all()
    # Both go through the same fixed-point codec, whose error depends on the values alone.
    assert np.allclose(
        prediction.probabilities, clear.prediction.probabilities, rtol=0.0, atol=1e-6
    )


# -- consent -----------------------------------------------------------------------------


def test_site_that_does_not_take_part_ends_the_training_and_can_be_left_out():
    mod = InferenceMod(small_model)
    with_stacking = StackingMod(mod).attach(mod.attach(ClientApp()))
    without = InferenceMod(small_model).attach(ClientApp())

    def app(message, context):
        site = context.node_config["partition-id"]
        return (without if site == 2 else with_stacking)(message, context)

    with LocalGrid(app, num_supernodes=4) as grid:
        with pytest.raises(NotRegisteredError):
            FedStack(rounds=1, min_available_nodes=4).start(grid)
        trained = FedStack(rounds=1, min_available_nodes=4, leave_out={"site-2"}).start(grid)
    assert len(trained.fitted.sites) == 3


def test_strangers_among_the_peers_are_refused():
    app = small_app(peer_key_ids=["ab" * 32])
    with LocalGrid(app, num_supernodes=3) as grid, pytest.raises(UntrustedKeyError):
        FedStack(rounds=1, min_available_nodes=3).start(grid)


def test_rows_beyond_the_sites_limit_are_refused_over_all_trainings_of_a_run():
    # Every site answers 31 + 32, 30 + 32 or 30 + 31 rows of its peers in one training.
    with LocalGrid(small_app(max_rows=70), num_supernodes=3) as grid:
        FedStack(rounds=1, min_available_nodes=3).start(grid)
        with pytest.raises(BudgetExceededError):
            FedStack(rounds=1, min_available_nodes=3).start(grid)


def test_site_with_a_privacy_budget_does_not_take_part(tmp_path):
    mod = InferenceMod(
        small_model,
        home=tmp_path,
        budget=BudgetPolicy(epsilon_per_querier=1.0, epsilon_global=1.0, delta=1e-6),
    )
    with pytest.raises(ConfigError, match="does not train stacks"):
        StackingMod(mod)


# -- hostile coordinators ----------------------------------------------------------------


def test_sites_refuse_a_stack_that_would_read_one_of_them():
    with LocalGrid(small_app(), num_supernodes=4) as grid:
        fed = FedStack(rounds=1, min_available_nodes=4)
        trained = fed.start(grid)
        cards = fed._onboard(grid)
        directory = Directory(run_id=grid.run_id, cards=tuple(cards.values()))
        job = StackJob(job_id="again", classes=SMALL_CLASSES, directory=directory)
        weights = np.zeros((4, 3, 3))
        weights[1] = np.eye(3)
        hostile = FittedAggregator(
            kind="linear-stack",
            arrays={"weights_kcc": weights, "bias_kc": np.zeros((4, 3))},
            card=dict(trained.fitted.card),
        )
        exchange = StackExchange(grid=grid, job=job, cards=cards, timeout_s=20.0)
        refused = exchange.install(hostile.to_bytes())
        assert len(refused) == 4
        assert {type(error) for error in refused.values()} == {ProtectionRefusedError}
        assert exchange.install(trained.fitted.to_bytes()) == {}
        other = StackJob(job_id="b", classes=SMALL_CLASSES[::-1], directory=directory)
        renamed = StackExchange(grid=grid, job=other, cards=cards, timeout_s=20.0)
        assert len(renamed.install(trained.fitted.to_bytes())) == 4


def test_deep_set_is_refused_by_sites_that_cannot_try_it_on_their_rows():
    with LocalGrid(small_app(), num_supernodes=3) as grid:
        fed = FedStack("deep-set", rounds=1, hidden=4, min_available_nodes=3)
        cards = fed._onboard(grid)
        directory = Directory(run_id=grid.run_id, cards=tuple(cards.values()))
        job = StackJob(job_id="no-exchange", classes=SMALL_CLASSES, directory=directory)
        made = made_up("deep-set", n_sites=3, n_classes=3)
        card = dict(made.card) | {"sites": list(job.key_ids), "classes": list(SMALL_CLASSES)}
        fitted = FittedAggregator(kind="deep-set", arrays=made.arrays, card=card)
        exchange = StackExchange(grid=grid, job=job, cards=cards, timeout_s=20.0)
        refused = exchange.install(fitted.to_bytes())
        assert {type(error) for error in refused.values()} == {ProtectionRefusedError}
        assert len(refused) == 3
        fed.start(grid)  # other parameters, the same sites: now they can try it
        assert exchange.install(fitted.to_bytes()) == {}


def test_training_round_without_an_exchange_is_refused_in_fixed_words():
    with LocalGrid(small_app(), num_supernodes=2) as grid:
        content = RecordDict(
            {
                "arrays": ArrayRecord({"gate_kc": Array(np.zeros((2, 3)))}),
                "config": ConfigRecord({"job": "canary-job", "kind": "gated-mixture"}),
            }
        )
        node = next(iter(grid.get_node_ids()))
        (reply,) = grid.send_and_receive([Message(content, node, TRAIN)], timeout=10)
    assert reply.has_error()
    assert reply.error.reason == "FI303: this site has taken no answers for that training"


# -- hostile sites -----------------------------------------------------------------------

SHAPES = {"gate_kc": (2, 3), "gate_bias_k": (2,)}


def trainer_app(change):
    """Replies as a site does, but for what `change` does to arrays and metrics of site 0."""
    app = ClientApp()

    @app.train("fi_stack")
    def train(message, context):
        arrays = {name: np.full(shape, 0.5) for name, shape in SHAPES.items()}
        metrics = {"num-examples": 10, "loss": 1.0}
        if context.node_config["partition-id"] == 0:
            change(arrays, metrics)
        content = {
            "arrays": ArrayRecord({name: Array(array) for name, array in arrays.items()}),
            "metrics": MetricRecord(metrics),
        }
        return Message(RecordDict(content), reply_to=message)

    return app


def rounds(grid):
    stack_grid = StackGrid(grid, node_ids=grid.get_node_ids(), shapes=SHAPES, timeout_s=10.0)
    start = {name: np.zeros(shape) for name, shape in SHAPES.items()}
    options = TrainerOptions(trainer="FedAvg", rounds=2)
    return stack_grid, lambda: run_rounds(
        stack_grid, "gated-mixture", start, options, job_id="j", timeout_s=10.0
    )


@pytest.mark.parametrize(
    "change",
    [
        lambda a, m: a.update(gate_kc=np.full((2, 3), np.nan)),
        lambda a, m: a.update(gate_kc=np.full((2, 3), 1e9)),
        lambda a, m: a.update(gate_kc=np.zeros((3, 3))),
        lambda a, m: a.update(gate_kc=np.zeros((2, 3), np.float32)),
        lambda a, m: a.update(more=np.zeros(1)),
        lambda a, m: a.pop("gate_bias_k"),
        lambda a, m: m.update({"num-examples": 10**9}),
        lambda a, m: m.update({"num-examples": 0}),
        lambda a, m: m.update({"loss": float("nan")}),
        lambda a, m: m.update({"more": 1}),
    ],
)
def test_reply_that_would_spoil_the_mean_is_left_out(change):
    with LocalGrid(trainer_app(change), num_supernodes=2) as grid:
        stack_grid, run = rounds(grid)
        arrays, history = run()
    assert stack_grid.dropped == 2  # one a round
    assert np.array_equal(arrays["gate_kc"], np.full((2, 3), 0.5))
    assert history == {1: 1.0, 2: 1.0}


def test_no_usable_reply_at_all_is_a_typed_error():
    with LocalGrid(ClientApp(), num_supernodes=2) as grid, pytest.raises(QueryError):
        rounds(grid)[1]()


@pytest.mark.parametrize(
    "options",
    [
        {"kind": "no-such"},
        {"trainer": "Krum"},
        {"rounds": 0},
        {"hidden": 0},
        {"classes": ["a"]},
        {"classes": ["a", "a"]},
        {"options": {"learning_rate": 0.0}},
        {"options": {"decay": 2.0}},
    ],
)
def test_option_out_of_range_is_refused_when_built(options):
    given = options.get("options")
    build = FedStack if given is None else TrainerOptions
    with pytest.raises(InvalidValueError):
        build(**(options if given is None else given))
