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
│   ├── ModelError               FI208  a local model that no adapter fits
│   └── DeploymentError          FI209  a site, gateway or SuperLink that is set up wrongly
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
│   ├── MediumRefusedError       FI320  the site does not share in this way
│   ├── SettlementError          FI321  evidence or a reveal that does not fit its epoch
│   ├── PolicyRefusedError       FI322  the site's policy forbids it
│   └── AuditLogError            FI323  an audit log that cannot be read or written on
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
    ├── PromptTooLongError       FI410  a prompt longer than the model's window
    ├── SelectionError           FI411  no set of sites fits what was asked for
    ├── LedgerError              FI412  a posting that is refused, or a ledger that does not verify
    ├── GatewayError             FI413  the gateway cannot be reached, or answers nonsense
    ├── AuthenticationError      FI414  an API key that is missing, wrong, expired or too narrow
    ├── QuotaExceededError       FI415  more than the API key, or the gateway, has room for
    ├── QueryCancelledError      FI416  a query that its owner called off
    ├── UnavailableError         FI417  the federation cannot be asked now
    └── UnknownQueryError        FI418  no query of that id, or not this key's

An error text says what happened, where, the likely cause and the next step. It never
carries inputs, scores, prompts or keys: Flower sends texts of exceptions to the server.
"""

from __future__ import annotations

from fedinfer_flower.errors.base import FedInferError
from fedinfer_flower.errors.by_code import error_class
from fedinfer_flower.errors.config import (
    CapacityError,
    ConfigError,
    DeploymentError,
    IncompatibleProtection,
    InvalidValueError,
    KeyAtCoordinatorError,
    MissingExtraError,
    ModelError,
    UnknownConfigKeyError,
    UnknownNameError,
)
from fedinfer_flower.errors.protocol import (
    AuditLogError,
    BindingError,
    BudgetExceededError,
    CacheError,
    DifferencingError,
    EnvelopeError,
    ExpiredError,
    HandleError,
    InvalidCiphertextError,
    InvalidScoresError,
    LabelSpaceError,
    MediumRefusedError,
    PolicyRefusedError,
    ProtectionRefusedError,
    ProtocolError,
    ReceiptError,
    ReplayError,
    SealError,
    SettlementError,
    ShapeError,
    SignatureError,
    SizeLimitError,
    UnsupportedVersionError,
    UntrustedKeyError,
)
from fedinfer_flower.errors.query import (
    AuthenticationError,
    FuserError,
    GatewayError,
    LedgerError,
    ModelAnswerError,
    ModelLoadError,
    NotEnoughNodesError,
    NotRegisteredError,
    PartyFailedError,
    PromptTooLongError,
    QueryCancelledError,
    QueryError,
    QuorumNotMetError,
    QuotaExceededError,
    RecoveryError,
    SelectionError,
    SiteFailedError,
    UnavailableError,
    UnknownQueryError,
)

__all__ = [
    "AuditLogError",
    "AuthenticationError",
    "BindingError",
    "BudgetExceededError",
    "CacheError",
    "CapacityError",
    "ConfigError",
    "DeploymentError",
    "DifferencingError",
    "EnvelopeError",
    "ExpiredError",
    "FedInferError",
    "FuserError",
    "GatewayError",
    "HandleError",
    "IncompatibleProtection",
    "InvalidCiphertextError",
    "InvalidScoresError",
    "InvalidValueError",
    "KeyAtCoordinatorError",
    "LabelSpaceError",
    "LedgerError",
    "MediumRefusedError",
    "MissingExtraError",
    "ModelAnswerError",
    "ModelError",
    "ModelLoadError",
    "NotEnoughNodesError",
    "NotRegisteredError",
    "PartyFailedError",
    "PolicyRefusedError",
    "PromptTooLongError",
    "ProtectionRefusedError",
    "ProtocolError",
    "QueryCancelledError",
    "QueryError",
    "QuorumNotMetError",
    "QuotaExceededError",
    "ReceiptError",
    "RecoveryError",
    "ReplayError",
    "SealError",
    "SelectionError",
    "SettlementError",
    "ShapeError",
    "SignatureError",
    "SiteFailedError",
    "SizeLimitError",
    "UnavailableError",
    "UnknownConfigKeyError",
    "UnknownNameError",
    "UnknownQueryError",
    "UnsupportedVersionError",
    "UntrustedKeyError",
    "error_class",
]

for _name in __all__:
    # A traceback names the class by the path from which users import it.
    globals()[_name].__module__ = __name__
