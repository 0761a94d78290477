"""What the documents of a settlement have in common: reading, signing, answering."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any, Final, Protocol, Self, TypeVar

import numpy as np
import numpy.typing as npt

from fedinfer_flower.errors import BindingError, EnvelopeError
from fedinfer_flower.wire import fields
from fedinfer_flower.wire.envelope import Envelope, Kind, WireLimits, decode
from fedinfer_flower.wire.identity import Identity, PublicIdentity

__all__ = [
    "answered_digest",
    "noise_of",
    "read_document",
    "require_answer",
    "require_signed",
    "signed",
    "words",
]

EPOCH_ID: Final = re.compile(r"[0-9a-f]{32}")
DIGEST: Final = re.compile(r"[0-9a-f]{64}")
_DOMAIN: Final = "settlement"


class Answer(Protocol):
    """A document that answers another."""

    @property
    def epoch_id(self) -> str:
        """Of the epoch."""

    @property
    def answers_to(self) -> str:
        """Digest of the document that it answers."""


class SignedAnswer(Answer, Protocol):
    """A document that the querier signs."""

    @property
    def signature(self) -> bytes:
        """By the querier."""

    def with_signature(self, signature: bytes) -> Self:
        """Return the same document with another signature."""

    def to_bytes(self) -> bytes:
        """Return the document as one envelope."""


Document = TypeVar("Document", bound=SignedAnswer)


def signed(document: Document, identity: Identity | None) -> Document:
    """Return a document with the querier's signature, if it has an identity."""
    if identity is None:
        return document
    plain = document.with_signature(b"").to_bytes()
    return document.with_signature(identity.sign(_DOMAIN, plain))


def require_signed(document: SignedAnswer, querier: PublicIdentity) -> None:
    """Require the querier's signature.

    Raises
    ------
    SignatureError
        If it did not sign this document.
    """
    querier.verify(_DOMAIN, document.with_signature(b"").to_bytes(), document.signature)


def require_answer(document: Answer, *, epoch_id: str, digest: str) -> None:
    """Require that a document answers this one.

    Raises
    ------
    BindingError
        If it is of another epoch, or answers another document.
    """
    if (document.epoch_id, document.answers_to) != (epoch_id, digest):
        raise BindingError("a settlement document of another epoch, or replayed in this one")


def read_document(data: bytes, kind: Kind, limits: WireLimits, *sections: str) -> Envelope:
    """Read one envelope of this kind, of an epoch, with exactly these sections."""
    envelope = decode(data, limits=limits)
    if envelope.kind is not kind or not EPOCH_ID.fullmatch(envelope.query_id):
        raise EnvelopeError(f"the bytes are no {kind.value}")
    envelope.require_sections(*sections)
    return envelope


def answered_digest(meta: Mapping[str, Any]) -> str:
    """Read the digest of the document that this one answers."""
    value = fields.text(meta, "answers-to", max_chars=64)
    if not DIGEST.fullmatch(value):
        raise EnvelopeError("field 'answers-to' is no digest")
    return value


def noise_of(meta: Mapping[str, Any]) -> float:
    """Read a standard deviation of noise."""
    value = fields.number(meta, "noise")
    if value < 0.0:
        raise EnvelopeError("field 'noise' is negative")
    return value


def words(data: bytes | memoryview, dtype: type[Any], shape: tuple[int, ...]) -> npt.NDArray[Any]:
    """Read an array of 64-bit words."""
    count = len(data) // 8 if -1 in shape else math.prod(shape)
    if len(data) != 8 * count:
        raise EnvelopeError("a section has another length than its shape")
    little = np.dtype(dtype).newbyteorder("<")
    return np.frombuffer(data, dtype=little).reshape(shape).astype(dtype)
