"""Gaussian noise that the sites of a sum add together, each a part.

Every site adds noise of standard deviation ``s_i = s / sqrt(N - D - c)`` to its integers, so
that the sum over at least N - D sites, of which c tell the querier their own noise, still
holds noise of standard deviation s: what the Gaussian mechanism needs for one site's answer.
The noise of a site alone protects it far less.

Sums of rounded Gaussians: each is a Gaussian and a rounding error. With a few grid steps of
standard deviation the error is uniform and independent of the Gaussian up to a relative
``exp(-2 pi^2 s_i^2)``, so the sum is the Gaussian mechanism with further independent noise on
top, which is post-processing. `MIN_SITE_STD` keeps that term below 1e-136.

References
----------
.. [1] Kairouz, Liu and Steinke, The Distributed Discrete Gaussian Mechanism for Federated
   Learning with Secure Aggregation, ICML 2021.
.. [2] Widrow, Kollar and Liu, Statistical Theory of Quantization, IEEE TIM 1996.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Final

from fedinfer_flower.ensemble.base import EnsembleRule, ScoreKind
from fedinfer_flower.errors import CapacityError, InvalidValueError
from fedinfer_flower.privacy import gaussian_dp
from fedinfer_flower.privacy.base import ScorePlan
from fedinfer_flower.privacy.charge import Charge
from fedinfer_flower.privacy.fixed_point import FixedPoint, IntArray
from fedinfer_flower.privacy.noise import gaussian_integers

__all__ = ["MIN_SITE_STD", "DistributedNoise", "SharedNoise", "check_noise_options"]

MIN_SITE_STD: Final = 4
_FRAC_BITS: Final = 12
_MAX_EPSILON: Final = 64.0
_MAX_DELTA: Final = 1e-3


@dataclass(frozen=True, kw_only=True)
class DistributedNoise:
    """Codec and noise of one plan; every role works out the same ones.

    Parameters
    ----------
    codec : FixedPoint
        With room for the noise of all sites.
    site_std : int
        Standard deviation of one site's noise, in grid steps.
    mu : float
        Sensitivity over the standard deviation that is left in the worst case.

    Examples
    --------
    >>> plan = ScorePlan(
    ...     width=10, bound=1.0, sensitivity_l2=2**0.5, n_sites_max=100, n_classes=10
    ... )
    >>> noise = DistributedNoise.calibrated(
    ...     plan, epsilon=2.0, delta=1e-5, n_honest=80, modulus=2**32
    ... )
    >>> round(noise.site_std / 2**12, 2)
    0.32
    """

    codec: FixedPoint
    site_std: int
    mu: float

    @classmethod
    def calibrated(
        cls, plan: ScorePlan, *, epsilon: float, delta: float, n_honest: int, modulus: int
    ) -> DistributedNoise:
        """Return the noise that is (epsilon, delta)-private for one row of one site.

        Parameters
        ----------
        n_honest : int
            Sites whose noise is certain to be in the sum: N - D - c.
        modulus : int
            Of the ring in which integers are added.

        Raises
        ------
        CapacityError
            If the noise does not fit the ring, or is too fine for the grid.
        """
        # Rounding to the grid moves each entry by up to half a step, at both neighbours.
        sensitivity = plan.sensitivity_l2 * 2.0**_FRAC_BITS + math.sqrt(plan.width)
        total = sensitivity / gaussian_dp.mu_for(epsilon, delta)
        site_std = math.ceil(total / math.sqrt(n_honest))
        if site_std < MIN_SITE_STD:
            raise CapacityError(
                f"one site's part of the noise is {site_std} grid steps, {MIN_SITE_STD} are needed",
                hint="use a smaller epsilon",
            )
        codec = FixedPoint(
            clip=plan.bound,
            frac_bits=_FRAC_BITS,
            n_sites_max=plan.n_sites_max,
            modulus=modulus,
            noise_std_int=site_std * math.sqrt(plan.n_sites_max),
        )
        return cls(
            codec=codec,
            site_std=site_std,
            mu=sensitivity / (site_std * math.sqrt(n_honest)),
        )

    @property
    def sum_slack(self) -> float:
        """How far a sum may lie beyond the sites' bounds, by noise and rounding."""
        codec = self.codec
        return codec.noise_max * codec.step + codec.n_sites_max * codec.step / 2.0


def check_noise_options(
    *, epsilon: float, delta: float, dropout_share: float, collusion_share: float
) -> None:
    """Refuse options that no promise can be made with.

    Raises
    ------
    InvalidValueError
        Naming the option.
    """
    for name, value, most in (("epsilon", epsilon, _MAX_EPSILON), ("delta", delta, _MAX_DELTA)):
        if not 0.0 < value <= most:
            raise InvalidValueError(f"{name} is in (0, {most:g}], got {value!r}")
    for name, value in (("dropout_share", dropout_share), ("collusion_share", collusion_share)):
        if not 0.0 <= value < 0.5:
            raise InvalidValueError(f"{name} is in [0, 0.5), got {value!r}")


class SharedNoise:
    """What a protection of integer sums gains when its sites share out Gaussian noise.

    Mixed into a protection whose fields include those named here; its `codec`, `noise` and
    `sum_slack` take the place of the exact ones.
    """

    ring: ClassVar[int]
    name: ClassVar[str]
    epsilon: float
    delta: float
    dropout_share: float
    collusion_share: float

    if TYPE_CHECKING:

        def least_sites(self, n_sites_max: int) -> int:
            """Return the fewest sites of a cohort: of the protection that this is mixed into."""

    def check_rule(self, rule: EnsembleRule) -> str:
        """Refuse raw logits, whose range is so wide that noise drowns the answer."""
        if rule.score_kind is ScoreKind.LOGIT:
            return (
                f"rule {rule.name!r} sends raw logits, whose range is so wide that noise for it"
                " drowns the answer"
            )
        return ""

    def epsilon_delta(self, plan: ScorePlan) -> tuple[float, float]:  # noqa: ARG002
        """Return (epsilon, delta) of one row; a site's total grows with every row."""
        return self.epsilon, self.delta

    def charge(self, plan: ScorePlan, n_rows: int) -> Charge:
        """Return what `n_rows` drawn answers cost."""
        return Charge.gaussian(self.calibrated(plan).mu, n_rows)

    def calibrated(self, plan: ScorePlan) -> DistributedNoise:
        """Return codec and noise of a plan, for the fewest sites less those that collude."""
        n_sites = plan.n_sites_max
        # A third of six is two, not 1.9999999999999998.
        n_colluding = math.floor(self.collusion_share * n_sites + 1e-9)
        return _calibrated(
            plan,
            epsilon=self.epsilon,
            delta=self.delta,
            n_honest=max(self.least_sites(n_sites) - n_colluding, 1),
            modulus=self.ring,
        )

    def codec(self, plan: ScorePlan) -> FixedPoint:
        """Return the codec, with room for the noise."""
        return self.calibrated(plan).codec

    def noise(self, plan: ScorePlan, shape: tuple[int, ...]) -> IntArray:
        """Return one site's part of the noise."""
        return gaussian_integers(shape, self.calibrated(plan).site_std)

    def sum_slack(self, plan: ScorePlan, n_sites: int) -> float:  # noqa: ARG002
        """Return how far a sum of honest sites may lie beyond their bounds."""
        return self.calibrated(plan).sum_slack


@functools.lru_cache(maxsize=64)
def _calibrated(
    plan: ScorePlan, *, epsilon: float, delta: float, n_honest: int, modulus: int
) -> DistributedNoise:
    return DistributedNoise.calibrated(
        plan, epsilon=epsilon, delta=delta, n_honest=n_honest, modulus=modulus
    )
