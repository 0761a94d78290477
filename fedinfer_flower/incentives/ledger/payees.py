"""Who is paid for a job, and whether its receipt says that they answered it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from fedinfer_flower.errors import InvalidValueError, LedgerError
from fedinfer_flower.incentives.ledger.names import DIGEST, STAKE, ordinary_account
from fedinfer_flower.incentives.ledger.states import EscrowState
from fedinfer_flower.incentives.payments.base import Payout
from fedinfer_flower.receipts.receipt import Receipt

__all__ = ["Payee", "amounts_of", "require_same_job"]


@dataclass(frozen=True, kw_only=True)
class Payee:
    """Whose account a site's pay goes to.

    Parameters
    ----------
    key_id : str
        Fingerprint of the key with which the site signs.
    account : str
        Ordinary account; several sites of one owner may share one.
    """

    key_id: str
    account: str

    def __post_init__(self) -> None:
        ordinary_account(self.account)
        if not DIGEST.fullmatch(self.key_id):
            raise InvalidValueError("a payee's key id has 64 hex digits")


def amounts_of(payout: Payout, payees: Sequence[Payee], receipt: Receipt) -> dict[str, int]:
    """Return what each account gets or loses; every site that gets something has signed.

    Raises
    ------
    LedgerError
        If a site is to be paid that did not answer, or charged that was not asked.
    """
    if len(payees) != len(payout.paid) or len({p.key_id for p in payees}) != len(payees):
        raise LedgerError("a payout has one amount for each payee, and each payee once")
    keys = {member.name: member.key_id for member in receipt.cohort}
    # A statement alone may be of an answer that came too late to count.
    answered = {keys[name] for batch in receipt.batches for name in batch.answered}
    signed = {signed.statement.site_key_id for signed in receipt.statements}
    amounts: dict[str, int] = {}
    for payee, paid in zip(payees, payout.paid, strict=True):
        if paid > 0 and payee.key_id not in answered & signed:
            raise LedgerError(
                f"the site with key {payee.key_id[:16]} is to be paid and has signed no answer of"
                " this job",
                hint="leave it out of the scores",
            )
        if paid < 0 and payee.key_id not in keys.values():
            raise LedgerError(
                f"the site with key {payee.key_id[:16]} is to be charged and was not asked"
            )
        account = payee.account if paid > 0 else STAKE + payee.account
        amounts[account] = amounts.get(account, 0) + paid
    return amounts


def require_same_job(state: EscrowState, receipt: Receipt) -> None:
    """Require that a receipt is of the job, querier and batches in escrow.

    Raises
    ------
    LedgerError
        If it is not.
    """
    if receipt.job_id != state.job_id:
        raise LedgerError("the receipt is of another job")
    if state.querier_key_id and receipt.querier_key_id != state.querier_key_id:
        raise LedgerError("the receipt is of a job that another key asked for")
    if not {batch.query_id for batch in receipt.batches} <= set(state.query_ids):
        raise LedgerError(
            "the receipt has a batch that is not in escrow",
            hint="open the escrow with every query id of the job",
        )
