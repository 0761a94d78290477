"""What an ensemble rule is: a local half at the site and a global half elsewhere.

Axes: K sites, B queries of a batch, C classes, S width of a score. Suffixes of array
names give the axes in this order (``scores_kbs``).

Every rule of the form ``argmax sum_k phi_k(x)``, with phi_k worked out at site k, needs
one vector sum and nothing else; such a rule declares ``Disclosure.SUM`` and works under
every protection, encryption among them. A rule that has to look at each site's own
scores declares ``Disclosure.SCORES``.
"""

from __future__ import annotations

import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Mapping
from enum import IntEnum, StrEnum
from typing import ClassVar

import numpy as np
import numpy.typing as npt

from fedinfer_flower.ensemble.options import Scalar, checked_options, require_known_options
from fedinfer_flower.errors import InvalidValueError, ShapeError
from fedinfer_flower.query import Prediction
from fedinfer_flower.registry import Registry

__all__ = [
    "PROBABILITY_FLOOR",
    "RULES",
    "Array",
    "Disclosure",
    "EnsembleRule",
    "Evidence",
    "ScoreKind",
    "SiteContext",
    "log_softmax",
    "make_rule",
    "softmax",
    "top_distance",
]

Array = npt.NDArray[np.float64]

PROBABILITY_FLOOR = 1e-6
"""Probability given to a class that a model puts at zero or has never seen. Finite, so
that log scores stay finite; far below anything a calibrated model says on purpose."""


class Disclosure(IntEnum):
    """What the coordinator is shown of the sites' scores; larger is more."""

    SUM = 1
    SCORES = 2


class ScoreKind(StrEnum):
    """What the entries of a score are; decides which noise makes sense on them."""

    VOTE = "vote"
    PROBABILITY = "probability"
    LOG_PROBABILITY = "log-probability"
    LOGIT = "logit"


class Evidence(StrEnum):
    """What a rule needs of a site beyond its logits."""

    CLASS_COUNTS = "class-counts"
    CONFUSION = "confusion"
    AUGMENTED = "augmented"
    FAMILIARITY = "familiarity"
    STACK = "stack"


@dataclasses.dataclass(frozen=True, kw_only=True)
class SiteContext:
    """What the local half of a rule may use. Built at the site and never sent.

    Parameters
    ----------
    present : bool array of shape (n_classes,)
        Classes that the local model was trained on.
    class_counts : float array of shape (n_classes,), optional
        The site's committed training counts, or presence bits as 0.0 and 1.0.
    class_totals : float array of shape (n_classes,), optional
        Sum of `class_counts` over all sites that are asked. Public.
    confusion : float array of shape (n_classes, n_classes), optional
        Row c, column l: estimate of P(model says l | truth is c) on the site's own
        held-out data. Rows sum to 1; the row of an unseen class is uniform.
    augmented_tbc : float array of shape (n_augmentations, n_queries, n_classes), optional
        Calibrated logits of augmented copies of the queries.
    familiarity : float array of shape (n_queries,), optional
        In [0, 1]: how close each query is to the site's own training data.
    key_id : str
        Fingerprint of the site's key: names its own part of a fitted aggregator.
    """

    present: npt.NDArray[np.bool_]
    class_counts: Array | None = None
    class_totals: Array | None = None
    confusion: Array | None = None
    augmented_tbc: Array | None = None
    familiarity: Array | None = None
    key_id: str = ""


_FAR_BELOW = -1e300
"""Stands for any distance that a float64 cannot hold; sums of many still can."""


def top_distance(logits: Array) -> Array:
    """Return logits relative to the highest of their row: 0.0 there, negative elsewhere.

    Finite for any finite logits, also where their difference overflows.

    Examples
    --------
    >>> top_distance(np.array([[1.0, 3.0]]))
    array([[-2.,  0.]])
    """
    with np.errstate(over="ignore"):
        return np.asarray(np.maximum(logits - logits.max(axis=-1, keepdims=True), _FAR_BELOW))


def log_softmax(logits: Array) -> Array:
    """Return log-probabilities along the last axis, without overflow.

    Examples
    --------
    >>> np.exp(log_softmax(np.array([[1000.0, 1000.0]])))
    array([[0.5, 0.5]])
    """
    shifted = top_distance(logits)
    return np.asarray(shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True)))


def softmax(logits: Array) -> Array:
    """Return probabilities along the last axis, floored at `PROBABILITY_FLOOR`.

    The floor keeps logarithms finite; rows sum to 1.

    Examples
    --------
    >>> softmax(np.array([[0.0, 0.0]]))
    array([[0.5, 0.5]])
    """
    probabilities = np.maximum(np.exp(log_softmax(logits)), PROBABILITY_FLOOR)
    return np.asarray(probabilities / probabilities.sum(axis=-1, keepdims=True))


@dataclasses.dataclass(frozen=True, kw_only=True)
class EnsembleRule(ABC):
    """Base of all rules: a frozen dataclass whose fields are the rule's options.

    A subclass writes `score` and, where the combined score is not simply the larger the
    likelier, `probabilities`. A rule that needs each site's own scores sets
    ``discloses = Disclosure.SCORES`` and writes `combine`.

    Attributes
    ----------
    name : str
        Registered name.
    discloses : Disclosure
        What the coordinator must be shown.
    score_kind : ScoreKind
        What a score's entries are.
    needs : frozenset of Evidence
        What a site must have besides logits.
    """

    name: ClassVar[str] = ""
    discloses: ClassVar[Disclosure] = Disclosure.SUM
    score_kind: ClassVar[ScoreKind] = ScoreKind.PROBABILITY
    needs: ClassVar[frozenset[Evidence]] = frozenset()

    def __post_init__(self) -> None:
        for name, value in checked_options(f"rule {self.name!r}", self).items():
            object.__setattr__(self, name, value)

    def options(self) -> dict[str, Scalar]:
        """Return the options that make the same rule elsewhere; see `make_rule`."""
        return dataclasses.asdict(self)

    def score_width(self, n_classes: int) -> int:
        """Return S, the number of entries of one score."""
        return n_classes

    def score_bound(self, n_classes: int) -> float:  # noqa: ARG002
        """Return the largest absolute value that an honest score's entry can have."""
        return 1.0

    def sensitivity_l2(self, n_classes: int) -> float:
        """Return how far one row can move when a site's whole answer is replaced (L2).

        The default is the diameter of the box of side ``2 * score_bound``; rules whose
        scores live in a smaller body say so, because noise grows with this number.
        """
        return 2.0 * self.score_bound(n_classes) * float(np.sqrt(self.score_width(n_classes)))

    @abstractmethod
    def score(self, logits: Array, site: SiteContext) -> Array:
        """Turn local logits into this site's score.

        Parameters
        ----------
        logits : float array of shape (n_queries, n_classes)
            Calibrated, aligned to the query's classes; absent classes are very small.
        site : SiteContext
            Local facts.

        Returns
        -------
        scores_bs : float array of shape (n_queries, score_width)
        """

    def combine(self, scores: Array) -> Array:
        """Combine the sites' scores; a sum unless the rule says otherwise.

        Parameters
        ----------
        scores : float array of shape (n_sites, n_queries, score_width)

        Returns
        -------
        total_bs : float array of shape (n_queries, score_width)
        """
        return np.asarray(scores.sum(axis=0))

    def class_totals(self, total: Array) -> Array:
        """Return the part of a combined score that ranks classes, shape (n_queries, n_classes)."""
        return total

    def probabilities(self, total: Array, n_sites: int) -> Array:  # noqa: ARG002
        """Turn a combined score into probabilities of shape (n_queries, n_classes)."""
        positive = np.maximum(self.class_totals(total), 0.0)
        mass = positive.sum(axis=-1, keepdims=True)
        uniform = np.full_like(positive, 1.0 / positive.shape[-1])
        return np.where(mass > 0.0, positive / np.where(mass > 0.0, mass, 1.0), uniform)

    def decide(
        self, total: Array, n_sites: int, classes: tuple[str, ...], *, tie_seed: int = 0
    ) -> Prediction:
        """Turn a combined score into labels, probabilities, margins and abstentions.

        Ties are broken by lot among the tied classes, so that no class gains by its
        place in the list. The lot depends on `tie_seed` and the row's number alone: the
        same run gives the same labels in simulation and in deployment.

        Parameters
        ----------
        total : float array of shape (n_queries, score_width)
        n_sites : int
            Number of sites in the sum.
        classes : tuple of str
        tie_seed : int

        Returns
        -------
        Prediction

        Raises
        ------
        ShapeError
            If `total` does not fit the rule and the classes.
        """
        if total.ndim != 2 or total.shape[1] != self.score_width(len(classes)):
            raise ShapeError(
                f"rule {self.name!r} expects (n_queries, {self.score_width(len(classes))})"
                f" combined scores, got {total.shape}"
            )
        ranking = self.class_totals(total)
        top = ranking.max(axis=1, keepdims=True)
        tied = ranking >= top - 1e-9
        lots = np.random.default_rng(tie_seed).random(ranking.shape)
        labels = np.where(tied, lots, -1.0).argmax(axis=1)
        if ranking.shape[1] > 1:
            second = np.partition(ranking, -2, axis=1)[:, -2]
            margin = np.maximum(top[:, 0] - second, 0.0)
        else:
            margin = np.full(len(ranking), np.inf)
        # Nothing was said at all: every class tied, which no vote can mean.
        abstained = tied.all(axis=1) & (ranking.shape[1] > 1)
        return Prediction(
            classes=classes,
            labels=labels,
            probabilities=self.probabilities(total, n_sites),
            margin=margin,
            abstained=abstained,
        )


RULES: Registry[EnsembleRule] = Registry(
    kind="rule", package="fedinfer_flower.ensemble", group="fedinfer_flower.rules"
)
"""All ensemble rules by name."""


def make_rule(name: str, options: Mapping[str, object] | None = None) -> EnsembleRule:
    """Build a rule from its registered name and its options, trusting neither.

    Parameters
    ----------
    name : str
    options : mapping of str to JSON scalar, optional
        Left-out options keep their defaults.

    Raises
    ------
    UnknownNameError
        If no rule has that name.
    InvalidValueError
        If an option does not exist, has the wrong type or lies outside its range.

    Examples
    --------
    >>> make_rule("mean-probability", {})
    MeanProbability()
    """
    cls = RULES.get(name)
    given = {} if options is None else options
    if not isinstance(given, Mapping):
        raise InvalidValueError(f"options of rule {name!r} are a mapping of names to values")
    known = [field.name for field in dataclasses.fields(cls) if field.init]
    require_known_options(f"rule {name!r}", given, known)
    return cls(**given)
