"""How sure a joint answer is, in words that hold: calibration of combined probabilities on audits.

A sum of the sites' answers ranks classes well and says badly how sure it is: where each site
knows some classes only, those that do not know the right one flatten the mean. Sites calibrate
their own answers on their own rows; what the sum says is calibrated here, by the querier.

References
----------
.. [1] Guo et al., On Calibration of Modern Neural Networks, ICML 2017 (temperature).
.. [2] Zadrozny and Elkan, Transforming Classifier Scores into Accurate Multiclass Probability
   Estimates, KDD 2002 (isotonic regression).
.. [3] Rahaman and Thiery, Uncertainty Quantification and Deep Ensembles, NeurIPS 2021: pool,
   then calibrate.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import Final

import numpy as np
import numpy.typing as npt

from fedinfer_flower.ensemble.base import PROBABILITY_FLOOR, Array, log_softmax
from fedinfer_flower.errors import InvalidValueError, ShapeError
from fedinfer_flower.query import Prediction

__all__ = ["MIN_AUDITS", "IsotonicConfidence", "JointTemperature"]

MIN_AUDITS: Final = 30
"""Fewest audits for a calibration; with fewer its error is of the size of what it mends."""

_COLDEST, _HOTTEST = 0.02, 50.0


def _audited(prediction: Prediction, labels: npt.ArrayLike) -> npt.NDArray[np.int64]:
    y = np.asarray(labels)
    if y.shape != (len(prediction),) or y.dtype.kind not in "iu":
        raise ShapeError("labels are one whole number for each audit row")
    if len(y) < MIN_AUDITS:
        raise InvalidValueError(
            f"{len(y)} audits; a calibration needs {MIN_AUDITS}",
            hint="pool the audits of more jobs",
        )
    if y.min() < 0 or y.max() >= len(prediction.classes):
        raise InvalidValueError("a label is a column of the prediction")
    return y.astype(np.int64)


def _log_probabilities(probabilities: Array) -> Array:
    # A class at exactly zero would stay there at any temperature.
    values = np.asarray(probabilities, dtype=np.float64)
    if not np.isfinite(values).all() or (values < 0.0).any():
        raise InvalidValueError("probabilities are finite and not negative")
    return np.log(np.maximum(values, PROBABILITY_FLOOR))


@dataclass(frozen=True, kw_only=True)
class JointTemperature:
    """One temperature for combined probabilities: ``p_c^(1/tau)``, normalised.

    Labels, margins and abstentions stay as they are, since the ranking does. Below 1 it
    sharpens: safe here and not at a site, because audits are rows like those that are asked.

    Parameters
    ----------
    tau : float
        In [0.02, 50].

    Raises
    ------
    InvalidValueError

    Privacy
    -------
    Held by the querier, worked out of joint answers and its own labels: nothing new of any
    site.

    Examples
    --------
    >>> sharper = JointTemperature(tau=0.5)
    >>> sharper.probabilities(np.array([[0.6, 0.4]])).round(3)
    array([[0.692, 0.308]])
    """

    tau: float = 1.0

    def __post_init__(self) -> None:
        if not _COLDEST <= self.tau <= _HOTTEST:
            raise InvalidValueError(f"tau is in [{_COLDEST}, {_HOTTEST}], got {self.tau!r}")

    @classmethod
    def from_audits(cls, prediction: Prediction, labels: npt.ArrayLike) -> JointTemperature:
        """Return the temperature that makes the audits' labels likeliest.

        Parameters
        ----------
        prediction : Prediction
            To the audit rows alone.
        labels : int array of shape (n_rows,)
            Columns of the right classes.

        Raises
        ------
        InvalidValueError
            With fewer than `MIN_AUDITS` rows, or a label that is no column.
        ShapeError
            If there is not one label a row.
        """
        y = _audited(prediction, labels)
        logs, rows = _log_probabilities(prediction.probabilities), np.arange(len(y))

        def loss(log_tau: float) -> float:
            return float(-log_softmax(logs / math.exp(log_tau))[rows, y].mean())

        # Convex in 1/tau, hence with one minimum in log(tau): a ternary search finds it.
        low, high = math.log(_COLDEST), math.log(_HOTTEST)
        for _ in range(60):
            left, right = low + (high - low) / 3.0, high - (high - low) / 3.0
            low, high = (low, right) if loss(left) <= loss(right) else (left, high)
        return cls(tau=min(max(math.exp((low + high) / 2.0), _COLDEST), _HOTTEST))

    def probabilities(self, probabilities: Array) -> Array:
        """Return calibrated probabilities of the same shape (n_queries, n_classes)."""
        return np.asarray(np.exp(log_softmax(_log_probabilities(probabilities) / self.tau)))

    def calibrated(self, prediction: Prediction) -> Prediction:
        """Return the same prediction with calibrated probabilities."""
        return dataclasses.replace(
            prediction, probabilities=self.probabilities(prediction.probabilities)
        )


@dataclass(frozen=True, kw_only=True)
class IsotonicConfidence:
    """The chance that the answer is right, as a rising step function of its probability.

    Bends more than a temperature can and needs more audits, some hundreds; says nothing
    about the classes that were not answered.

    Parameters
    ----------
    knots : tuple of float
        Probabilities of the answered class at which the function steps up, rising.
    chances : tuple of float
        What it steps up to, not falling; one for each knot.

    Raises
    ------
    InvalidValueError

    Privacy
    -------
    As `JointTemperature`; the steps give away how many of the querier's audits fell where.

    Examples
    --------
    >>> IsotonicConfidence(knots=(0.5, 0.8), chances=(0.6, 0.95)).chance(np.array([0.7, 0.9]))
    array([0.6 , 0.95])
    """

    knots: tuple[float, ...]
    chances: tuple[float, ...]

    def __post_init__(self) -> None:
        if not self.knots or len(self.knots) != len(self.chances):
            raise InvalidValueError("a step function has as many chances as knots, one at least")
        if (np.diff(self.knots) <= 0.0).any() or (np.diff(self.chances) < 0.0).any():
            raise InvalidValueError("knots rise and chances do not fall")
        if not (min(self.chances) >= 0.0 and max(self.chances) <= 1.0):
            raise InvalidValueError("chances are in [0, 1]")

    @classmethod
    def from_audits(cls, prediction: Prediction, labels: npt.ArrayLike) -> IsotonicConfidence:
        """Fit by pooling adjacent violators; each pool counts one right and one wrong more.

        The two pseudo-counts keep a pool of few rows from saying never or always.

        Raises
        ------
        InvalidValueError, ShapeError
            As `JointTemperature.from_audits`.
        """
        y = _audited(prediction, labels)
        said = _answered(prediction)
        right = (prediction.labels == y).astype(np.float64)
        pools: list[tuple[float, float, float]] = []  # first probability, right, rows
        for knot in np.unique(said):
            here = said == knot
            pools.append((float(knot), float(right[here].sum()), float(here.sum())))
            while len(pools) > 1 and _chance(pools[-2]) >= _chance(pools[-1]):
                _, r, n = pools.pop()
                first, before_r, before_n = pools.pop()
                pools.append((first, before_r + r, before_n + n))
        return cls(
            knots=tuple(pool[0] for pool in pools), chances=tuple(_chance(pool) for pool in pools)
        )

    def chance(self, probability: Array) -> Array:
        """Return the chance of being right, for probabilities of the answered class."""
        places = np.searchsorted(np.array(self.knots), probability, side="right") - 1
        return np.array(self.chances)[np.maximum(places, 0)]

    def confidence(self, prediction: Prediction) -> Array:
        """Return the chance that each label is right, shape (n_queries,)."""
        return self.chance(_answered(prediction))


def _answered(prediction: Prediction) -> Array:
    """Return the probability of the class that was answered."""
    return np.asarray(prediction.probabilities[np.arange(len(prediction)), prediction.labels])


def _chance(pool: tuple[float, float, float]) -> float:
    return (pool[1] + 1.0) / (pool[2] + 2.0)
