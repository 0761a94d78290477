"""What the querier asks a receiver, and what it consents to.

The consent is a statement of its own, without the questions: the receiver hands it on to every
sharer, which can see for itself that the querier allows this medium, receiver and sharer.
A question in clear, asked by the coordinator itself, has neither querier nor signature.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Final

from fedinfer_flower.errors import (
    BindingError,
    EnvelopeError,
    ExpiredError,
    InvalidValueError,
    MediumRefusedError,
    SignatureError,
    UntrustedKeyError,
)
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
from fedinfer_flower.wire.refine_fields import (
    MAX_ROUNDS,
    MEDIA,
    key_id,
    key_ids,
    require_verb,
    some_of,
    texts_from_bytes,
    texts_to_bytes,
)
from fedinfer_flower.wire.sealing import open_sealed, seal_to

__all__ = ["Asked", "QuerierConsent", "open_asked", "seal_asked"]

_CONSENT_DOMAIN: Final = "language consent"
_ASKED_DOMAIN: Final = "language question"
_ASKED: Final = "asked"
_SIGNATURE_BYTES: Final = 64
_MAX_STOPS: Final = 16
_CONSENT_FIELDS: Final = (
    *("run_id", "query_id", "batch", "allow", "receiver", "sharers"),
    *("max_rounds", "expires_at"),
)


@dataclass(frozen=True, kw_only=True)
class QuerierConsent:
    """What a querier allows for one batch of questions.

    Parameters
    ----------
    run_id : int
    query_id : str
        Of this batch at this receiver; a site works on it once a round.
    batch : str
        The same for all receivers of the same questions, so that a site which helps in a
        later round builds on what it fused as receiver; default the query id.
    allow : tuple of str
        Media in which sharers may give, of `MEDIA`. Empty: the receiver answers alone.
    receiver : str
        Key id of the site that reads the questions; in clear it may be empty, for any.
    sharers : tuple of str
        Key ids of the sites that may read the rewritten questions. In clear, empty is any.
    max_rounds : int
    expires_at : float
        Seconds since 1970, after which no site works on it; 0.0 for never.
    querier : PublicIdentity, optional
    signature : bytes

    Privacy
    -------
    Every sharer reads it: who asks, of whom, and in which media; not what is asked.
    """

    run_id: int
    query_id: str
    batch: str = ""
    allow: tuple[str, ...] = ()
    receiver: str = ""
    sharers: tuple[str, ...] = ()
    max_rounds: int = 1
    expires_at: float = 0.0
    querier: PublicIdentity | None = None
    signature: bytes = field(default=b"", repr=False)

    def __post_init__(self) -> None:
        if not set(self.allow) <= set(MEDIA):
            raise InvalidValueError(f"media are {', '.join(MEDIA)}")
        if not 1 <= self.max_rounds <= MAX_ROUNDS or not self.query_id:
            raise InvalidValueError(f"a consent has a query id, and 1 to {MAX_ROUNDS} rounds")
        if self.querier is not None and not self.receiver:
            raise InvalidValueError("a querier that signs names the receiver")

    @property
    def batch_id(self) -> str:
        """What all receivers of the same questions have in common."""
        return self.batch or self.query_id

    @property
    def querier_key_id(self) -> str:
        """Fingerprint of the querier; empty where the coordinator asks itself."""
        return "" if self.querier is None else self.querier.key_id

    def signed(self, identity: Identity) -> QuerierConsent:
        """Return it with the querier's keys and signature."""
        mine = replace(self, querier=identity.public, signature=b"")
        signature = identity.sign(_CONSENT_DOMAIN, mine._statement())
        return replace(mine, signature=signature)

    def require_signature(self) -> None:
        """Require the querier's signature, if there is a querier.

        Raises
        ------
        SignatureError
        """
        if self.querier is None:
            if self.signature:
                raise SignatureError("a consent that is signed by nobody in particular")
            return
        self.querier.verify(_CONSENT_DOMAIN, self._statement(), self.signature)

    def require_open(self, *, now_s: float, round_number: int) -> None:
        """Require that it still holds, and covers this round.

        Raises
        ------
        ExpiredError, BindingError
        """
        if self.expires_at and now_s > self.expires_at:
            raise ExpiredError("the questions expired", hint="ask again with a later deadline")
        if not 1 <= round_number <= self.max_rounds:
            raise BindingError("the querier did not consent to this many rounds")

    def require_sharer(self, sharer: str) -> None:
        """Require that this site may read the rewritten questions.

        Raises
        ------
        UntrustedKeyError
        """
        if sharer not in self.sharers and (self.sharers or self.querier is not None):
            raise UntrustedKeyError(
                f"the querier did not name key {sharer[:16]} among the sharers",
                hint="the querier names the sharers' key ids in its consent",
            )

    def require_medium(self, medium: str) -> None:
        """Require that the querier allows a medium.

        Raises
        ------
        MediumRefusedError
        """
        if medium not in self.allow:
            raise MediumRefusedError(
                f"the querier does not allow {medium!r}",
                hint="sharers read the rewritten questions, and caches contain them: the querier"
                " names each medium in its consent",
            )

    def to_meta(self) -> dict[str, Json]:
        """Return all but the keys and the signature."""
        values = {name: getattr(self, name) for name in _CONSENT_FIELDS}
        return {k: list(v) if isinstance(v, tuple) else v for k, v in values.items()}

    def sections(self) -> tuple[tuple[str, bytes], ...]:
        """Return the keys and the signature."""
        querier = b"" if self.querier is None else self.querier.to_bytes()
        return (("querier", querier), ("consent-signature", self.signature))

    @classmethod
    def read(cls, meta: Json, envelope: Envelope) -> QuerierConsent:
        """Read a consent that another document carries, and verify its signature.

        Raises
        ------
        ProtocolError
        """
        if not isinstance(meta, dict):
            raise EnvelopeError("a consent that is no object")
        fields.exactly(meta, *_CONSENT_FIELDS)
        querier = envelope.section("querier")
        try:
            consent = cls(
                run_id=fields.whole(meta, "run_id", low=0, high=2**64 - 1),
                query_id=fields.text(meta, "query_id", max_chars=64),
                batch=fields.text(meta, "batch", max_chars=64),
                allow=some_of(meta, "allow", MEDIA),
                receiver=key_id(meta, "receiver", empty=True),
                sharers=key_ids(meta, "sharers"),
                max_rounds=fields.whole(meta, "max_rounds", low=1, high=MAX_ROUNDS),
                expires_at=fields.number(meta, "expires_at"),
                querier=PublicIdentity.from_bytes(querier) if len(querier) else None,
                signature=bytes(envelope.section("consent-signature")),
            )
        except InvalidValueError as exc:
            raise EnvelopeError(f"the consent is not valid: {exc.message}") from None
        if (consent.run_id, consent.query_id) != (envelope.run_id, envelope.query_id):
            raise BindingError("the consent belongs to another run or batch")
        consent.require_signature()
        return consent

    def _statement(self) -> bytes:
        meta = json.dumps(self.to_meta(), sort_keys=True, separators=(",", ":"), allow_nan=False)
        querier = b"" if self.querier is None else self.querier.to_bytes()
        return querier + meta.encode()


@dataclass(frozen=True, kw_only=True)
class Asked:
    """A batch of questions as the receiver gets it.

    Parameters
    ----------
    questions : tuple of str
    consent : QuerierConsent
    decoding : mapping
        Keyword arguments of ``Decoding``, ``stop`` as a tuple of texts; the site's policy
        caps them.
    candidates : tuple of str
        For `CANDIDATES` only: the answers to score, the same for every question.
    rephrase : str
        Name of the rephraser; empty for the site's own choice.

    Privacy
    -------
    The receiver reads the questions; so does the coordinator, unless they travel sealed.
    """

    questions: tuple[str, ...] = field(repr=False)
    consent: QuerierConsent
    decoding: Mapping[str, Json] = field(default_factory=dict)
    candidates: tuple[str, ...] = field(default=(), repr=False)
    rephrase: str = ""

    def __post_init__(self) -> None:
        if not self.questions:
            raise InvalidValueError("a batch has at least one question")

    def to_bytes(self) -> bytes:
        """Return the questions in clear.

        Examples
        --------
        >>> consent = QuerierConsent(run_id=7, query_id="q")
        >>> asked = Asked(questions=("why ?",), consent=consent)
        >>> Asked.from_bytes(asked.to_bytes()) == asked
        True
        """
        return encode(
            Envelope(
                kind=Kind.QUERY,
                run_id=self.consent.run_id,
                query_id=self.consent.query_id,
                meta={
                    "verb": _ASKED,
                    "consent": self.consent.to_meta(),
                    "decoding": {
                        name: list(value) if isinstance(value, tuple) else value
                        for name, value in self.decoding.items()
                    },
                    "rephrase": self.rephrase,
                },
                sections=(
                    ("questions", texts_to_bytes(self.questions)),
                    ("candidates", texts_to_bytes(self.candidates)),
                    *self.consent.sections(),
                ),
            )
        )

    @classmethod
    def from_bytes(cls, data: bytes | memoryview, *, limits: WireLimits = DEFAULT_LIMITS) -> Asked:
        """Read questions in clear.

        Raises
        ------
        ProtocolError
        """
        envelope = decode(data, limits=limits)
        require_verb(envelope, Kind.QUERY, _ASKED)
        envelope.require_sections("questions", "candidates", "querier", "consent-signature")
        fields.exactly(envelope.meta, "verb", "consent", "decoding", "rephrase")
        questions = texts_from_bytes(envelope.section("questions"))
        if not questions:
            raise EnvelopeError("a batch without questions")
        return cls(
            questions=questions,
            consent=QuerierConsent.read(envelope.meta["consent"], envelope),
            decoding=_decoding(envelope.meta),
            candidates=texts_from_bytes(envelope.section("candidates")),
            rephrase=fields.text(envelope.meta, "rephrase", max_chars=64),
        )


def seal_asked(asked: Asked, *, identity: Identity, receiver: PublicIdentity) -> bytes:
    """Sign questions as their querier and seal them to the receiver.

    Raises
    ------
    BindingError
        If the consent names another querier or receiver.

    Examples
    --------
    >>> me, site = Identity.generate(), Identity.generate()
    >>> consent = QuerierConsent(run_id=7, query_id="q", receiver=site.key_id).signed(me)
    >>> sealed = seal_asked(Asked(questions=("why ?",), consent=consent),
    ...                     identity=me, receiver=site.public)
    >>> open_asked(sealed, identity=site, run_id=7, query_id="q").questions
    ('why ?',)
    """
    consent = asked.consent
    if consent.querier != identity.public or consent.receiver != receiver.key_id:
        raise BindingError("sealed questions name their querier and their receiver")
    plain = asked.to_bytes()
    info = _info(consent.run_id, consent.query_id, receiver.key_id)
    signature = identity.sign(_ASKED_DOMAIN, info + plain)
    return seal_to(receiver, signature + plain, info=info)


def open_asked(
    data: bytes | memoryview,
    *,
    identity: Identity,
    run_id: int,
    query_id: str,
    limits: WireLimits = DEFAULT_LIMITS,
) -> Asked:
    """Open sealed questions at their receiver, and require their querier's signature.

    Raises
    ------
    ProtocolError
        If they are sealed to another site, altered, or of another run or batch.
    """
    info = _info(run_id, query_id, identity.key_id)
    opened = open_sealed(identity, data, info=info)
    plain = opened[_SIGNATURE_BYTES:]
    asked = Asked.from_bytes(plain, limits=limits)
    if asked.consent.querier is None:
        raise SignatureError("sealed questions that name no querier")
    asked.consent.querier.verify(_ASKED_DOMAIN, info + plain, opened[:_SIGNATURE_BYTES])
    return asked


def _decoding(meta: Mapping[str, Json]) -> dict[str, Json]:
    given = meta["decoding"]
    if not isinstance(given, dict) or "stop" not in given:
        return dict(fields.scalars(meta, "decoding"))
    rest = {name: value for name, value in given.items() if name != "stop"}
    stop = fields.texts(given, "stop", max_items=_MAX_STOPS)
    return {**fields.scalars({"decoding": rest}, "decoding"), "stop": stop}


def _info(run_id: int, query_id: str, receiver: str) -> bytes:
    return f"asked|{run_id}|{query_id}|{receiver}".encode()
