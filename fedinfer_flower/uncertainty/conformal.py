"""Prediction sets that hold the right class as often as promised: split conformal prediction.

Axes: B queries, C classes.

**What is promised.** Let n audit rows and a new row be exchangeable: drawn alike, in any order
equally likely, and answered by the same sites under the same rule. Then the set of the new row
holds its right class with probability at least ``1 - alpha``, whatever the models are, and at
most ``1 - alpha + 1/(n + 1)`` where no two scores are equal. The probability is over the audits
*and* the row.

**What is not promised.** Coverage of each class, each site's patients or each hard row: only the
average over rows. Coverage given these very audits: it varies with them, and
`ConformalPredictor.coverage_with_confidence` says how much. Anything once rows, sites, models or
rule have changed: calibrate again.

References
----------
.. [1] Vovk, Gammerman and Shafer, Algorithmic Learning in a Random World, 2005.
.. [2] Lei et al., Distribution-free predictive inference for regression, JASA 113, 2018
   (split conformal, theorem 2.2).
.. [3] Vovk, Conditional validity of inductive conformal predictors, ACML 2012 (proposition 2).
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import Final

import numpy as np
import numpy.typing as npt

from fedinfer_flower.errors import InvalidValueError, LabelSpaceError
from fedinfer_flower.query import Prediction
from fedinfer_flower.uncertainty.binomial import beta_lower_quantile
from fedinfer_flower.uncertainty.nonconformity import (
    label_scores,
    nonconformity,
    require_method,
)

__all__ = ["JOINT", "OWN", "ConformalPredictor", "conformal_rank"]

JOINT: Final = "joint"
"""Scores of the federation's joint answers: a promise about joint answers."""

OWN: Final = "own"
"""Scores of each site's own answers: a promise about a site's own answers to its own rows."""

BoolArray = npt.NDArray[np.bool_]


def conformal_rank(n_rows: int, alpha: float, *, n_groups: int = 1) -> int:
    """Return which of the sorted scores is the threshold, counted from 1.

    With more than one group the row to come is from group k with probability
    ``(n_k + 1) / (n + n_groups)``, and each group stands for one row more [1]_. A rank
    beyond `n_rows` says that no threshold short of infinity keeps the promise.

    References
    ----------
    .. [1] Lu et al., Federated Conformal Predictors for Distributed Uncertainty
       Quantification, ICML 2023, theorem 4.3.

    Examples
    --------
    >>> conformal_rank(99, 0.1), conformal_rank(99, 0.1, n_groups=5), conformal_rank(5, 0.1)
    (90, 94, 6)
    """
    if not isinstance(alpha, int | float | np.floating) or not 0.0 < alpha < 1.0:
        raise InvalidValueError(f"alpha is in (0, 1), got {alpha!r}")
    if n_rows < 0 or n_groups < 1:
        raise InvalidValueError("there are no fewer than 0 rows, and at least one group")
    # 0.9 * 10 is 9.000000000000002 in floats for some alpha: not a reason for one row more.
    return math.ceil((1.0 - alpha) * (n_rows + n_groups) - 1e-9)


@dataclass(frozen=True, kw_only=True)
class ConformalPredictor:
    """Turns probabilities into sets of classes, one of which is right in 1 - alpha of rows.

    Parameters
    ----------
    threshold : float
        Classes whose nonconformity is not above it are in the set; infinite for all.
    alpha : float
        Share of rows that may miss their right class, in (0, 1).
    method : {"lac", "aps"}
        See `uncertainty.nonconformity`.
    n_calibration : int
        Rows behind the threshold.
    scope : {"joint", "own"}
        Whose answers were scored; see `JOINT` and `OWN`.
    n_groups : int
        Sites whose rows were pooled; 1 for audits.

    Raises
    ------
    InvalidValueError

    Privacy
    -------
    Held by the querier. The threshold is one of the audits' scores: whoever gets it learns
    that number, and nothing else of them.

    Examples
    --------
    >>> import numpy as np
    >>> sure = ConformalPredictor(threshold=0.4, alpha=0.1)
    >>> sure.sets(np.array([[0.7, 0.2, 0.1], [0.5, 0.5, 0.0]]))
    array([[ True, False, False],
           [False, False, False]])
    """

    threshold: float
    alpha: float
    method: str = "lac"
    n_calibration: int = 0
    scope: str = JOINT
    n_groups: int = 1
    classes: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        require_method(self.method)
        if not 0.0 < self.alpha < 1.0:
            raise InvalidValueError(f"alpha is in (0, 1), got {self.alpha!r}")
        if math.isnan(self.threshold):
            raise InvalidValueError("a threshold is a number")
        if self.scope not in (JOINT, OWN):
            raise InvalidValueError("scope is 'joint' or 'own'")
        if self.n_calibration < 0 or self.n_groups < 1:
            raise InvalidValueError("rows are not negative, and of one group at least")

    @classmethod
    def from_scores(
        cls, scores: npt.ArrayLike, *, alpha: float = 0.1, method: str = "lac", scope: str = JOINT
    ) -> ConformalPredictor:
        """Learn the threshold from the right classes' nonconformity, shape (n_rows,)."""
        values = np.sort(np.asarray(scores, dtype=np.float64).ravel())
        if np.isnan(values).any():
            raise InvalidValueError("nonconformity scores are numbers")
        rank = conformal_rank(len(values), alpha)
        # Fewer rows than 1/alpha - 1: only the set of all classes keeps the promise.
        threshold = math.inf if rank > len(values) else float(values[max(rank, 1) - 1])
        return cls(
            threshold=threshold,
            alpha=alpha,
            method=method,
            n_calibration=len(values),
            scope=scope,
        )

    @classmethod
    def from_audits(
        cls,
        prediction: Prediction,
        labels: npt.ArrayLike,
        *,
        alpha: float = 0.1,
        method: str = "lac",
    ) -> ConformalPredictor:
        """Learn the threshold from joint answers to rows whose class the querier knows.

        The way to a promise about joint answers: audits are asked like all other rows.

        Parameters
        ----------
        prediction : Prediction
            To the audit rows alone; see `settlement.audits`.
        labels : int array of shape (n_rows,)
            Columns of the right classes; -1 where it is none of them.
        alpha : float
        method : {"lac", "aps"}

        Raises
        ------
        InvalidValueError
            If alpha is not in (0, 1), or a label is no column.
        ShapeError
            If there is not one label a row.
        """
        scores = label_scores(prediction.probabilities, labels, method=method)
        found = cls.from_scores(scores, alpha=alpha, method=method)
        return dataclasses.replace(found, classes=prediction.classes)

    def sets(self, answer: Prediction | npt.ArrayLike) -> BoolArray:
        """Return which classes are in each row's set, shape (n_queries, n_classes).

        Parameters
        ----------
        answer : Prediction or float array of shape (n_queries, n_classes)
            A `Prediction` is a joint answer; probabilities are whoever's they are.

        Raises
        ------
        InvalidValueError
            If the threshold was learnt on sites' own answers and this is a joint one.
        """
        if isinstance(answer, Prediction):
            if self.scope != JOINT:
                raise InvalidValueError(
                    "the threshold was learnt on sites' own answers and promises nothing about"
                    " joint ones",
                    hint="ConformalPredictor.from_audits(prediction, labels)",
                )
            if self.classes and set(answer.classes) != set(self.classes):
                raise LabelSpaceError(
                    "the threshold was learnt for answers in another label space",
                    hint="ask audits with the same classes=..., and calibrate again",
                )
            answer = answer.probabilities
        return np.asarray(nonconformity(answer, method=self.method) <= self.threshold)

    def undecided(self, answer: Prediction | npt.ArrayLike) -> BoolArray:
        """Return the rows with more than one class in their set: ask one more site there.

        Asking more for some rows only makes their answers another rule's: calibrate that
        procedure as a whole, on audits that went through it.
        """
        return np.asarray(self.sets(answer).sum(axis=1) > 1)

    def abstain(self, prediction: Prediction, *, most_classes: int = 1) -> Prediction:
        """Return the same prediction, abstaining where the set is empty or too large.

        The promise is about sets: among the rows that are left the share of right labels
        may be below 1 - alpha. For that, see `uncertainty.abstention`.

        Parameters
        ----------
        most_classes : int
            Largest set that still counts as an answer.
        """
        if most_classes < 1:
            raise InvalidValueError(f"most_classes is at least 1, got {most_classes!r}")
        sizes = self.sets(prediction).sum(axis=1)
        silent = (sizes == 0) | (sizes > most_classes)
        return dataclasses.replace(prediction, abstained=prediction.abstained | silent)

    def coverage_with_confidence(self, delta: float = 0.05) -> float:
        """Return the coverage that holds with probability 1 - delta over the audits.

        With these very audits the coverage of new rows is distributed as the rank-th of n
        uniform draws, or larger where scores tie: a Beta(rank, n + 1 - rank).

        Raises
        ------
        InvalidValueError
            If it is not known how many rows the threshold comes from, or they are pooled
            from sites whose rows differ.

        Examples
        --------
        >>> audits = ConformalPredictor.from_scores(np.arange(200) / 200, alpha=0.1)
        >>> round(audits.coverage_with_confidence(0.05), 3)
        0.864
        """
        if self.n_calibration == 0 or self.n_groups > 1:
            raise InvalidValueError(
                "only of a threshold that was learnt on counted rows drawn alike"
            )
        rank = conformal_rank(self.n_calibration, self.alpha)
        if rank > self.n_calibration:
            return 1.0
        return beta_lower_quantile(max(rank, 1), self.n_calibration, delta=delta)
