"""Value objects: what travels through a query's life, frozen and validated.

Axes: B queries of a batch, C classes. Arrays in values are made read-only.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from enum import StrEnum
from types import MappingProxyType
from typing import Any, NewType

import numpy as np
import numpy.typing as npt

from fedinfer_flower.errors import InvalidValueError, ShapeError

__all__ = [
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

MAX_CLASSES = 65_536
MAX_CLASS_COUNT = 1e12
"""Bound on a declared class count: a weight that a site declares is committed once, at
onboarding, and bounded; nothing that it says later can raise it."""


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

    Examples
    --------
    >>> Deadline(timeout_s=30, quorum=3)
    Deadline(timeout_s=30, quorum=3)
    """

    timeout_s: float = 60.0
    quorum: int = 1

    def __post_init__(self) -> None:
        _require(
            math.isfinite(self.timeout_s) and self.timeout_s > 0,
            f"timeout_s must be a positive number of seconds, got {self.timeout_s!r}",
        )
        _require(self.quorum >= 1, f"quorum must be at least 1, got {self.quorum!r}")


class CountsKind(StrEnum):
    """What a site agrees to say about its classes."""

    COUNTS = "counts"
    PRESENCE = "presence"
    WITHHELD = "withheld"


@dataclass(frozen=True, kw_only=True)
class SiteProfile:
    """What a site says about itself at onboarding. Routing data: the coordinator reads it.

    Parameters
    ----------
    name : str
        The site's own name for itself; not an identity, which is Flower's node id.
    classes : tuple of str
        Names of the classes that the local model knows.
    counts_kind : CountsKind
        Whether `class_counts` are training counts, presence bits, or withheld.
    class_counts : tuple of float, optional
        One per class; None when withheld.
    calibrated : bool
        Whether a temperature was fitted on held-out data.
    temperature : float
        The fitted temperature; 1.0 when not calibrated.
    familiarity : bool
        Whether the site can say how close a query is to its own training data.
    model_card : mapping of str to str
        Free text such as ``{"kind": "random forest"}``.
    price_per_query : float
        What the site asks for one query row; 0.0 if nothing.
    model_digest : str
        Names the model behind the answers; empty if the site does not say.
    record_epsilon, record_delta : float, optional
        Differential privacy of the model's training, for replacing one training record;
        None without. The site's claim.

    Privacy
    -------
    Class counts tell the coordinator how a site's training data is distributed over
    classes. A site that does not consent shares presence bits, or nothing.
    """

    name: str
    classes: tuple[str, ...]
    counts_kind: CountsKind = CountsKind.WITHHELD
    class_counts: tuple[float, ...] | None = None
    calibrated: bool = False
    temperature: float = 1.0
    familiarity: bool = False
    model_card: Mapping[str, str] = field(default_factory=dict)
    price_per_query: float = 0.0
    model_digest: str = ""
    record_epsilon: float | None = None
    record_delta: float | None = None

    def __post_init__(self) -> None:
        # As they are after their journey: 1 and 1.0 are equal, but not in a digest.
        card = {str(key): str(value) for key, value in self.model_card.items()}
        object.__setattr__(self, "model_card", MappingProxyType(card))
        for name in ("temperature", "price_per_query"):
            object.__setattr__(self, name, float(getattr(self, name)))
        for name in ("record_epsilon", "record_delta"):
            if getattr(self, name) is not None:
                object.__setattr__(self, name, float(getattr(self, name)))
        if self.class_counts is not None:
            object.__setattr__(self, "class_counts", tuple(float(n) for n in self.class_counts))
        # The name ends in logs and terminals.
        _require(
            0 < len(self.name) <= 128 and self.name.isprintable(),
            "a site's name has 1 to 128 printable characters",
        )
        _require(0 < len(self.classes) <= MAX_CLASSES, f"a site has 1 to {MAX_CLASSES} classes")
        _require(
            all(0 < len(name) <= 256 and name.isprintable() for name in self.classes),
            "class names have 1 to 256 printable characters",
        )
        _require(len(set(self.classes)) == len(self.classes), "a site's class names are distinct")
        _require(
            (self.class_counts is None) == (self.counts_kind is CountsKind.WITHHELD),
            "class_counts are given exactly when counts_kind is not 'withheld'",
        )
        if self.class_counts is not None:
            _require(
                len(self.class_counts) == len(self.classes),
                f"{len(self.classes)} classes but {len(self.class_counts)} class counts",
            )
            limit = 1.0 if self.counts_kind is CountsKind.PRESENCE else MAX_CLASS_COUNT
            _require(
                all(math.isfinite(n) and 0.0 <= n <= limit for n in self.class_counts),
                f"class counts are finite numbers in [0, {limit:g}]",
            )
        _require(
            math.isfinite(self.temperature) and 0.0 < self.temperature < 1e3,
            "temperature is a number in (0, 1000)",
        )
        _require(
            math.isfinite(self.price_per_query) and self.price_per_query >= 0.0,
            "price_per_query is a number that is not negative",
        )
        _require(
            len(self.model_digest) <= 128 and (self.model_digest + "x").isprintable(),
            "a model's digest has at most 128 printable characters",
        )
        _require(
            (self.record_epsilon is None) == (self.record_delta is None),
            "record_epsilon and record_delta come together",
        )
        if self.record_epsilon is not None and self.record_delta is not None:
            _require(
                math.isfinite(self.record_epsilon)
                and self.record_epsilon >= 0.0
                and 0.0 <= self.record_delta < 1.0,
                "record_epsilon is not negative and record_delta is in [0, 1)",
            )

    def to_dict(self) -> dict[str, Any]:
        """Return plain values for JSON."""
        plain: dict[str, Any] = {n: getattr(self, n) for n in self.__dataclass_fields__}
        plain["classes"] = list(self.classes)
        plain["counts_kind"] = self.counts_kind.value
        plain["class_counts"] = None if self.class_counts is None else list(self.class_counts)
        plain["model_card"] = dict(self.model_card)
        return plain

    def commitment(self) -> str:
        """Return a digest that binds the site to what it declared.

        Every later answer repeats it: a site that changes its classes or counts after
        onboarding is refused until it is onboarded again.

        Examples
        --------
        >>> len(SiteProfile(name="a", classes=("x",)).commitment())
        64
        """
        canonical = json.dumps(self.to_dict(), sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(canonical.encode()).hexdigest()

    def aligned_counts(self, classes: tuple[str, ...], kind: CountsKind) -> npt.NDArray[np.float64]:
        """Return class counts in the order of `classes`, 0.0 for absent ones.

        Parameters
        ----------
        classes : tuple of str
        kind : CountsKind
            ``COUNTS`` for the counts themselves, ``PRESENCE`` for 0.0 and 1.0.

        Raises
        ------
        InvalidValueError
            If the profile withholds what is asked for.
        """
        if self.class_counts is None or (
            kind is CountsKind.COUNTS and self.counts_kind is not CountsKind.COUNTS
        ):
            raise InvalidValueError(f"the profile of {self.name!r} has no class {kind.value}")
        known = dict(zip(self.classes, self.class_counts, strict=True))
        counts = np.array([known.get(name, 0.0) for name in classes])
        return (counts > 0).astype(float) if kind is CountsKind.PRESENCE else counts


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
