"""When to say nothing: a margin below which the federation abstains, with a promise about the rest.

`risk_coverage` shows the trade; `margin_for_risk` picks a margin such that the share of wrong
labels among the rows that are answered is at most `target_risk`, with probability 1 - delta over
the audits, if audits and rows are drawn independently alike. It is a promise about the rate among
all rows like these, not about one class, site or batch, and it ends with a new rule, new sites or
other rows.

References
----------
.. [1] Geifman and El-Yaniv, Selective Classification for Deep Neural Networks, NeurIPS 2017
   (lemma 3.1 and algorithm 1).
.. [2] Angelopoulos et al., Learn then Test: Calibrating Predictive Algorithms to Achieve Risk
   Control, Ann. Appl. Stat. 2025 (fixed sequence testing with several starts).
.. [3] Chow, On optimum recognition error and reject tradeoff, IEEE Trans. Inf. Theory 16, 1970.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Final

import numpy as np
import numpy.typing as npt

from fedinfer_flower.ensemble.base import Array
from fedinfer_flower.errors import InvalidValueError, ShapeError
from fedinfer_flower.query import Prediction
from fedinfer_flower.uncertainty.binomial import at_most_probability, upper_bound

__all__ = ["MarginThreshold", "RiskCoverage", "margin_for_risk", "risk_coverage"]

_CANDIDATES: Final = 20
"""Thresholds that are tried, by the share of audits that they answer."""

_STARTS: Final = 3
"""Sequences of tests; each takes its part of delta."""


@dataclass(frozen=True, kw_only=True, eq=False)
class RiskCoverage:
    """Error among answered rows for every share of rows that is answered.

    Parameters
    ----------
    margins : float array of shape (n_points,)
        Falling: rows with a smaller margin are not answered.
    coverage, risk : float array of shape (n_points,)
        Share of rows answered, and share of wrong labels among them.
    """

    margins: Array = field(repr=False)
    coverage: Array = field(repr=False)
    risk: Array = field(repr=False)

    @property
    def area(self) -> float:
        """Mean risk over all coverages: 0.0 where every wrong label has a smaller margin."""
        steps = np.diff(self.coverage, prepend=0.0)
        return float((steps * self.risk).sum())

    def risk_at(self, coverage: float) -> float:
        """Return the risk at the smallest coverage that is not below this one."""
        place = int(np.searchsorted(self.coverage, coverage - 1e-12))
        return float(self.risk[min(place, len(self.risk) - 1)])


def _checked(prediction: Prediction, labels: npt.ArrayLike) -> tuple[Array, npt.NDArray[np.bool_]]:
    """Return (margins, wrong); a row that is abstained on has the smallest margin of all."""
    y = np.asarray(labels)
    if y.shape != (len(prediction),) or not len(y):
        raise ShapeError("labels are one for each audit row, of which there is one at least")
    margins = np.where(prediction.abstained, -np.inf, prediction.margin)
    return margins, np.asarray(prediction.labels != y)


def risk_coverage(prediction: Prediction, labels: npt.ArrayLike) -> RiskCoverage:
    """Return how the error falls as fewer rows are answered, surest first.

    Parameters
    ----------
    prediction : Prediction
    labels : int array of shape (n_queries,)

    Privacy
    -------
    Worked out by the querier, of joint answers and its own labels.

    Examples
    --------
    >>> sure = Prediction(
    ...     classes=("a", "b"),
    ...     labels=np.array([0, 0, 1]),
    ...     probabilities=np.array([[0.9, 0.1], [0.6, 0.4], [0.2, 0.8]]),
    ...     margin=np.array([0.8, 0.2, 0.6]),
    ...     abstained=np.zeros(3, dtype=bool),
    ... )
    >>> risk_coverage(sure, [0, 1, 1]).risk.round(2)
    array([0.  , 0.  , 0.33])
    """
    margins, wrong = _checked(prediction, labels)
    values, places = np.unique(-margins, return_inverse=True)  # surest first
    rows = np.bincount(places)
    errors = np.bincount(places, weights=wrong)
    answered = np.isfinite(values) | (values < 0.0)  # an infinite margin is an answer
    count = np.cumsum(rows)[answered]
    return RiskCoverage(
        margins=-values[answered],
        coverage=count / len(margins),
        risk=np.cumsum(errors)[answered] / count,
    )


@dataclass(frozen=True, kw_only=True)
class MarginThreshold:
    """Below which margin to abstain, and what that promises.

    Parameters
    ----------
    margin : float
        For `Prediction.abstain_below`; infinite if no margin keeps the promise.
    risk_bound : float
        Above the true share of wrong labels among answered rows, with probability 1 - delta.
    coverage : float
        Share of the audits that is answered.
    risk : float
        Share of wrong labels among those.
    n_audits : int
    delta : float
    """

    margin: float
    risk_bound: float
    coverage: float
    risk: float
    n_audits: int
    delta: float

    def apply(self, prediction: Prediction) -> Prediction:
        """Return the prediction, abstaining where the margin is too small."""
        return prediction.abstain_below(self.margin)


def margin_for_risk(
    prediction: Prediction, labels: npt.ArrayLike, *, target_risk: float, delta: float = 0.05
) -> MarginThreshold:
    """Return the smallest of some margins that keeps the error within a target.

    Given the i-th largest margin, the rows above it are independent draws of rows with a
    larger margin: their errors are binomial, and bounded exactly by Clopper and Pearson.
    Ranks are fixed beforehand and tried in turn, surest first, until one fails: whatever is
    accepted before costs nothing, since only the first rank that is truly too bad could be
    accepted wrongly. Three such sequences start at different ranks, each with a third of
    `delta`, so that one unlucky audit among the surest rows does not end the search.

    Parameters
    ----------
    prediction : Prediction
        To the audit rows alone.
    labels : int array of shape (n_rows,)
    target_risk : float
        In (0, 1).
    delta : float
        Chance that the promise fails, in (0, 1).

    Returns
    -------
    MarginThreshold
        With an infinite margin, zero coverage and a bound of 1.0 if no margin will do: fewer
        audits than about ``log(3 / delta) / target_risk``, or too many wrong labels.

    Raises
    ------
    InvalidValueError
        If target or delta are out of range.
    ShapeError
        If there is not one label a row.
    """
    if not 0.0 < target_risk < 1.0 or not 0.0 < delta < 1.0:
        raise InvalidValueError("target_risk and delta are in (0, 1)")
    margins, wrong = _checked(prediction, labels)
    n_rows = len(margins)
    falling = np.sort(margins)[::-1]
    part = delta / _STARTS
    # Fewer rows prove too little even without an error. Ties may leave a rank with fewer; that
    # is known from the margins alone, before any label.
    least = math.log(part) / math.log1p(-target_risk)
    ranks = np.ceil(np.arange(1, _CANDIDATES) * n_rows / _CANDIDATES).astype(int)
    cuts = [float(np.nextafter(falling[rank - 1], np.inf)) for rank in np.unique(ranks)]
    # The last candidate answers all rows that are not abstained on already.
    cuts = [cut for cut in [*cuts, -np.inf] if (margins >= max(cut, 0.0)).sum() >= least]
    best: tuple[int, int, float] = (0, 0, np.inf)  # answered, wrong, cut
    for start in {len(cuts) * s // _STARTS for s in range(_STARTS)}:
        for cut in cuts[start:]:
            answered = (margins >= cut) & (margins > -np.inf)
            n_answered, n_wrong = int(answered.sum()), int(wrong[answered].sum())
            # The upper bound is on target exactly if so few errors are this unlikely.
            if at_most_probability(n_wrong, n_answered, target_risk) > part:
                break
            best = max(best, (n_answered, n_wrong, cut), key=lambda tried: tried[0])
    n_answered, n_wrong, cut = best
    return MarginThreshold(
        margin=max(cut, 0.0),
        risk_bound=upper_bound(n_wrong, n_answered, delta=part) if n_answered else 1.0,
        coverage=n_answered / n_rows,
        risk=n_wrong / max(n_answered, 1),
        n_audits=n_rows,
        delta=delta,
    )
