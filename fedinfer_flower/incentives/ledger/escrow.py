"""The fee of a job, held until a receipt shows who answered, or the deadline has passed.

Nothing here is a row that changes: opening, dispute, release and refund are entries, each
written whole, in one transaction with the check that it is allowed now.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence

from fedinfer_flower.errors import InvalidValueError, LedgerError
from fedinfer_flower.incentives.ledger.entry import Draft, Entry
from fedinfer_flower.incentives.ledger.ledger import Ledger
from fedinfer_flower.incentives.ledger.names import (
    DIGEST,
    ESCROW,
    REASON,
    checked_amount,
    ordinary_account,
)
from fedinfer_flower.incentives.ledger.payees import Payee, amounts_of, require_same_job
from fedinfer_flower.incentives.ledger.states import (
    EscrowState,
    Outcome,
    asked_claims,
    end_claims,
)
from fedinfer_flower.incentives.payments.base import Payout
from fedinfer_flower.receipts.checks import JOB_ID, MAX_TIME, QUERY_ID
from fedinfer_flower.receipts.receipt import Receipt
from fedinfer_flower.receipts.verification import verify

__all__ = ["Escrow"]


class Escrow:
    """Fees in escrow, on a ledger.

    Parameters
    ----------
    ledger : Ledger
    coordinator_key_id : str
        Key that must have signed a receipt as a whole.
    site_pins : mapping of site name to key id, optional
        Keys that were compared out of band; every site of a receipt must be among them.
        Without, the payees' key ids are all that ties a payment to a known key.

    Privacy
    -------
    The ledger's: who, what for, when, how much; no inputs, no answers, no scores. The memo of
    a release holds the SHA-256 of the receipt, from which nothing of it can be told, and by
    which whoever is shown the receipt knows it again.

    What a release proves: the coordinator's key signed the receipt, each site that is paid
    signed that it answered, the fee is the one that was put in, and no query id was paid
    before. Not proved: that the scores behind the amounts are right (settlement is for
    that), nor that whoever calls has the right to: a coordinator and one site together can
    have an honest-looking receipt paid out for nonsense, which a dispute is for.

    Examples
    --------
    >>> import tempfile
    >>> folder = tempfile.TemporaryDirectory()
    >>> ledger = Ledger(f"sqlite:///{folder.name}/ledger.db", clock=lambda: 1_000)
    >>> ledger.migrate()
    >>> _ = ledger.deposit("clinic", 9_000_000, key="invoice-1")
    >>> escrow = Escrow(ledger, coordinator_key_id="ab" * 32)
    >>> _ = escrow.open("job", "clinic", fee=5_000_000, deadline=1_000, query_ids=["job-0"])
    >>> ledger.balance("clinic")
    4000000
    >>> _ = escrow.refund("job")
    >>> ledger.balance("clinic"), escrow.state("job").status.value
    (9000000, 'refunded')
    >>> folder.cleanup()
    """

    def __init__(
        self,
        ledger: Ledger,
        *,
        coordinator_key_id: str,
        site_pins: Mapping[str, str] | None = None,
    ) -> None:
        if not DIGEST.fullmatch(coordinator_key_id):
            raise InvalidValueError("the coordinator's key id has 64 hex digits")
        self._ledger = ledger
        self._coordinator = coordinator_key_id
        self._pins = None if site_pins is None else dict(site_pins)

    def open(
        self,
        job_id: str,
        querier: str,
        *,
        fee: int,
        deadline: int,
        query_ids: Iterable[str],
        querier_key_id: str = "",
        arbiter: str = "",
    ) -> Entry:
        """Take a job's fee from the querier's account; doing it again changes nothing.

        Parameters
        ----------
        job_id : str
        querier : str
            Account that pays.
        fee : int
            Micro-credits.
        deadline : int
            UTC, seconds since 1970: from then on the fee can be refunded.
        query_ids : iterable of str
            Every batch that the job may have, ``<job id>-<number>``.
        querier_key_id : str
            If given, the receipt must be of a job that this key asked for.
        arbiter : str
            Account whose word ends a dispute. Without one there can be none.

        Raises
        ------
        InvalidValueError
            If a value is none.
        LedgerError
            If the account holds less, or the job has an escrow that says something else.
        """
        if not JOB_ID.fullmatch(job_id):
            raise InvalidValueError("a job id has 1 to 56 letters, digits, - and _")
        ids = tuple(query_ids)
        if not ids or not all(
            QUERY_ID.fullmatch(i) and i.rpartition("-")[0] == job_id for i in ids
        ):
            raise InvalidValueError("query ids are those of the job's batches: <job id>-<number>")
        if type(deadline) is not int or not 0 <= deadline <= MAX_TIME:
            raise InvalidValueError("a deadline is in whole seconds since 1970")
        if querier_key_id and not DIGEST.fullmatch(querier_key_id):
            raise InvalidValueError("the querier's key id has 64 hex digits")
        draft = Draft(
            kind="open-escrow",
            key=f"open-escrow:{job_id}",
            subject=ESCROW + job_id,
            amounts={
                ordinary_account(querier): -checked_amount(fee, what="a fee"),
                ESCROW + job_id: fee,
            },
            memo={
                "job_id": job_id,
                "querier": querier,
                "querier_key_id": querier_key_id,
                "arbiter": ordinary_account(arbiter) if arbiter else "",
                "fee": fee,
                "deadline": deadline,
            },
            claims=asked_claims(job_id, ids),
        )
        with self._ledger.writing() as book:
            return book.append(draft)

    def state(self, job_id: str) -> EscrowState | None:
        """Return where a job's fee is; None if it never had any."""
        with self._ledger.reading() as book:
            state = book.state(ESCROW + job_id)
        return state if isinstance(state, EscrowState) else None

    def require_receipt(self, receipt: Receipt) -> str:
        """Require that a receipt verifies under these keys; return its SHA-256, in hex.

        Raises
        ------
        SignatureError, UntrustedKeyError, ReceiptError
            If it does not.
        """
        return self._verified(receipt)[1]

    def release(
        self,
        job_id: str,
        payout: Payout,
        receipt: Receipt,
        *,
        payees: Sequence[Payee],
        settlement_digest: str = "",
    ) -> Entry:
        """Pay a job's fee out against its receipt; doing it again changes nothing.

        Possible until the fee is refunded, also after the deadline: whichever comes first.

        Parameters
        ----------
        job_id : str
        payout : Payout
            Of exactly the fee. A site with a negative amount is charged from its stake.
        receipt : Receipt
            Verified here; signed by the coordinator.
        payees : sequence of Payee
            One for each amount of the payout, in the same order.
        settlement_digest : str
            SHA-256, in hex, of the settlement behind the amounts; goes into the ledger.

        Raises
        ------
        SignatureError, UntrustedKeyError, ReceiptError
            If the receipt does not verify.
        LedgerError
            If it is of another job, querier or batches, a site is to be paid that did not
            sign, the amounts are not of this fee, or the fee is released, refunded or
            disputed.
        """
        if settlement_digest and not DIGEST.fullmatch(settlement_digest):
            raise InvalidValueError("a settlement's digest has 64 hex digits")
        # Signatures take milliseconds each: checked before other writers have to wait.
        known, digest = self._verified(receipt)
        amounts = amounts_of(payout, payees, known)
        with self._ledger.writing() as book:
            state = book.state(ESCROW + job_id)
            if not isinstance(state, EscrowState):
                raise LedgerError("there is no escrow for this job", hint="open one first")
            require_same_job(state, known)
            if payout.fee != state.fee or payout.refund < 0:
                raise LedgerError(
                    f"the payout is of {payout.fee} micro-credits; {state.fee} are in escrow",
                    hint="work the payout out from the fee in escrow",
                )
            amounts[ESCROW + job_id] = -state.fee
            amounts[state.querier] = amounts.get(state.querier, 0) + payout.refund
            draft = Draft(
                kind="release",
                key=f"release:{job_id}",
                subject=ESCROW + job_id,
                amounts={name: amount for name, amount in amounts.items() if amount},
                memo={
                    "job_id": job_id,
                    "receipt_digest": digest,
                    "settlement_digest": settlement_digest,
                },
                claims=end_claims(job_id, state.query_ids),
            )
            return book.append(draft)

    def refund(self, job_id: str) -> Entry:
        """Give a job's fee back after its deadline; doing it again changes nothing.

        Raises
        ------
        LedgerError
            If it is too early, or the fee is released or disputed.
        """
        with self._ledger.writing() as book:
            state = book.state(ESCROW + job_id)
            if not isinstance(state, EscrowState):
                raise LedgerError("there is no escrow for this job", hint="open one first")
            return book.append(
                Draft(
                    kind="refund",
                    key=f"refund:{job_id}",
                    subject=ESCROW + job_id,
                    amounts={ESCROW + job_id: -state.fee, state.querier: state.fee},
                    memo={"job_id": job_id},
                    claims=end_claims(job_id, state.query_ids),
                )
            )

    def dispute(self, job_id: str, *, reason_code: str, by: str) -> Entry:
        """Hold a fee: neither release nor refund until the arbiter resolves.

        Parameters
        ----------
        job_id : str
        reason_code : str
            A short code, such as ``"wrong-score"``: everybody who reads the ledger reads it.
        by : str
            Account of who disputes; once a job.

        Raises
        ------
        InvalidValueError
            If the code or the account is none.
        LedgerError
            If there is no arbiter, or the fee is released, refunded, or was disputed and
            resolved.
        """
        if not REASON.fullmatch(reason_code):
            raise InvalidValueError("a reason code is a word or some, in kebab-case")
        return self._note(
            job_id,
            "dispute",
            key=f"dispute:{job_id}:{_short(ordinary_account(by))}",
            memo={"by": by, "reason_code": reason_code},
            claim=f"dispute:{job_id}:{by}",
        )

    def resolve(self, job_id: str, *, by: str, outcome: Outcome, deadline: int = 0) -> Entry:
        """End all disputes of a job, for good.

        Parameters
        ----------
        by : str
            The arbiter.
        outcome : Outcome
            ``release``: the fee may be released, and refunded from `deadline` on only;
            ``refund``: it may be refunded now, and not be released.
        deadline : int
            For ``release``: UTC, seconds since 1970, in the future. Otherwise as it was.

        Raises
        ------
        LedgerError
            If the job is not disputed, or `by` is not its arbiter.
        """
        if Outcome(outcome) is Outcome.REFUND:
            state = self.state(job_id)
            deadline = state.deadline if state else 0
        return self._note(
            job_id,
            "resolve",
            key=f"resolve:{job_id}",
            memo={"by": ordinary_account(by), "outcome": str(outcome), "deadline": deadline},
            claim=f"resolve:{job_id}",
        )

    def _verified(self, receipt: Receipt) -> tuple[Receipt, str]:
        data = receipt.to_bytes()
        found = verify(
            data, pins=self._pins, coordinator_key_id=self._coordinator, now=self._ledger.now()
        )
        found.require_ok()
        return found.receipt, hashlib.sha256(data).hexdigest()

    def _note(
        self, job_id: str, kind: str, *, key: str, memo: dict[str, str | int], claim: str
    ) -> Entry:
        if not JOB_ID.fullmatch(job_id):
            raise InvalidValueError("a job id has 1 to 56 letters, digits, - and _")
        draft = Draft(
            kind=kind,
            key=key,
            subject=ESCROW + job_id,
            memo={"job_id": job_id, **memo},
            claims=(claim,),
        )
        with self._ledger.writing() as book:
            return book.append(draft)


def _short(account: str) -> str:
    # An account may hold what a key may not, and be as long as one.
    return hashlib.sha256(account.encode()).hexdigest()
