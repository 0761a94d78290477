"""The ledger: who paid whom how much for which job; written once, checked by anybody."""

from __future__ import annotations

import secrets
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

from fedinfer_flower.errors import InvalidValueError, LedgerError
from fedinfer_flower.incentives.ledger import migrating
from fedinfer_flower.incentives.ledger.book import Book
from fedinfer_flower.incentives.ledger.entry import Draft, Entry, Head
from fedinfer_flower.incentives.ledger.exporting import exported
from fedinfer_flower.incentives.ledger.names import (
    EXTERNAL,
    KEY,
    KIND,
    checked_amount,
    ordinary_account,
)
from fedinfer_flower.incentives.ledger.rules import FIRST_KIND, RESERVED_KINDS
from fedinfer_flower.incentives.ledger.store import Store
from fedinfer_flower.incentives.ledger.verification import BadRow, Replay, Verification
from fedinfer_flower.receipts.checks import MAX_TIME

__all__ = ["Ledger"]


class Ledger:
    """A book of entries in one database, for all its processes.

    Double entry in whole micro-credits: the postings of every entry sum to 0, and no account
    but ``external`` is ever below 0, so that money comes in by `deposit` alone. Entries are
    added, never changed: triggers in the database refuse it, and each entry's SHA-256 covers
    the one before, so that `verify` names the first row that somebody changed all the same.

    Parameters
    ----------
    url : str
        ``sqlite:///PATH`` (a file on a local disk), or ``postgresql://...`` (extra
        ``postgres``).
    clock : callable, optional
        Returns UTC in seconds since 1970.

    Raises
    ------
    InvalidValueError
        If the URL is of another kind.
    MissingExtraError
        For PostgreSQL without its driver.

    Privacy
    -------
    Whoever reads the database, or an export of it, learns which account paid or got how much,
    when, and for which job and query ids: no inputs, no answers, no scores. Amounts paid in
    proportion to scores tell the ratios of those that are above 0. An auditor needs no more
    than to read; whoever may *write* to the database can add entries that follow the rules
    in anybody's name, and deciding who may is the database's matter: on PostgreSQL
    a writer needs SELECT and INSERT on the three tables, SELECT on
    ``fedinfer_ledger_version``, and nothing else. Nobody can change or delete entries unseen,
    except the last ones, or all of them: publish `head` somewhere else, now and then, and
    give it to `verify`.

    Examples
    --------
    >>> import tempfile
    >>> folder = tempfile.TemporaryDirectory()
    >>> ledger = Ledger(f"sqlite:///{folder.name}/ledger.db")
    >>> ledger.migrate()
    >>> _ = ledger.deposit("clinic", 5_000_000, key="invoice-1")
    >>> _ = ledger.post("fee", "fee-1", {"clinic": -1_000_000, "north": 1_000_000})
    >>> ledger.balance("clinic"), ledger.balance("north"), ledger.balance("external")
    (4000000, 1000000, -5000000)
    >>> ledger.verify().ok
    True
    >>> folder.cleanup()
    """

    def __init__(self, url: str, *, clock: Callable[[], float] = time.time) -> None:
        self._store = Store(url)
        self._clock = clock
        self._is_newest = False

    def migrate(self) -> None:
        """Make the tables, or bring them to this release's form; entries stay as they are.

        Raises
        ------
        ConfigError
            If the database cannot be used, or a newer release made its tables.
        """
        self._store.create_file()
        with self._store.transaction(write=True) as connection:
            migrating.migrate_to(connection)
            book = Book(connection, now=self.now())
            if book.last() is None:
                # So that no two ledgers have a row in common, and one head fits one ledger.
                memo = {"ledger_id": secrets.token_hex(32)}
                book.append(Draft(kind=FIRST_KIND, key=FIRST_KIND, memo=memo))

    @contextmanager
    def reading(self) -> Iterator[Book]:
        """Open the book as it is at this moment."""
        with self._opened(write=False) as book:
            yield book

    @contextmanager
    def writing(self) -> Iterator[Book]:
        """Open the book to add to it; other writers wait until the block ends.

        What the block appends is on disk when it ends, and none of it if it raises.
        """
        with self._opened(write=True) as book:
            yield book

    def post(
        self,
        kind: str,
        key: str,
        postings: Mapping[str, int],
        memo: Mapping[str, str | int] | None = None,
    ) -> Entry:
        """Move money between parties' accounts; the same key again changes nothing.

        Parameters
        ----------
        kind : str
            What for, such as ``"bonus"``; not one that the ledger writes itself.
        key : str
            Letters, digits, ``.``, ``_``, ``-``; at most 128.
        postings : mapping of account to int
            Micro-credits, positive into the account; they sum to 0. Neither ``external`` nor
            the accounts of escrows and stakes.
        memo : mapping of str to str or int, optional
            Goes into the ledger for everybody who reads it: no inputs, no scores.

        Raises
        ------
        InvalidValueError
            If a name or an amount is none.
        LedgerError
            If an account would be overdrawn, or the key stands for another entry.
        """
        if kind in RESERVED_KINDS or not KIND.fullmatch(kind):
            raise InvalidValueError(
                "post moves money between parties under a kind of your own, in kebab-case",
                hint="use deposit, withdraw, Escrow or Stakes for what the ledger does itself",
            )
        amounts = {ordinary_account(account): amount for account, amount in postings.items()}
        if not amounts:
            raise InvalidValueError("an entry that moves nothing")
        return self._append(kind, key, amounts, memo or {})

    def deposit(self, account: str, amount: int, *, key: str) -> Entry:
        """Bring money in from outside: the only way that an account's money can begin.

        Raises
        ------
        InvalidValueError
            If the account, the amount or the key is none.
        LedgerError
            If the key stands for another entry.
        """
        amounts = {EXTERNAL: -checked_amount(amount), ordinary_account(account): amount}
        return self._append("deposit", key, amounts, {})

    def withdraw(self, account: str, amount: int, *, key: str) -> Entry:
        """Take money out; somebody has paid the account's owner outside of the ledger.

        Raises
        ------
        InvalidValueError
            If the account, the amount or the key is none.
        LedgerError
            If the account holds less, or the key stands for another entry.
        """
        amounts = {EXTERNAL: checked_amount(amount), ordinary_account(account): -amount}
        return self._append("withdraw", key, amounts, {})

    def balance(self, account: str) -> int:
        """Return an account's micro-credits; 0 for one that nobody has used."""
        with self.reading() as book:
            return book.balance(account)

    def balances(self) -> dict[str, int]:
        """Return the balance of every account that was ever used, sorted by name."""
        with self.reading() as book:
            return book.balances()

    def entries(self, after: int = 0) -> Iterator[Entry]:
        """Yield the entries after a place, as they are now.

        Raises
        ------
        LedgerError
            At a row that is no entry; names it.
        """
        # A transaction a page: a slow reader keeps no writer waiting, and what was read of an
        # append-only book stays so.
        while True:
            with self.reading() as book:
                page = book.page(after)
            before = after
            for entry in page:
                after = entry.seq
                yield entry
            if after == before:
                return

    def head(self) -> Head:
        """Return the last entry's number and hash, to be kept where nobody can change it."""
        with self.reading() as book:
            last = book.last()
        if last is None:
            raise LedgerError("the ledger has lost its first entry")
        return last[0]

    def verify(self, head: Head | None = None) -> Verification:
        """Check every row; name the first that does not fit.

        Parameters
        ----------
        head : Head, optional
            One that was published earlier. Without it, nobody can tell that the last rows
            were deleted, or that the whole book was written anew.
        """
        replay, done = Replay(head), False
        while not done:
            # A row that cannot even be decoded is the one after the last that fits.
            seq = replay.n_entries + 1
            try:
                with self.reading() as book:
                    done = True
                    for entry in book.page(replay.n_entries):
                        seq, done = entry.seq, False
                        replay.take(entry)
                        seq += 1
                    if done:
                        seq = replay.n_entries
                        self._require_whole(replay, book)
            except LedgerError as exc:
                return replay.found(BadRow(seq=seq, what=exc.message))
        return replay.found()

    def export(self, form: str) -> Iterator[str]:
        """Yield the ledger as lines of ``"csv"`` or ``"json"``; see `exporting`.

        Raises
        ------
        InvalidValueError
            For another form.
        """
        return exported(self.entries(), form)

    def _require_whole(self, replay: Replay, book: Book) -> None:
        replay.finish()
        if book.counts() != (replay.n_entries, replay.n_postings, len(replay.claims)):
            raise LedgerError("there are rows that belong to no entry")
        if not book.is_intact():
            raise LedgerError(
                "the database's file is damaged in a place that holds no entry, such as an index"
            )
        missing = migrating.missing_triggers(book)
        if missing:
            raise LedgerError(
                f"the trigger {missing[0]} is missing, without which rows can be changed: somebody"
                " with the rights of the database's owner removed it"
            )

    @contextmanager
    def _opened(self, *, write: bool) -> Iterator[Book]:
        with self._store.transaction(write=write) as connection:
            if not self._is_newest:
                migrating.require_newest(connection)
                self._is_newest = True
            yield Book(connection, now=self.now())

    def _append(
        self, kind: str, key: str, amounts: Mapping[str, int], memo: Mapping[str, str | int]
    ) -> Entry:
        if not KEY.fullmatch(key):
            raise InvalidValueError("a key has 1 to 128 letters, digits, '.', '_' and '-'")
        draft = Draft(kind=kind, key=key, amounts=amounts, memo=memo)
        with self.writing() as book:
            return book.append(draft)

    def now(self) -> int:
        """Return the clock's UTC in whole seconds since 1970."""
        now = float(self._clock())
        if not 0.0 <= now <= MAX_TIME:  # NaN is neither
            raise LedgerError("the clock is out of range", hint="set this machine's clock")
        return int(now)
