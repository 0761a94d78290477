"""What one site signs about one batch that it answered.

A statement is what a site *says* it did: under which protection, for whom, among how many
others, at what privacy charge. It holds digests of what left the site, no scores and no
inputs, so that it can be kept and shown to an auditor.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, fields
from typing import Final

from fedinfer_flower.errors import (
    EnvelopeError,
    InvalidValueError,
    SignatureError,
    SizeLimitError,
    UnsupportedVersionError,
)
from fedinfer_flower.privacy.charge import Charge
from fedinfer_flower.receipts.canonical import canonical_bytes, parse_object
from fedinfer_flower.receipts.checks import (
    HEX,
    MAX_ROWS,
    MAX_SITES,
    MAX_TIME,
    Scalars,
    frozen_options,
    hex_bytes,
    in_floats,
    optional_number,
    read_charge,
    wrong_fields,
)
from fedinfer_flower.wire import fields as read
from fedinfer_flower.wire.envelope import Json
from fedinfer_flower.wire.identity import Identity, PublicIdentity

__all__ = [
    "MAX_STATEMENT_BYTES",
    "STATEMENT_DOMAIN",
    "STATEMENT_VERSION",
    "SignedStatement",
    "SiteStatement",
    "cohort_digest",
]

STATEMENT_VERSION: Final = 2
STATEMENT_DOMAIN: Final = "receipt-statement"
MAX_STATEMENT_BYTES: Final = 65_536

_OPTIONAL: Final = ("epsilon", "delta", "record_epsilon", "record_delta")


def cohort_digest(key_ids: Iterable[str]) -> str:
    """Return one digest for the set of sites that were asked.

    Parameters
    ----------
    key_ids : iterable of str
        Fingerprints of the sites, 64 hex digits each, in any order.

    Returns
    -------
    digest : str
        SHA-256, in hex, of ``b"fedinfer/v1/cohort|"`` and the sorted fingerprints, 32
        bytes each.

    Raises
    ------
    InvalidValueError
        If one is no fingerprint, or comes twice.

    Examples
    --------
    >>> cohort_digest(["0" * 64, "1" * 64]) == cohort_digest(["1" * 64, "0" * 64])
    True
    """
    ordered = sorted(key_ids)
    if len(set(ordered)) != len(ordered) or not all(HEX.fullmatch(k) for k in ordered):
        raise InvalidValueError("a cohort is of distinct key ids of 64 hex digits")
    raw = b"".join(bytes.fromhex(key_id) for key_id in ordered)
    return hashlib.sha256(b"fedinfer/v1/cohort|" + raw).hexdigest()


@dataclass(frozen=True, kw_only=True)
class SiteStatement:
    """One answered batch, in the words of the site that answered it.

    Parameters
    ----------
    query_id : str
        Of the batch: ``<job id>-<number>``.
    run_id : int
        Flower's run.
    site : str
        The site's own name for itself.
    site_key_id : str
        Fingerprint of the key that signs.
    querier_key_id : str
        Fingerprint of who asked; empty if the site could not tell.
    session_key_id : str
        Fingerprint of the querier's public key for which the answer is encrypted or masked;
        empty for protections without one.
    query_sealed : bool
        Whether the query reached the site sealed to its key.
    protection, rule : str
    protection_options, rule_options : mapping of str to scalar
    n_rows : int
        Rows of the batch.
    n_fresh_rows : int
        Rows that were charged; the others came from the site's cache and cost nothing.
    n_sites_asked : int
    cohort_digest : str
        Of the sites asked, as the site was told: see `cohort_digest`.
    min_cohort : int
        Fewest sites whose combination the site accepts to be part of.
    epsilon, delta : float, optional
        Charge of this batch to this querier; None without differential privacy.
    charge : Charge
        The same in sums that add up, which epsilons do not; zero without differential
        privacy.
    profile_commitment : str
        Digest of the profile that the site declared: `SiteProfile.commitment`.
    model_digest : str
        SHA-256 of the model, in hex; empty if the site does not say.
    record_epsilon, record_delta : float, optional
        The site's claim about one training record of its model; None without one.
    payload_digest : str
        SHA-256, in hex, of the payload that left the site.
    evidence : str
        Form of a second copy that left with it, for a settlement; empty for none.
    issued_at : int
        UTC, seconds since 1970, by the site's clock.

    Raises
    ------
    InvalidValueError
        If a field cannot be that of an honest statement; names it.

    Privacy
    -------
    Whoever holds a statement learns who answered whom, when, how many rows, under what
    protection and at what charge. The payload's digest tells whether a payload that one
    already holds is the one that left; under `plain`, with a handful of possible scores,
    it can be guessed from. Statements go where answers go, or to those whom the parties
    choose to show them to.
    """

    query_id: str
    run_id: int
    site: str
    site_key_id: str
    querier_key_id: str = ""
    session_key_id: str = ""
    query_sealed: bool = False
    protection: str
    protection_options: Scalars = field(default_factory=dict)
    rule: str
    rule_options: Scalars = field(default_factory=dict)
    n_rows: int
    n_fresh_rows: int
    n_sites_asked: int
    cohort_digest: str
    min_cohort: int
    epsilon: float | None = None
    delta: float | None = None
    charge: Charge = field(default_factory=Charge)
    profile_commitment: str
    model_digest: str = ""
    record_epsilon: float | None = None
    record_delta: float | None = None
    payload_digest: str
    evidence: str = ""
    issued_at: int

    def __post_init__(self) -> None:
        for name in ("protection_options", "rule_options"):
            object.__setattr__(self, name, frozen_options(name, getattr(self, name)))
        # One value, one byte form: 1 and 1.0, 0.0 and -0.0 are equal but written differently.
        for name in (n for n in _OPTIONAL if getattr(self, n) is not None):
            object.__setattr__(self, name, float(getattr(self, name)) + 0.0)
        object.__setattr__(self, "charge", in_floats(self.charge))
        wrong = next(wrong_fields(self), None)
        if wrong is not None:
            raise InvalidValueError(f"{wrong} is not that of a site's statement")

    @property
    def job_id(self) -> str:
        """The job that the batch is part of."""
        return self.query_id.rpartition("-")[0]

    def to_dict(self) -> dict[str, Json]:
        """Return plain values for JSON, with the version."""
        plain: dict[str, Json] = {spec.name: getattr(self, spec.name) for spec in fields(self)}
        for name in ("protection_options", "rule_options"):
            plain[name] = dict(plain[name])
        plain["charge"] = self.charge.to_dict()
        return plain | {"version": STATEMENT_VERSION}

    @classmethod
    def from_dict(cls, plain: Mapping[str, Json]) -> SiteStatement:
        """Read what `to_dict` wrote.

        Raises
        ------
        EnvelopeError
            If a field is missing, unknown or malformed.
        UnsupportedVersionError
            If the version is another.
        """
        if type(plain.get("version")) is not int or plain["version"] != STATEMENT_VERSION:
            raise UnsupportedVersionError(
                f"this release reads statements of version {STATEMENT_VERSION} only"
            )
        read.exactly(plain, "version", *(spec.name for spec in fields(cls)))
        names = ("query_id", "site", "protection", "rule")
        keys = ("site_key_id", "querier_key_id", "session_key_id")
        digests = ("cohort_digest", "profile_commitment", "model_digest", "payload_digest")
        simple: dict[str, Json] = {name: read.text(plain, name) for name in names + keys + digests}
        simple |= {name: optional_number(plain, name) for name in _OPTIONAL}
        try:
            return cls(
                **simple,
                evidence=read.text(plain, "evidence", max_chars=16),
                charge=read_charge(plain, "charge"),
                run_id=read.whole(plain, "run_id", low=0, high=2**64 - 1),
                query_sealed=read.flag(plain, "query_sealed"),
                protection_options=read.scalars(plain, "protection_options"),
                rule_options=read.scalars(plain, "rule_options"),
                n_rows=read.whole(plain, "n_rows", low=1, high=MAX_ROWS),
                n_fresh_rows=read.whole(plain, "n_fresh_rows", low=0, high=MAX_ROWS),
                n_sites_asked=read.whole(plain, "n_sites_asked", low=1, high=MAX_SITES),
                min_cohort=read.whole(plain, "min_cohort", low=1, high=MAX_SITES),
                issued_at=read.whole(plain, "issued_at", low=0, high=MAX_TIME),
            )
        except InvalidValueError as exc:
            raise EnvelopeError(f"the statement is not valid: {exc.message}") from None

    def to_bytes(self) -> bytes:
        """Return the bytes that are signed: see `canonical_bytes`.

        Raises
        ------
        SizeLimitError
            If options make it longer than `MAX_STATEMENT_BYTES`.
        """
        data = canonical_bytes(self.to_dict())
        if len(data) > MAX_STATEMENT_BYTES:
            raise SizeLimitError(
                f"a statement of {len(data)} bytes; the limit is {MAX_STATEMENT_BYTES}"
            )
        return data

    @classmethod
    def from_bytes(cls, data: bytes | memoryview) -> SiteStatement:
        """Read the canonical bytes of a statement, and no others.

        Raises
        ------
        EnvelopeError
            If they are not exactly one statement in its canonical form.
        SizeLimitError
            If there are more than `MAX_STATEMENT_BYTES`.
        """
        statement = cls.from_dict(
            parse_object(data, max_bytes=MAX_STATEMENT_BYTES, what="statement")
        )
        if statement.to_bytes() != bytes(data):
            raise EnvelopeError("the statement is not in its canonical form")
        return statement

    def sign(self, identity: Identity) -> SignedStatement:
        """Sign the statement with the key that it names.

        Raises
        ------
        InvalidValueError
            If it names another key.
        """
        if identity.key_id != self.site_key_id:
            raise InvalidValueError("a statement is signed by the key that its site_key_id names")
        return SignedStatement(
            statement=self,
            signer=identity.public,
            signature=identity.sign(STATEMENT_DOMAIN, self.to_bytes()),
        )


@dataclass(frozen=True, kw_only=True)
class SignedStatement:
    """A statement with the public key and the signature of its site.

    Making or reading one checks no signature: `verify` does.

    Parameters
    ----------
    statement : SiteStatement
    signer : PublicIdentity
    signature : bytes
        Ed25519, 64 bytes.

    Examples
    --------
    >>> site = Identity.generate()
    >>> statement = SiteStatement(
    ...     query_id="job-0", run_id=1, site="north", site_key_id=site.key_id,
    ...     protection="plain", rule="majority-vote", n_rows=2, n_fresh_rows=2,
    ...     n_sites_asked=1, cohort_digest=cohort_digest([site.key_id]), min_cohort=1,
    ...     profile_commitment="0" * 64, payload_digest="0" * 64, issued_at=1_800_000_000)
    >>> signed = statement.sign(site)
    >>> signed.verify()
    >>> SignedStatement.from_bytes(signed.to_bytes()) == signed
    True
    """

    statement: SiteStatement
    signer: PublicIdentity
    signature: bytes

    def __post_init__(self) -> None:
        if len(self.signature) != 64:
            raise EnvelopeError("a signature has 64 bytes")

    def verify(self) -> None:
        """Require that the key which the statement names signed exactly this statement.

        Whether that key is the site's own is a matter of pins.

        Raises
        ------
        SignatureError
            If it did not.
        """
        if self.signer.key_id != self.statement.site_key_id:
            raise SignatureError("a statement comes with another key than it names")
        self.signer.verify(STATEMENT_DOMAIN, self.statement.to_bytes(), self.signature)

    def to_dict(self) -> dict[str, Json]:
        """Return plain values for JSON; keys and signature in hex."""
        return {
            "statement": self.statement.to_dict(),
            "signer": self.signer.to_bytes().hex(),
            "signature": self.signature.hex(),
        }

    @classmethod
    def from_dict(cls, plain: Mapping[str, Json]) -> SignedStatement:
        """Read what `to_dict` wrote.

        Raises
        ------
        EnvelopeError
            If it is something else.
        """
        read.exactly(plain, "statement", "signer", "signature")
        if not isinstance(plain["statement"], dict):
            raise EnvelopeError("field 'statement' is not an object")
        return cls(
            statement=SiteStatement.from_dict(plain["statement"]),
            signer=PublicIdentity.from_bytes(hex_bytes(plain, "signer", n_bytes=64)),
            signature=hex_bytes(plain, "signature", n_bytes=64),
        )

    def to_bytes(self) -> bytes:
        """Return canonical JSON, for the reply in which it travels."""
        return canonical_bytes(self.to_dict())

    @classmethod
    def from_bytes(cls, data: bytes | memoryview) -> SignedStatement:
        """Read canonical JSON, and nothing else.

        Raises
        ------
        EnvelopeError
            If it is something else, or not in its canonical form.
        SizeLimitError
            If it is longer than a statement and a signature can be.
        """
        limit = MAX_STATEMENT_BYTES + 1024
        signed = cls.from_dict(parse_object(data, max_bytes=limit, what="signed statement"))
        if signed.to_bytes() != bytes(data):
            raise EnvelopeError("the signed statement is not in its canonical form")
        return signed
