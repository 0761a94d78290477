"""The registry: hides audits among its questions, puts the fee in escrow, asks, and settles.

python registry.py STATE [--round 1] [--deadline-s 300]
"""

import argparse
import sys
import time

import numpy as np
from hospital_consortium.places import Places, wait_for
from hospital_consortium.task import CLASSES, asked_in
from hospital_consortium.terms import SCHEME, fee_for, payout_for

from fedinfer_flower import Directory, Identity, Querier, read_pins
from fedinfer_flower.errors import FedInferError, QueryError, SettlementError
from fedinfer_flower.incentives.ledger import Escrow, Head
from fedinfer_flower.incentives.payments import MICRO
from fedinfer_flower.receipts.verification import verify
from fedinfer_flower.settlement import (
    EvidenceForm,
    QuerierDesk,
    Settlement,
    SettlementRequest,
    mix_audits,
)
from fedinfer_flower.settlement.epoch import Epoch
from fedinfer_flower.strategies.handover import write_whole
from fedinfer_flower.wire.documents import CombinedAnswer

ACCOUNT = "registry"


class Registry:
    """One round of the registry: all that it knows stays in this process."""

    def __init__(self, places, number):
        self.places, self.folder = places, places.round(number)
        self.pins = read_pins(places.registry / "pins.toml")
        self.office_key_id = (places.registry / "office.key").read_text()
        self.me = Identity.load_or_create(places.registry / "registry.id")
        self.querier = Querier(protection="secagg", identity=self.me, pins=self.pins)
        self.ledger = places.ledger()
        self.escrow = Escrow(
            self.ledger, coordinator_key_id=self.office_key_id, site_pins=self.pins.sites
        )
        questions, self.truth, audits, labels = asked_in(number)
        self.mix = mix_audits(questions, audits, labels)

    def ask(self, until, deadline_s):
        """Seal the rows, pay the fee into escrow, and only then hand the job over."""
        directory = Directory.from_bytes(wait_for(self.folder / "directory.fi", until=until))
        self.sites = [card.identity for card in directory.cards]
        self.job = self.querier.ask(
            self.mix.inputs,
            directory=directory,
            classes=CLASSES,
            rule="mean-probability",
            evidence=True,
        )
        self.asked = {batch.query_id: batch.n_queries for batch in self.job.batches}
        fee = fee_for(directory, self.job.n_queries)
        deadline = int(time.time() + deadline_s)
        # The ledger's keeper books a bank transfer; `deposit` is that.
        self.ledger.deposit(ACCOUNT, fee, key=f"transfer-{self.job.job_id}")
        self.escrow.open(
            self.job.job_id,
            ACCOUNT,
            fee=fee,
            deadline=deadline,
            query_ids=self.asked,
            querier_key_id=self.me.key_id,
        )
        write_whole(self.folder / "job.fi", self.job.to_bytes())
        say(f"{len(self.mix.inputs)} rows, {len(self.mix.rows)} of them audits")
        say(f"{fee / MICRO:.2f} credits in escrow for {len(self.sites)} hospitals")
        return deadline

    def open(self, deadline):
        """Open the joint answer, and say how good it was where the truth is known."""
        data = wait_for(self.folder / "answer.fi", until=deadline)
        self.combined = CombinedAnswer.from_bytes(data)
        labels = self.mix.without(self.querier.open(self.combined).labels)
        right = (labels == self.truth).mean()
        say(f"{len(labels)} questions answered, {right:.0%} right")

    def settle(self, deadline):
        """Check that evidence adds up to the answer, and reveal which rows were audits."""
        data = wait_for(self.folder / "settlement-request.fi", until=deadline)
        self.request = SettlementRequest.from_bytes(data)
        desk = QuerierDesk(
            self.request,
            scheme=SCHEME,
            asked=self.asked,
            form=EvidenceForm.SHARES,
            sites=self.sites,
            identity=self.me,
            min_sites=min(batch.n_sites for batch in self.combined.batches),
        )
        ends = np.cumsum(list(self.asked.values()))[:-1]
        totals = np.split(self.querier.totals(self.combined), ends)
        desk.check_against_answer(dict(zip(self.asked, totals, strict=True)))
        most = max(self.asked.values())
        self.reply = desk.settle(self.mix.located(self.job.job_id, batch_size=most))
        write_whole(self.folder / "settlement-reply.fi", self.reply.to_bytes())
        say("evidence adds up to the answer; audits revealed")

    def check(self, deadline):
        """Check what can be: receipt, sum of the scores, amounts, and the whole ledger."""
        done = Settlement.from_bytes(wait_for(self.folder / "settlement.fi", until=deadline))
        receipt = (self.folder / "receipt.json").read_bytes()
        pinned = dict(self.pins.sites)
        verify(receipt, pins=pinned, coordinator_key_id=self.office_key_id).require_ok()
        epoch = Epoch.of(
            self.request,
            audits_t3=self.reply.audits_t3,
            totals_tc=self.reply.totals_tc,
            scheme=SCHEME,
        )
        scores = np.array([done.values[key_id] for key_id in self.request.sites])
        epoch.require_plausible(scores, noise_std=done.noise_scale)
        fee = self.escrow.state(self.job.job_id).fee
        key_ids, payout = payout_for(done, fee)
        names = {key_id: name for name, key_id in pinned.items()}
        due = {names[k]: paid for k, paid in zip(key_ids, payout.paid, strict=True) if paid}
        if self.paid() != due | {ACCOUNT: payout.refund}:
            raise SettlementError("the office paid other amounts than the scores say")
        say(f"paid {sum(payout.paid) / MICRO:.2f} credits, {payout.refund / MICRO:.2f} came back")

    def paid(self):
        """Return what the release of this job's fee paid to whom."""
        entry = next(
            e for e in self.ledger.entries() if e.draft.key == f"release:{self.job.job_id}"
        )
        return {p.account: p.amount for p in entry.postings if p.amount > 0}

    def refund(self):
        """Take the fee back, now that the deadline has passed; the ledger's rules allow it."""
        self.escrow.refund(self.job.job_id)
        say(f"refunded: the account holds {self.ledger.balance(ACCOUNT) / MICRO:.2f} credits")

    def verify_ledger(self):
        """Check every entry, and that none of those seen last time is gone."""
        seen = self.places.registry / "ledger-head.txt"
        head = Head.from_text(seen.read_text()) if seen.exists() else None
        self.ledger.verify(head).require_ok()
        seen.write_text(str(self.ledger.head()))


def main(places, number, deadline_s):
    registry = Registry(places, number)
    deadline = registry.ask(time.time() + 120, deadline_s)
    try:
        registry.open(deadline)
        registry.settle(deadline)
        registry.check(deadline)
    except QueryError as exc:
        say(f"{exc.message}: the office does not answer")
        registry.refund()
    registry.verify_ledger()


def say(text):
    print(f"registry: {text}", flush=True)  # noqa: T201


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("state")
    parser.add_argument("--round", type=int, default=1)
    parser.add_argument("--deadline-s", type=int, default=300)
    args = parser.parse_args()
    try:
        main(Places(args.state), args.round, args.deadline_s)
    except FedInferError as exc:
        sys.exit(str(exc))
