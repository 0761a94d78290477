"""A session: who computes, with whose networks, for whom, and what is disclosed.

The querier signs it; every site checks it against its own consent before it takes part, and
everything that is sealed in the session is bound to its digest.
"""

from __future__ import annotations

import hashlib
import time
from dataclasses import dataclass
from functools import cached_property
from typing import Final

from fedinfer_flower.errors import (
    BindingError,
    EnvelopeError,
    ExpiredError,
    InvalidValueError,
    ProtectionRefusedError,
    UntrustedKeyError,
)
from fedinfer_flower.mpc import tls
from fedinfer_flower.mpc.forward import Disclosed, MpcRule
from fedinfer_flower.mpc.network import NetworkSpec
from fedinfer_flower.mpc.runtime import Computation
from fedinfer_flower.mpc.shares import N_PARTIES
from fedinfer_flower.mpc.statement import SiteStatement, read_signed, sign_document
from fedinfer_flower.wire import fields
from fedinfer_flower.wire.envelope import Envelope, Kind, decode, encode
from fedinfer_flower.wire.identity import Identity, PublicIdentity

__all__ = ["MpcConsent", "MpcSession"]

_DOMAIN: Final = "mpc-session"
MAX_OWNERS: Final = 64
MAX_BATCHES: Final = 256
MAX_ROWS: Final = 4096


@dataclass(frozen=True, kw_only=True)
class MpcSession:
    """The public, signed description of one job.

    Parameters
    ----------
    session_id : str
        128 random bits in hex.
    querier : PublicIdentity
    parties, owners : tuple of bytes
        Signed `SiteStatement`s, as the sites made them. The order of parties is their rank.
    rule : MpcRule
    disclosed : Disclosed
    n_queries : int
        Rows of every batch.
    n_batches : int
    expires_at : int
        Unix seconds.

    Raises
    ------
    InvalidValueError
        If the statements do not make a computation.
    ProtocolError
        If one of them does not verify.
    """

    session_id: str
    querier: PublicIdentity
    parties: tuple[bytes, ...]
    owners: tuple[bytes, ...]
    rule: MpcRule
    disclosed: Disclosed
    n_queries: int
    n_batches: int
    expires_at: int

    def __post_init__(self) -> None:
        if len(self.parties) != N_PARTIES or not 1 <= len(self.owners) <= MAX_OWNERS:
            raise InvalidValueError(
                f"a session has {N_PARTIES} parties and 1 to {MAX_OWNERS} owners"
            )
        if not 1 <= self.n_queries <= MAX_ROWS or not 1 <= self.n_batches <= MAX_BATCHES:
            raise InvalidValueError(
                f"a session has at most {MAX_BATCHES} batches of at most {MAX_ROWS} rows"
            )
        # One institution with two places would be two parties, who see everything.
        for role, places in (("party", self.party_places), ("owner", self.owner_places)):
            keys = {place.identity.signing_key for place in places}
            sealing = {place.identity.agreement_key for place in places}
            if len(keys) < len(places) or len(sealing) < len(places):
                raise InvalidValueError(f"a session with the same {role} twice")
        if not all(place.computes for place in self.party_places):
            raise InvalidValueError(
                "a party without an address", hint="give the site MpcSite(address='host:port')"
            )
        if any(place.network is None for place in self.owner_places):
            raise InvalidValueError("an owner without a network")
        shapes = {spec.input_shape for spec in self.specs}
        if len(shapes) != 1 or len({place.classes for place in self.owner_places}) != 1:
            raise InvalidValueError(
                "the owners' networks take other inputs, or name their classes otherwise",
                hint="architectures may differ; input shape and order of classes may not",
            )

    @cached_property
    def party_places(self) -> tuple[SiteStatement, ...]:
        """The parties' statements, read."""
        return tuple(SiteStatement.from_bytes(data) for data in self.parties)

    @cached_property
    def owner_places(self) -> tuple[SiteStatement, ...]:
        """The owners' statements, read."""
        return tuple(SiteStatement.from_bytes(data) for data in self.owners)

    @property
    def specs(self) -> tuple[NetworkSpec, ...]:
        """The owners' networks."""
        return tuple(place.network for place in self.owner_places if place.network is not None)

    @property
    def classes(self) -> tuple[str, ...]:
        """Class names, in the order of the logits."""
        return self.owner_places[0].classes

    @property
    def computation(self) -> Computation:
        """What the parties run."""
        return Computation(
            specs=self.specs, rule=self.rule, disclosed=self.disclosed, n_queries=self.n_queries
        )

    def digest(self) -> bytes:
        """Return the SHA-256 of the byte form."""
        return hashlib.sha256(self._body()).digest()

    def rank_of(self, key_id: str) -> int:
        """Return a site's rank among the parties; raise BindingError if it has none."""
        return _place(self.party_places, key_id, "a party")

    def owner_number(self, key_id: str) -> int:
        """Return a site's number among the owners; raise BindingError if it has none."""
        return _place(self.owner_places, key_id, "an owner")

    def _body(self) -> bytes:
        return encode(
            Envelope(
                kind=Kind.JOB,
                query_id=self.session_id,
                key_id=self.querier.key_id,
                meta={
                    "rule": self.rule.value,
                    "disclosed": self.disclosed.value,
                    "rows": self.n_queries,
                    "batches": self.n_batches,
                    "expires": self.expires_at,
                },
                sections=(
                    ("querier", self.querier.to_bytes()),
                    *((f"party-{i}", data) for i, data in enumerate(self.parties)),
                    *((f"owner-{i}", data) for i, data in enumerate(self.owners)),
                ),
            )
        )

    def to_bytes(self, querier: Identity) -> bytes:
        """Return the session, signed by its querier."""
        return sign_document(querier, _DOMAIN, self._body())

    @classmethod
    def from_bytes(cls, data: bytes | memoryview) -> MpcSession:
        """Read a session and check the signatures of its querier and of every site in it.

        Raises
        ------
        ProtocolError
            If anything in it is malformed or does not verify.
        """
        envelope = decode(memoryview(data)[64:])
        if envelope.kind is not Kind.JOB or not envelope.query_id:
            raise EnvelopeError("the bytes are not a session")
        querier = PublicIdentity.from_bytes(envelope.section("querier"))
        read_signed(querier, _DOMAIN, data)
        meta = envelope.meta
        fields.exactly(meta, "rule", "disclosed", "rows", "batches", "expires")
        rule, disclosed = meta["rule"], meta["disclosed"]
        if rule not in list(MpcRule) or disclosed not in list(Disclosed):
            raise EnvelopeError("a session with an unknown rule or disclosure")
        parts = {
            role: tuple(bytes(d) for title, d in envelope.sections if title.startswith(role))
            for role in ("party-", "owner-")
        }
        try:
            session = cls(
                session_id=envelope.query_id,
                querier=querier,
                parties=parts["party-"],
                owners=parts["owner-"],
                rule=MpcRule(rule),
                disclosed=Disclosed(disclosed),
                n_queries=fields.whole(meta, "rows", low=1, high=MAX_ROWS),
                n_batches=fields.whole(meta, "batches", low=1, high=MAX_BATCHES),
                expires_at=fields.whole(meta, "expires", low=0, high=2**62),
            )
        except InvalidValueError as exc:
            raise EnvelopeError(f"a session that cannot be: {exc.message}") from None
        if session._body() != bytes(data[64:]):
            raise EnvelopeError("a session that is not in its one byte form")
        return session


@dataclass(frozen=True, kw_only=True)
class MpcConsent:
    """What a site agrees to. Neither coordinator nor querier can widen it.

    Parameters
    ----------
    parties : frozenset of str
        Key ids of the sites that may compute, this one included. There is no default: with
        keys of its own choice a coordinator, or querier, would hold every share.
    queriers : frozenset of str
        Key ids of the queriers who may ask.
    min_owners : int
        Fewest networks in an answer. With 1 the querier may see this site's own logits.
    disclosed : frozenset of Disclosed
        What the querier may be shown.
    """

    parties: frozenset[str]
    queriers: frozenset[str]
    min_owners: int = 2
    disclosed: frozenset[Disclosed] = frozenset(Disclosed)

    def check(self, session: MpcSession) -> None:
        """Refuse what the site did not agree to.

        Raises
        ------
        UntrustedKeyError, ProtectionRefusedError, ExpiredError
        """
        if session.querier.key_id not in self.queriers:
            raise UntrustedKeyError(
                f"querier {session.querier.key_id[:16]} is not one this site knows",
                hint="add the querier's key id to MpcConsent(queriers=...)",
            )
        for place in session.party_places:
            if place.identity.key_id not in self.parties:
                raise UntrustedKeyError(
                    f"party {place.identity.key_id[:16]} is not one this site trusts to compute",
                    hint="compare its key id out of band, then add it to MpcConsent(parties=...)",
                )
            tls.require_valid(place.certificate)
        if len(session.owners) < self.min_owners:
            raise ProtectionRefusedError(
                f"{len(session.owners)} networks in the answer, this site demands"
                f" {self.min_owners}",
                hint="ask with more owners",
            )
        if session.disclosed not in self.disclosed:
            raise ProtectionRefusedError(
                f"this site does not agree to disclose {session.disclosed.value!r}",
                hint=f"ask for {' or '.join(sorted(self.disclosed))}",
            )
        if time.time() > session.expires_at:
            raise ExpiredError("the session is over", hint="ask again; check the clocks")


def _place(places: tuple[SiteStatement, ...], key_id: str, role: str) -> int:
    for number, place in enumerate(places):
        if place.identity.key_id == key_id:
            return number
    raise BindingError(f"the site with key {key_id[:16]} is not {role} of this session")
