"""`Treasurer`: a fee in escrow before a query, paid out by a settlement after it."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Final

import numpy as np

from fedinfer_flower.errors import ReceiptError
from fedinfer_flower.incentives import reputation
from fedinfer_flower.incentives.ledger.escrow import Escrow
from fedinfer_flower.incentives.ledger.ledger import Ledger
from fedinfer_flower.incentives.ledger.payees import Payee
from fedinfer_flower.incentives.ledger.states import Status
from fedinfer_flower.incentives.payments.base import PaymentRule, Payout, make_payment
from fedinfer_flower.incentives.quotient import owner_clusters, split_within
from fedinfer_flower.incentives.shrinkage import shrink
from fedinfer_flower.receipts.receipt import Receipt
from fedinfer_flower.selection.history import SiteHistory
from fedinfer_flower.settlement.outcome import Settlement
from fedinfer_flower.wire.identity import Identity

__all__ = ["Payment", "Treasurer"]

_NOISE_DEVIATIONS: Final = 3.0
"""A score counts as earned from so many deviations of its noise above zero."""


@dataclass(frozen=True, kw_only=True)
class Payment:
    """What one job paid.

    Parameters
    ----------
    job_id : str
    paid : mapping of str to int
        Micro-credits, by the site's key id.
    refund : int
        Micro-credits back to the querier.
    scores : mapping of str to float
        What was paid for: after owners and shrinkage, by key id.
    """

    job_id: str
    paid: Mapping[str, int]
    refund: int
    scores: Mapping[str, float]


class Treasurer:
    """Takes fees, and pays them out to those who earned them. At the coordinator.

    Sites of one registered owner are one party: their mean score is split among them. Scores
    are shrunk towards zero where the audits are few. Where nobody earned anything, the fee
    goes back.

    Parameters
    ----------
    ledger : Ledger
        Migrated.
    identity : Identity
        The coordinator's: signs receipts.
    payment : str or PaymentRule
    history : SiteHistory, optional
        Owners are read from it; scores and reputation are added to it.
    account_of : callable, optional
        From a site's key id to its account in the ledger; default ``site:<16 digits of it>``.
    prior_audits : float
        Audits as which "earned nothing" counts; see `incentives.shrinkage.shrink`.
    site_pins : mapping of site name to key id, optional
        Keys that were compared out of band: only these sites are paid.
    clock : callable
        Seconds since 1970.

    Privacy
    -------
    The ledger holds who was paid how much for which job, and digests of receipt and
    settlement; no question, no answer, no score. Amounts tell scores up to the payment rule.

    Examples
    --------
    >>> import tempfile
    >>> folder = tempfile.TemporaryDirectory()
    >>> ledger = Ledger(f"sqlite:///{folder.name}/ledger.db")
    >>> ledger.migrate()
    >>> _ = ledger.deposit("clinic", 2_000_000, key="invoice-7")
    >>> treasurer = Treasurer(ledger, identity=Identity.generate())
    >>> treasurer.take("job", "clinic", fee=1_500_000, n_batches=1, deadline_s=60.0)
    >>> ledger.balance("clinic")
    500000
    >>> folder.cleanup()
    """

    def __init__(
        self,
        ledger: Ledger,
        *,
        identity: Identity,
        payment: str | PaymentRule = "proportional",
        history: SiteHistory | None = None,
        account_of: Callable[[str], str] | None = None,
        prior_audits: float = 50.0,
        site_pins: Mapping[str, str] | None = None,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self.ledger, self.identity, self.history = ledger, identity, history
        self.payment = make_payment(payment) if isinstance(payment, str) else payment
        self.escrow = Escrow(ledger, coordinator_key_id=identity.key_id, site_pins=site_pins)
        self._account_of = account_of or (lambda key_id: f"site:{key_id[:16]}")
        self._prior_audits, self._clock = prior_audits, clock

    def take(
        self,
        job_id: str,
        account: str,
        *,
        fee: int,
        n_batches: int,
        deadline_s: float,
        querier_key_id: str = "",
        arbiter: str = "",
    ) -> None:
        """Put a job's fee in escrow, before anybody is asked; again changes nothing.

        Parameters
        ----------
        account : str
            The querier's, in the ledger.
        fee : int
            Micro-credits.
        n_batches : int
            Of the job: each is paid for once.
        deadline_s : float
            From now; after it the fee can go back.
        arbiter : str
            Account whose word ends a dispute. Without one a querier that opens the answer and
            then says nothing has its fee back at the deadline.

        Raises
        ------
        LedgerError
            If the account does not cover it, or the job has another escrow.
        """
        self.escrow.open(
            job_id,
            account,
            fee=fee,
            deadline=int(self._clock() + deadline_s),
            query_ids=[f"{job_id}-{number}" for number in range(n_batches)],
            querier_key_id=querier_key_id,
            arbiter=arbiter,
        )

    def pay(self, settlement: Settlement, receipts: Iterable[Receipt]) -> tuple[Payment, ...]:
        """Pay every job of a settled epoch; what was paid before is not paid again.

        An epoch whose jobs were all paid before changes neither ledger nor history: after a
        crash between the two, its reputation is lost rather than counted twice.

        Parameters
        ----------
        receipts : iterable of Receipt
            One for each job. Signed here if the coordinator has not.

        Raises
        ------
        LedgerError
            If a job has no escrow, was refunded, or is disputed.
        ReceiptError
            If a site that earned something has not signed.
        """
        key_ids = tuple(sorted(settlement.values))
        scores = self._scores(settlement, key_ids)
        jobs = tuple(receipts)
        is_new = any(self._is_open(receipt.job_id) for receipt in jobs)
        made = [self._pay_job(receipt, settlement, key_ids, scores) for receipt in jobs]
        if is_new:
            self._remember(settlement)
        return tuple(made)

    def _least(self, settlement: Settlement) -> float:
        """Return the score above which something was earned, and not only noise."""
        noise = np.array([_NOISE_DEVIATIONS * settlement.noise_scale])
        return float(shrink(noise, settlement.n_audits, prior_audits=self._prior_audits)[0])

    def _is_open(self, job_id: str) -> bool:
        state = self.escrow.state(job_id)
        return state is not None and state.status is Status.OPEN

    def _scores(self, settlement: Settlement, key_ids: tuple[str, ...]) -> np.ndarray:
        values = np.array([settlement.values[key_id] for key_id in key_ids])
        split = split_within(values, owner_clusters([self._owner(key) for key in key_ids]))
        return shrink(split, settlement.n_audits, prior_audits=self._prior_audits)

    def _owner(self, key_id: str) -> str:
        # Registered owners only: a site that claims another's would share its pay.
        known = self.history is not None and key_id in self.history
        owner = self.history[key_id].owner if known and self.history is not None else ""
        return f"owner {owner}" if owner else f"key {key_id}"

    def _pay_job(
        self,
        receipt: Receipt,
        settlement: Settlement,
        key_ids: tuple[str, ...],
        scores: np.ndarray,
    ) -> Payment:
        job_id = receipt.job_id
        state = self.escrow.state(job_id)
        fee = 0 if state is None else state.fee
        signed = receipt if receipt.coordinator is not None else receipt.signed_by(self.identity)
        answered = {s.statement.site_key_id for s in signed.statements}
        missing = [
            k for k, score in zip(key_ids, scores, strict=True) if score > 0 and k not in answered
        ]
        if missing:
            raise ReceiptError(
                f"the site with key {missing[0][:16]} earned something and has signed no answer",
                hint="settle and pay jobs that the same sites answered",
            )
        if scores.max() > self._least(settlement):
            payout = self.payment.pay(scores, fee=fee)
        else:  # nobody earned anything: a rule that always pays out would pay everybody
            payout = Payout(paid=(0,) * len(key_ids), refund=fee, fee=fee)
        self.escrow.release(
            job_id,
            payout,
            signed,
            payees=[Payee(key_id=key, account=self._account_of(key)) for key in key_ids],
            settlement_digest=settlement.digest,
        )
        return Payment(
            job_id=job_id,
            paid=dict(zip(key_ids, payout.paid, strict=True)),
            refund=payout.refund,
            scores=dict(zip(key_ids, scores.tolist(), strict=True)),
        )

    def _remember(self, settlement: Settlement) -> None:
        """Add scores and reputation to the history: an epoch is one observation."""
        if self.history is None:
            return
        epoch = self.history.next_epoch
        least = _NOISE_DEVIATIONS * settlement.noise_scale
        for key_id, value in settlement.values.items():
            self.history.record_merit(key_id, epoch, value)
            good = value > least
            before = self.history[key_id].reputation
            alpha, beta = reputation.update(before, float(good), float(not good))
            self.history.record_reputation(key_id, alpha, beta)
