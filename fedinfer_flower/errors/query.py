"""Runs that did not go to their end."""

from __future__ import annotations

from fedinfer_flower.errors.base import FedInferError

__all__ = [
    "AuthenticationError",
    "FuserError",
    "GatewayError",
    "LedgerError",
    "ModelAnswerError",
    "ModelLoadError",
    "NotEnoughNodesError",
    "NotRegisteredError",
    "PartyFailedError",
    "PromptTooLongError",
    "QueryCancelledError",
    "QueryError",
    "QuorumNotMetError",
    "QuotaExceededError",
    "RecoveryError",
    "SelectionError",
    "SiteFailedError",
    "UnavailableError",
    "UnknownQueryError",
]


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


class SelectionError(QueryError):
    """No set of sites fits what was asked for."""

    code = "FI411"


class LedgerError(QueryError):
    """A posting that the ledger refuses, or a ledger that does not verify."""

    code = "FI412"


class GatewayError(QueryError):
    """The gateway cannot be reached, or what it answers is not an answer."""

    code = "FI413"


class AuthenticationError(QueryError):
    """An API key that is missing, wrong, expired, or not meant for this."""

    code = "FI414"


class QuotaExceededError(QueryError):
    """More than the API key may ask, or the gateway has room for."""

    code = "FI415"


class QueryCancelledError(QueryError):
    """A query that its owner called off."""

    code = "FI416"


class UnavailableError(QueryError):
    """The federation cannot be asked now: too few sites, or the gateway is closing."""

    code = "FI417"


class UnknownQueryError(QueryError):
    """No query of that id, or it belongs to another API key."""

    code = "FI418"
