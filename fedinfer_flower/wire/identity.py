"""Who signs and who can open: one long-term key pair for each purpose, at each role.

A party has two keys: Ed25519 to sign what it says, X25519 to receive what is sealed to it and
to agree on masks. Both public halves together have one fingerprint, the *key id*, which is
what people compare out of band and write into a pin file.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey

from fedinfer_flower.errors import ConfigError, EnvelopeError, SignatureError

__all__ = ["Identity", "PublicIdentity"]

_KEY_BYTES: Final = 32
_SIGNATURE_DOMAIN: Final = b"fedinfer/v1/signature|"


@dataclass(frozen=True, kw_only=True)
class PublicIdentity:
    """The public halves of a party's keys.

    Parameters
    ----------
    signing_key : bytes
        Ed25519, 32 bytes.
    agreement_key : bytes
        X25519, 32 bytes.

    Raises
    ------
    EnvelopeError
        If a key does not have 32 bytes.

    Examples
    --------
    >>> public = Identity.generate().public
    >>> PublicIdentity.from_bytes(public.to_bytes()) == public
    True
    >>> len(public.key_id)
    64
    """

    signing_key: bytes
    agreement_key: bytes

    def __post_init__(self) -> None:
        if len(self.signing_key) != _KEY_BYTES or len(self.agreement_key) != _KEY_BYTES:
            raise EnvelopeError("a public identity is two keys of 32 bytes")

    @property
    def key_id(self) -> str:
        """Fingerprint of both keys: SHA-256 in hex."""
        return hashlib.sha256(self.to_bytes()).hexdigest()

    def to_bytes(self) -> bytes:
        """Return 64 bytes: the signing key, then the agreement key."""
        return self.signing_key + self.agreement_key

    @classmethod
    def from_bytes(cls, data: bytes | memoryview) -> PublicIdentity:
        """Read 64 bytes."""
        raw = bytes(data)
        return cls(signing_key=raw[:_KEY_BYTES], agreement_key=raw[_KEY_BYTES:])

    def require_usable(self) -> None:
        """Require that keys can be agreed on with the agreement key.

        Raises
        ------
        EnvelopeError
            If it is no X25519 public key, or one of low order.
        """
        # An exchange is the only check that the library offers; the result is thrown away.
        _ = Identity.generate().agree(self.agreement_key)

    def verify(self, domain: str, data: bytes, signature: bytes) -> None:
        """Require a signature of `data` by this party, made for this purpose.

        Parameters
        ----------
        domain : str
            What the signature is for; a signature for one purpose never serves another.

        Raises
        ------
        SignatureError
            If it is not.
        """
        try:
            key = Ed25519PublicKey.from_public_bytes(self.signing_key)
            key.verify(signature, _to_sign(domain, data))
        except (InvalidSignature, ValueError):
            raise SignatureError(
                f"the signature of a {domain} is not by key {self.key_id[:16]}"
            ) from None


@dataclass(frozen=True, kw_only=True)
class Identity:
    """A party's secret keys. Never travels, never shown by `repr`.

    Examples
    --------
    >>> me = Identity.generate()
    >>> me.public.verify("receipt", b"text", me.sign("receipt", b"text"))
    """

    signing: Ed25519PrivateKey = field(repr=False)
    agreement: X25519PrivateKey = field(repr=False)

    @classmethod
    def generate(cls) -> Identity:
        """Make fresh keys."""
        return cls(signing=Ed25519PrivateKey.generate(), agreement=X25519PrivateKey.generate())

    @property
    def public(self) -> PublicIdentity:
        """The public halves."""
        return PublicIdentity(
            signing_key=self.signing.public_key().public_bytes_raw(),
            agreement_key=self.agreement.public_key().public_bytes_raw(),
        )

    @property
    def key_id(self) -> str:
        """Fingerprint of the public halves."""
        return self.public.key_id

    def sign(self, domain: str, data: bytes) -> bytes:
        """Sign `data` for one purpose; 64 bytes."""
        return self.signing.sign(_to_sign(domain, data))

    def agree(self, public_key: bytes) -> bytes:
        """Return the raw X25519 secret shared with the holder of `public_key`.

        Never a key by itself: derive one from it with a purpose.

        Raises
        ------
        EnvelopeError
            If it is no public key, or one of low order.
        """
        try:
            return self.agreement.exchange(X25519PublicKey.from_public_bytes(public_key))
        except ValueError:
            raise EnvelopeError("an agreement key that is no X25519 public key") from None

    def to_secret(self) -> dict[str, str]:
        """Return both secret keys in hex, for a file or a store that only the owner reads."""
        return {
            "signing": self.signing.private_bytes_raw().hex(),
            "agreement": self.agreement.private_bytes_raw().hex(),
        }

    @classmethod
    def from_secret(cls, secret: Mapping[str, Any]) -> Identity:
        """Read what `to_secret` wrote.

        Raises
        ------
        ConfigError
            If it is something else; the text never quotes it.
        """
        try:
            return cls(
                signing=Ed25519PrivateKey.from_private_bytes(bytes.fromhex(secret["signing"])),
                agreement=X25519PrivateKey.from_private_bytes(bytes.fromhex(secret["agreement"])),
            )
        except (KeyError, TypeError, ValueError):
            raise ConfigError("not the secret keys of an identity") from None

    @classmethod
    def load_or_create(cls, path: Path) -> Identity:
        """Return the identity kept in a file, made there at first use.

        The file is created with access for its owner only. Two processes that start at
        the same time end with the same identity.

        Raises
        ------
        ConfigError
            If others may read the file, it holds something else, or it cannot be read or
            made.
        """
        try:
            if not path.exists():
                path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
                _write_once(path, json.dumps(cls.generate().to_secret()))
            mode, raw = path.stat().st_mode, path.read_bytes()
        except OSError as exc:
            raise ConfigError(
                f"the identity file {path.name!r} cannot be read or made ({type(exc).__name__})",
                hint="check the folder's owner and disk; hard links must work in it",
            ) from None
        if os.name == "posix" and mode & 0o077:
            raise ConfigError(
                f"the identity file {path.name!r} can be read by others",
                hint=f"chmod 600 {path.name}; if others did read it, delete it and pin the new key",
            )
        try:
            secret = json.loads(raw)
        except (ValueError, RecursionError):
            secret = {}
        return cls.from_secret(secret if isinstance(secret, dict) else {})


def _to_sign(domain: str, data: bytes) -> bytes:
    name = domain.encode()
    return _SIGNATURE_DOMAIN + len(name).to_bytes(2, "big") + name + data


def _write_once(path: Path, text: str) -> None:
    # Written whole under another name and linked into place: nobody reads half a file, and
    # of two writers the first wins.
    draft = path.with_name(f".{path.name}.{os.getpid()}.{os.urandom(4).hex()}")
    handle = os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    try:
        with os.fdopen(handle, "w") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        with contextlib.suppress(FileExistsError):
            os.link(draft, path)
    finally:
        draft.unlink()
