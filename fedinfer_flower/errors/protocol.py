"""Messages that must not be believed."""

from __future__ import annotations

from fedinfer_flower.errors.base import FedInferError

__all__ = [
    "AuditLogError",
    "BindingError",
    "BudgetExceededError",
    "CacheError",
    "DifferencingError",
    "EnvelopeError",
    "ExpiredError",
    "HandleError",
    "InvalidCiphertextError",
    "InvalidScoresError",
    "LabelSpaceError",
    "MediumRefusedError",
    "PolicyRefusedError",
    "ProtectionRefusedError",
    "ProtocolError",
    "ReceiptError",
    "ReplayError",
    "SealError",
    "SettlementError",
    "ShapeError",
    "SignatureError",
    "SizeLimitError",
    "UnsupportedVersionError",
    "UntrustedKeyError",
]


class ProtocolError(FedInferError):
    """A message that must not be believed."""

    code = "FI300"


class EnvelopeError(ProtocolError):
    """Malformed bytes, fields or lengths."""

    code = "FI301"


class UnsupportedVersionError(ProtocolError):
    """An envelope of a version that this release does not read."""

    code = "FI302"


class BindingError(ProtocolError):
    """A well-formed envelope of another run, query, key, sender or profile."""

    code = "FI303"


class ShapeError(ProtocolError):
    """An array of another shape or dtype than agreed."""

    code = "FI304"


class SizeLimitError(ProtocolError):
    """More bytes, rows or classes than the receiver accepts."""

    code = "FI305"


class InvalidScoresError(ProtocolError):
    """Scores that are NaN, infinite or outside the bound of their rule."""

    code = "FI306"


class InvalidCiphertextError(ProtocolError):
    """Bytes that are no ciphertext of this round."""

    code = "FI307"


class ProtectionRefusedError(ProtocolError):
    """The site does not answer under the protection that was asked for."""

    code = "FI308"


class LabelSpaceError(ProtocolError):
    """Class names of a site that do not fit those of the query."""

    code = "FI309"


class SignatureError(ProtocolError):
    """A signature that is not by the key that it claims."""

    code = "FI310"


class UntrustedKeyError(ProtocolError):
    """A key that is not the one pinned for its owner."""

    code = "FI311"


class SealError(ProtocolError):
    """Sealed bytes that do not open with this key, or were altered."""

    code = "FI312"


class ReplayError(ProtocolError):
    """A query id that this site has answered before."""

    code = "FI313"


class ExpiredError(ProtocolError):
    """A query that arrived after its time."""

    code = "FI314"


class BudgetExceededError(ProtocolError):
    """The site's privacy budget does not cover the query; nothing was spent."""

    code = "FI315"


class DifferencingError(ProtocolError):
    """The same rows asked of another cohort: the difference would single out a site."""

    code = "FI316"


class ReceiptError(ProtocolError):
    """A receipt that does not verify."""

    code = "FI317"


class CacheError(ProtocolError):
    """A KV cache that is malformed, not finite, or not of the model that it names."""

    code = "FI318"


class HandleError(ProtocolError):
    """A cache handle that is unknown, spent, expired, or another querier's."""

    code = "FI319"


class MediumRefusedError(ProtocolError):
    """The site does not share in this way: cache, full cache, or text."""

    code = "FI320"


class SettlementError(ProtocolError):
    """Evidence, weights or a reveal of audits that do not fit their epoch."""

    code = "FI321"


class PolicyRefusedError(ProtocolError):
    """The site's policy forbids it; the text names the rule."""

    code = "FI322"


class AuditLogError(ProtocolError):
    """An audit log that cannot be read, or written on."""

    code = "FI323"
