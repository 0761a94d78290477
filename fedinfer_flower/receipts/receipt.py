"""The receipt of a job: every site's signed statement, and what follows from them.

A receipt is one JSON file that people can read and a program can verify without a network:
see `verification.verify`. The coordinator puts it together and may sign it. What it says of
sites that answered is theirs; what it says of sites that did not is the coordinator's.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass, field, fields, replace
from typing import Final

from fedinfer_flower.errors import (
    EnvelopeError,
    InvalidValueError,
    SignatureError,
    SizeLimitError,
    UnsupportedVersionError,
)
from fedinfer_flower.receipts.batches import BatchRecord, CohortMember
from fedinfer_flower.receipts.canonical import canonical_bytes, parse_object
from fedinfer_flower.receipts.checks import (
    HEX,
    JOB_ID,
    MAX_SITES,
    MAX_TIME,
    NAME,
    Scalars,
    frozen_options,
    hex_bytes,
    objects,
)
from fedinfer_flower.receipts.disclosure import DisclosureLine, disclosures
from fedinfer_flower.receipts.statement import SignedStatement
from fedinfer_flower.receipts.totals import SiteTotal, site_total
from fedinfer_flower.wire import fields as read
from fedinfer_flower.wire.envelope import Json
from fedinfer_flower.wire.identity import Identity, PublicIdentity

__all__ = [
    "MAX_RECEIPT_BYTES",
    "RECEIPT_DOMAIN",
    "RECEIPT_VERSION",
    "Receipt",
    "totals_of",
]

RECEIPT_VERSION: Final = 1
RECEIPT_DOMAIN: Final = "receipt"
MAX_RECEIPT_BYTES: Final = 64 << 20


@dataclass(frozen=True, kw_only=True)
class Receipt:
    """One job: what sites signed, and what the coordinator says of them.

    Make one with `Receipt.for_job`; read one with `from_bytes`, which checks its form only.

    Parameters
    ----------
    job_id : str
    run_id : int
    querier_key_id : str
        Empty if unknown.
    session_key_id : str
        Key for which answers are encrypted or masked; empty without one.
    query_sealed : bool
    protection, rule : str
    protection_options, rule_options : mapping of str to scalar
    key_at_coordinator : bool
        Whether the coordinator could open every answer.
    cohort : tuple of CohortMember
        All sites that were asked.
    min_cohort : int
    batches : tuple of BatchRecord
    statements : tuple of SignedStatement
        One for each answer that arrived.
    totals : tuple of SiteTotal
    who_can_learn_what : tuple of DisclosureLine
    issued_at : int
        UTC, seconds since 1970, by the coordinator's clock.
    coordinator : PublicIdentity, optional
        Who signed the receipt as a whole.
    signature : bytes
        Ed25519, of `body_bytes`; empty if nobody signed.

    Privacy
    -------
    Tells its reader who asked whom, how many rows, and who answered; no inputs, no scores.
    """

    job_id: str
    run_id: int
    querier_key_id: str
    session_key_id: str
    query_sealed: bool
    protection: str
    protection_options: Scalars
    rule: str
    rule_options: Scalars
    key_at_coordinator: bool
    cohort: tuple[CohortMember, ...]
    min_cohort: int
    batches: tuple[BatchRecord, ...]
    statements: tuple[SignedStatement, ...]
    totals: tuple[SiteTotal, ...]
    who_can_learn_what: tuple[DisclosureLine, ...]
    issued_at: int
    coordinator: PublicIdentity | None = None
    signature: bytes = field(default=b"", repr=False)

    def __post_init__(self) -> None:
        for name in ("protection_options", "rule_options"):
            object.__setattr__(self, name, frozen_options(name, getattr(self, name)))
        for name in ("querier_key_id", "session_key_id"):
            if getattr(self, name) and not HEX.fullmatch(getattr(self, name)):
                raise InvalidValueError(f"{name} is empty or 64 hex digits")
        if not JOB_ID.fullmatch(self.job_id):
            raise InvalidValueError("a job id has 1 to 56 letters, digits, - and _")
        if not (NAME.fullmatch(self.protection) and NAME.fullmatch(self.rule)):
            raise InvalidValueError("a receipt names its protection and its rule")
        if (self.coordinator is None) != (not self.signature):
            raise InvalidValueError("a receipt has a coordinator and a signature, or neither")

    @classmethod
    def for_job(
        cls,
        statements: Iterable[SignedStatement],
        *,
        cohort: Iterable[CohortMember],
        batches: Iterable[BatchRecord],
        issued_at: int,
        key_at_coordinator: bool = False,
        coordinator: Identity | None = None,
    ) -> Receipt:
        """Put a receipt together from the statements that came with the answers.

        Parameters
        ----------
        statements : iterable of SignedStatement
            At least one. Of a site that was late or refused as well, if it arrived: what
            was charged there was spent.
        cohort : iterable of CohortMember
        batches : iterable of BatchRecord
        issued_at : int
        key_at_coordinator : bool
        coordinator : Identity, optional
            Signs the receipt as a whole.

        Raises
        ------
        InvalidValueError
            If there is no statement.
        UnknownNameError
            If nobody has written down what the protection discloses.
        MissingExtraError
            To add up Gaussian noise without the extra ``dp``.
        """
        signed = tuple(sorted(statements, key=lambda s: (s.statement.query_id, s.statement.site)))
        if not signed:
            raise InvalidValueError("a receipt needs at least one statement")
        first = signed[0].statement
        draft = cls(
            job_id=first.job_id,
            run_id=first.run_id,
            querier_key_id=first.querier_key_id,
            session_key_id=first.session_key_id,
            query_sealed=first.query_sealed,
            protection=first.protection,
            protection_options=first.protection_options,
            rule=first.rule,
            rule_options=first.rule_options,
            key_at_coordinator=key_at_coordinator,
            cohort=tuple(sorted(cohort, key=lambda m: m.name)),
            min_cohort=first.min_cohort,
            batches=tuple(batches),
            statements=signed,
            totals=totals_of(signed),
            who_can_learn_what=(),
            issued_at=issued_at,
        )
        receipt = replace(draft, who_can_learn_what=draft.disclosures_now())
        return receipt if coordinator is None else receipt.signed_by(coordinator)

    def disclosures_now(self) -> tuple[DisclosureLine, ...]:
        """Return the table that this release writes for such a job.

        Raises
        ------
        UnknownNameError
            If nobody has written down what the protection discloses.
        """
        options = dict(self.protection_options)
        options["allow_coordinator_key"] = self.key_at_coordinator
        options["evidence"] = max((s.statement.evidence for s in self.statements), default="")
        return disclosures(self.protection, sealed=self.query_sealed, options=options)

    def signed_by(self, coordinator: Identity) -> Receipt:
        """Return the same receipt with a coordinator's signature."""
        signature = coordinator.sign(RECEIPT_DOMAIN, self.body_bytes())
        return replace(self, coordinator=coordinator.public, signature=signature)

    def verify_coordinator(self) -> None:
        """Require that the coordinator that the receipt names signed exactly this receipt.

        Raises
        ------
        SignatureError
            If it did not, or nobody signed.
        """
        if self.coordinator is None:
            raise SignatureError("nobody signed the receipt as a whole")
        self.coordinator.verify(RECEIPT_DOMAIN, self.body_bytes(), self.signature)

    def body_bytes(self) -> bytes:
        """Return what a coordinator signs: everything but its key and signature."""
        return canonical_bytes(self._body())

    def to_dict(self) -> dict[str, Json]:
        """Return plain values for JSON."""
        signer = None if self.coordinator is None else self.coordinator.to_bytes().hex()
        return self._body() | {"coordinator": signer, "signature": self.signature.hex()}

    def to_bytes(self) -> bytes:
        """Return the receipt as a JSON file, indented for reading.

        Raises
        ------
        SizeLimitError
            If it is longer than `MAX_RECEIPT_BYTES`: nobody would read it.
        """
        data = (json.dumps(self.to_dict(), indent=1, allow_nan=False) + "\n").encode()
        if len(data) > MAX_RECEIPT_BYTES:
            raise SizeLimitError(
                f"a receipt of {len(data)} bytes; the limit is {MAX_RECEIPT_BYTES}"
            )
        return data

    @classmethod
    def from_bytes(cls, data: bytes | memoryview, *, max_bytes: int = MAX_RECEIPT_BYTES) -> Receipt:
        """Read the form of a receipt; believe nothing of it before `verify`.

        Raises
        ------
        EnvelopeError
            If it is not exactly one receipt, or has an unknown field anywhere.
        SizeLimitError
            If it is longer than `max_bytes`.
        UnsupportedVersionError
            If the version is another.
        """
        plain = parse_object(data, max_bytes=max_bytes, what="receipt")
        if type(plain.get("version")) is not int or plain["version"] != RECEIPT_VERSION:
            raise UnsupportedVersionError(
                f"this release reads receipts of version {RECEIPT_VERSION} only"
            )
        read.exactly(plain, "version", *(spec.name for spec in fields(cls)))
        strings = ("job_id", "querier_key_id", "session_key_id", "protection", "rule")
        values: dict[str, Json] = {name: read.text(plain, name) for name in strings}
        values |= {n: read.scalars(plain, n) for n in ("protection_options", "rule_options")}
        values |= {n: read.flag(plain, n) for n in ("query_sealed", "key_at_coordinator")}
        is_signed = plain["coordinator"] is not None
        signer = hex_bytes(plain, "coordinator", n_bytes=64) if is_signed else b""
        try:
            return cls(
                **values,
                run_id=read.whole(plain, "run_id", low=0, high=2**64 - 1),
                min_cohort=read.whole(plain, "min_cohort", low=1, high=MAX_SITES),
                issued_at=read.whole(plain, "issued_at", low=0, high=MAX_TIME),
                cohort=tuple(CohortMember.from_dict(m) for m in objects(plain, "cohort")),
                batches=tuple(BatchRecord.from_dict(b) for b in objects(plain, "batches")),
                statements=tuple(
                    SignedStatement.from_dict(s) for s in objects(plain, "statements")
                ),
                totals=tuple(SiteTotal.from_dict(t) for t in objects(plain, "totals")),
                who_can_learn_what=tuple(
                    DisclosureLine.from_dict(d) for d in objects(plain, "who_can_learn_what")
                ),
                coordinator=PublicIdentity.from_bytes(signer) if is_signed else None,
                signature=hex_bytes(plain, "signature", n_bytes=64 if is_signed else 0),
            )
        except InvalidValueError as exc:
            raise EnvelopeError(f"the receipt is not valid: {exc.message}") from None

    def _body(self) -> dict[str, Json]:
        plain: dict[str, Json] = {"version": RECEIPT_VERSION}
        plain |= {spec.name: getattr(self, spec.name) for spec in fields(self)}
        for name in ("protection_options", "rule_options"):
            plain[name] = dict(plain[name])
        for name in ("cohort", "batches", "statements", "totals", "who_can_learn_what"):
            plain[name] = [item.to_dict() for item in plain[name]]
        del plain["coordinator"], plain["signature"]
        return plain


def totals_of(statements: Iterable[SignedStatement]) -> tuple[SiteTotal, ...]:
    """Return what the job cost each site, in the order of their names."""
    by_site: dict[str, list[SignedStatement]] = {}
    for signed in statements:
        by_site.setdefault(signed.statement.site, []).append(signed)
    return tuple(site_total(s.statement for s in by_site[site]) for site in sorted(by_site))
