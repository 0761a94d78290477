"""How badly a class fits an answer: the scores that conformal prediction ranks.

Axes: B queries (or held-out rows), C classes.

``lac``: one minus the probability of the class. Smallest sets on average.
``aps``: the probability of all classes that are at least as likely, itself included. Sets
adapt to how hard a row is; not randomised, so they are larger than they would have to be.

References
----------
.. [1] Sadinle, Lei and Wasserman, Least ambiguous set-valued classifiers with bounded error
   levels, JASA 114, 2019 (lac).
.. [2] Romano, Sesia and Candes, Classification with valid and adaptive coverage, NeurIPS
   2020 (aps).
"""

from __future__ import annotations

from typing import Final

import numpy as np
import numpy.typing as npt

from fedinfer_flower.ensemble.base import Array
from fedinfer_flower.errors import InvalidValueError, ShapeError

__all__ = ["METHODS", "label_scores", "nonconformity", "require_method"]

METHODS: Final = ("lac", "aps")

_TOLERANCE: Final = 1e-6
"""Rows of probabilities sum to 1 up to this; the same at answer and at calibration."""


def require_method(method: str) -> None:
    """Refuse a method that does not exist.

    Raises
    ------
    InvalidValueError
    """
    if method not in METHODS:
        raise InvalidValueError(
            f"no nonconformity score is called {str(method)[:32]!r}",
            hint=f"methods: {', '.join(METHODS)}",
        )


def nonconformity(probabilities: npt.ArrayLike, *, method: str = "lac") -> Array:
    """Return how badly each class fits each row, in [0, 1].

    Parameters
    ----------
    probabilities : float array of shape (n_queries, n_classes)
        Rows sum to 1.
    method : {"lac", "aps"}

    Returns
    -------
    scores_bc : float array of shape (n_queries, n_classes)

    Raises
    ------
    InvalidValueError
        If there is no such method, or the rows are no probabilities.
    ShapeError

    Examples
    --------
    >>> nonconformity([[0.75, 0.25]], method="lac")
    array([[0.25, 0.75]])
    >>> nonconformity([[0.75, 0.25]], method="aps")
    array([[0.75, 1.  ]])
    """
    require_method(method)
    p = np.asarray(probabilities, dtype=np.float64)
    if p.ndim != 2 or p.shape[1] < 1:
        raise ShapeError(f"probabilities are (n_queries, n_classes), got {p.shape}")
    # NaN compares false with everything, so it fails here as well.
    if not ((p >= 0.0).all() and (np.abs(p.sum(axis=1) - 1.0) <= _TOLERANCE).all()):
        raise InvalidValueError("rows of probabilities are not negative, finite and sum to 1")
    if method == "lac":
        return np.asarray(np.clip(1.0 - p, 0.0, 1.0))
    # Sorted sums, so that equally likely classes get one score whatever their place.
    order = np.argsort(-p, axis=1, kind="stable")
    ranked = np.take_along_axis(p, order, axis=1)
    sums = np.cumsum(ranked, axis=1)
    last = _last_of_ties(ranked)
    scores = np.empty_like(p)
    np.put_along_axis(scores, order, np.take_along_axis(sums, last, axis=1), axis=1)
    return np.asarray(np.clip(scores, 0.0, 1.0))


def _last_of_ties(ranked: Array) -> npt.NDArray[np.int64]:
    """Return, for each place of a descending row, the last place with the same value."""
    n_classes = ranked.shape[1]
    ends = np.ones(ranked.shape, dtype=np.bool_)
    ends[:, :-1] = ranked[:, :-1] > ranked[:, 1:]
    places = np.where(ends, np.arange(n_classes), n_classes - 1)
    return np.minimum.accumulate(places[:, ::-1], axis=1)[:, ::-1]


def label_scores(
    probabilities: npt.ArrayLike, labels: npt.ArrayLike, *, method: str = "lac"
) -> Array:
    """Return how badly each row's right class fits, shape (n_rows,).

    Parameters
    ----------
    probabilities : float array of shape (n_rows, n_classes)
    labels : int array of shape (n_rows,)
        Column of the right class; -1 where it is none of the classes, which no set can
        cover: the score is infinite.
    method : {"lac", "aps"}

    Privacy
    -------
    A score says how well a model knows one labelled row, which is what membership
    inference asks: single scores stay where the labels are.

    Examples
    --------
    >>> label_scores([[0.75, 0.25], [0.5, 0.5]], [1, -1])
    array([0.75,  inf])
    """
    scores = nonconformity(probabilities, method=method)
    y = np.asarray(labels)
    if y.shape != (len(scores),) or (len(y) and y.dtype.kind not in "iu"):
        raise ShapeError("labels are one whole number for each row")
    y = y.astype(np.int64)
    if len(y) and not (y.min() >= -1 and y.max() < scores.shape[1]):
        raise InvalidValueError("a label is a column of the probabilities, or -1")
    return np.where(y >= 0, scores[np.arange(len(y)), y], np.inf)
