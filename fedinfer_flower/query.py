"""Value objects: what travels through a query's life, frozen and validated.

Axes: B queries of a batch, C classes. Arrays in values are made read-only.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from enum import StrEnum
from typing import Any, NewType

import numpy as np
import numpy.typing as npt

from fedinfer_flower.errors import InvalidValueError, ShapeError
from fedinfer_flower.profile import MAX_CLASS_COUNT, MAX_CLASSES, CountsKind, SiteProfile

__all__ = [
    "MAX_CLASSES",
    "MAX_CLASS_COUNT",
    "CountsKind",
    "Deadline",
    "Prediction",
    "QueryId",
    "QueryReport",
    "SiteId",
    "SiteOutcome",
    "SiteProfile",
    "SiteStatus",
]

SiteId = NewType("SiteId", int)
QueryId = NewType("QueryId", str)


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise InvalidValueError(message)


@dataclass(frozen=True, kw_only=True)
class Deadline:
    """When a query ends, and how many answers it needs.

    Parameters
    ----------
    timeout_s : float
        Seconds after which a query ends with what has arrived.
    quorum : int
        Fewest answers that make a result. Fewer raise `QuorumNotMetError`; fewer than
        were asked flag the result as degraded.
    straggler_s : float
        Seconds to wait for the other sites once there are enough answers: the quorum, and
        what the protection needs. With 0.0, to `timeout_s`.

    Notes
    -----
    Under masks, a site that is not waited for counts as one that dropped out: the others
    help to open the sum, and sites then refuse to sum the same rows again. A second copy of
    a question to a site that has not answered does not help either: sites hold different
    models, and a query id is answered once.

    Examples
    --------
    >>> Deadline(timeout_s=30, quorum=3, straggler_s=0.5)
    Deadline(timeout_s=30, quorum=3, straggler_s=0.5)
    """

    timeout_s: float = 60.0
    quorum: int = 1
    straggler_s: float = 0.0

    def __post_init__(self) -> None:
        _require(
            math.isfinite(self.timeout_s) and self.timeout_s > 0,
            f"timeout_s must be a positive number of seconds, got {self.timeout_s!r}",
        )
        _require(self.quorum >= 1, f"quorum must be at least 1, got {self.quorum!r}")
        _require(
            math.isfinite(self.straggler_s) and self.straggler_s >= 0,
            f"straggler_s must be a number of seconds, not negative, got {self.straggler_s!r}",
        )


def _frozen(array: npt.NDArray[Any]) -> npt.NDArray[Any]:
    array = np.asarray(array).view()
    array.flags.writeable = False
    return array


@dataclass(frozen=True, kw_only=True, eq=False)
class Prediction:
    """The joint answer to a batch of queries.

    Parameters
    ----------
    classes : tuple of str
        Class names, in the order of the columns.
    labels : int array of shape (n_queries,)
        Index into `classes`.
    probabilities : float array of shape (n_queries, n_classes)
        Rows sum to 1.
    margin : float array of shape (n_queries,)
        Distance between the two highest combined scores, in units of the rule's score.
    abstained : bool array of shape (n_queries,)
        Queries to which the federation gives no answer.
    """

    classes: tuple[str, ...]
    labels: npt.NDArray[np.int64]
    probabilities: npt.NDArray[np.float64]
    margin: npt.NDArray[np.float64]
    abstained: npt.NDArray[np.bool_]

    def __post_init__(self) -> None:
        n_queries = len(self.labels)
        if self.probabilities.shape != (n_queries, len(self.classes)):
            raise ShapeError(
                f"probabilities have shape {self.probabilities.shape}, expected"
                f" {(n_queries, len(self.classes))}"
            )
        if len(self.margin) != n_queries or len(self.abstained) != n_queries:
            raise ShapeError("labels, margin and abstained have the same length")
        for name in ("labels", "probabilities", "margin", "abstained"):
            object.__setattr__(self, name, _frozen(getattr(self, name)))

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def names(self) -> list[str]:
        """Class name of each label, in query order."""
        return [self.classes[label] for label in self.labels]

    def abstain_below(self, margin: float) -> Prediction:
        """Return the same prediction, abstaining where the margin is smaller."""
        return Prediction(
            classes=self.classes,
            labels=self.labels,
            probabilities=self.probabilities,
            margin=self.margin,
            abstained=self.abstained | (self.margin < margin),
        )

    def accuracy(self, truth: npt.ArrayLike) -> float:
        """Return the share of queries answered rightly; an abstention counts as wrong.

        Parameters
        ----------
        truth : int array of shape (n_queries,)
            Index into `classes`.
        """
        right = (self.labels == np.asarray(truth)) & ~self.abstained
        return float(right.mean())


class SiteStatus(StrEnum):
    """How a site fared in one query."""

    ANSWERED = "answered"
    LATE = "late"
    FAILED = "failed"


@dataclass(frozen=True, kw_only=True)
class SiteOutcome:
    """How one site fared in one query.

    Parameters
    ----------
    site_id : int
        Flower's node id.
    name : str
    status : SiteStatus
    payload_bytes : int
        Bytes of the reply's payload; 0 if none came.
    seconds : float
        From sending the query to reading the reply.
    error_code, error : str
        Code and text of the typed error; empty if the site answered.
    """

    site_id: SiteId
    name: str
    status: SiteStatus
    payload_bytes: int = 0
    seconds: float = 0.0
    error_code: str = ""
    error: str = ""


@dataclass(frozen=True, kw_only=True)
class QueryReport:
    """What happened to one query: who answered, at what cost, how protected.

    Parameters
    ----------
    query_id : str
    n_queries : int
        Rows in the batch.
    rule, protection : str
    rule_reason : str
        Why this rule was picked.
    sites : tuple of SiteOutcome
    seconds : float
    request_bytes : int
        Bytes of the query's payload, sent to each site.
    key_at_coordinator : bool
        True if the coordinator could open every answer.
    epsilon_per_query, delta_per_query : float, optional
        Differential privacy of one row of one site's answer; None without `dp`.
    """

    query_id: QueryId
    n_queries: int
    rule: str
    protection: str
    rule_reason: str
    sites: tuple[SiteOutcome, ...]
    seconds: float
    request_bytes: int
    key_at_coordinator: bool = False
    epsilon_per_query: float | None = None
    delta_per_query: float | None = None

    @property
    def answered(self) -> tuple[SiteOutcome, ...]:
        """Sites whose answers are in the result."""
        return tuple(s for s in self.sites if s.status is SiteStatus.ANSWERED)

    @property
    def degraded(self) -> bool:
        """Whether a site that was asked is missing from the result."""
        return len(self.answered) < len(self.sites)

    @property
    def reply_bytes(self) -> int:
        """Payload bytes of all replies together."""
        return sum(s.payload_bytes for s in self.sites)

    def to_dict(self) -> dict[str, Any]:
        """Return plain values for JSON, with the derived ones."""
        return asdict(self) | {
            "degraded": self.degraded,
            "n_answered": len(self.answered),
            "reply_bytes": self.reply_bytes,
        }
