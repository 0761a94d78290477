"""What the ledger is made of: entries of postings that sum to zero, chained by hash.

An entry is one thing that happened. Its hash covers all of it and the hash of the entry
before, so that whoever knows the last hash knows the whole book.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Final

from fedinfer_flower.errors import InvalidValueError, LedgerError
from fedinfer_flower.incentives.ledger.names import (
    DIGEST,
    MAX_AMOUNT,
    Memo,
    checked_claims,
    checked_memo,
    is_account,
)
from fedinfer_flower.receipts.canonical import canonical_bytes
from fedinfer_flower.wire.envelope import Json

__all__ = ["FIRST_PREVIOUS", "Draft", "Entry", "Head", "Posting"]

FIRST_PREVIOUS: Final = "0" * 64
_DOMAIN: Final = b"fedinfer/v1/ledger|"
_MAX_POSTINGS: Final = 100_000
_MAX_BALANCE: Final = 2**62


@dataclass(frozen=True, kw_only=True)
class Draft:
    """What an entry is to say, before it has its place in the chain.

    Parameters
    ----------
    kind : str
        ``"deposit"``, ``"release"``, ...
    key : str
        Unique: the same key again is the same entry, never a second one.
    amounts : mapping of account to int
        Micro-credits; positive into the account. They sum to 0.
    memo : mapping of str to str or int
    subject : str
        The escrow or stake that the entry is about; empty for others.
    claims : iterable of str
        What can happen once in the life of the ledger, such as the payment of a query id.

    Raises
    ------
    InvalidValueError
        If a name or an amount is none, or the amounts do not sum to 0.

    Examples
    --------
    >>> Draft(kind="transfer", key="k1", amounts={"a": -5, "b": 4})
    Traceback (most recent call last):
    ...
    fedinfer_flower.errors.InvalidValueError: FI202 InvalidValueError: postings sum to 0
    """

    kind: str
    key: str
    amounts: Mapping[str, int] = field(default_factory=dict)
    memo: Memo = field(default_factory=dict)
    subject: str = ""
    claims: Iterable[str] = ()

    def __post_init__(self) -> None:
        amounts = dict(sorted(self.amounts.items()))
        if not all(is_account(account) for account in amounts):
            raise InvalidValueError("a posting names an account that cannot be")
        if len(amounts) > _MAX_POSTINGS or not all(
            type(amount) is int and 0 < abs(amount) <= MAX_AMOUNT for amount in amounts.values()
        ):
            raise InvalidValueError(
                f"amounts are whole micro-credits, not 0, at most {MAX_AMOUNT} either way"
            )
        if sum(amounts.values()) != 0:
            raise InvalidValueError("postings sum to 0")
        object.__setattr__(self, "amounts", amounts)
        object.__setattr__(self, "memo", checked_memo(self.memo))
        object.__setattr__(self, "claims", checked_claims(self.claims))


@dataclass(frozen=True, kw_only=True)
class Posting:
    """One account's part in an entry.

    Parameters
    ----------
    account : str
    amount : int
        Micro-credits; positive into the account.
    balance : int
        Of the account, after the entry.
    """

    account: str
    amount: int
    balance: int


@dataclass(frozen=True, kw_only=True)
class Head:
    """The last entry's place and hash: publish it, and nobody can shorten the book unseen.

    Parameters
    ----------
    seq : int
    hash : str
        64 hex digits.
    """

    seq: int
    hash: str

    def __post_init__(self) -> None:
        if type(self.seq) is not int or self.seq < 1 or not DIGEST.fullmatch(self.hash):
            raise InvalidValueError("a head is a number from 1 and a hash of 64 hex digits")

    def __str__(self) -> str:
        return f"{self.seq}:{self.hash}"

    @classmethod
    def from_text(cls, text: str) -> Head:
        """Read what `str` wrote.

        Raises
        ------
        InvalidValueError
            If it is something else.

        Examples
        --------
        >>> Head.from_text("7:" + "ab" * 32).seq
        7
        """
        seq, _, digest = text.partition(":")
        if not (seq.isascii() and seq.isdigit() and len(seq) <= 18):
            raise InvalidValueError("a head is written as number:hash")
        return cls(seq=int(seq), hash=digest)


@dataclass(frozen=True, kw_only=True)
class Entry:
    """One row of the book, as it was written.

    Parameters
    ----------
    seq : int
        From 1, without gaps.
    at : int
        UTC, seconds since 1970, by the writer's clock; never before the entry before.
    draft : Draft
        What it says.
    postings : tuple of Posting
        Sorted by account.
    previous, hash : str
        64 hex digits: the hash of the entry before, and this one's.

    Privacy
    -------
    Whoever reads an entry learns who paid or was paid how much, when, and for which job; no
    inputs, no scores. Amounts tell how sites compare in the eyes of the payment rule.
    """

    seq: int
    at: int
    draft: Draft
    postings: tuple[Posting, ...]
    previous: str
    hash: str

    @classmethod
    def chained(
        cls, draft: Draft, *, after: Head | None, at: int, balances: Mapping[str, int]
    ) -> Entry:
        """Return a draft as the entry that follows `after`.

        Parameters
        ----------
        balances : mapping of account to int
            Before the entry.

        Raises
        ------
        LedgerError
            If a balance would leave 62 bits.
        """
        postings = tuple(
            Posting(account=name, amount=amount, balance=balances.get(name, 0) + amount)
            for name, amount in draft.amounts.items()
        )
        if any(abs(posting.balance) > _MAX_BALANCE for posting in postings):
            raise LedgerError("a balance would be larger than the ledger can write")
        seq = 1 if after is None else after.seq + 1
        previous = FIRST_PREVIOUS if after is None else after.hash
        values = {"seq": seq, "at": at, "draft": draft, "postings": postings}
        bare = cls(**values, previous=previous, hash="")  # type: ignore[arg-type]
        return cls(**values, previous=previous, hash=bare.hash_now())  # type: ignore[arg-type]

    @property
    def head(self) -> Head:
        """The head of the book, were this the last entry."""
        return Head(seq=self.seq, hash=self.hash)

    def body(self) -> dict[str, Json]:
        """Return what is hashed, as plain values for JSON."""
        return {
            "version": 1,
            "seq": self.seq,
            "at": self.at,
            "kind": self.draft.kind,
            "key": self.draft.key,
            "subject": self.draft.subject,
            "postings": [[p.account, p.amount, p.balance] for p in self.postings],
            "memo": dict(self.draft.memo),
            "claims": list(self.draft.claims),
            "previous": self.previous,
        }

    def hash_now(self) -> str:
        """Return the hash that the entry should have: SHA-256 of its canonical JSON."""
        return hashlib.sha256(_DOMAIN + canonical_bytes(self.body())).hexdigest()

    def to_dict(self) -> dict[str, Json]:
        """Return plain values for JSON, with the hash."""
        return self.body() | {"hash": self.hash}
