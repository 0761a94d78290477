"""What a contribution scheme is: from audited answers to one number a site.

Axes: K sites, T audit queries, C classes.

Schemes differ in what they must be shown. A *linear* scheme is a sum over queries of a
site's own answers with weights that everybody may know, and so can be worked out under
encryption or on additive shares: it is written once, as `LinearScheme.weights`, and is the
same in clear (see `fedinfer_flower.settlement`).
"""

from __future__ import annotations

import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt

from fedinfer_flower.ensemble.options import Scalar, checked_options, require_known_options
from fedinfer_flower.errors import InvalidValueError, ShapeError
from fedinfer_flower.registry import Registry

__all__ = [
    "SCHEMES",
    "AuditedAnswers",
    "CoalitionSums",
    "ContributionScheme",
    "LinearScheme",
    "PublicFacts",
    "Sight",
    "likeliest",
    "make_scheme",
    "without_dust",
]

Array = npt.NDArray[np.float64]
IntArray = npt.NDArray[np.int64]


class Sight(StrEnum):
    """What whoever runs a scheme must be shown of the sites' answers."""

    NOTHING = "nothing"
    ROW_SUMS = "row-sums"
    """One weighted sum a site over an epoch's queries; weights are public."""
    COALITION_SUMS = "coalition-sums"
    """The combined answer of random coalitions."""
    ANSWERS = "answers"
    """Each site's own answer to each audit query."""


def _no_labels(scheme: str) -> InvalidValueError:
    return InvalidValueError(
        f"scheme {scheme!r} needs the labels of the audit queries",
        hint="mix audit queries with known labels among the others",
    )


def _frozen(array: npt.NDArray[Any]) -> npt.NDArray[Any]:
    view = np.asarray(array).view()
    view.flags.writeable = False
    return view


def likeliest(totals: Array) -> IntArray:
    """Return the class with the largest total along the last axis; the first of equal ones.

    Totals are compared to nine digits, so that the order in which sites were added up does
    not decide a tie.

    Examples
    --------
    >>> likeliest(np.array([[0.1 + 0.2, 0.3], [0.2, 0.8]]))
    array([0, 1])
    """
    return np.asarray(np.round(totals, 9).argmax(axis=-1), dtype=np.int64)


@dataclass(frozen=True, kw_only=True, eq=False)
class PublicFacts:
    """What may be known of an epoch's audit queries by everybody who settles.

    Parameters
    ----------
    total_tc : float array of shape (n_queries, n_classes)
        Sum over sites of their probabilities.
    n_sites : int
        Sites in the sum.
    labels : int array of shape (n_queries,), optional
        Right classes, where the querier knows them; None for queries without labels.
    """

    total_tc: Array
    n_sites: int
    labels: IntArray | None = None

    def __post_init__(self) -> None:
        if self.total_tc.ndim != 2 or self.n_sites < 1:
            raise ShapeError("public facts have a total of shape (n_queries, n_classes)")
        object.__setattr__(self, "total_tc", _frozen(np.asarray(self.total_tc, dtype=float)))
        if self.labels is not None:
            labels = np.asarray(self.labels, dtype=np.int64)
            n_queries, n_classes = self.total_tc.shape
            if labels.shape != (n_queries,) or (
                n_queries and not (labels.min() >= 0 and labels.max() < n_classes)
            ):
                raise ShapeError("labels are one class index for each audit query")
            object.__setattr__(self, "labels", _frozen(labels))

    @property
    def n_queries(self) -> int:
        """T."""
        return int(self.total_tc.shape[0])

    @property
    def n_classes(self) -> int:
        """C."""
        return int(self.total_tc.shape[1])

    def reference(self) -> IntArray:
        """Return the labels; where there are none, the joint answer to each query."""
        if self.labels is not None:
            return self.labels
        return likeliest(self.total_tc)

    def require_labels(self, scheme: str) -> IntArray:
        """Return the labels.

        Raises
        ------
        InvalidValueError
            If there are none.
        """
        if self.labels is None:
            raise _no_labels(scheme)
        return self.labels


@dataclass(frozen=True, kw_only=True, eq=False)
class AuditedAnswers:
    """Every site's answer to every audit query, in clear.

    Parameters
    ----------
    probabilities_ktc : float array of shape (n_sites, n_queries, n_classes)
        Rows sum to 1.
    labels : int array of shape (n_queries,), optional
        Right classes.
    owners : tuple of str, optional
        One for each site; sites of one owner are one party.

    Privacy
    -------
    Whoever holds this sees each site's own answer: under `plain` the coordinator or the
    querier may, under `secagg` and `he` nobody can build it.
    """

    probabilities_ktc: Array = field(repr=False)
    labels: IntArray | None = field(default=None, repr=False)
    owners: tuple[str, ...] | None = None

    def __post_init__(self) -> None:
        p = np.asarray(self.probabilities_ktc, dtype=float)
        if p.ndim != 3 or 0 in p.shape:
            raise ShapeError("answers have shape (n_sites, n_queries, n_classes), none empty")
        if not (np.isfinite(p).all() and (p >= 0.0).all()):
            raise InvalidValueError("answers are probabilities: finite and not negative")
        if not np.allclose(p.sum(axis=-1), 1.0, atol=1e-6):
            raise InvalidValueError("each answer's probabilities sum to 1")
        object.__setattr__(self, "probabilities_ktc", _frozen(p))
        if self.owners is not None and len(self.owners) != len(p):
            raise ShapeError(f"{len(self.owners)} owners for {len(p)} sites")
        if self.labels is not None:
            object.__setattr__(self, "labels", self.public().labels)

    @property
    def n_sites(self) -> int:
        """K."""
        return int(self.probabilities_ktc.shape[0])

    @property
    def n_queries(self) -> int:
        """T."""
        return int(self.probabilities_ktc.shape[1])

    @property
    def n_classes(self) -> int:
        """C."""
        return int(self.probabilities_ktc.shape[2])

    def public(self) -> PublicFacts:
        """Return what of this everybody who settles may know."""
        return PublicFacts(
            total_tc=self.probabilities_ktc.sum(axis=0), n_sites=self.n_sites, labels=self.labels
        )

    def votes(self) -> IntArray:
        """Return each site's likeliest class, shape (n_sites, n_queries)."""
        return likeliest(self.probabilities_ktc)


@dataclass(frozen=True, kw_only=True, eq=False)
class CoalitionSums:
    """Combined answers of random coalitions, each to its own queries.

    Parameters
    ----------
    members_tk : bool array of shape (n_queries, n_sites)
        Who was asked each query.
    totals_tc : float array of shape (n_queries, n_classes)
        Sum of the members' probabilities.
    labels : int array of shape (n_queries,)
    """

    members_tk: npt.NDArray[np.bool_]
    totals_tc: Array
    labels: IntArray

    def __post_init__(self) -> None:
        n_queries = len(self.labels)
        if self.members_tk.ndim != 2 or self.totals_tc.ndim != 2:
            raise ShapeError("members are (n_queries, n_sites), totals (n_queries, n_classes)")
        if len(self.members_tk) != n_queries or len(self.totals_tc) != n_queries:
            raise ShapeError("members, totals and labels have one row a query")


@dataclass(frozen=True, kw_only=True)
class ContributionScheme(ABC):
    """Base of all schemes: a frozen dataclass whose fields are its options.

    Attributes
    ----------
    name : str
        Registered name.
    sees : Sight
        What it must be shown.
    needs_labels : bool
        Whether it works on audit queries with known labels only.
    max_sites : int, optional
        Most sites for which it can be worked out.
    """

    name: ClassVar[str] = ""
    sees: ClassVar[Sight] = Sight.ANSWERS
    needs_labels: ClassVar[bool] = False
    max_sites: ClassVar[int | None] = None

    def __post_init__(self) -> None:
        for name, value in checked_options(f"scheme {self.name!r}", self).items():
            object.__setattr__(self, name, value)

    def options(self) -> dict[str, Scalar]:
        """Return the options that make the same scheme elsewhere; see `make_scheme`."""
        return dataclasses.asdict(self)

    def check(self, answers: AuditedAnswers) -> None:
        """Refuse answers that the scheme cannot score.

        Raises
        ------
        InvalidValueError
            If labels are missing, or there are too many sites.
        """
        if self.needs_labels and answers.labels is None:
            raise _no_labels(self.name)
        if self.max_sites is not None and answers.n_sites > self.max_sites:
            raise InvalidValueError(
                f"scheme {self.name!r} is for at most {self.max_sites} sites, got"
                f" {answers.n_sites}",
                hint="use 'shapley-sampled' or 'brier-shapley'",
            )

    @abstractmethod
    def contributions(self, answers: AuditedAnswers) -> Array:
        """Return one score a site; may be negative, is not normalised.

        Returns
        -------
        values_k : float array of shape (n_sites,)
        """


@dataclass(frozen=True, kw_only=True)
class LinearScheme(ContributionScheme):
    """A scheme that is a row sum with public weights: ``sum_t <p_k(t) - 1/C, M(t)>``.

    A subclass writes `weights` alone. The answers are centred, so that a uniform answer
    earns exactly 0 under any weights.
    """

    sees: ClassVar[Sight] = Sight.ROW_SUMS

    @abstractmethod
    def weights(self, facts: PublicFacts) -> Array:
        """Return M, which everybody who settles works out for himself.

        Returns
        -------
        weights_tc : float array of shape (n_queries, n_classes)
        """

    def contributions(self, answers: AuditedAnswers) -> Array:
        """Return the row sums in clear."""
        self.check(answers)
        centred = answers.probabilities_ktc - 1.0 / answers.n_classes
        weights_tc = self.weights(answers.public())
        sums = np.einsum("ktc,tc->k", centred, weights_tc)
        return without_dust(sums, 1e-12 * float(np.abs(weights_tc).sum()))


def without_dust(values: Array, error: float) -> Array:
    """Return values with those that may be rounding errors set to 0.

    A fixed answer earns 0 but for rounding, and dust must not win a pot that nobody earned.

    Examples
    --------
    >>> without_dust(np.array([1e-17, 0.2]), 1e-12)
    array([0. , 0.2])
    """
    return np.where(np.abs(values) <= error, 0.0, values)


SCHEMES: Registry[ContributionScheme] = Registry(
    kind="scheme", package="fedinfer_flower.incentives", group="fedinfer_flower.schemes"
)
"""All contribution schemes by name."""


def make_scheme(name: str, options: Mapping[str, object] | None = None) -> ContributionScheme:
    """Build a scheme from its registered name and its options.

    Raises
    ------
    UnknownNameError
        If no scheme has that name.
    InvalidValueError
        If an option does not exist, has the wrong type or lies outside its range.

    Examples
    --------
    >>> from fedinfer_flower.incentives import make_scheme
    >>> make_scheme("brier-shapley").sees.value
    'row-sums'
    """
    cls = SCHEMES.get(name)
    given: dict[str, Any] = dict(options or {})
    known = [f.name for f in dataclasses.fields(cls) if f.init]
    require_known_options(f"scheme {name!r}", given, known)
    return cls(**given)
