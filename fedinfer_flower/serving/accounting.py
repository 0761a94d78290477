"""`Accounts`: what callers pay for a job, and what sites get, each posted once.

A job's fee is set aside when the job is accepted, and moved on when it has ended: to the
sites in its answer, or back. Both are entries of the ledger under a key of their own, and
what is to be posted is in the outbox before it is posted: after a crash at any point it is
posted again, which changes nothing if it was.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Final

import numpy as np

from fedinfer_flower.errors import (
    InvalidValueError,
    LedgerError,
    QuotaExceededError,
    UnavailableError,
)
from fedinfer_flower.incentives.ledger.ledger import Ledger
from fedinfer_flower.incentives.payments.base import MICRO, apportion
from fedinfer_flower.serving.config import ModelConfig
from fedinfer_flower.serving.jobs import Job, JobKind
from fedinfer_flower.wire.directory import SiteCard

__all__ = ["HELD", "Accounts", "Money", "account_of_key", "account_of_site"]

HELD: Final = "gateway:held"
"""Where fees are until their jobs have ended."""

_RESERVE: Final = "gateway-reserve"
_SETTLE: Final = "gateway-settle"


def account_of_key(owner: str) -> str:
    """Return the account that pays for an API key's jobs."""
    return f"key:{owner}"


def account_of_site(key_id: str) -> str:
    """Return the account of a site; the same as `Treasurer`'s."""
    return f"site:{key_id[:16]}"


@dataclass(frozen=True, kw_only=True)
class Money:
    """Where a job's fee is, as the outbox keeps it.

    Parameters
    ----------
    job_id : str
    account : str
        Who pays.
    fee : int
        Micro-credits.
    stage : {"reserve", "held", "settle"}
        Being set aside; set aside; to be moved on.
    priced : bool
        Whether the operator set the price: then all of it goes to the sites.
    paid : mapping of account to int
        Micro-credits; what is left of the fee goes back.
    """

    job_id: str
    account: str
    fee: int
    stage: str = "reserve"
    priced: bool = False
    paid: Mapping[str, int] = field(default_factory=dict)

    def to_json(self) -> str:
        """Return the text for the outbox."""
        return json.dumps(dataclasses.asdict(self), sort_keys=True)

    @classmethod
    def from_json(cls, text: str) -> Money:
        """Read what `to_json` wrote."""
        return cls(**json.loads(text))

    def held(self) -> Money:
        """Return the same, set aside."""
        return dataclasses.replace(self, stage="held")

    def settled(self, earned: Mapping[str, float]) -> Money:
        """Return what is to be moved on.

        Parameters
        ----------
        earned : mapping of str to float
            Credits at the sites' prices, by key id of the sites in the answer; empty to give
            all of the fee back.

        Notes
        -----
        Under the operator's price, the fee is split evenly: what a site asks is its own word,
        and asking for a million would leave the others nothing. Otherwise each gets what it
        asks; if prices rose since the job was accepted, the fee is split in that proportion.
        """
        asked = {k: round(v * MICRO) for k, v in sorted(earned.items())}
        total = sum(asked.values())
        if not asked or (not self.priced and total == 0):
            amounts: list[int] = []
        elif self.priced or total > self.fee:
            weights = np.array([1.0 if self.priced else float(v) for v in asked.values()])
            amounts = list(apportion(weights, self.fee))
        else:
            amounts = list(asked.values())
        paid: dict[str, int] = {}
        for key_id, amount in zip(asked, amounts, strict=False):
            if amount:
                account = account_of_site(key_id)
                paid[account] = paid.get(account, 0) + amount
        return dataclasses.replace(self, stage="settle", paid=paid)

    @property
    def cost(self) -> int:
        """Micro-credits that the caller pays in the end."""
        return sum(self.paid.values())


class Accounts:
    """The gateway's side of a ledger.

    Parameters
    ----------
    ledger : Ledger
        Migrated.

    Privacy
    -------
    The ledger says which API key paid how much for which job and when, and what each site
    got for it; no inputs, no answers.

    Examples
    --------
    >>> import tempfile
    >>> folder = tempfile.TemporaryDirectory()
    >>> ledger = Ledger(f"sqlite:///{folder.name}/ledger.db")
    >>> ledger.migrate()
    >>> _ = ledger.deposit("key:0a1b2c3d", 5_000_000, key="invoice-1")
    >>> accounts = Accounts(ledger)
    >>> money = accounts.plan("job", "0a1b2c3d", credits=2.0, priced=True)
    >>> accounts.reserve(money)
    >>> accounts.post(money.settled({"ab" * 32: 0.0, "cd" * 32: 0.0}))
    >>> ledger.balance("key:0a1b2c3d"), ledger.balance("site:" + "ab" * 8)
    (3000000, 1000000)
    >>> folder.cleanup()
    """

    def __init__(self, ledger: Ledger) -> None:
        self.ledger = ledger

    @classmethod
    def at(cls, url: str) -> Accounts | None:
        """Return the accounts of a ledger; None for an empty URL."""
        if not url:
            return None
        ledger = Ledger(url)
        ledger.migrate()
        return cls(ledger)

    def price(self, job: Job, model: ModelConfig, cards: Mapping[int, SiteCard]) -> Money | None:
        """Return what a job costs at most: the operator's price, or what all sites ask.

        Jobs of language models cost nothing: their runners do not say who earned what.

        Raises
        ------
        UnavailableError
            If the price is the sites', and none is here to ask for one.
        """
        if job.kind is JobKind.TEXT:
            return None
        price = model.price
        if price is None:
            if not cards:
                raise UnavailableError(
                    "no site can be asked now, so that the price is not known",
                    hint="ask again in a while",
                )
            price = sum(card.profile.price_per_query for card in cards.values())
        return self.plan(
            job.job_id, job.owner, credits=price * job.n_rows, priced=model.price is not None
        )

    def plan(self, job_id: str, owner: str, *, credits: float, priced: bool) -> Money | None:
        """Return what a job costs at most; None if it costs nothing.

        Raises
        ------
        InvalidValueError
            If that is more than a ledger can hold.
        """
        fee = round(credits * MICRO)
        if not 0 <= fee <= 10**15:
            raise InvalidValueError("a job at this price cannot be paid")
        if fee == 0:
            return None
        return Money(job_id=job_id, account=account_of_key(owner), fee=fee, priced=priced)

    def reserve(self, money: Money) -> None:
        """Set a fee aside; again changes nothing.

        Raises
        ------
        QuotaExceededError
            If the account does not cover it.
        LedgerError
            If the ledger cannot be used.
        """
        try:
            self.ledger.post(
                _RESERVE,
                f"reserve.{money.job_id}",
                {money.account: -money.fee, HELD: money.fee},
                {"job_id": money.job_id},
            )
        except LedgerError:
            if self.ledger.balance(money.account) >= money.fee:
                raise
            raise QuotaExceededError(
                f"the account of this API key does not cover {money.fee / MICRO:g} credits",
                hint=f"the operator deposits to {money.account!r}",
            ) from None

    def post(self, money: Money) -> None:
        """Move a fee on as `Money.settled` says; again changes nothing.

        A fee that was never set aside, because the process died before it came to that, is
        not moved either.

        Raises
        ------
        LedgerError
            If it was moved on otherwise, or the ledger cannot be used.
        """
        with self.ledger.reading() as book:
            if book.find(f"reserve.{money.job_id}") is None:
                return
        amounts = dict(money.paid)
        amounts[HELD] = -money.fee
        if refund := money.fee - money.cost:
            amounts[money.account] = amounts.get(money.account, 0) + refund
        self.ledger.post(_SETTLE, f"settle.{money.job_id}", amounts, {"job_id": money.job_id})

    def rewards(self) -> dict[str, int]:
        """Return micro-credits by account, of the accounts of sites."""
        return {n: v for n, v in self.ledger.balances().items() if n.startswith("site:")}
