"""What an escrow and a stake have come to, from the entries about them.

States are not stored: they follow from entries, one step an entry, and a step that is not
allowed is refused. The same steps are taken when an entry is written and when the book is
verified.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from enum import StrEnum
from typing import Final

from fedinfer_flower.errors import LedgerError
from fedinfer_flower.incentives.ledger.entry import Draft
from fedinfer_flower.incentives.ledger.names import (
    DIGEST,
    ESCROW,
    REASON,
    STAKE,
    is_ordinary,
)
from fedinfer_flower.receipts.checks import JOB_ID, MAX_TIME, QUERY_ID

__all__ = [
    "ESCROW_KINDS",
    "STAKE_KINDS",
    "EscrowState",
    "Outcome",
    "StakeState",
    "State",
    "Status",
    "asked_claims",
    "end_claims",
    "escrow_step",
    "stake_step",
]

ESCROW_KINDS: Final = frozenset({"open-escrow", "dispute", "resolve", "release", "refund"})
STAKE_KINDS: Final = frozenset({"lock-stake", "return-stake", "slash-stake"})


class Status(StrEnum):
    """Where an escrow stands."""

    OPEN = "open"
    DISPUTED = "disputed"
    RELEASED = "released"
    REFUNDED = "refunded"


class Outcome(StrEnum):
    """How an arbiter ends a dispute."""

    RELEASE = "release"
    """The sites may be paid; the querier gets its fee back only after a new deadline."""
    REFUND = "refund"
    """The querier may have its fee back at once; the sites are not paid."""


@dataclass(frozen=True, kw_only=True)
class EscrowState:
    """One job's fee, and whether it may be released or refunded.

    Parameters
    ----------
    job_id : str
    status : Status
    querier : str
        Account that the fee came from.
    querier_key_id : str
        Key that must have asked; empty if any may.
    arbiter : str
        Account whose word ends a dispute; empty: there can be none.
    fee : int
        Micro-credits.
    deadline : int
        UTC, seconds since 1970; from then on the fee can be refunded.
    query_ids : tuple of str
    outcome : Outcome, optional
        Of a dispute that was resolved.
    """

    job_id: str
    status: Status
    querier: str
    querier_key_id: str
    arbiter: str
    fee: int
    deadline: int
    query_ids: tuple[str, ...]
    outcome: Outcome | None = None


@dataclass(frozen=True, kw_only=True)
class StakeState:
    """One site's stake: until when it is locked. How much it is, is the account's balance."""

    until: int = 0


State = EscrowState | StakeState


def asked_claims(job_id: str, query_ids: Iterable[str]) -> tuple[str, ...]:
    """Return what the opening of an escrow claims: job and query ids are used once."""
    return (f"open:{job_id}", *(f"asked:{query_id}" for query_id in query_ids))


def end_claims(job_id: str, query_ids: Iterable[str]) -> tuple[str, ...]:
    """Return what release and refund claim alike, so that only one of them can be."""
    return (f"end:{job_id}", *(f"settled:{query_id}" for query_id in query_ids))


def escrow_step(state: State | None, draft: Draft, *, at: int) -> EscrowState:
    """Return the state of an escrow after an entry.

    Raises
    ------
    LedgerError
        If the entry is not allowed now, or not what such an entry says.
    """
    if draft.kind == "open-escrow":
        return _opened(state, draft)
    if not isinstance(state, EscrowState):
        raise LedgerError("there is no escrow for this job", hint="open one first")
    if state.status in (Status.RELEASED, Status.REFUNDED):
        raise LedgerError(
            f"the fee of job {state.job_id} is {state.status} already",
            hint="a fee is released or refunded once",
        )
    if draft.kind == "dispute":
        return _disputed(state, draft)
    if draft.kind == "resolve":
        return _resolved(state, draft, at=at)
    if state.status is Status.DISPUTED:
        raise LedgerError(
            f"job {state.job_id} is disputed", hint="its arbiter must resolve the dispute first"
        )
    return _ended(state, draft, at=at)


def _opened(state: State | None, draft: Draft) -> EscrowState:
    if state is not None:
        raise LedgerError("there was an escrow for this job before", hint="use a fresh job id")
    memo, job_id = draft.memo, str(draft.memo.get("job_id", ""))
    _require_fields(draft, "job_id", "querier", "querier_key_id", "arbiter", "fee", "deadline")
    querier, arbiter, fee = memo["querier"], memo["arbiter"], memo["fee"]
    key_id, deadline = memo["querier_key_id"], memo["deadline"]
    ids = tuple(c.removeprefix("asked:") for c in draft.claims if c.startswith("asked:"))
    fits = (
        JOB_ID.fullmatch(job_id)
        and draft.subject == ESCROW + job_id
        and is_ordinary(querier)
        and (arbiter == "" or is_ordinary(arbiter))
        and (key_id == "" or DIGEST.fullmatch(str(key_id)))
        and isinstance(fee, int)
        and fee > 0
        and draft.amounts == {str(querier): -fee, ESCROW + job_id: fee}
        and isinstance(deadline, int)
        and 0 <= deadline <= MAX_TIME
        and ids
        and all(QUERY_ID.fullmatch(i) and i.rpartition("-")[0] == job_id for i in ids)
        and set(draft.claims) == set(asked_claims(job_id, ids))
    )
    if not fits:
        raise _not_one(draft)
    return EscrowState(
        job_id=job_id,
        status=Status.OPEN,
        querier=str(querier),
        querier_key_id=str(key_id),
        arbiter=str(arbiter),
        fee=int(fee),
        deadline=int(deadline),
        query_ids=ids,
    )


def _disputed(state: EscrowState, draft: Draft) -> EscrowState:
    _require_fields(draft, "job_id", "by", "reason_code")
    if not state.arbiter:
        raise LedgerError(
            f"job {state.job_id} has no arbiter, who could end a dispute",
            hint="name one when the escrow is opened",
        )
    if state.outcome is not None:
        raise LedgerError(f"the dispute of job {state.job_id} was resolved", hint="that is final")
    claims = (f"dispute:{state.job_id}:{draft.memo['by']}",)
    reason = REASON.fullmatch(str(draft.memo["reason_code"]))
    if draft.amounts or draft.claims != claims or not reason or not is_ordinary(draft.memo["by"]):
        raise _not_one(draft)
    return replace(state, status=Status.DISPUTED)


def _resolved(state: EscrowState, draft: Draft, *, at: int) -> EscrowState:
    _require_fields(draft, "job_id", "by", "outcome", "deadline")
    if state.status is not Status.DISPUTED:
        raise LedgerError(f"job {state.job_id} is not disputed")
    if draft.memo["by"] != state.arbiter:
        raise LedgerError(
            f"a dispute of job {state.job_id} is resolved by the arbiter that was named when its"
            " escrow was opened"
        )
    deadline, outcome = draft.memo["deadline"], draft.memo["outcome"]
    fits = (
        not draft.amounts
        and draft.claims == (f"resolve:{state.job_id}",)
        and outcome in set(Outcome)
        and isinstance(deadline, int)
        and deadline <= MAX_TIME
        and (deadline > at if outcome == Outcome.RELEASE else deadline == state.deadline)
    )
    if not fits:
        raise _not_one(draft)
    return replace(state, status=Status.OPEN, outcome=Outcome(str(outcome)), deadline=int(deadline))


def _ended(state: EscrowState, draft: Draft, *, at: int) -> EscrowState:
    held = ESCROW + state.job_id
    others = {name: amount for name, amount in draft.amounts.items() if name != held}
    if draft.amounts.get(held) != -state.fee or set(draft.claims) != set(
        end_claims(state.job_id, state.query_ids)
    ):
        raise _not_one(draft)
    if draft.kind == "refund":
        _require_fields(draft, "job_id")
        if at < state.deadline and state.outcome is not Outcome.REFUND:
            raise LedgerError(
                f"the fee of job {state.job_id} can be refunded from {state.deadline} on (seconds"
                " since 1970)",
                hint="until then the sites may still be paid",
            )
        if others != {state.querier: state.fee}:
            raise _not_one(draft)
        return replace(state, status=Status.REFUNDED)
    _require_fields(draft, "job_id", "receipt_digest", "settlement_digest")
    if state.outcome is Outcome.REFUND:
        raise LedgerError(f"the dispute of job {state.job_id} was resolved for the querier")
    digests = (str(draft.memo["receipt_digest"]), str(draft.memo["settlement_digest"]))
    fits = (
        all(is_ordinary(name) if n > 0 else name.startswith(STAKE) for name, n in others.items())
        and DIGEST.fullmatch(digests[0])
        and (digests[1] == "" or DIGEST.fullmatch(digests[1]))
    )
    if not fits:
        raise _not_one(draft)
    return replace(state, status=Status.RELEASED)


def stake_step(state: State | None, draft: Draft, *, at: int) -> StakeState:
    """Return the state of a stake after an entry.

    Raises
    ------
    LedgerError
        If the entry is not allowed now, or not what such an entry says.
    """
    before = state if isinstance(state, StakeState) else StakeState()
    owner = draft.subject.removeprefix(STAKE)
    moved = {name: amount for name, amount in draft.amounts.items() if name != draft.subject}
    held = draft.amounts.get(draft.subject, 0)
    other, amount = next(iter(moved.items()), ("", 0))
    if len(moved) != 1 or draft.claims or held != -amount or not is_ordinary(owner):
        raise _not_one(draft)
    if draft.kind == "lock-stake":
        _require_fields(draft, "until")
        until = draft.memo["until"]
        if held <= 0 or other != owner or not isinstance(until, int) or not 0 <= until <= MAX_TIME:
            raise _not_one(draft)
        return StakeState(until=max(before.until, until))
    if held >= 0 or not is_ordinary(other):
        raise _not_one(draft)
    if draft.kind == "slash-stake":
        _require_fields(draft, "reason_code")
        # In its owner's favour it would be a way around the lock.
        if other == owner or not REASON.fullmatch(str(draft.memo["reason_code"])):
            raise _not_one(draft)
        return before
    _require_fields(draft)
    if other != owner:
        raise _not_one(draft)
    if at < before.until:
        raise LedgerError(
            f"the stake is locked until {before.until} (seconds since 1970)",
            hint="it stands for answers that may still be disputed",
        )
    return before


def _require_fields(draft: Draft, *names: str) -> None:
    if set(draft.memo) != set(names):
        raise _not_one(draft)


def _not_one(draft: Draft) -> LedgerError:
    return LedgerError(f"this is not what an entry of kind {draft.kind!r} says")
