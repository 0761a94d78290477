"""What a site puts at risk, so that cheating costs something."""

from __future__ import annotations

from fedinfer_flower.errors import InvalidValueError
from fedinfer_flower.incentives.ledger.entry import Draft, Entry
from fedinfer_flower.incentives.ledger.ledger import Ledger
from fedinfer_flower.incentives.ledger.names import (
    KEY,
    REASON,
    STAKE,
    checked_amount,
    ordinary_account,
)
from fedinfer_flower.incentives.ledger.states import StakeState
from fedinfer_flower.receipts.checks import MAX_TIME

__all__ = ["Stakes"]


class Stakes:
    """Stakes of accounts, on a ledger.

    Parameters
    ----------
    ledger : Ledger

    Privacy
    -------
    Everybody who reads the ledger sees who has how much at stake, and who was charged, with
    the code of the reason. Whether a charge is just, the ledger does not know: whoever may
    write to it can slash.

    Examples
    --------
    >>> import tempfile
    >>> folder = tempfile.TemporaryDirectory()
    >>> ledger = Ledger(f"sqlite:///{folder.name}/ledger.db", clock=lambda: 1_000)
    >>> ledger.migrate()
    >>> _ = ledger.deposit("north", 3_000_000, key="d1")
    >>> stakes = Stakes(ledger)
    >>> _ = stakes.lock("north", 2_000_000, key="s1", until=1_000)
    >>> _ = stakes.slash("north", 500_000, to="fund", key="s2", reason_code="bad-receipt")
    >>> _ = stakes.give_back("north", 1_500_000, key="s3")
    >>> ledger.balance("north"), ledger.balance("fund"), stakes.held("north")
    (2500000, 500000, 0)
    >>> folder.cleanup()
    """

    def __init__(self, ledger: Ledger) -> None:
        self._ledger = ledger

    def lock(self, account: str, amount: int, *, key: str, until: int) -> Entry:
        """Move money from an account to its stake.

        Parameters
        ----------
        until : int
            UTC, seconds since 1970: nothing of the stake goes back before. The latest of all
            locks holds.

        Raises
        ------
        InvalidValueError
            If a value is none.
        LedgerError
            If the account holds less.
        """
        if type(until) is not int or not 0 <= until <= MAX_TIME:
            raise InvalidValueError("until is in whole seconds since 1970")
        amounts = {ordinary_account(account): -checked_amount(amount), STAKE + account: amount}
        return self._append("lock-stake", account, key, amounts, {"until": until})

    def slash(self, account: str, amount: int, *, to: str, key: str, reason_code: str) -> Entry:
        """Move money from a stake to somebody else's account.

        Raises
        ------
        InvalidValueError
            If a value is none.
        LedgerError
            If the stake is smaller.
        """
        if not REASON.fullmatch(reason_code):
            raise InvalidValueError("a reason code is a word or some, in kebab-case")
        if ordinary_account(to) == account:
            raise InvalidValueError("a stake is slashed in somebody else's favour")
        stake = STAKE + ordinary_account(account)
        amounts = {stake: -checked_amount(amount), to: amount}
        return self._append("slash-stake", account, key, amounts, {"reason_code": reason_code})

    def give_back(self, account: str, amount: int, *, key: str) -> Entry:
        """Move money from a stake back to its owner.

        Raises
        ------
        LedgerError
            If the stake is smaller, or still locked.
        """
        stake = STAKE + ordinary_account(account)
        amounts = {stake: -checked_amount(amount), account: amount}
        return self._append("return-stake", account, key, amounts, {})

    def held(self, account: str) -> int:
        """Return the micro-credits that an account has at stake."""
        return self._ledger.balance(STAKE + ordinary_account(account))

    def locked_until(self, account: str) -> int:
        """Return until when a stake is locked, in seconds since 1970; 0 if it never was."""
        with self._ledger.reading() as book:
            state = book.state(STAKE + ordinary_account(account))
        return state.until if isinstance(state, StakeState) else 0

    def _append(
        self,
        kind: str,
        account: str,
        key: str,
        amounts: dict[str, int],
        memo: dict[str, str | int],
    ) -> Entry:
        if not KEY.fullmatch(key):
            raise InvalidValueError("a key has 1 to 128 letters, digits, '.', '_' and '-'")
        draft = Draft(
            kind=kind, key=f"{kind}:{key}", subject=STAKE + account, amounts=amounts, memo=memo
        )
        with self._ledger.writing() as book:
            return book.append(draft)
