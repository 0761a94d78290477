"""A fee from deposit to payout: who earned nothing gets nothing, and nothing is paid twice."""

from __future__ import annotations

import numpy as np
import pytest
from flwr.clientapp import ClientApp

from fedinfer_flower import FedEnsemble, InferenceMod, LocalModel, Querier
from fedinfer_flower.errors import LedgerError
from fedinfer_flower.incentives import make_scheme
from fedinfer_flower.incentives.ledger.ledger import Ledger
from fedinfer_flower.selection.history import SiteHistory
from fedinfer_flower.settlement import EvidenceForm, SettlementDesk, mix_audits, settle
from fedinfer_flower.settlement.outcome import Settlement
from fedinfer_flower.simulation.local_grid import LocalGrid
from fedinfer_flower.strategies.treasurer import Treasurer
from fedinfer_flower.wire.identity import Identity

N_SITES, CLASSES, FEE = 5, ("a", "b", "c"), 1_000_000
RNG = np.random.default_rng(21)
AUDIT_ROWS = RNG.standard_normal((90, 3))
AUDIT_LABELS = AUDIT_ROWS.argmax(axis=1)


def load_model(context) -> LocalModel:
    """Sites 0 to 3 know the classes; site 4 says the same whatever it is asked."""
    partition = context.node_config["partition-id"]
    noise = np.random.default_rng(partition).standard_normal((3, 3))
    weights = 2.0 * np.eye(3) + 0.3 * partition * noise

    def logits(rows):
        if partition == 4:
            return np.tile([4.0, 0.0, 0.0], (len(rows), 1))
        return np.asarray(rows, dtype=float) @ weights

    return LocalModel(model=logits, classes=CLASSES, outputs="logits")


class Deal:
    """One job of a querier, asked and settled; every role in this process, as in a test only."""

    def __init__(self, folder, grid, **options):
        self.ledger = Ledger(f"sqlite:///{folder}/ledger.db")
        self.ledger.migrate()
        self.ledger.deposit("clinic", 10 * FEE, key="invoice-1")
        self.history = SiteHistory()
        self.treasurer = Treasurer(
            self.ledger, identity=Identity.generate(), history=self.history, **options
        )
        strategy = FedEnsemble(protection="secagg", evidence=True, min_available_nodes=N_SITES)
        self.directory = strategy.directory(grid)
        querier = Querier(protection="secagg")
        mix = mix_audits(RNG.standard_normal((30, 3)), AUDIT_ROWS, AUDIT_LABELS)
        job = querier.ask(
            mix.inputs, directory=self.directory, rule="mean-probability", evidence=True
        )
        self.job = job
        self.treasurer.take(
            job.job_id,
            "clinic",
            fee=FEE,
            n_batches=len(job.batches),
            deadline_s=60.0,
            querier_key_id=querier.identity.key_id,
        )
        self.result = strategy.start(grid, job)
        scheme = make_scheme("audited-blend")
        desk = SettlementDesk(self.result.evidence, scheme=scheme, querier=querier.identity.public)
        reply = settle(
            desk.request(),
            mix.located(job.job_id, 1024),
            scheme=scheme,
            asked={batch.query_id: batch.n_queries for batch in job.batches},
            form=EvidenceForm.SHARES,
            sites=[card.identity for card in self.directory.cards],
            identity=querier.identity,
            noise_std=0.0,
        )
        self.settlement = desk.finish(reply)

    def key_of(self, partition: int) -> str:
        return next(c.key_id for c in self.directory.cards if c.profile.name == f"site-{partition}")


@pytest.fixture
def deal(tmp_path):
    app = InferenceMod(load_model, agrees_to=("settlement",)).attach(ClientApp())
    with LocalGrid(app, num_supernodes=N_SITES) as grid:
        yield Deal(tmp_path, grid)


def test_free_rider_gets_nothing_and_the_fee_is_paid_out_whole(deal):
    (paid,) = deal.treasurer.pay(deal.settlement, [deal.result.receipt])

    assert paid.paid[deal.key_of(4)] == 0
    assert all(paid.paid[deal.key_of(k)] > 0 for k in range(4))
    assert sum(paid.paid.values()) + paid.refund == FEE
    assert deal.ledger.balance("clinic") == 9 * FEE
    assert deal.ledger.balance(f"site:{deal.key_of(0)[:16]}") == paid.paid[deal.key_of(0)]
    assert deal.ledger.verify().ok


def test_paying_again_pays_nothing(deal):
    first = deal.treasurer.pay(deal.settlement, [deal.result.receipt])
    before, known = deal.ledger.balances(), dict(deal.history.records)
    again = deal.treasurer.pay(deal.settlement, [deal.result.receipt])

    assert deal.ledger.balances() == before
    assert dict(deal.history.records) == known
    assert [p.paid for p in again] == [p.paid for p in first]


def test_reputation_falls_for_who_earns_nothing(deal):
    deal.treasurer.pay(deal.settlement, [deal.result.receipt])
    good, bad = (deal.history[deal.key_of(k)].reputation for k in (0, 4))
    assert good == (2.0, 1.0)
    assert bad == (1.0, 2.0)


def test_sites_of_one_registered_owner_are_paid_as_one(deal):
    for partition in (0, 1):
        deal.history.register(deal.key_of(partition), owner="one trust")
    (paid,) = deal.treasurer.pay(deal.settlement, [deal.result.receipt])
    values = deal.settlement.values
    mean = (values[deal.key_of(0)] + values[deal.key_of(1)]) / 2.0

    # Half of the mean each, shrunk as 90 audits are beside 50 of nothing.
    expected = mean / 2.0 * 90.0 / 140.0
    assert paid.scores[deal.key_of(0)] == pytest.approx(expected)
    assert paid.scores[deal.key_of(1)] == pytest.approx(expected)


def test_claimed_owner_is_not_believed(deal):
    scores = deal.treasurer._scores(deal.settlement, tuple(sorted(deal.settlement.values)))
    assert len(set(np.round(scores, 9))) == N_SITES


def test_where_nobody_earned_the_fee_goes_back(deal):
    nothing = Settlement(
        epoch_id="0" * 32,
        scheme="audited-blend",
        values=dict.fromkeys(deal.settlement.values, -0.1),
        n_audits=90,
        noise_scale=0.0,
    )
    (paid,) = deal.treasurer.pay(nothing, [deal.result.receipt])
    assert paid.refund == FEE
    assert deal.ledger.balance("clinic") == 10 * FEE


def test_job_without_escrow_is_not_paid(deal, tmp_path):
    other = Treasurer(deal.ledger, identity=deal.treasurer.identity)
    other.escrow = type(other.escrow)(
        Ledger(f"sqlite:///{tmp_path}/other.db"), coordinator_key_id=other.identity.key_id
    )
    other.escrow._ledger.migrate()
    with pytest.raises(LedgerError, match="no escrow"):
        other.pay(deal.settlement, [deal.result.receipt])


def test_fee_that_the_account_does_not_cover_is_refused_before_anyone_is_asked(deal):
    with pytest.raises(LedgerError):
        deal.treasurer.take("big", "clinic", fee=100 * FEE, n_batches=1, deadline_s=1.0)
