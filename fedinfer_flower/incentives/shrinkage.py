"""Shrinkage: thin evidence counts for less.

A score from few audits, or released with noise, is drawn towards zero before it is paid by.
Shrinking all sites alike changes nothing in a proportional payment; it matters where sites
answered unlike numbers of audits, and for payments that are absolute.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from fedinfer_flower.errors import InvalidValueError, ShapeError
from fedinfer_flower.incentives.base import Array, AuditedAnswers, LinearScheme

__all__ = ["posterior_mean", "row_sum_variances", "shrink"]


def shrink(
    values: Array, n_audits: int | npt.NDArray[np.int64], *, prior_audits: float = 50.0
) -> Array:
    """Return ``u T / (T + T0)``.

    The posterior mean of a score whose prior has mean 0 and weighs as much as T0 audits.

    Parameters
    ----------
    values : float array of shape (n_sites,)
    n_audits : int, or int array of shape (n_sites,)
        T, the audits that each site answered.
    prior_audits : float
        T0; 0 shrinks nothing.

    Examples
    --------
    >>> shrink(np.array([0.5, 0.5]), np.array([200, 50]))
    array([0.4 , 0.25])
    """
    counts = np.broadcast_to(np.asarray(n_audits, dtype=float), np.shape(values))
    if not (prior_audits >= 0.0 and (counts >= 0.0).all()):
        raise InvalidValueError("counts of audits are not negative")
    weight = np.divide(counts, counts + prior_audits, out=np.zeros_like(counts), where=counts > 0.0)
    return np.asarray(values * weight)


def posterior_mean(
    values: Array, variances: Array | float, *, prior_variance: float | None = None
) -> Array:
    """Return ``u tau^2 / (tau^2 + var)``: the mean of a normal score given a noisy one.

    Parameters
    ----------
    values : float array of shape (n_sites,)
    variances : float array of shape (n_sites,), or float
        Of each value: of its audits (`row_sum_variances`), plus of any noise added.
    prior_variance : float, optional
        tau^2, of true scores around 0. By default estimated from the values themselves,
        ``max(mean(u^2) - mean(var), 0)``: with no more spread than noise all become 0.

    Examples
    --------
    >>> posterior_mean(np.array([1.0, -1.0]), 0.25)
    array([ 0.75, -0.75])
    """
    noise = np.broadcast_to(np.asarray(variances, dtype=float), np.shape(values))
    if not (np.isfinite(noise).all() and (noise >= 0.0).all()):
        raise InvalidValueError("variances are finite and not negative")
    if prior_variance is None:
        prior_variance = max(float(np.mean(np.square(values)) - noise.mean()), 0.0)
    spread = prior_variance + noise
    weight = np.divide(prior_variance, spread, out=np.zeros_like(spread), where=spread > 0.0)
    return np.asarray(values * weight)


def row_sum_variances(answers: AuditedAnswers, scheme: LinearScheme) -> Array:
    """Return how far each site's row sum would vary with other audits of the same kind.

    T times the sample variance of the row's terms, with the public weights taken as given.

    Returns
    -------
    variances_k : float array of shape (n_sites,)

    Raises
    ------
    ShapeError
        If there are fewer than two audits.
    """
    if answers.n_queries < 2:
        raise ShapeError("a variance takes two audits at least")
    centred = answers.probabilities_ktc - 1.0 / answers.n_classes
    terms_kt = np.einsum("ktc,tc->kt", centred, scheme.weights(answers.public()))
    return np.asarray(terms_kt.var(axis=1, ddof=1) * answers.n_queries)
