"""Check a whole ledger: every hash, every sum, every balance, every rule, in order.

What is checked needs nothing but the entries, so that an auditor can do it on an export.
What it proves: nothing *between* the first entry and the last was changed, left out, added
or put in another order after it was written. That nothing is missing *at the end*, and that
the book was not written anew from the beginning, only a head proves that somebody else kept.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

from fedinfer_flower.errors import LedgerError
from fedinfer_flower.incentives.ledger.entry import FIRST_PREVIOUS, Entry, Head
from fedinfer_flower.incentives.ledger.names import EXTERNAL
from fedinfer_flower.incentives.ledger.rules import FIRST_KIND, step
from fedinfer_flower.incentives.ledger.states import EscrowState, State

__all__ = ["BadRow", "Replay", "Verification", "verify_entries"]


@dataclass(frozen=True, kw_only=True)
class BadRow:
    """The first row that does not fit.

    Parameters
    ----------
    seq : int
        Its number; 0 if it is the ledger as a whole.
    what : str
        What is wrong with it, for people.
    """

    seq: int
    what: str


@dataclass(frozen=True, kw_only=True)
class Verification:
    """What verifying a ledger has found.

    Parameters
    ----------
    n_entries : int
        Entries up to the first bad row.
    head : Head, optional
        Of these entries; None if there are none.
    first_bad : BadRow, optional
        None if all is well.
    balances : mapping of account to int
        After these entries, in micro-credits.
    jobs : tuple of EscrowState
        Every escrow after these entries, in the order in which they were opened.
    """

    n_entries: int
    head: Head | None
    first_bad: BadRow | None = None
    balances: dict[str, int] = field(default_factory=dict)
    jobs: tuple[EscrowState, ...] = ()

    @property
    def ok(self) -> bool:
        """Whether every row fits."""
        return self.first_bad is None

    def require_ok(self) -> None:
        """Raise if a row does not fit.

        Raises
        ------
        LedgerError
            Naming the first such row.
        """
        if self.first_bad is not None:
            raise LedgerError(
                f"row {self.first_bad.seq}: {self.first_bad.what}",
                hint="trust nothing from this row on; compare with a copy that verifies",
            )


class Replay:
    """Takes entries in order and keeps what they come to; refuses the first that does not fit.

    Memory grows with accounts, escrows, keys and claims, not with postings.

    Parameters
    ----------
    head : Head, optional
        One that was published: the book must have had it.
    """

    def __init__(self, head: Head | None = None) -> None:
        self._expected = head
        self.last: Entry | None = None
        self.n_postings = 0
        self.balances: dict[str, int] = {}
        self.states: dict[str, State] = {}
        self._keys: set[str] = set()
        self.claims: set[str] = set()

    @property
    def n_entries(self) -> int:
        """Entries taken."""
        return self.last.seq if self.last else 0

    def take(self, entry: Entry) -> None:
        """Take the next entry.

        Raises
        ------
        LedgerError
            If it does not fit; says why.
        """
        self._require_place(entry)
        self._require_money(entry)
        draft = entry.draft
        if draft.key in self._keys:
            raise LedgerError("its key was used before")
        if twice := self.claims & set(draft.claims):
            raise LedgerError(f"{min(twice)!r} was claimed before")
        state = step(self.states.get(draft.subject), draft, at=entry.at)
        expected = self._expected
        if expected is not None and entry.seq == expected.seq and entry.hash != expected.hash:
            raise LedgerError("its hash is not that of the head that was published")
        if state is not None:
            self.states[draft.subject] = state
        self.balances.update((p.account, p.balance) for p in entry.postings)
        self._keys.add(draft.key)
        self.claims.update(draft.claims)
        self.n_postings += len(entry.postings)
        self.last = entry

    def finish(self) -> None:
        """Require that nothing is missing that can be seen to be.

        Raises
        ------
        LedgerError
            If there is no entry, or the published head was not reached.
        """
        if self.last is None:
            raise LedgerError("a ledger has at least its first entry")
        if self._expected is not None and self.n_entries < self._expected.seq:
            raise LedgerError(
                f"the book ends at {self.n_entries}; the head that was published is"
                f" {self._expected.seq}: the last rows were deleted"
            )

    def found(self, bad: BadRow | None = None) -> Verification:
        """Return what was found so far."""
        jobs = tuple(s for s in self.states.values() if isinstance(s, EscrowState))
        return Verification(
            n_entries=self.n_entries,
            head=self.last.head if self.last else None,
            first_bad=bad,
            balances=dict(sorted(self.balances.items())),
            jobs=jobs,
        )

    def _require_place(self, entry: Entry) -> None:
        last = self.last
        if entry.seq != self.n_entries + 1:
            raise LedgerError("a row before it is missing, or comes twice")
        if entry.previous != (last.hash if last else FIRST_PREVIOUS):
            raise LedgerError("it does not follow from the row before: that row was changed")
        if entry.hash != entry.hash_now():
            raise LedgerError("its hash is not that of what it says: it was changed")
        if entry.at < (last.at if last else 0):
            raise LedgerError("it is older than the row before")
        if (entry.draft.kind == FIRST_KIND) != (last is None):
            raise LedgerError(f"a ledger starts with one entry of kind {FIRST_KIND!r}")

    def _require_money(self, entry: Entry) -> None:
        if {p.account: p.amount for p in entry.postings} != entry.draft.amounts:
            raise LedgerError("its postings are not those of its draft")
        for posting in entry.postings:
            if posting.balance != self.balances.get(posting.account, 0) + posting.amount:
                raise LedgerError("a balance does not follow from the one before")
            if posting.balance < 0 and posting.account != EXTERNAL:
                raise LedgerError("an account is below zero")


def verify_entries(entries: Iterable[Entry], *, head: Head | None = None) -> Verification:
    """Check entries that came from anywhere, such as an export.

    Parameters
    ----------
    entries : iterable of Entry
        All, from the first.
    head : Head, optional
        One that was published earlier: the book must contain it.

    Returns
    -------
    verification : Verification

    Examples
    --------
    >>> verify_entries([]).first_bad.what
    'a ledger has at least its first entry'
    """
    replay = Replay(head)
    seq = 1
    try:
        for entry in entries:
            seq = entry.seq
            replay.take(entry)
            # Of a row that cannot even be read: the one after the last that fits.
            seq += 1
        seq = replay.n_entries
        replay.finish()
    except LedgerError as exc:
        return replay.found(BadRow(seq=seq, what=exc.message))
    return replay.found()
