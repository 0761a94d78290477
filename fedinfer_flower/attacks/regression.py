"""Ridge regression with the penalty chosen from the data: the attacker's learner.

Linear in the targets, so that noise in answers averages out as well as it can; no
optional package; the same result every time.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

import numpy as np
import numpy.typing as npt

from fedinfer_flower.ensemble.base import Array
from fedinfer_flower.errors import InvalidValueError

__all__ = ["fit_ridge", "one_hot", "random_features"]

_PENALTIES: Final = tuple(10.0**k for k in range(-6, 4))
"""Relative to the mean squared singular value."""

Floats = npt.NDArray[np.floating]


def fit_ridge(features: Floats, targets: Floats) -> Callable[[Floats], Array]:
    """Fit targets on features by ridge regression and return the predictor.

    The penalty is the one of `_PENALTIES` with the least generalised cross-validation
    error. Works with more features than rows.

    Parameters
    ----------
    features : float array of shape (n, p)
    targets : float array of shape (n, q)

    Returns
    -------
    predict : callable
        From features of shape (m, p) to predictions of shape (m, q).

    Raises
    ------
    InvalidValueError
        If there are fewer than two rows, or the shapes do not fit.

    References
    ----------
    .. [1] Golub, Heath and Wahba, Technometrics 21, 1979 (generalised cross-validation).

    Examples
    --------
    >>> x = np.arange(10.0)[:, None]
    >>> fit_ridge(x, 2.0 * x)(np.array([[20.0]])).round(2).tolist()
    [[40.0]]
    """
    if features.ndim != 2 or targets.ndim != 2 or len(features) != len(targets):
        raise InvalidValueError("features have shape (n, p) and targets (n, q)")
    if len(features) < 2:
        raise InvalidValueError("a regression needs two rows or more")
    n = len(features)
    centre, level = features.mean(axis=0), targets.mean(axis=0)
    left, values, right = np.linalg.svd(features - centre, full_matrices=False)
    along = left.T @ (targets - level)
    outside = float(((targets - level) ** 2).sum() - (along**2).sum())
    scale = float(np.mean(values**2)) or 1.0
    best, chosen = np.inf, np.zeros_like(values)
    for penalty in _PENALTIES:
        shrink = values**2 / (values**2 + penalty * scale)
        residual = outside + float((((1.0 - shrink)[:, None] * along) ** 2).sum())
        # One degree of freedom went into the mean.
        error = residual / max(n - 1.0 - float(shrink.sum()), 1e-9 * n) ** 2
        if error < best:
            best, chosen = error, values / (values**2 + penalty * scale)
    weights = right.T @ (chosen[:, None] * along)
    return lambda rows: np.asarray((rows - centre) @ weights + level, dtype=float)


def random_features(inputs: Floats, *, n_features: int, seed: int) -> Array:
    """Return inputs beside random rectified features of them, shape (n, d + n_features).

    Examples
    --------
    >>> random_features(np.ones((2, 3)), n_features=4, seed=0).shape
    (2, 7)
    """
    rng = np.random.default_rng(seed)
    width = inputs.shape[1]
    mixed = inputs @ rng.standard_normal((width, n_features)) / np.sqrt(width)
    bent = np.maximum(mixed + rng.standard_normal(n_features), 0.0)
    return np.asarray(np.hstack([inputs, bent]), dtype=float)


def one_hot(labels: npt.NDArray[np.integer], n_classes: int) -> Array:
    """Return labels as rows of the identity.

    Examples
    --------
    >>> one_hot(np.array([1]), 2).tolist()
    [[0.0, 1.0]]
    """
    return np.asarray(np.eye(n_classes)[labels], dtype=float)
