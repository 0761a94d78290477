"""A site's signed statement: what it brings to a joint computation, and how to reach it."""

from __future__ import annotations

import re
import secrets
from dataclasses import dataclass, field
from typing import Final

from fedinfer_flower.errors import EnvelopeError, InvalidValueError
from fedinfer_flower.mpc import tls
from fedinfer_flower.mpc.network import NetworkSpec
from fedinfer_flower.query import MAX_CLASSES
from fedinfer_flower.wire import fields
from fedinfer_flower.wire.envelope import Envelope, Kind, WireLimits, decode, encode
from fedinfer_flower.wire.identity import Identity, PublicIdentity

__all__ = ["SiteStatement", "read_signed", "sign_document"]

_DOMAIN: Final = "mpc-statement"
_SIGNATURE_BYTES: Final = 64
_ADDRESS = re.compile(r"[0-9A-Za-z.\-]{1,253}:[0-9]{1,5}|\[[0-9a-fA-F:]{2,45}\]:[0-9]{1,5}")
_LIMITS: Final = WireLimits(max_header_bytes=4 << 20, max_payload_bytes=1 << 16)


def sign_document(identity: Identity, domain: str, body: bytes) -> bytes:
    """Return 64 bytes of signature, then the body."""
    return identity.sign(domain, body) + body


def read_signed(public: PublicIdentity, domain: str, data: bytes | memoryview) -> bytes:
    """Return the body of a signed document.

    Raises
    ------
    SignatureError
        If it is not signed by this key for this purpose.
    """
    raw = bytes(data)
    public.verify(domain, raw[_SIGNATURE_BYTES:], raw[:_SIGNATURE_BYTES])
    return raw[_SIGNATURE_BYTES:]


@dataclass(frozen=True, kw_only=True)
class SiteStatement:
    """What a site brings: a network, a place to compute, or both.

    Parameters
    ----------
    identity : PublicIdentity
    name : str
    network : NetworkSpec, optional
        Architecture of its model; None for a site that only computes.
    classes : tuple of str
        Names of the network's logits, in order; empty without a network.
    address : str
        ``host:port`` at which the other parties reach it; empty for a site that does not
        compute.
    salt, certificate : bytes
        Of its links: see `mpc.tls`.

    Examples
    --------
    >>> me = Identity.generate()
    >>> statement = SiteStatement.of_party(me, name="a", address="127.0.0.1:7000")
    >>> SiteStatement.from_bytes(statement.to_bytes(me)) == statement
    True
    """

    identity: PublicIdentity
    name: str
    network: NetworkSpec | None = None
    classes: tuple[str, ...] = ()
    address: str = ""
    salt: bytes = field(default=b"", repr=False)
    certificate: bytes = field(default=b"", repr=False)

    def __post_init__(self) -> None:
        n_classes = self.network.n_classes if self.network else 0
        if len(self.classes) != n_classes or len(set(self.classes)) != n_classes:
            raise InvalidValueError(
                f"a network of {n_classes} logits with {len(self.classes)} class names",
                hint="name every logit once, in order",
            )
        if self.address and not _ADDRESS.fullmatch(self.address):
            raise InvalidValueError("an address is 'host:port'")

    @property
    def computes(self) -> bool:
        """Whether the site can be one of the three parties."""
        return bool(self.address)

    @classmethod
    def of_party(
        cls,
        identity: Identity,
        *,
        name: str,
        address: str,
        network: NetworkSpec | None = None,
        classes: tuple[str, ...] = (),
    ) -> SiteStatement:
        """Make a statement with a fresh link certificate."""
        salt = secrets.token_bytes(tls.SALT_BYTES)
        return cls(
            identity=identity.public,
            name=name,
            network=network,
            classes=classes,
            address=address,
            salt=salt,
            certificate=tls.certificate(identity, salt),
        )

    def to_bytes(self, identity: Identity) -> bytes:
        """Return the signed statement."""
        body = Envelope(
            kind=Kind.PROFILE,
            meta={
                "name": self.name,
                "network": self.network.to_json() if self.network else None,
                "classes": list(self.classes),
                "address": self.address,
            },
            sections=(
                ("identity", self.identity.to_bytes()),
                ("salt", self.salt),
                ("certificate", self.certificate),
            ),
        )
        return sign_document(identity, _DOMAIN, encode(body))

    @classmethod
    def from_bytes(cls, data: bytes | memoryview) -> SiteStatement:
        """Read a statement and check its own signature.

        Whether the key is the right site's is for the reader to check against its pins.

        Raises
        ------
        ProtocolError
            If it is malformed, or not signed by the key in it.
        """
        envelope = decode(memoryview(data)[_SIGNATURE_BYTES:], limits=_LIMITS)
        envelope.require_sections("identity", "salt", "certificate")
        identity = PublicIdentity.from_bytes(envelope.section("identity"))
        read_signed(identity, _DOMAIN, data)
        meta = envelope.meta
        fields.exactly(meta, "name", "network", "classes", "address")
        network = meta["network"]
        try:
            return cls(
                identity=identity,
                name=fields.text(meta, "name", max_chars=128),
                network=None if network is None else NetworkSpec.from_json(network),
                classes=fields.texts(meta, "classes", max_items=MAX_CLASSES),
                address=fields.text(meta, "address", max_chars=300),
                salt=bytes(envelope.section("salt")),
                certificate=bytes(envelope.section("certificate")),
            )
        except InvalidValueError as exc:
            raise EnvelopeError(f"a statement that cannot be: {exc.message}") from None
