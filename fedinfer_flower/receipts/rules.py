"""The rules of a receipt, one function each: words if it is kept, an error if not."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Mapping
from typing import Final, TypeAlias, TypeVar

from fedinfer_flower.errors import (
    MissingExtraError,
    ReceiptError,
    UntrustedKeyError,
)
from fedinfer_flower.privacy.accountant import Accountant
from fedinfer_flower.receipts.disclosure import require_mode
from fedinfer_flower.receipts.receipt import Receipt, totals_of
from fedinfer_flower.receipts.statement import SiteStatement, cohort_digest
from fedinfer_flower.receipts.totals import SiteTotal

__all__ = [
    "ALWAYS",
    "NotCheckedError",
    "Rule",
    "coordinator",
    "querier_pin",
    "site_pins",
    "times",
]

T = TypeVar("T")
Rule: TypeAlias = Callable[[Receipt], str]

_CLOCK_SKEW_S: Final = 600
_LONGEST_JOB_S: Final = 7 * 86_400
_EARLIEST: Final = 1_704_067_200
"""2024-01-01: before that there was no such receipt."""

_SAME: Final = (
    "run_id",
    "job_id",
    "querier_key_id",
    "session_key_id",
    "query_sealed",
    "protection",
    "protection_options",
    "rule",
    "rule_options",
    "min_cohort",
)


class NotCheckedError(Exception):
    """A rule that lacks what it would compare with. Never leaves `verification`."""


def site_signatures(receipt: Receipt) -> str:
    """Require that every statement is signed by the key that it names."""
    for signed in receipt.statements:
        signed.verify()
    return f"{len(receipt.statements)} statements, each signed by the key that it names"


def same_job(receipt: Receipt) -> str:
    """Require that all statements are of this job, under its protection and rule."""
    for signed in receipt.statements:
        for name in _SAME:
            if getattr(signed.statement, name) != getattr(receipt, name):
                raise ReceiptError(f"{_of(signed.statement)}: {name} is not that of the receipt")
    return "all statements are of this job, protection and rule"


def cohort(receipt: Receipt) -> str:
    """Require that the sites listed are those that each site was told of."""
    names = [member.name for member in receipt.cohort]
    if len(set(names)) != len(names):
        raise ReceiptError("two members of the cohort have the same name")
    keys = {member.name: member.key_id for member in receipt.cohort}
    digest = cohort_digest(keys.values())
    for signed in receipt.statements:
        said = signed.statement
        if said.cohort_digest != digest or said.n_sites_asked != len(keys):
            raise ReceiptError(f"{_of(said)}: the site was told of another cohort")
        if keys.get(said.site) != said.site_key_id:
            raise ReceiptError(f"{_of(said)}: its name and key are not in the cohort")
    return f"{len(names)} sites were asked, and each that answered was told of the same"


def who_answered(receipt: Receipt) -> str:
    """Require one statement for each answer in the result, and word of each site asked."""
    if not receipt.statements:
        raise ReceiptError("no site signed anything")
    ids = [batch.query_id for batch in receipt.batches]
    if len(set(ids)) != len(ids) or not all(i.rpartition("-")[0] == receipt.job_id for i in ids):
        raise ReceiptError("a batch comes twice, or is of another job")
    counts = Counter((s.statement.query_id, s.statement.site) for s in receipt.statements)
    twice = next((key for key, n in counts.items() if n > 1), None)
    if twice is not None:
        raise ReceiptError(f"site {twice[1]!r} has two statements for {twice[0]}")
    if stray := {query_id for query_id, _ in counts} - set(ids):
        raise ReceiptError(f"there are statements for {min(stray)}, which is no batch of the job")
    asked = {member.name for member in receipt.cohort}
    for batch in receipt.batches:
        listed = [*batch.answered, *(dropout.site for dropout in batch.dropped)]
        if sorted(listed) != sorted(asked):
            raise ReceiptError(f"{batch.query_id}: not every site asked is listed once")
        for site in batch.answered:
            if (batch.query_id, site) not in counts:
                raise ReceiptError(f"{batch.query_id}: no statement by {site!r}, who answered")
    rows = {batch.query_id: batch.n_rows for batch in receipt.batches}
    for signed in receipt.statements:
        if signed.statement.n_rows != rows[signed.statement.query_id]:
            raise ReceiptError(f"{_of(signed.statement)}: rows are not those of the batch")
    dropped = sum(len(batch.dropped) for batch in receipt.batches)
    return f"every answer has its statement; dropouts: {dropped}, by the coordinator's word only"


def min_cohort(receipt: Receipt) -> str:
    """Require that no result is of fewer sites than the sites agreed to."""
    for batch in receipt.batches:
        # Where nobody is in the result there is none.
        if 0 < len(batch.answered) < receipt.min_cohort:
            raise ReceiptError(
                f"{batch.query_id}: {len(batch.answered)} sites in the result, the sites"
                f" agreed to {receipt.min_cohort} or more"
            )
    return f"at least {receipt.min_cohort} sites in every result"


def charges(receipt: Receipt) -> str:
    """Require that each epsilon is at least what its charge comes to."""
    require_mode(receipt.protection)
    noisy = "dp" in receipt.protection.split("+")
    for signed in receipt.statements:
        said = signed.statement
        if noisy != (said.epsilon is not None):
            raise ReceiptError(f"{_of(said)}: its epsilon does not fit the protection")
        if said.epsilon is not None and said.epsilon < _least_epsilon(said) * (1.0 - 1e-9):
            raise ReceiptError(f"{_of(said)}: epsilon is below what its charge comes to")
    if not noisy:
        return "no differential privacy, and none is claimed for the answers"
    return "no epsilon is below what its charge comes to"


def totals(receipt: Receipt) -> str:
    """Require that the totals are those of the statements."""
    expected = {total.site: total for total in _need_extra(lambda: totals_of(receipt.statements))}
    stated = {total.site: total for total in receipt.totals}
    if len(stated) != len(receipt.totals) or stated.keys() != expected.keys():
        raise ReceiptError("the totals are not of the sites that made statements")
    for site, total in expected.items():
        if not _same_total(total, stated[site]):
            raise ReceiptError(f"the total of {site!r} is not that of its statements")
    return "totals follow from the statements"


def disclosures(receipt: Receipt) -> str:
    """Require that who can learn what is said in the words of this release."""
    if receipt.who_can_learn_what != receipt.disclosures_now():
        raise ReceiptError(
            "who can learn what is not what this release says of such a job: the receipt was"
            " altered, or written by another release"
        )
    return "who can learn what is as this release says of such a job"


def times(receipt: Receipt, *, now: float) -> str:
    """Require that no statement is from the future, nor from long before the receipt."""
    if receipt.issued_at > now + _CLOCK_SKEW_S:
        raise ReceiptError("the receipt is from the future")
    for signed in receipt.statements:
        age = receipt.issued_at - signed.statement.issued_at
        if not -_CLOCK_SKEW_S <= age <= _LONGEST_JOB_S or signed.statement.issued_at < _EARLIEST:
            raise ReceiptError(f"{_of(signed.statement)}: its time does not fit the receipt's")
    return "times are plausible; they are by the parties' own clocks"


def coordinator(receipt: Receipt, *, key_id: str | None) -> str:
    """Require that the receipt as a whole is signed by the key that was given."""
    if receipt.coordinator is not None:
        receipt.verify_coordinator()
        if key_id is not None and receipt.coordinator.key_id != key_id:
            raise UntrustedKeyError(
                f"the receipt is signed by key {receipt.coordinator.key_id[:16]}, not by the"
                " coordinator's"
            )
        if key_id is not None:
            return "signed as a whole by the coordinator's key"
        raise NotCheckedError(
            f"signed as a whole by key {receipt.coordinator.key_id[:16]}; whose it is was not given"
        )
    if key_id is not None:
        raise UntrustedKeyError("nobody signed the receipt as a whole")
    raise NotCheckedError("nobody signed the receipt as a whole: who dropped out is hearsay")


def site_pins(receipt: Receipt, *, pins: Mapping[str, str] | None) -> str:
    """Require that the keys of all sites asked are those compared out of band."""
    if pins is None:
        raise NotCheckedError("no pins were given: whose keys these are is not known")
    for member in receipt.cohort:
        if member.key_id in pins.values() and member.name == f"key {member.key_id[:16]}":
            continue  # a site that was not there: the coordinator does not know its name
        if member.name not in pins:
            raise UntrustedKeyError(f"site {member.name!r} is not pinned")
        if pins[member.name] != member.key_id:
            raise UntrustedKeyError(
                f"site {member.name!r} has key {member.key_id[:16]}, pinned is"
                f" {pins[member.name][:16]}"
            )
    return f"the keys of all {len(receipt.cohort)} sites are the pinned ones"


def querier_pin(receipt: Receipt, *, pins: Mapping[str, str] | None) -> str:
    """Require that the querier is one that was compared out of band."""
    if pins is None:
        raise NotCheckedError("no queriers were given: who asked is not known")
    names = sorted(name for name, key_id in pins.items() if key_id == receipt.querier_key_id)
    if not names:
        raise UntrustedKeyError("the querier is not one of the pinned ones")
    return f"asked by {names[0]!r}"


def _of(statement: SiteStatement) -> str:
    return f"statement of {statement.site!r} on {statement.query_id}"


def _least_epsilon(said: SiteStatement) -> float:
    if said.charge.is_free:
        return 0.0
    if not said.delta:
        if not said.charge.is_pure:
            raise ReceiptError(f"{_of(said)}: a delta of 0 does not fit its charge")
        return said.charge.pure_epsilon
    charge, delta = said.charge, said.delta
    return _need_extra(lambda: Accountant().epsilon(charge, delta))


def _same_total(one: SiteTotal, other: SiteTotal) -> bool:
    exact = one.to_dict() | {"epsilon": None}
    if exact != other.to_dict() | {"epsilon": None}:
        return False
    if one.epsilon is None or other.epsilon is None:
        return one.epsilon is other.epsilon
    # Root finding and special functions differ in the last digits between platforms.
    return math.isclose(one.epsilon, other.epsilon, rel_tol=1e-6, abs_tol=1e-9)


def _need_extra(work: Callable[[], T]) -> T:
    try:
        return work()
    except MissingExtraError as exc:
        raise NotCheckedError(f"{exc.message}: {exc.hint}") from None


ALWAYS: Final[Mapping[str, Rule]] = {
    "site signatures": site_signatures,
    "same job": same_job,
    "cohort": cohort,
    "who answered": who_answered,
    "smallest cohort": min_cohort,
    "charges": charges,
    "totals": totals,
    "who can learn what": disclosures,
}
"""Rules that need nothing but the receipt, by the names that people read."""
