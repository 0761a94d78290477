"""What a site with a language model says of itself, signed: model, media, speeds, fusers."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Final

from fedinfer_flower.errors import BindingError, EnvelopeError
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
from fedinfer_flower.wire.refine_fields import MAX_SHARERS, MEDIA, key_id, require_verb, some_of

__all__ = ["FuserNote", "LanguageCard", "Speeds", "read_language_card"]

_DOMAIN: Final = "language card"
_VERB: Final = "language-card"
_MAX_LAYOUT_CHARS: Final = 8192
_MAX_BYTES: Final = 1 << 20
_SPEEDS: Final = ("prefill_s", "prefill_s_per_token", "decode_s")


@dataclass(frozen=True, kw_only=True)
class Speeds:
    """How fast a site's model is, as the site measured it.

    Parameters
    ----------
    prefill_s : float
        Seconds before the first token of a prompt is read.
    prefill_s_per_token : float
        Seconds for each token of a prompt.
    decode_s : float
        Seconds for each new token.
    """

    prefill_s: float
    prefill_s_per_token: float
    decode_s: float


@dataclass(frozen=True, kw_only=True)
class FuserNote:
    """One fuser that a site has as receiver.

    Parameters
    ----------
    sharer_digest : str
        Digest of the sharer's model.
    kind : str
    share : mapping
        What the sharer must send, as ``ShareSpec.to_dict`` gives it.
    """

    sharer_digest: str
    kind: str
    share: Mapping[str, str | int | float | bool]


@dataclass(frozen=True, kw_only=True)
class LanguageCard:
    """The language card of a site.

    Parameters
    ----------
    run_id : int
    name : str
    layout : str
        JSON of the model's ``CacheLayout``.
    node_id : int
        Flower's, in this run.
    media : tuple of str
        What it shares with consenting queriers, of `MEDIA`; empty for a pure receiver.
    answers : bool
        Whether it takes part as receiver.
    coordinator_fusers : bool
        Whether it lets the coordinator read caches, so that fusers can run there.
    candidates : bool
        Whether it scores given answers.
    codecs : tuple of str
        How it encodes entries.
    max_questions, max_new_tokens, one_phase_bytes : int
        Its limits; payloads above the last are offered by handle.
    speeds : Speeds, optional
        None where it withholds them.
    fusers : tuple of FuserNote
    identity : PublicIdentity
    signature : bytes

    Privacy
    -------
    Everybody in the run may read a card. It names the model exactly, by its digest.
    """

    run_id: int
    name: str
    layout: str
    node_id: int = 0
    media: tuple[str, ...] = ()
    answers: bool = True
    coordinator_fusers: bool = False
    candidates: bool = False
    codecs: tuple[str, ...] = ()
    max_questions: int = 64
    max_new_tokens: int = 64
    one_phase_bytes: int = 65_536
    speeds: Speeds | None = None
    fusers: tuple[FuserNote, ...] = ()
    identity: PublicIdentity = field(
        default=PublicIdentity(signing_key=bytes(32), agreement_key=bytes(32))
    )
    signature: bytes = field(default=b"", repr=False)

    def signed(self, identity: Identity) -> LanguageCard:
        """Return the card with the keys and the signature of its site.

        Examples
        --------
        >>> site = Identity.generate()
        >>> layout = json.dumps({"model_digest": "0" * 64})
        >>> card = LanguageCard(run_id=7, name="a", layout=layout).signed(site)
        >>> LanguageCard.from_bytes(card.to_bytes()) == card
        True
        """
        mine = {**self.__dict__, "identity": identity.public, "signature": b""}
        card = LanguageCard(**mine)
        signature = identity.sign(_DOMAIN, card._statement())
        return LanguageCard(**{**mine, "signature": signature})

    @property
    def key_id(self) -> str:
        """Fingerprint of the site's keys."""
        return self.identity.key_id

    @property
    def model_digest(self) -> str:
        """Digest of the site's model."""
        return str(json.loads(self.layout)["model_digest"])

    def require_signature(self) -> None:
        """Require that the card is by the holder of its keys, and that they work.

        Raises
        ------
        SignatureError, EnvelopeError
        """
        self.identity.require_usable()
        self.identity.verify(_DOMAIN, self._statement(), self.signature)

    def to_envelope(self, *, sender: int = 0) -> Envelope:
        """Return the reply to an introduction."""
        return Envelope(
            kind=Kind.PROFILE,
            run_id=self.run_id,
            sender=sender,
            meta={"verb": _VERB, "card": self._meta()},
            sections=(("identity", self.identity.to_bytes()), ("signature", self.signature)),
        )

    def to_bytes(self) -> bytes:
        """Return the card for others to read."""
        return encode(self.to_envelope())

    @classmethod
    def from_bytes(
        cls,
        data: bytes | memoryview,
        *,
        run_id: int | None = None,
        limits: WireLimits = DEFAULT_LIMITS,
    ) -> LanguageCard:
        """Read and verify a card.

        Raises
        ------
        ProtocolError
            If it is malformed, of another run, or not signed by its own keys.
        """
        if len(data) > _MAX_BYTES:
            raise EnvelopeError("a language card that is too long")
        envelope = decode(data, limits=limits)
        return read_language_card(
            envelope, run_id=envelope.run_id if run_id is None else run_id, sender=0
        )

    def _meta(self) -> dict[str, Json]:
        skip = ("run_id", "identity", "signature", "fusers", "speeds")
        meta: dict[str, Json] = {
            name: list(value) if isinstance(value, tuple) else value
            for name, value in self.__dict__.items()
            if name not in skip
        }
        meta["fusers"] = [
            {"sharer": n.sharer_digest, "kind": n.kind, "share": dict(n.share)} for n in self.fusers
        ]
        meta["speeds"] = None if self.speeds is None else asdict(self.speeds)
        return meta

    def _statement(self) -> bytes:
        meta = json.dumps(self._meta(), sort_keys=True, separators=(",", ":"), allow_nan=False)
        return self.run_id.to_bytes(8, "big") + self.identity.to_bytes() + meta.encode()


def read_language_card(envelope: Envelope, *, run_id: int, sender: int) -> LanguageCard:
    """Read and verify the reply to an introduction.

    Raises
    ------
    ProtocolError
        If it is malformed, of another run or sender, or not signed by its own keys.
    """
    require_verb(envelope, Kind.PROFILE, _VERB)
    envelope.require_sections("identity", "signature")
    fields.exactly(envelope.meta, "verb", "card")
    if (envelope.run_id, envelope.sender, envelope.query_id) != (run_id, sender, ""):
        raise BindingError("the language card belongs to another run or sender")
    meta = envelope.meta["card"]
    if not isinstance(meta, dict):
        raise EnvelopeError("a language card that is no object")
    node_id = fields.whole(meta, "node_id", low=0, high=2**64 - 1)
    if sender and node_id != sender:
        # Cards are shown to other sites: one that replays another's must not displace it.
        raise BindingError("the language card is another node's")
    own = set(LanguageCard.__dataclass_fields__) - {"run_id", "identity", "signature"}
    fields.exactly(meta, *own)
    card = LanguageCard(
        run_id=run_id,
        name=_name(meta),
        layout=_layout(meta),
        node_id=node_id,
        media=some_of(meta, "media", MEDIA),
        answers=fields.flag(meta, "answers"),
        coordinator_fusers=fields.flag(meta, "coordinator_fusers"),
        candidates=fields.flag(meta, "candidates"),
        codecs=fields.texts(meta, "codecs", max_items=16),
        max_questions=fields.whole(meta, "max_questions", low=1, high=1 << 20),
        max_new_tokens=fields.whole(meta, "max_new_tokens", low=1, high=1 << 20),
        one_phase_bytes=fields.whole(meta, "one_phase_bytes", low=0, high=1 << 32),
        speeds=_speeds(meta["speeds"]),
        fusers=_fusers(meta["fusers"]),
        identity=PublicIdentity.from_bytes(envelope.section("identity")),
        signature=bytes(envelope.section("signature")),
    )
    card.require_signature()
    return card


def _name(meta: Mapping[str, Json]) -> str:
    name = fields.text(meta, "name", max_chars=128)
    # Logs and reports show it: a line of its own in them is not a site's to write.
    if not name.isprintable():
        raise EnvelopeError("a language card whose name does not print")
    return name


def _layout(meta: Mapping[str, Json]) -> str:
    text = fields.text(meta, "layout", max_chars=_MAX_LAYOUT_CHARS)
    try:
        layout = json.loads(text)
    except (ValueError, RecursionError):
        layout = None
    if not isinstance(layout, dict):
        raise EnvelopeError("a language card without the layout of a cache")
    key_id(layout, "model_digest")  # the same form: 64 hex digits
    return text


def _speeds(value: Json) -> Speeds | None:
    if value is None:
        return None
    if not isinstance(value, dict):
        raise EnvelopeError("speeds that are no object")
    fields.exactly(value, *_SPEEDS)
    numbers = {name: fields.number(value, name) for name in _SPEEDS}
    if not all(0.0 <= n < 1e6 for n in numbers.values()):
        raise EnvelopeError("a speed that no model has")
    return Speeds(**numbers)


def _fusers(values: Json) -> tuple[FuserNote, ...]:
    if not isinstance(values, list) or len(values) > MAX_SHARERS:
        raise EnvelopeError("the fusers of a card are not a short list")
    notes = []
    for value in values:
        if not isinstance(value, dict):
            raise EnvelopeError("a fuser of a card is no object")
        fields.exactly(value, "sharer", "kind", "share")
        notes.append(
            FuserNote(
                sharer_digest=key_id(value, "sharer"),
                kind=fields.text(value, "kind", max_chars=64),
                share=fields.scalars(value, "share"),
            )
        )
    return tuple(notes)
