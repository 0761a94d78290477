r"""Privacy of a noisy arg max of votes: what holds for any data, and what these data allow.

One voter who changes its mind moves two counts by one, L2 sensitivity sqrt(2). With Gaussian
noise of standard deviation sigma on each count, publishing the class with the largest noisy
count costs, in Renyi divergence of order a (called lambda in the paper):

- on any data, ``a / sigma^2`` (proposition 8);
- on these data, far less if the votes agree: if another class than the top one comes out with
  probability at most q, then theorem 6 bounds the divergence by a function of q that goes to
  0 with q. Orders and sizes of q that the theorem does not cover keep ``a / sigma^2``.

**A bound that looks at the data is private itself**, and must not be published. And it holds
on the actual data in one direction only: theorem 6 bounds ``D(M(data) || M(neighbour))``. The
reverse can be larger by many orders of magnitude, because a label that is next to impossible
on these data may be likely on a neighbour's. With ``any_neighbour=True`` q is the largest of
the data and all their neighbours, and the bound holds in both directions.

Axes: B rows of a batch, C classes, A orders.

References
----------
.. [1] Papernot, Song, Mironov, Raghunathan, Talwar and Erlingsson, Scalable Private Learning
   with PATE, ICLR 2018, arXiv 1802.08908: propositions 7, 8 and 10, theorem 6.
.. [2] Canonne, Kamath and Steinke, The Discrete Gaussian for Differential Privacy, NeurIPS
   2020, proposition 12 (from Renyi to approximate differential privacy).
"""

from __future__ import annotations

import math
from typing import Final

import numpy as np
import numpy.typing as npt

from fedinfer_flower.ensemble.base import Array
from fedinfer_flower.errors import InvalidValueError
from fedinfer_flower.privacy import gaussian_dp
from fedinfer_flower.privacy.base import optional_module
from fedinfer_flower.privacy.fixed_point import IntArray

__all__ = [
    "GRID_BITS",
    "ORDERS",
    "data_dependent_rdp",
    "epsilon_of_rdp",
    "grid_steps",
    "log_other_label",
    "log_rarer_check",
    "public_epsilon",
]

GRID_BITS: Final = 12
"""Votes are counted in steps of 2^-12, so that noise is an integer."""

_STEP: Final = 2.0**-GRID_BITS

ORDERS: Final[Array] = 1.0 + np.logspace(-2.0, 4.0, 241)
"""Orders at which divergences are added up: 1.01 to 10001, 40 a decade."""
ORDERS.setflags(write=False)


def grid_steps(votes: float) -> int:
    """Return a number of votes in steps of the grid, rounded.

    Examples
    --------
    >>> grid_steps(1.5)
    6144
    """
    return math.floor(votes / _STEP + 0.5)


def log_other_label(counts_bc: IntArray, *, sigma: float, any_neighbour: bool = False) -> Array:
    r"""Bound the chance that another class than the top one comes out (proposition 7).

    ``q = sum over j of erfc((n_top - n_j) / (2 sigma)) / 2``, a union bound. Both noisy counts
    are rounded to the grid and the lower index wins a tie, which together can make up for a
    margin of at most one step: each margin counts one step less.

    Parameters
    ----------
    counts_bc : int array of shape (n_rows, n_classes)
        Votes.
    sigma : float
        Standard deviation of the noise, in votes.
    any_neighbour : bool
        Return the largest q of these counts and of all that one voter can make of them, for
        the same top class.

    Returns
    -------
    log_q : float array of shape (n_rows,)
        At most 0.

    Privacy
    -------
    Tells how far the voters agree: not to be published.

    Examples
    --------
    >>> np.exp(log_other_label(np.array([[20, 10], [30, 0]]), sigma=5.0)).round(4)
    array([0.0787, 0.    ])
    """
    log_cdf = optional_module("scipy.special", extra="dp").log_ndtr
    counts = np.asarray(counts_bc, dtype=np.float64)
    top = counts.argmax(axis=1)[:, None]
    margins = np.take_along_axis(counts, top, axis=1) - counts - _STEP
    scale = math.sqrt(2.0) * sigma
    now = np.asarray(log_cdf(-margins / scale))
    np.put_along_axis(now, top, -np.inf, axis=1)
    if not any_neighbour:
        return _at_most_one(np.logaddexp.reduce(now, axis=1))
    # The worst neighbour takes a vote from the top class: it lifts one rival by two votes
    # relative to the top, and all others by one.
    by_one = np.asarray(log_cdf(-(margins - 1.0) / scale))
    by_two = np.asarray(log_cdf(-(margins - 2.0) / scale))
    np.put_along_axis(by_one, top, -np.inf, axis=1)
    worst = np.full(len(counts), -np.inf)
    for rival in range(counts.shape[1]):
        moved = by_one.copy()
        moved[:, rival] = by_two[:, rival]
        moved[top[:, 0] == rival, rival] = -np.inf
        worst = np.maximum(worst, np.logaddexp.reduce(moved, axis=1))
    return _at_most_one(worst)


def log_rarer_check(
    counts_bc: IntArray, *, threshold: float, sigma: float, any_neighbour: bool = False
) -> Array:
    """Return the chance of the rarer result of the confidence check, in logarithms.

    The check asks whether the largest count plus noise reaches the threshold; exact for
    noise that is rounded to the grid.

    Parameters
    ----------
    counts_bc : int array of shape (n_rows, n_classes)
    threshold, sigma : float
        In votes; the threshold is rounded to the grid.
    any_neighbour : bool
        As in `log_other_label`.

    Returns
    -------
    log_q : float array of shape (n_rows,)

    Privacy
    -------
    Tells how far the voters agree: not to be published.

    Examples
    --------
    >>> counts = np.array([[30, 0], [20, 10]])
    >>> np.exp(log_rarer_check(counts, threshold=20.0, sigma=5.0)).round(3)
    array([0.023, 0.5  ])
    """
    log_cdf = optional_module("scipy.special", extra="dp").log_ndtr
    on_grid = grid_steps(threshold) * _STEP
    # A noisy count reaches the threshold from half a step below it.
    above = np.asarray(counts_bc, dtype=np.float64).max(axis=1) - on_grid + _STEP / 2.0
    margin = np.abs(above) - (1.0 if any_neighbour else 0.0)
    return _at_most_one(np.asarray(log_cdf(-margin / sigma)))


def data_dependent_rdp(log_q_b: Array, *, mu: float, orders: Array = ORDERS) -> Array:
    r"""Bound the Renyi divergence given how rare all results but one are (theorem 6).

    For a mechanism whose divergence of order a is at most ``a * mu^2 / 2`` on any data, as it
    is after Gaussian noise of standard deviation ``sensitivity / mu``: noisy arg max has
    ``mu = sqrt(2) / sigma``, the confidence check ``mu = 1 / sigma``. With
    ``e_i = m_i mu^2 / 2`` and, by proposition 10, ``m_2 = sqrt(2 ln(1/q)) / mu`` and
    ``m_1 = m_2 + 1``::

        D_a <= 1/(a-1) ln( (1-q) A^(a-1) + q B^(a-1) )
        A = (1-q) / (1 - (q exp(e_2))^((m_2 - 1)/m_2)),    B = exp(e_1) / q^(1/(m_1 - 1))

    provided that ``a <= m_1``, ``m_2 > 1``, ``q exp(e_2) < 1`` and
    ``q <= exp((m_2 - 1) e_2) / (m_1/(m_1 - 1) * m_2/(m_2 - 1))^m_2``. Elsewhere, and where it
    is smaller, the bound is ``a * mu^2 / 2``.

    Parameters
    ----------
    log_q_b : float array of shape (n_rows,)
        Logarithm of an upper bound of the probability of all results but one.
    mu : float
    orders : float array of shape (n_orders,)
        Above 1.

    Returns
    -------
    rdp : float array of shape (n_rows, n_orders)
        At most ``orders * mu^2 / 2``.

    Privacy
    -------
    Depends on the data: not to be published.

    Examples
    --------
    >>> rdp = data_dependent_rdp(np.array([-30.0, 0.0]), mu=0.5, orders=np.array([2.0, 50.0]))
    >>> bool(rdp[0, 0] < 1e-6), rdp[1].tolist()
    (True, [0.25, 6.25])
    """
    slope = mu * mu / 2.0
    log_q = np.minimum(np.asarray(log_q_b, dtype=np.float64), 0.0)[:, None]
    baseline = np.broadcast_to(orders * slope, (len(log_q), len(orders)))
    # A larger q is safe, and an infinite logarithm would give inf - inf.
    log_q = np.maximum(log_q, -1e12)
    m2 = np.sqrt(-log_q / slope)
    covered = _covered(log_q, m2, slope)[:, 0]
    result = np.array(baseline)
    if covered.any():
        q, m_2 = log_q[covered], m2[covered]
        e_1, e_2 = (m_2 + 1.0) * slope, m_2 * slope
        log_rest = _log1mexp(q)
        log_a = log_rest - _log1mexp((q + e_2) * (1.0 - 1.0 / m_2))
        log_b = e_1 - q / m_2  # m_1 - 1 is m_2
        power = orders - 1.0
        bound = np.logaddexp(log_rest + power * log_a, q + power * log_b) / power
        usable = orders <= m_2 + 1.0
        result[covered] = np.where(usable, np.minimum(bound, baseline[covered]), baseline[covered])
    # Rounding may leave a bound of zero slightly below it.
    return np.maximum(result, 0.0)


def epsilon_of_rdp(rdp: Array, *, delta: float, orders: Array = ORDERS) -> float:
    """Return the least epsilon that Renyi divergences give at this delta.

    ``epsilon = rdp + ln((a-1)/a) - (ln delta + ln a)/(a-1)``, at the best order.

    Raises
    ------
    InvalidValueError
        If delta is not in (0, 1).

    Examples
    --------
    >>> round(epsilon_of_rdp(ORDERS / 2.0, delta=1e-5), 3)  # exact: 4.377
    4.729
    """
    if not 0.0 < delta < 1.0:
        raise InvalidValueError(f"delta is in (0, 1), got {delta!r}")
    power = orders - 1.0
    found = rdp + np.log(power / orders) - (math.log(delta) + np.log(orders)) / power
    return max(float(found.min()), 0.0)


def public_epsilon(mu_squared: float, *, delta: float) -> float:
    """Return the epsilon of Gaussian noise with this sum of mu^2, on any data.

    The smaller of two bounds: exact Gaussian composition, and Renyi divergences
    ``a * mu^2 / 2`` (proposition 8). The second is there as a check; it is never smaller.

    Examples
    --------
    >>> round(public_epsilon(1.0, delta=1e-5), 3)
    4.377
    """
    if mu_squared == 0.0:
        return 0.0
    renyi = epsilon_of_rdp(ORDERS * (mu_squared / 2.0), delta=delta)
    return min(gaussian_dp.epsilon_of(math.sqrt(mu_squared), delta), renyi)


def _covered(log_q: Array, m2: Array, slope: float) -> npt.NDArray[np.bool_]:
    # Conditions of theorem 6 on q; an m_2 of 2 stands in where m_2 - 1 is not positive.
    safe = np.where(m2 > 1.0, m2, 2.0)
    e_2 = safe * slope
    # m_1 / (m_1 - 1) is 1 + 1/m_2.
    most = (safe - 1.0) * e_2 - safe * (np.log1p(1.0 / safe) + np.log1p(1.0 / (safe - 1.0)))
    return np.asarray((m2 > 1.0) & (log_q < 0.0) & (log_q <= most) & (log_q + e_2 < 0.0))


def _log1mexp(x: Array) -> Array:
    # ln(1 - exp(x)) for x < 0, without loss of digits at either end.
    half = -math.log(2.0)
    near_zero = np.log(-np.expm1(np.minimum(x, -1e-300)))
    return np.asarray(np.where(x < half, np.log1p(-np.exp(np.minimum(x, half))), near_zero))


def _at_most_one(log_probability: Array) -> Array:
    return np.minimum(log_probability, 0.0)
