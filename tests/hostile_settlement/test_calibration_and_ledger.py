"""Calibration calls and ledger entries by somebody who means harm."""

from __future__ import annotations

import math
import threading

import numpy as np
import pytest
from flwr.clientapp import ClientApp

from fedinfer_flower import InferenceMod, LocalModel
from fedinfer_flower.errors import FedInferError, LedgerError
from fedinfer_flower.incentives.ledger import Escrow, Ledger
from fedinfer_flower.incentives.ledger.entry import Draft, Entry
from fedinfer_flower.receipts.checks import MAX_TIME
from fedinfer_flower.simulation.local_grid import LocalGrid
from fedinfer_flower.strategies.fed_calibrate import FedCalibrate

CLASSES = ("healthy", "hiv", "flu")
HELD = ["healthy"] * 50 + ["hiv"] * 7 + ["flu"] * 3


def load_model(context) -> LocalModel:
    rng = np.random.default_rng(context.node_config["partition-id"])
    return LocalModel(
        model=lambda rows: np.asarray(rows, dtype=float) @ np.ones((4, 3)),
        classes=CLASSES,
        outputs="logits",
        holdout=(rng.standard_normal((60, 4)), list(HELD)),
    )


@pytest.mark.parametrize("with_home", [False, True])
def test_calibration_does_not_count_labels_by_class(tmp_path, with_home):
    """Sites that withhold class counts give them away, one call a class."""
    app = InferenceMod(
        load_model,
        agrees_to=("calibration",),
        share_counts="withheld",
        home=tmp_path if with_home else None,
    ).attach(ClientApp())
    counted = {}
    with LocalGrid(app, num_supernodes=3) as grid:
        for left_out in CLASSES:
            classes = tuple(c for c in CLASSES if c != left_out)
            strategy = FedCalibrate(protection="plain", min_available_nodes=3, classes=classes)
            try:
                histogram = strategy.start(grid)
            except FedInferError:
                return
            # The coordinator sees each term of this sum under `plain`, not only the sum.
            counted[left_out] = round(float(np.frombuffer(histogram.total, dtype="<f8")[-1]))
    assert counted != {"healthy": 150, "hiv": 21, "flu": 9}


# -- the ledger ------------------------------------------------------------------------------


class Clock:
    now: float = 1_900_000_000

    def __call__(self):
        return self.now


@pytest.fixture
def clock():
    return Clock()


@pytest.fixture
def ledger(tmp_path, clock):
    made = Ledger(f"sqlite:///{tmp_path}/ledger.db", clock=clock)
    made.migrate()
    made.deposit("clinic", 10_000_000, key="first")
    return made


def escrow_of(ledger):
    service = Escrow(ledger, coordinator_key_id="ab" * 32)
    service.open(
        "job",
        "clinic",
        fee=1_000_000,
        deadline=1_900_000_060,
        query_ids=["job-0"],
        arbiter="board",
    )
    return service


@pytest.mark.parametrize("now", [math.nan, math.inf, 1e19, MAX_TIME + 10.0])
def test_clock_that_is_out_of_range_is_a_typed_error(ledger, clock, now):
    clock.now = now
    with pytest.raises(FedInferError):
        ledger.deposit("clinic", 1, key="second")


def test_balance_that_does_not_fit_is_a_typed_error():
    draft = Draft(kind="deposit", key="d", amounts={"external": -(10**15), "rich": 10**15})
    for balances in ({"rich": 2**62}, {"external": -(2**62)}):
        with pytest.raises(LedgerError, match="larger"):
            Entry.chained(draft, after=None, at=0, balances=balances)


@pytest.mark.parametrize(
    "name",
    [
        "x'; DROP TABLE ledger_entries; --",
        'a" OR 1=1',
        "ünïcode Ж 病院",
        "a%_\\",
    ],
)
def test_names_are_data(ledger, name):
    ledger.deposit(name, 5, key="odd")
    assert ledger.balance(name) == 5
    assert ledger.verify().ok


@pytest.mark.parametrize("name", ["a\u202eb", "a\u0000b", "e\u0301", "", " a", "escrow:job"])
def test_names_that_deceive_are_refused(ledger, name):
    with pytest.raises(FedInferError):
        ledger.deposit(name, 5, key="odd")


@pytest.mark.parametrize("amount", [0, -1, 10**15 + 1, 2**63, 2**64, True, 1.0])
def test_amounts_that_are_none_are_refused(ledger, amount):
    with pytest.raises(FedInferError):
        ledger.deposit("clinic", amount, key="odd")
    with pytest.raises(FedInferError):
        ledger.post("bonus", "odd", {"clinic": -amount, "north": amount})


def test_refunds_at_once_pay_once(ledger, clock):
    service = escrow_of(ledger)
    clock.now += 100
    failures = []

    def refund():
        try:
            service.refund("job")
        except FedInferError as exc:
            failures.append(exc)

    threads = [threading.Thread(target=refund) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert ledger.balance("clinic") == 10_000_000
    assert ledger.balance("escrow:job") == 0
    assert ledger.verify().ok
