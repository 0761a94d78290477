"""From the sums of a charge to epsilon: exact for Gaussian noise, bounds for the rest.

=============================  ==================================================  =========
in the total                   bound                                               delta
=============================  ==================================================  =========
pure mechanisms only           sum of epsilon                                      0
Gaussian and pure              Gaussian mechanism of the summed mu^2, exact        as asked
anything                       zero-concentrated privacy of the summed rho         as asked
anything, chosen beforehand    sum of epsilon, plus one of the above for the rest  as asked
=============================  ==================================================  =========

Whoever chooses the next query after seeing the last answer may not also choose the bound:
two bounds that may each fail with probability delta fail together with up to 2 delta. A
budget therefore fixes its `composition` when it is made; the sum of epsilon may always
be used beside it, since it never fails.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass
from typing import Final

from fedinfer_flower.errors import InvalidValueError
from fedinfer_flower.privacy.base import optional_module
from fedinfer_flower.privacy.charge import Charge
from fedinfer_flower.privacy.gaussian_dp import delta_of, epsilon_of

__all__ = ["COMPOSITIONS", "Accountant", "subsampled_epsilon", "zcdp_epsilon"]

COMPOSITIONS: Final = ("gaussian", "concentrated", "fixed")

_MU_MAX: Final = 1e4


@dataclass(frozen=True, kw_only=True)
class Accountant:
    """Turn the total charge of many answers into (epsilon, delta).

    Parameters
    ----------
    composition : str
        ``"gaussian"``: for Gaussian noise and pure mechanisms, in any order, each chosen
        after seeing earlier answers. Exact where all noise is Gaussian.
        ``"concentrated"``: for every kind of charge, each chosen after seeing earlier
        answers; 3 to 10 % higher than exact for Gaussian noise.
        ``"fixed"`` (default): the smallest bound of all; only for a list of charges that
        does not depend on any answer, as in planning.

    Raises
    ------
    InvalidValueError
        If there is no such composition.

    Privacy
    -------
    Neighbours: one site's whole answer to each row is replaced. The bound holds towards
    everyone who sees the answers that were charged, pooled. It covers nothing that was not
    charged.

    References
    ----------
    .. [1] Balle and Wang, ICML 2018, theorem 8 (Gaussian, exact).
    .. [2] Smith and Thakurta, Fully Adaptive Composition for Gaussian Differential Privacy,
       2022 (a cap on the sum of mu^2 under adaptive choice).
    .. [3] Bun and Steinke, TCC 2016, propositions 1.3, 1.4 (zero-concentrated privacy).
    .. [4] Feldman and Zrnic, Individual Privacy Accounting via a Renyi Filter, NeurIPS 2021
       (a cap on the sum of rho under adaptive choice).

    Examples
    --------
    >>> accountant = Accountant(composition="gaussian")
    >>> round(accountant.epsilon(Charge.gaussian(0.1, 100), 1e-5), 4)
    4.3772
    >>> accountant.epsilon_delta(Charge.pure(2.0, 3), 1e-5)
    (6.0, 0.0)
    """

    composition: str = "fixed"

    def __post_init__(self) -> None:
        if self.composition not in COMPOSITIONS:
            raise InvalidValueError(
                f"no composition {self.composition[:32]!r}",
                hint=f"compositions: {', '.join(COMPOSITIONS)}",
            )

    def require_supported(self, charge: Charge) -> None:
        """Refuse a charge that this composition has no bound for.

        Raises
        ------
        InvalidValueError
            If `rho` is charged under ``"gaussian"``.
        """
        if self.composition == "gaussian" and charge.rho > 0.0:
            raise InvalidValueError(
                "a mechanism known only by its rho cannot be composed as a Gaussian one",
                hint='set composition="concentrated" for this budget',
            )

    def epsilon(self, total: Charge, delta: float) -> float:
        """Return the epsilon of `epsilon_delta`."""
        return self.epsilon_delta(total, delta)[0]

    def epsilon_delta(self, total: Charge, delta: float) -> tuple[float, float]:
        """Return (epsilon, delta) of a total; delta is 0.0 where the sum of epsilon is used.

        Raises
        ------
        InvalidValueError
            If delta is not in (0, 1), or the composition has no bound for the total.
        MissingExtraError
            For Gaussian noise without the extra ``dp``.
        """
        _require_delta(delta)
        self.require_supported(total)
        found = [(_round_up(epsilon), delta) for epsilon in self._bounds(total, delta)]
        if total.is_pure:
            found.append((total.pure_epsilon, 0.0))
        return min(found)

    def fits(self, total: Charge, epsilon: float, delta: float) -> bool:
        """Return whether a total keeps within (epsilon, delta); faster than `epsilon`."""
        self.require_supported(total)
        if total.is_pure and total.pure_epsilon <= epsilon:
            return True
        if self.composition == "gaussian":
            return delta_of(epsilon, _mu(total)) <= delta
        return self.epsilon(total, delta) <= epsilon

    def _bounds(self, total: Charge, delta: float) -> list[float]:
        if self.composition == "gaussian":
            return [_gaussian_epsilon(total, delta)]
        if self.composition == "concentrated":
            return [zcdp_epsilon(_rho(total), delta)]
        noisy = Charge(mu_squared=total.mu_squared, rho=total.rho)
        found = [
            zcdp_epsilon(_rho(total), delta),
            total.pure_epsilon + zcdp_epsilon(_rho(noisy), delta),
        ]
        if total.rho == 0.0:
            found.append(_gaussian_epsilon(total, delta))
            found.append(total.pure_epsilon + _gaussian_epsilon(noisy, delta))
        return found


@functools.lru_cache(maxsize=256)
def zcdp_epsilon(rho: float, delta: float) -> float:
    """Return an epsilon of a rho-zero-concentrated mechanism at this delta.

    For every order a + 1 above 1 the mechanism is (epsilon, delta)-private with::

        epsilon = (1 + a) rho - ln(1 + 1/a) + (ln(1/delta) - ln(1 + a)) / a

    The smallest over a grid of orders, then refined. Each order gives a valid bound, so an
    imperfect search can only return too much. Never above the usual
    ``rho + 2 sqrt(rho ln(1/delta))``, which leaves out two negative terms.

    References
    ----------
    .. [1] Canonne, Kamath and Steinke, The Discrete Gaussian for Differential Privacy,
       NeurIPS 2020, proposition 12 and corollary 13.
    .. [2] Bun and Steinke, TCC 2016, proposition 1.3 (the usual bound).

    Examples
    --------
    >>> round(zcdp_epsilon(0.5, 1e-5), 3)
    4.728
    """
    if not (math.isfinite(rho) and rho >= 0.0):
        raise InvalidValueError("rho is finite and not negative")
    _require_delta(delta)
    if rho == 0.0:
        return 0.0
    log_one_over_delta = -math.log(delta)

    def at(log_a: float) -> float:
        a = math.exp(log_a)
        rest = (log_one_over_delta - math.log1p(a)) / a
        return (1.0 + a) * rho - math.log1p(1.0 / a) + rest

    # The order at which the usual bound is reached; the best one is near it.
    centre = 0.5 * (math.log(log_one_over_delta) - math.log(rho))
    step = 0.05
    best = min((centre + step * k for k in range(-40, 41)), key=at)
    left, right = best - step, best + step
    for _ in range(40):
        third = (right - left) / 3.0
        if at(left + third) < at(right - third):
            right -= third
        else:
            left += third
    return _round_up(max(min(at(best), at(0.5 * (left + right))), 0.0))


def subsampled_epsilon(
    *, noise_multiplier: float, sample_rate: float, steps: int, delta: float
) -> float:
    """Return the epsilon of training with noise on randomly drawn batches (DP-SGD).

    For batches that a trusted trainer draws in secret, each record with `sample_rate`.
    Never for queries: who asks knows which sites and rows were asked.

    Parameters
    ----------
    noise_multiplier : float
        Standard deviation of the noise over the clipping bound.
    sample_rate : float
        Chance of each record to be in a batch, in (0, 1].
    steps : int
    delta : float

    Returns
    -------
    epsilon : float
        The upper end of a numeric interval about 0.02 wide; exact at `sample_rate` 1.

    Raises
    ------
    InvalidValueError
        If a value is out of range.
    MissingExtraError
        Below `sample_rate` 1 without the extra ``dp-training``.

    Privacy
    -------
    Neighbours: one training record more or less, in one site's data.

    References
    ----------
    .. [1] Gopi, Lee and Wutschitz, Numerical Composition of Differential Privacy,
       NeurIPS 2021.

    Examples
    --------
    >>> epsilon = subsampled_epsilon(noise_multiplier=2.0, sample_rate=1.0, steps=10, delta=1e-5)
    >>> round(epsilon, 4)
    7.5113
    """
    _require_delta(delta)
    if not (math.isfinite(noise_multiplier) and noise_multiplier > 0.0 and steps >= 0):
        raise InvalidValueError("noise_multiplier is positive and steps is not negative")
    if not 0.0 < sample_rate <= 1.0:
        raise InvalidValueError(f"sample_rate is in (0, 1], got {sample_rate!r}")
    if steps == 0:
        return 0.0
    if sample_rate == 1.0:
        return epsilon_of(math.sqrt(steps) / noise_multiplier, delta)
    # Not its GaussianAccountant: that is a central limit approximation without an error
    # bound, and reports too little below sample_rate 1 (6.0 where 7.05 is true, at noise 1,
    # rate 0.1, 100 steps, delta 1e-5).
    accountant = optional_module("opacus.accountants", extra="dp-training").PRVAccountant()
    accountant.history = [(noise_multiplier, sample_rate, steps)]
    return float(accountant.get_epsilon(delta))


def _gaussian_epsilon(total: Charge, delta: float) -> float:
    mu = _mu(total)
    # An epsilon of tens of millions bounds nothing; the exact equation loses its digits there.
    return epsilon_of(mu, delta) if mu <= _MU_MAX else zcdp_epsilon(mu * mu / 2.0, delta)


def _mu(total: Charge) -> float:
    squared = (total + Charge(mu_squared=total.pure_mu_squared)).mu_squared
    return math.nextafter(math.sqrt(squared), math.inf)


def _rho(total: Charge) -> float:
    return total.rho + total.mu_squared / 2.0 + total.pure_epsilon_squared / 2.0


def _round_up(epsilon: float) -> float:
    # A handful of float operations, each good to one part in 2^53.
    return epsilon * (1.0 + 1e-13)


def _require_delta(delta: float) -> None:
    if not 0.0 < delta < 1.0:
        raise InvalidValueError(f"delta is in (0, 1), got {delta!r}")
