"""Which entry may follow: by its kind, its money, and what came before."""

from __future__ import annotations

from typing import Final

from fedinfer_flower.errors import LedgerError
from fedinfer_flower.incentives.ledger.entry import Draft
from fedinfer_flower.incentives.ledger.names import (
    DIGEST,
    ESCROW,
    EXTERNAL,
    KEY,
    KIND,
    ROW_KEY,
    is_ordinary,
)
from fedinfer_flower.incentives.ledger.states import (
    ESCROW_KINDS,
    STAKE_KINDS,
    State,
    escrow_step,
    stake_step,
)

__all__ = ["FIRST_KIND", "RESERVED_KINDS", "step"]

FIRST_KIND: Final = "open-ledger"
RESERVED_KINDS: Final = frozenset({FIRST_KIND, "deposit", "withdraw"}) | ESCROW_KINDS | STAKE_KINDS
"""Kinds that the ledger writes itself; `Ledger.post` refuses them."""


def step(state: State | None, draft: Draft, *, at: int) -> State | None:
    """Require that an entry is one that may be written; return the state of its subject.

    Parameters
    ----------
    state : EscrowState or StakeState, optional
        Of the entry's subject, before.
    draft : Draft
    at : int
        UTC, seconds since 1970.

    Raises
    ------
    LedgerError
        If it may not.

    Examples
    --------
    >>> gift = Draft(kind="gift", key="g1", amounts={"external": -5, "a": 5})
    >>> step(None, gift, at=0)  # doctest: +ELLIPSIS
    Traceback (most recent call last):
    ...
    fedinfer_flower.errors.LedgerError: FI412 ... kind 'gift' cannot do this
    """
    if not KIND.fullmatch(draft.kind) or not ROW_KEY.fullmatch(draft.key):
        raise LedgerError("an entry's kind or key is none")
    if draft.kind in ESCROW_KINDS:
        _require_key(draft, draft.subject.removeprefix(ESCROW))
        return escrow_step(state, draft, at=at)
    if draft.kind in STAKE_KINDS:
        if not draft.key.startswith(f"{draft.kind}:"):
            raise _refused(draft)
        return stake_step(state, draft, at=at)
    if draft.kind == FIRST_KIND:
        ledger_id = str(draft.memo.get("ledger_id", ""))
        if draft.amounts or draft.subject or draft.claims or not DIGEST.fullmatch(ledger_id):
            raise _refused(draft)
        return None
    if not KEY.fullmatch(draft.key) or not _moves_as_it_may(draft):
        raise _refused(draft)
    return None


def _require_key(draft: Draft, job_id: str) -> None:
    # One key an act and job, so that doing it again is seen to be the same; several parties
    # may dispute.
    key = f"{draft.kind}:{job_id}"
    if draft.kind == "dispute":
        if not draft.key.startswith(f"{key}:"):
            raise _refused(draft)
    elif draft.key != key:
        raise _refused(draft)


def _moves_as_it_may(draft: Draft) -> bool:
    """Whether an entry of no escrow and no stake moves money as its kind may."""
    if draft.subject or draft.claims:
        return False
    goes_in = {name: amount > 0 for name, amount in draft.amounts.items()}
    outside = goes_in.pop(EXTERNAL, None)
    if not all(is_ordinary(name) for name in goes_in):
        return False
    if draft.kind == "deposit":
        return outside is False and list(goes_in.values()) == [True]
    if draft.kind == "withdraw":
        return outside is True and list(goes_in.values()) == [False]
    return outside is None and len(goes_in) > 1


def _refused(draft: Draft) -> LedgerError:
    return LedgerError(f"an entry of kind {draft.kind!r} cannot do this")
