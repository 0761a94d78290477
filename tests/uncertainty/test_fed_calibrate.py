"""A calibration over Flower's wire format: consent, dropouts, replays, and the pooled threshold."""

from __future__ import annotations

import numpy as np
import pytest
from flwr.clientapp import ClientApp

from fedinfer_flower import InferenceMod, LocalModel
from fedinfer_flower.clients import further_work
from fedinfer_flower.clients.site_model import prepare
from fedinfer_flower.ensemble.base import softmax
from fedinfer_flower.errors import (
    EnvelopeError,
    InvalidValueError,
    KeyAtCoordinatorError,
    ProtocolError,
    QuorumNotMetError,
)
from fedinfer_flower.privacy import make_protection
from fedinfer_flower.privacy.key_presence import note_secret
from fedinfer_flower.query import CountsKind, Deadline
from fedinfer_flower.simulation.local_grid import LocalGrid
from fedinfer_flower.strategies.fed_calibrate import FedCalibrate
from fedinfer_flower.uncertainty.combined_histogram import CombinedHistogram
from fedinfer_flower.uncertainty.conformal import JOINT, OWN, conformal_rank
from fedinfer_flower.uncertainty.federated_quantile import HistogramSpec
from fedinfer_flower.uncertainty.nonconformity import label_scores
from fedinfer_flower.wire.calibrate import CALIBRATE, CalibrationCall, calibration, read_calibration
from fedinfer_flower.wire.envelope import Envelope, Kind
from fedinfer_flower.wire.messages import read_question
from fedinfer_flower.wire.roster import Roster

N_SITES, N_HELD = 5, 60
CLASSES = ("a", "b", "c")
WEIGHTS = np.random.default_rng(0).normal(size=(4, 3))


def held_out(partition):
    rng = np.random.default_rng(50 + partition)
    inputs = rng.normal(size=(N_HELD + partition, 4))
    scores = inputs @ WEIGHTS + rng.gumbel(size=(len(inputs), 3))
    return inputs, scores.argmax(axis=1)


def load_model(context):
    inputs, labels = held_out(context.node_config["partition-id"])
    return LocalModel(
        # Logits that a temperature of 1 fits, as labels follow them.
        model=lambda rows: np.asarray(rows, dtype=float) @ WEIGHTS,
        classes=CLASSES,
        outputs="logits",
        holdout=(inputs, [CLASSES[y] for y in labels]),
    )


@pytest.fixture(autouse=True)
def _wired(monkeypatch):
    # The table of handlers, should it not name this one yet.
    wired = {
        **further_work.HANDLERS,
        (CALIBRATE, Kind.QUERY): ("calibrating", "answer_calibration"),
    }
    monkeypatch.setattr(further_work, "HANDLERS", wired)


def app_with(wrap=None, **options):
    mod = InferenceMod(load_model, **{"agrees_to": ("calibration",)} | options)
    app = ClientApp()
    for action in ("fi_hello", CALIBRATE, "fi_recover"):

        @app.query(action)
        def handle(message, context, action=action):
            if wrap is not None:
                wrap(action, context.node_config["partition-id"])
            return mod.handle(message, context)

    return app


def calibrate(app, strategy, **options):
    with LocalGrid(app, num_supernodes=N_SITES) as grid:
        return strategy.start(grid, **options)


def strategy_with(protection, **options):
    return FedCalibrate(
        protection=protection,
        min_available_nodes=N_SITES,
        deadline=Deadline(timeout_s=20.0, quorum=3),
        **options,
    )


def exact_threshold(alpha, partitions=range(N_SITES)):
    scores = []
    for k in partitions:
        inputs, labels = held_out(k)
        context = type("C", (), {"node_config": {"partition-id": k}})
        site = prepare(load_model(context), name=f"s{k}", share_counts=CountsKind.PRESENCE)
        scores.append(label_scores(softmax(site.calibrated_logits(inputs, CLASSES)), labels))
    pooled = np.sort(np.concatenate(scores))
    rank = conformal_rank(len(pooled), alpha, n_groups=len(scores))
    return pooled[rank - 1], len(pooled)


@pytest.mark.parametrize("name", ["plain", "secagg", "he"])
def test_threshold_over_the_wire_is_that_of_the_pooled_rows(name):
    if name == "he":
        pytest.importorskip("tenseal")
    protection = make_protection(name)
    keys = protection.make_keys()
    strategy = strategy_with(protection, allow_coordinator_key=True)

    combined = calibrate(app_with(), strategy, public_key=keys.public_key)
    found = CombinedHistogram.from_bytes(combined.to_bytes()).open(keys, alpha=0.1)

    exact, n_rows = exact_threshold(0.1)
    assert (combined.n_sites, found.n_rows) == (N_SITES, n_rows)
    assert exact <= found.predictor.threshold <= exact + 1.0 / 200
    assert found.predictor.scope == OWN


def test_site_that_did_not_agree_gives_nothing():
    with pytest.raises(QuorumNotMetError):
        calibrate(app_with(agrees_to=()), strategy_with("plain"))


def test_site_that_refuses_the_protection_gives_nothing():
    with pytest.raises(QuorumNotMetError):
        calibrate(app_with(protections=("he",)), strategy_with("plain"))


def test_masks_of_a_site_that_drops_out_are_made_good_for():
    def wrap(action, partition):
        if action == CALIBRATE and partition == 2:
            raise RuntimeError("gone")

    protection = make_protection("secagg")
    keys = protection.make_keys()
    combined = calibrate(app_with(wrap), strategy_with(protection), public_key=keys.public_key)

    exact, n_rows = exact_threshold(0.2, partitions=[0, 1, 3, 4])
    found = combined.open(keys, alpha=0.2)
    assert (combined.n_sites, found.n_rows) == (4, n_rows)
    assert exact <= found.predictor.threshold <= exact + 1.0 / 200


def test_key_in_the_coordinator_is_refused():
    pytest.importorskip("tenseal")
    protection = make_protection("he")
    keys = protection.make_keys()
    note_secret(keys.key_id)  # as a querier in this process does
    with pytest.raises(KeyAtCoordinatorError):
        calibrate(app_with(), strategy_with(protection), public_key=keys.public_key)


def test_noisy_histogram_of_the_same_rows_leaves_a_site_with_a_home_once(tmp_path):
    pytest.importorskip("scipy")
    app = app_with(home=tmp_path / "home")
    strategy = strategy_with(make_protection("dp", {"epsilon": 2.0}))

    first = calibrate(app, strategy)
    assert first.n_sites == N_SITES
    with pytest.raises(QuorumNotMetError):
        calibrate(app, strategy)


def test_exact_sums_of_one_cohort_may_be_repeated_and_of_another_not(tmp_path):
    protection = make_protection("secagg")
    keys = protection.make_keys()
    app = app_with(home=tmp_path / "home")
    strategy = strategy_with(protection)

    for _ in range(2):
        assert calibrate(app, strategy, public_key=keys.public_key).n_sites == N_SITES
    # The same rows with one site fewer: the difference would be that site's histogram.
    fewer = FedCalibrate(
        protection=protection, min_available_nodes=4, deadline=Deadline(timeout_s=20.0, quorum=3)
    )
    with LocalGrid(app, num_supernodes=4) as grid, pytest.raises(QuorumNotMetError):
        fewer.start(grid, public_key=keys.public_key)


def test_joint_scores_cannot_be_asked_for():
    with pytest.raises(InvalidValueError, match="joint"):
        FedCalibrate(spec=HistogramSpec(scope=JOINT))


def call(**changes):
    fields = {
        "query_id": "c-1",
        "classes": CLASSES,
        "n_sites": 0,
        "n_bins": 10,
        "max_rows": 5,
        "method": "lac",
        "protection": "plain",
        "roster": Roster(()),
    }
    return CalibrationCall(**fields | changes)


def test_call_is_no_question_and_malformed_calls_are_refused():
    envelope = calibration(call(), run_id=1)
    with pytest.raises(ProtocolError):
        read_question(envelope)
    with pytest.raises(EnvelopeError):  # no sites
        read_calibration(envelope)
    for changed in (
        {"classes": ("a", "a")},
        {"query_id": ""},
        {"n_bins": 0},
        {"max_rows": 10**9},
        {"n_sites": 2},
    ):
        with pytest.raises(EnvelopeError):
            read_calibration(calibration(call(**changed), run_id=1))
    with pytest.raises(EnvelopeError):
        read_calibration(Envelope(kind=Kind.PING, run_id=1))
