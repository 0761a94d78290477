"""`fedinfer demo --rewards`: the querier's part in the settlement, and the ledger."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Final

import numpy as np

from fedinfer_flower.errors import IncompatibleProtection, InvalidValueError
from fedinfer_flower.incentives.payments.base import MICRO, Payout, make_payment
from fedinfer_flower.querier import Querier
from fedinfer_flower.query import Prediction
from fedinfer_flower.receipts.receipt import Receipt
from fedinfer_flower.settlement.audits import AuditMix, mix_audits
from fedinfer_flower.settlement.documents import SettlementRequest
from fedinfer_flower.settlement.forms import EvidenceForm
from fedinfer_flower.settlement.outcome import Settlement
from fedinfer_flower.settlement.row_sums import MIN_AUDITS, MIN_SITES
from fedinfer_flower.settlement.settling import QuerierDesk
from fedinfer_flower.simulation.data import Dataset
from fedinfer_flower.simulation.federation import COORDINATOR_FILE, Step
from fedinfer_flower.simulation.rewards import (
    REPLY_FILE,
    REQUEST_FILE,
    SETTLEMENT_FILE,
    settlement_scheme,
)
from fedinfer_flower.strategies.handover import write_whole
from fedinfer_flower.wire.directory import Directory
from fedinfer_flower.wire.documents import CombinedAnswer
from fedinfer_flower.wire.identity import PublicIdentity
from fedinfer_flower.wire.sealed_job import SealedJob

if TYPE_CHECKING:
    from fedinfer_flower.incentives.ledger import Escrow

__all__ = [
    "LEDGER_FILE",
    "PAYMENT",
    "REWARDS_STEP",
    "DemoRewards",
    "PaidOut",
    "audit_count",
    "require_rewards",
]

PAYMENT: Final = "proportional"
LEDGER_FILE: Final = "demo-ledger.db"
"""Not ``ledger.db``: it replaces that of an earlier run, and must not replace a real one."""

REWARDS_STEP: Final = Step(
    label="rewards", rule="mean-probability", protection="secagg", sealed=True, settled=True
)
"""Settlement is of the mean-probability game, so that evidence can be checked against it."""

_ACCOUNT: Final = "querier"
_DEPOSIT: Final = 2
"""The querier deposits so many times the fee, to show where the rest goes."""
_DEADLINE_S: Final = 3600


def audit_count(n_rows: int) -> int:
    """Return how many of the rows that are asked are audits: 200, at most three quarters.

    Examples
    --------
    >>> audit_count(540), audit_count(54)
    (200, 40)
    """
    return min(200, 3 * n_rows // 4)


def require_rewards(*, protect: str, hides_query: bool, n_sites: int, n_rows: int) -> None:
    """Refuse a run whose contributions could not be settled, before anything is started.

    Raises
    ------
    IncompatibleProtection
        If the sites answer without reading the query.
    InvalidValueError
        If there are too few sites, or too few labelled rows.
    """
    if hides_query:
        raise IncompatibleProtection(
            f"sites that answer under {protect!r} cannot read the query, and so cannot give a"
            " second copy of an answer",
            hint="leave --rewards out, or use --protect secagg",
        )
    if n_sites < MIN_SITES:
        raise InvalidValueError(
            f"rewards are settled among at least {MIN_SITES} sites",
            hint=f"fedinfer demo --rewards --sites {MIN_SITES}",
        )
    if audit_count(n_rows) < MIN_AUDITS:
        raise InvalidValueError(f"these data leave fewer than {MIN_AUDITS} rows for audits")


@dataclass(frozen=True, kw_only=True, eq=False)
class PaidOut:
    """What the rewards of a run came to.

    Parameters
    ----------
    mix : AuditMix
    prediction : Prediction
        The joint answer to all rows, audits among them.
    names : tuple of str
        Sites, in the order of `settlement.values`.
    settlement : Settlement
    payout : Payout
    """

    mix: AuditMix
    prediction: Prediction
    names: tuple[str, ...]
    settlement: Settlement
    payout: Payout


class DemoRewards:
    """The querier's audits, its desk, and its money. All of it stays in the parent process.

    Parameters
    ----------
    dataset : Dataset
        Some of its test rows become audits.
    querier : Querier
        Asks the step that is settled.
    folder : Path
        Where coordinator and querier exchange files; the ledger lies there too.
    """

    def __init__(self, dataset: Dataset, querier: Querier, folder: Path) -> None:
        from fedinfer_flower.incentives.ledger import Ledger

        n_audits = audit_count(len(dataset.test_labels))
        self.mix = mix_audits(
            dataset.test_inputs[n_audits:],
            dataset.test_inputs[:n_audits],
            dataset.test_labels[:n_audits],
        )
        self._classes = dataset.classes
        self._querier, self._folder = querier, folder
        self._ledger = Ledger(f"sqlite:///{folder / LEDGER_FILE}")
        self._job: SealedJob | None = None
        self._directory: Directory | None = None

    def ask(self, directory: Directory) -> bytes:
        """Seal the queries with the audits among them, and put the fee in escrow."""
        job = self._querier.ask(
            self.mix.inputs,
            directory=directory,
            classes=self._classes,
            rule=REWARDS_STEP.rule,
            evidence=True,
        )
        self._job, self._directory = job, directory
        # What the sites ask for, and so what the querier expects to pay.
        prices = sum(card.profile.price_per_query for card in directory.cards)
        fee = round(MICRO * prices * job.n_queries)
        self._ledger.migrate()
        self._ledger.deposit(_ACCOUNT, _DEPOSIT * fee, key="deposit-1")
        self._escrow().open(
            job.job_id,
            _ACCOUNT,
            fee=fee,
            deadline=int(time.time()) + _DEADLINE_S,
            query_ids=[batch.query_id for batch in job.batches],
            querier_key_id=self._querier.identity.key_id,
        )
        return job.to_bytes()

    def settle(self) -> None:
        """Check the evidence against the answer, and answer the coordinator's request."""
        job, directory = self._asked()
        request = SettlementRequest.from_bytes((self._folder / REQUEST_FILE).read_bytes())
        combined = self._combined()
        desk = QuerierDesk(
            request,
            scheme=settlement_scheme(),
            asked={batch.query_id: batch.n_queries for batch in job.batches},
            form=EvidenceForm.SHARES,
            sites=[card.identity for card in directory.cards],
            identity=self._querier.identity,
            # Exact, so that the report can compare; one user is every role here.
            noise_std=0.0,
            min_sites=min(batch.n_sites for batch in combined.batches),
        )
        ends = np.cumsum([batch.n_queries for batch in job.batches])[:-1]
        totals = np.split(self._querier.totals(combined), ends)
        desk.check_against_answer(
            {batch.query_id: part for batch, part in zip(job.batches, totals, strict=True)}
        )
        reply = desk.settle(self.mix.located(job.job_id, max(b.n_queries for b in job.batches)))
        write_whole(self._folder / REPLY_FILE, reply.to_bytes())

    def open(self) -> Prediction:
        """Open the joint answer to all rows, audits included."""
        return self._querier.open(self._combined())

    def pay(self) -> PaidOut:
        """Split the fee by the settled scores, release it on the receipt, take the rest back.

        Raises
        ------
        LedgerError, ReceiptError, SignatureError
            If the coordinator's receipt does not say that these sites answered this job.
        """
        from fedinfer_flower.incentives.ledger import Payee

        job, directory = self._asked()
        settlement = Settlement.from_bytes((self._folder / SETTLEMENT_FILE).read_bytes())
        receipt = Receipt.from_bytes(
            (self._folder / f"{REWARDS_STEP.label}.receipt.json").read_bytes()
        )
        named = {card.key_id: card.profile.name for card in directory.cards}
        key_ids = sorted(settlement.values)
        escrow = self._escrow()
        state = escrow.state(job.job_id)
        fee = 0 if state is None else state.fee
        scores = np.array([settlement.values[key_id] for key_id in key_ids])
        payout = make_payment(PAYMENT).pay(scores, fee=fee)
        escrow.release(
            job.job_id,
            payout,
            receipt,
            payees=[Payee(key_id=key_id, account=named[key_id]) for key_id in key_ids],
            settlement_digest=settlement.digest,
        )
        self._ledger.withdraw(_ACCOUNT, self._ledger.balance(_ACCOUNT), key="withdraw-1")
        return PaidOut(
            mix=self.mix,
            prediction=self.open(),
            names=tuple(named[key_id] for key_id in key_ids),
            settlement=settlement,
            payout=payout,
        )

    def book(self) -> Mapping[str, object]:
        """Return the ledger's entries and balances, and whether it verifies."""
        found = self._ledger.verify()
        found.require_ok()
        return {
            "file": LEDGER_FILE,
            "ok": found.ok,
            "head": str(self._ledger.head()),
            "entries": [
                {
                    "kind": entry.draft.kind,
                    "postings": [[p.account, p.amount] for p in entry.postings],
                }
                for entry in self._ledger.entries()
            ],
            "balances": self._ledger.balances(),
        }

    def _asked(self) -> tuple[SealedJob, Directory]:
        if self._job is None or self._directory is None:
            raise InvalidValueError("the step that is settled was not asked yet")
        return self._job, self._directory

    def _combined(self) -> CombinedAnswer:
        data = (self._folder / f"{REWARDS_STEP.label}.answer").read_bytes()
        return CombinedAnswer.from_bytes(data)

    def _escrow(self) -> Escrow:
        from fedinfer_flower.incentives.ledger import Escrow

        # Compared out of band in a real federation; here both are one user's processes.
        coordinator = PublicIdentity.from_bytes((self._folder / COORDINATOR_FILE).read_bytes())
        return Escrow(self._ledger, coordinator_key_id=coordinator.key_id)
