"""Every error of the package, in one tree.

FedInferError
├── ConfigError                  FI200  wrong before anything runs
│   ├── UnknownNameError         FI201  no rule, protection, ... of that name
│   ├── InvalidValueError        FI202  a value outside its range or type
│   ├── IncompatibleProtection   FI203  rule x protection pair that cannot work
│   ├── MissingExtraError        FI204  an optional dependency is not installed
│   ├── KeyAtCoordinatorError    FI205  the coordinator would hold the secret key
│   ├── UnknownConfigKeyError    FI206  a run-config key that nothing reads
│   ├── CapacityError            FI207  a sum could wrap around its modulus
│   └── ModelError               FI208  a local model that no adapter fits
├── ProtocolError                FI300  a message that must not be believed
│   ├── EnvelopeError            FI301  malformed bytes or fields
│   ├── UnsupportedVersionError  FI302  an envelope of another version
│   ├── BindingError             FI303  right form, wrong run, query, key, sender, profile
│   ├── ShapeError               FI304  shape or dtype other than agreed
│   ├── SizeLimitError           FI305  larger than the receiver accepts
│   ├── InvalidScoresError       FI306  NaN, infinite or out-of-bound scores
│   ├── InvalidCiphertextError   FI307  bytes that are no ciphertext of this round
│   ├── ProtectionRefusedError   FI308  the site does not answer under this protection
│   ├── LabelSpaceError          FI309  class names that do not fit the query
│   ├── SignatureError           FI310  a signature that is not by the key it claims
│   ├── UntrustedKeyError        FI311  a key that is not the pinned one
│   ├── SealError                FI312  sealed bytes that do not open with this key
│   ├── ReplayError              FI313  a query id that was answered before
│   ├── ExpiredError             FI314  a query after its time
│   ├── BudgetExceededError      FI315  a privacy budget that does not cover the query
│   ├── DifferencingError        FI316  the same rows to another cohort
│   ├── ReceiptError             FI317  a receipt that does not verify
│   ├── CacheError               FI318  a cache that is malformed, not finite or another model's
│   ├── HandleError              FI319  a cache handle that is unknown, spent, late or another's
│   └── MediumRefusedError       FI320  the site does not share in this way
└── QueryError                   FI400  a run that did not go to its end
    ├── SiteFailedError          FI401  a site's app failed outside our handler
    ├── QuorumNotMetError        FI402  too few answers by the deadline
    ├── ModelLoadError           FI403  load_model failed at the site
    ├── ModelAnswerError         FI404  the local model failed on the query
    ├── NotEnoughNodesError      FI405  too few nodes came online
    ├── NotRegisteredError       FI406  the ClientApp has no inference handler
    ├── RecoveryError            FI407  a dropout that could not be made good
    ├── PartyFailedError         FI408  a party of a joint computation died or was late
    ├── FuserError               FI409  no fuser for a pair of models, or one for another pair
    └── PromptTooLongError       FI410  a prompt longer than the model's window

An error text says what happened, where, the likely cause and the next step. It never
carries inputs, scores, prompts or keys: Flower sends texts of exceptions to the server.
"""

from __future__ import annotations

from typing import ClassVar

__all__ = [
    "BindingError",
    "BudgetExceededError",
    "CacheError",
    "CapacityError",
    "ConfigError",
    "DifferencingError",
    "EnvelopeError",
    "ExpiredError",
    "FedInferError",
    "FuserError",
    "HandleError",
    "IncompatibleProtection",
    "InvalidCiphertextError",
    "InvalidScoresError",
    "InvalidValueError",
    "KeyAtCoordinatorError",
    "LabelSpaceError",
    "MediumRefusedError",
    "MissingExtraError",
    "ModelAnswerError",
    "ModelError",
    "ModelLoadError",
    "NotEnoughNodesError",
    "NotRegisteredError",
    "PartyFailedError",
    "PromptTooLongError",
    "ProtectionRefusedError",
    "ProtocolError",
    "QueryError",
    "QuorumNotMetError",
    "ReceiptError",
    "RecoveryError",
    "ReplayError",
    "SealError",
    "ShapeError",
    "SignatureError",
    "SiteFailedError",
    "SizeLimitError",
    "UnknownConfigKeyError",
    "UnknownNameError",
    "UnsupportedVersionError",
    "UntrustedKeyError",
    "error_class",
]


class FedInferError(Exception):
    """Root of all errors of the package.

    Parameters
    ----------
    message : str
        What happened and where. Safe to show to any role.
    hint : str
        The next step to take; may be empty.
    site : str
        The site concerned, by name or node id; may be empty.
    """

    code: ClassVar[str] = "FI000"

    def __init__(self, message: str, *, hint: str = "", site: str = "") -> None:
        self.message = message
        self.hint = hint
        self.site = site
        where = f" [site {site}]" if site else ""
        fix = f"\n  fix: {hint}" if hint else ""
        page = f"   docs: docs/reference/errors.md#{self.code.lower()}"
        super().__init__(
            f"{self.code} {type(self).__name__}{where}: {message}{fix}{page if fix else ''}"
        )

    def at_site(self, site: str) -> FedInferError:
        """Return the same error with the name of the site in it."""
        return type(self)(self.message, hint=self.hint, site=site)


class ConfigError(FedInferError):
    """Wrong before anything runs."""

    code = "FI200"


class UnknownNameError(ConfigError):
    """No rule, protection or other registered thing has that name."""

    code = "FI201"


class InvalidValueError(ConfigError, ValueError):
    """A value outside its range or of the wrong type."""

    code = "FI202"


class IncompatibleProtection(ConfigError):
    """A rule and a protection that cannot work together."""

    code = "FI203"


class MissingExtraError(ConfigError, ImportError):
    """An optional dependency is not installed."""

    code = "FI204"


class KeyAtCoordinatorError(ConfigError):
    """The coordinator would hold the key that is to keep answers from it."""

    code = "FI205"


class UnknownConfigKeyError(ConfigError):
    """A run-config key that nothing reads."""

    code = "FI206"


class CapacityError(ConfigError):
    """A sum of this many scores could wrap around its modulus without notice."""

    code = "FI207"


class ModelError(ConfigError):
    """A local model that no adapter fits, or without the facts an adapter needs."""

    code = "FI208"


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


class QueryError(FedInferError):
    """A query that did not go to its end."""

    code = "FI400"


class SiteFailedError(QueryError):
    """The site's app or process failed outside the inference handler."""

    code = "FI401"


class QuorumNotMetError(QueryError):
    """Fewer sites than the quorum answered by the deadline."""

    code = "FI402"


class ModelLoadError(QueryError):
    """`load_model` raised, or returned nothing, at the site."""

    code = "FI403"


class ModelAnswerError(QueryError):
    """The local model failed on the query, or gave back something unusable."""

    code = "FI404"


class NotEnoughNodesError(QueryError):
    """Too few nodes came online before the run's patience ended."""

    code = "FI405"


class NotRegisteredError(QueryError):
    """The site's ClientApp has no inference handler."""

    code = "FI406"


class RecoveryError(QueryError):
    """A site dropped out, and the others could not make good for it."""

    code = "FI407"


class PartyFailedError(QueryError):
    """A party of a joint computation died, was late, or broke the protocol."""

    code = "FI408"


class FuserError(QueryError):
    """No fuser for this pair of models, or one that was trained for another pair."""

    code = "FI409"


class PromptTooLongError(QueryError):
    """A prompt that does not fit into the model's window."""

    code = "FI410"


def _walk(cls: type[FedInferError]) -> dict[str, type[FedInferError]]:
    found = {cls.code: cls}
    for child in cls.__subclasses__():
        found.update(_walk(child))
    return found


def error_class(code: str) -> type[FedInferError]:
    """Return the class with this code; `ProtocolError` for a code nobody knows.

    Examples
    --------
    >>> error_class("FI304").__name__
    'ShapeError'
    >>> error_class("nonsense").__name__
    'ProtocolError'
    """
    return _walk(FedInferError).get(code, ProtocolError)
