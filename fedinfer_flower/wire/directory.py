"""The key directory: which sites there are, with the keys that they sign and receive with.

A site signs its card: profile, keys and run together. A coordinator collects the cards and
hands them on as a directory. It cannot alter one; it can leave sites out, and it can add
sites of its own making, which is why a querier compares key ids with a pin file.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, field
from typing import Any

from fedinfer_flower.errors import BindingError, EnvelopeError, InvalidValueError
from fedinfer_flower.query import MAX_CLASSES, CountsKind, SiteProfile
from fedinfer_flower.wire import fields
from fedinfer_flower.wire.envelope import (
    DEFAULT_LIMITS,
    Envelope,
    Json,
    Kind,
    WireLimits,
    decode,
    encode,
)
from fedinfer_flower.wire.identity import Identity, PublicIdentity
from fedinfer_flower.wire.pins import Pins
from fedinfer_flower.wire.roster import Roster, Seat

__all__ = ["Directory", "SiteCard", "read_site_card", "site_card"]

_DOMAIN = "site card"
_SIGNATURE_BYTES = 64


@dataclass(frozen=True, kw_only=True)
class SiteCard:
    """What one site says of itself, signed.

    Parameters
    ----------
    run_id : int
    profile : SiteProfile
    identity : PublicIdentity
    signature : bytes
    """

    run_id: int
    profile: SiteProfile
    identity: PublicIdentity
    signature: bytes = field(repr=False)

    @classmethod
    def signed(cls, profile: SiteProfile, *, identity: Identity, run_id: int) -> SiteCard:
        """Make the card of a site."""
        statement = _statement(profile, identity.public, run_id)
        return cls(
            run_id=run_id,
            profile=profile,
            identity=identity.public,
            signature=identity.sign(_DOMAIN, statement),
        )

    @property
    def key_id(self) -> str:
        """Fingerprint of the site's keys."""
        return self.identity.key_id

    @property
    def seat(self) -> Seat:
        """The site's place in a roster."""
        return Seat(identity=self.identity, commitment=self.profile.commitment())

    def require_signature(self) -> None:
        """Require that the card is by the holder of its signing key, with keys that work.

        Raises
        ------
        SignatureError
            If it is not.
        EnvelopeError
            If nothing can be sealed to its agreement key: one such card would otherwise
            keep everybody from asking all the others.
        """
        self.identity.require_usable()
        statement = _statement(self.profile, self.identity, self.run_id)
        self.identity.verify(_DOMAIN, statement, self.signature)


def _statement(profile: SiteProfile, identity: PublicIdentity, run_id: int) -> bytes:
    return run_id.to_bytes(8, "big") + identity.to_bytes() + bytes.fromhex(profile.commitment())


def site_card(card: SiteCard, *, sender: int) -> Envelope:
    """Build the envelope of a site's card."""
    return Envelope(
        kind=Kind.PROFILE,
        run_id=card.run_id,
        sender=sender,
        meta=card.profile.to_dict(),
        sections=(("identity", card.identity.to_bytes()), ("signature", card.signature)),
    )


def read_site_card(envelope: Envelope, *, run_id: int, sender: int) -> SiteCard:
    """Read and verify a site's card.

    Raises
    ------
    ProtocolError
        If it is malformed, of another run or sender, or not signed by its own keys.
    """
    if envelope.kind is not Kind.PROFILE:
        raise EnvelopeError(f"expected a profile envelope, got {envelope.kind.value}")
    envelope.require_sections("identity", "signature")
    if (envelope.run_id, envelope.sender, envelope.query_id) != (run_id, sender, ""):
        raise BindingError("the profile belongs to another run or sender")
    card = SiteCard(
        run_id=run_id,
        profile=_profile(envelope.meta),
        identity=PublicIdentity.from_bytes(envelope.section("identity")),
        signature=bytes(envelope.section("signature")),
    )
    card.require_signature()
    return card


@dataclass(frozen=True, kw_only=True)
class Directory:
    """The cards of a run.

    Parameters
    ----------
    run_id : int
    cards : tuple of SiteCard
        Each with a valid signature of this run; no key twice.

    Examples
    --------
    >>> site = Identity.generate()
    >>> profile = SiteProfile(name="a", classes=("x",))
    >>> card = SiteCard.signed(profile, identity=site, run_id=7)
    >>> directory = Directory(run_id=7, cards=(card,))
    >>> Directory.from_bytes(directory.to_bytes()).roster.key_ids == (site.key_id,)
    True
    """

    run_id: int
    cards: tuple[SiteCard, ...]

    def __post_init__(self) -> None:
        for card in self.cards:
            if card.run_id != self.run_id:
                raise BindingError("a site's card belongs to another run")
            card.require_signature()
        _ = self.roster  # refuses a key that comes twice

    @property
    def roster(self) -> Roster:
        """All sites."""
        return Roster(tuple(card.seat for card in self.cards))

    def only(self, names: Collection[str]) -> Directory:
        """Return the directory of these sites alone.

        Raises
        ------
        InvalidValueError
            If a name is not in it.
        """
        missing = set(names) - {card.profile.name for card in self.cards}
        if missing:
            raise InvalidValueError(f"no site {min(missing)!r} in the directory")
        return Directory(
            run_id=self.run_id, cards=tuple(c for c in self.cards if c.profile.name in names)
        )

    def require_pinned(self, pins: Pins) -> None:
        """Require that every site is pinned, and to the key that it shows.

        Raises
        ------
        UntrustedKeyError
            Naming the site.
        """
        for card in self.cards:
            pins.require_site(card.profile.name, card.key_id)

    def to_bytes(self) -> bytes:
        """Return the directory as one envelope."""
        return encode(
            Envelope(
                kind=Kind.DIRECTORY,
                run_id=self.run_id,
                meta={"profiles": [card.profile.to_dict() for card in self.cards]},
                sections=(
                    ("identities", b"".join(c.identity.to_bytes() for c in self.cards)),
                    ("signatures", b"".join(c.signature for c in self.cards)),
                ),
            )
        )

    @classmethod
    def from_bytes(cls, data: bytes, *, limits: WireLimits = DEFAULT_LIMITS) -> Directory:
        """Read a directory and verify every signature in it.

        Raises
        ------
        ProtocolError
            If the bytes are not exactly one valid directory.
        """
        envelope = decode(data, limits=limits)
        if envelope.kind is not Kind.DIRECTORY:
            raise EnvelopeError("the bytes are not a directory")
        envelope.require_sections("identities", "signatures")
        fields.exactly(envelope.meta, "profiles")
        profiles = envelope.meta["profiles"]
        keys = bytes(envelope.section("identities"))
        signatures = bytes(envelope.section("signatures"))
        if not isinstance(profiles, list) or not (
            len(keys) == len(signatures) == _SIGNATURE_BYTES * len(profiles)
        ):
            raise EnvelopeError("a directory whose parts do not fit each other")
        cards = []
        for number, meta in enumerate(profiles):
            part = slice(_SIGNATURE_BYTES * number, _SIGNATURE_BYTES * (number + 1))
            if not isinstance(meta, dict):
                raise EnvelopeError("a profile in a directory is not an object")
            cards.append(
                SiteCard(
                    run_id=envelope.run_id,
                    profile=_profile(meta),
                    identity=PublicIdentity.from_bytes(keys[part]),
                    signature=signatures[part],
                )
            )
        return cls(run_id=envelope.run_id, cards=tuple(cards))


def _profile(meta: Any) -> SiteProfile:
    fields.exactly(meta, *SiteProfile.__dataclass_fields__)
    counts = meta["class_counts"]
    card = fields.scalars(meta, "model_card")
    try:
        return SiteProfile(
            name=fields.text(meta, "name", max_chars=128),
            classes=fields.texts(meta, "classes", max_items=MAX_CLASSES),
            counts_kind=_counts_kind(meta["counts_kind"]),
            class_counts=None
            if counts is None
            else fields.numbers(meta, "class_counts", max_items=MAX_CLASSES),
            calibrated=fields.flag(meta, "calibrated"),
            temperature=fields.number(meta, "temperature"),
            familiarity=fields.flag(meta, "familiarity"),
            model_card={key: str(value) for key, value in card.items()},
            price_per_query=fields.number(meta, "price_per_query"),
            model_digest=fields.text(meta, "model_digest", max_chars=128),
            record_epsilon=_optional(meta, "record_epsilon"),
            record_delta=_optional(meta, "record_delta"),
        )
    except InvalidValueError as exc:
        raise EnvelopeError(f"the profile is not valid: {exc.message}") from None


def _optional(meta: Any, name: str) -> float | None:
    return None if meta[name] is None else fields.number(meta, name)


def _counts_kind(value: Json) -> CountsKind:
    if not isinstance(value, str) or value not in CountsKind.__members__.values():
        raise EnvelopeError("field 'counts_kind' is unknown")
    return CountsKind(value)
