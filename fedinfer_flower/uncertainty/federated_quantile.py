"""The threshold of prediction sets from the sites' held-out rows; no score leaves a site.

Each site counts its rows' nonconformity scores in bins with public edges and gives the counts,
as one vector, under any protection of the package. The querier opens the sum of the histograms
and reads the quantile from it, rounded *up* to the edge of its bin. Axes: S bins, the last of
which is for scores that no set can cover.

**Rounding up keeps the promise.** Let q be the score of the rank that `conformal_rank` asks for,
and e the upper edge of its bin. The edges were fixed before any score, and ``q <= e``, so
``P(score <= e) >= P(score <= q) >= 1 - alpha``. The price: sets are as large as at threshold e.
Coverage grows by the share of rows whose score lies in that bin above q, which is at most the
share of the bin, `FederatedThreshold.bin_share`.

**Noise keeps the promise too.** With noise in the counts, the smallest edge is taken at which
enough rows lie below even if the noise was as unlucky as it is with probability `failure`, over
all edges together (see `_safe_bin`). The quantile is then worked out for ``alpha - failure``, so
that 1 - alpha holds in all.

**What is promised, and about whose answers.** That the right class of a new row is in its set
with probability 1 - alpha, if the row comes from site k with probability
``(n_k + 1) / (n + K)`` and is exchangeable with that site's held-out rows [1]_. Scores of a
site's *own* model promise this for that model, asked about that site's rows: not for the joint
answer, and not for a row from elsewhere. For the joint answer sites need joint answers to their
held-out rows: each asks them as a querier does, scores what it opens, and gives that histogram
(``scope="joint"``). Held-out rows that also chose a temperature or a stack are no longer quite
exchangeable with new ones; audits are (`ConformalPredictor.from_audits`).

References
----------
.. [1] Lu et al., Federated Conformal Predictors for Distributed Uncertainty Quantification,
   ICML 2023, section 4.
"""

from __future__ import annotations

import math
import secrets
from dataclasses import dataclass
from typing import Final

import numpy as np
import numpy.typing as npt

from fedinfer_flower.ensemble.base import Array
from fedinfer_flower.ensemble.mean_probability import MeanProbability
from fedinfer_flower.errors import (
    IncompatibleProtection,
    InvalidScoresError,
    InvalidValueError,
    ShapeError,
)
from fedinfer_flower.privacy.base import (
    CoordinatorSide,
    KeyPair,
    Protection,
    ScorePlan,
)
from fedinfer_flower.privacy.cohort import Cohort
from fedinfer_flower.privacy.distributed_noise import SharedNoise
from fedinfer_flower.privacy.dp import DP
from fedinfer_flower.privacy.gaussian_mechanism import GaussianMechanism
from fedinfer_flower.uncertainty.conformal import JOINT, OWN, ConformalPredictor, conformal_rank
from fedinfer_flower.uncertainty.nonconformity import require_method

__all__ = [
    "FederatedThreshold",
    "HistogramSpec",
    "coordinator_sum",
    "noise_std_rows",
    "open_quantile",
    "require_protection",
    "safe_threshold",
    "site_histogram",
]

MAX_BINS: Final = 10_000
MAX_ROWS: Final = 100_000


@dataclass(frozen=True, kw_only=True)
class HistogramSpec:
    """Public facts of a calibration: what every site counts, and how.

    Parameters
    ----------
    n_bins : int
        Equal bins of [0, 1]; one more is for rows whose class is none of the query's.
    max_rows : int
        Most rows that one site counts. Bounds what a site that lies can do, and fixes the
        capacity of the sum.
    method : {"lac", "aps"}
    scope : {"own", "joint"}
        Whose answers are scored.

    Raises
    ------
    InvalidValueError

    Examples
    --------
    >>> HistogramSpec(n_bins=4).edges
    array([0.25, 0.5 , 0.75, 1.  ])
    """

    n_bins: int = 200
    max_rows: int = 1000
    method: str = "lac"
    scope: str = OWN

    def __post_init__(self) -> None:
        require_method(self.method)
        for name, value, most in (
            ("n_bins", self.n_bins, MAX_BINS),
            ("max_rows", self.max_rows, MAX_ROWS),
        ):
            if not 1 <= value <= most:
                raise InvalidValueError(f"{name} is in [1, {most}], got {value!r}")
        if self.scope not in (OWN, JOINT):
            raise InvalidValueError("scope is 'own' or 'joint'")

    @property
    def edges(self) -> Array:
        """Upper edges of the bins of [0, 1]; a score on an edge is in the bin below it."""
        return np.arange(1, self.n_bins + 1) / self.n_bins

    def plan(self, n_sites_max: int) -> ScorePlan:
        """Return what the sides of a protection agree on: one row, a bin an entry.

        The sensitivity is of one held-out row for another: one count less in a bin, one
        more in another. The number of a site's rows is not what noise hides.
        """
        return ScorePlan(
            width=self.n_bins + 1,
            bound=float(self.max_rows),
            sensitivity_l2=math.sqrt(2.0),
            n_sites_max=n_sites_max,
            n_classes=2,
        )


def require_protection(protection: Protection) -> None:
    """Refuse a protection that cannot carry counts.

    Raises
    ------
    IncompatibleProtection
    """
    if isinstance(protection, DP) and protection.mechanism != GaussianMechanism.name:
        raise IncompatibleProtection(
            "randomised response sends one label, and a histogram is many counts",
            hint="DP(mechanism='gaussian'), or 'secagg+dp'",
        )


def site_histogram(scores: npt.ArrayLike, spec: HistogramSpec) -> Array:
    """Count a site's scores; what it then protects like any scores.

    Parameters
    ----------
    scores : float array of shape (n_rows,)
        Of `label_scores` with the spec's method; infinite where no set can cover the class.
        Of more than ``spec.max_rows`` a random part is counted.
    spec : HistogramSpec

    Returns
    -------
    counts_bs : float array of shape (1, n_bins + 1)

    Raises
    ------
    InvalidValueError
        If a score is not a number or negative.

    Privacy
    -------
    The histogram says how well the model knows its held-out rows. Under `plain` the
    coordinator sees it; under `secagg` and `he` nobody sees anything but the sum over all
    sites; with noise, one held-out row more or less in a bin is hidden as well.

    Examples
    --------
    >>> site_histogram([0.1, 0.25, 0.26, np.inf], HistogramSpec(n_bins=4))
    array([[2., 1., 0., 0., 1.]])
    """
    values = np.asarray(scores, dtype=np.float64).ravel()
    if np.isnan(values).any() or (values < 0.0).any():
        raise InvalidValueError("nonconformity scores are numbers that are not negative")
    if len(values) > spec.max_rows:
        # Which rows are left out does not depend on their scores: the rest stay exchangeable.
        values = np.random.default_rng(secrets.randbits(128)).permutation(values)[: spec.max_rows]
    # The first edge that is not below the score: never an edge that would leave it out.
    places = np.searchsorted(spec.edges, values, side="left")
    return np.bincount(places, minlength=spec.n_bins + 1).astype(np.float64)[np.newaxis]


def coordinator_sum(
    spec: HistogramSpec,
    protection: Protection,
    *,
    n_sites_max: int,
    public_key: bytes = b"",
    cohort: Cohort | None = None,
) -> CoordinatorSide:
    """Return the coordinator's side, which adds the sites' payloads as they come.

    Raises
    ------
    IncompatibleProtection, CapacityError
    """
    require_protection(protection)
    return protection.coordinator_side(
        spec.plan(n_sites_max),
        n_queries=1,
        rule=MeanProbability(),  # a plain sum
        public_key=public_key,
        cohort=cohort,
    )


def noise_std_rows(protection: Protection, plan: ScorePlan, n_sites: int) -> float:
    """Return the standard deviation of the noise in one bin of the opened sum, in rows.

    Examples
    --------
    >>> from fedinfer_flower.privacy import make_protection
    >>> noise_std_rows(make_protection("secagg"), HistogramSpec().plan(5), 5)
    0.0
    """
    if isinstance(protection, SharedNoise):
        noise = protection.calibrated(plan)
        std, step = float(noise.site_std), noise.codec.step
    elif isinstance(protection, DP):
        require_protection(protection)
        mechanism = GaussianMechanism.calibrated(
            plan, epsilon=protection.epsilon, delta=protection.delta
        )
        std, step = float(mechanism.std), mechanism.codec.step
    else:
        return 0.0
    # Rounding to the grid is a uniform error, independent of the noise (distributed_noise).
    return math.sqrt(n_sites * (std**2 + 1.0 / 12.0)) * step


@dataclass(frozen=True, kw_only=True)
class FederatedThreshold:
    """A threshold, and what it was read from.

    Parameters
    ----------
    predictor : ConformalPredictor
    n_rows : float
        Held-out rows of all sites together; an estimate under noise.
    bin_share : float
        Share of them in the quantile's bin: most coverage that rounding up adds.
    noise_std_rows : float
        Of one bin; 0.0 without noise.
    """

    predictor: ConformalPredictor
    n_rows: float
    bin_share: float
    noise_std_rows: float


def open_quantile(
    total: bytes | memoryview,
    spec: HistogramSpec,
    protection: Protection,
    *,
    n_sites: int,
    n_sites_max: int,
    keys: KeyPair,
    cohort: Cohort | None = None,
    alpha: float = 0.1,
    failure: float | None = None,
) -> FederatedThreshold:
    """Open the sum of the histograms and read the threshold from it (querier).

    Parameters
    ----------
    total : bytes
        What the coordinator's side returned.
    spec : HistogramSpec
    protection : Protection
    n_sites, n_sites_max : int
        Sites in the sum, and sites that were asked.
    keys : KeyPair
        The querier's; empty for protections without one.
    cohort : Cohort, optional
        Where masks are bound to one.
    alpha : float
        Share of rows that may miss their right class, all in all.
    failure : float, optional
        Part of alpha for unlucky noise; default a tenth of it. Unused without noise.

    Raises
    ------
    ProtocolError
        If the total does not open to counts that so many honest sites could send.
    InvalidValueError
        If alpha or failure is out of range.

    Privacy
    -------
    The querier sees the histogram of all sites' rows together. All sites but one, with the
    querier, see that one's by subtraction, unless noise is in it. Under `plain`
    and `dp` a site that lies shifts the threshold as far as `max_rows` rows can. Under masks
    and encryption only the sum is checked: it has the room that all sites' `max_rows` leave,
    and can take others' counts away.
    """
    plan = spec.plan(n_sites_max)
    side = protection.querier_side(plan, keys=keys, cohort=cohort)
    counts = side.open(total, n_queries=1, n_sites=n_sites)[0]
    return safe_threshold(
        counts,
        spec,
        n_sites=n_sites,
        alpha=alpha,
        noise_std=noise_std_rows(protection, plan, n_sites),
        failure=failure,
    )


def safe_threshold(
    counts: Array,
    spec: HistogramSpec,
    *,
    n_sites: int,
    alpha: float,
    noise_std: float = 0.0,
    failure: float | None = None,
) -> FederatedThreshold:
    """Read the threshold from a histogram; see the module for what it promises.

    Parameters
    ----------
    counts : float array of shape (n_bins + 1,)
        With independent noise of standard deviation `noise_std` rows in each entry.

    Examples
    --------
    >>> counts = np.array([50.0, 30.0, 15.0, 5.0, 0.0])
    >>> safe_threshold(counts, HistogramSpec(n_bins=4), n_sites=1, alpha=0.1).predictor.threshold
    0.75
    """
    if counts.shape != (spec.n_bins + 1,):
        raise ShapeError(f"a histogram has {spec.n_bins + 1} entries, got {counts.shape}")
    if not 0.0 < alpha < 1.0:
        raise InvalidValueError(f"alpha is in (0, 1), got {alpha!r}")
    if not np.isfinite(counts).all():
        raise InvalidScoresError("the opened histogram holds what is no number")
    if not 0.0 <= noise_std < math.inf:
        raise InvalidValueError("noise_std is a number of rows that is not negative")
    if noise_std > 0.0:
        failure = alpha / 10.0 if failure is None else failure
        if not 0.0 < failure < alpha:
            raise InvalidValueError("failure is a part of alpha: in (0, alpha)")
        place = _safe_bin(counts, alpha - failure, n_sites, noise_std, failure)
    else:
        counts = np.rint(counts)
        if (counts < 0.0).any() or counts.sum() > n_sites * spec.max_rows:
            raise InvalidScoresError("the opened histogram is none that honest sites can send")
        rank = conformal_rank(int(counts.sum()), alpha, n_groups=n_sites)
        place = int(np.searchsorted(np.cumsum(counts), rank, side="left"))
    n_rows = max(float(counts.sum()), 0.0)
    covered = place < spec.n_bins
    share = max(float(counts[place]), 0.0) / n_rows if covered and n_rows > 0.0 else 0.0
    predictor = ConformalPredictor(
        threshold=float(spec.edges[place]) if covered else math.inf,
        alpha=alpha,
        method=spec.method,
        n_calibration=round(n_rows),
        scope=spec.scope,
        n_groups=n_sites,
    )
    return FederatedThreshold(
        predictor=predictor, n_rows=n_rows, bin_share=share, noise_std_rows=noise_std
    )


def _safe_bin(counts: Array, alpha: float, n_groups: int, std: float, failure: float) -> int:
    """Return the first bin up to whose edge enough rows lie, whatever the noise.

    Enough rows lie below edge j if ``G_j = sum_(i <= j) h_i - (1 - alpha)(n + K) >= 0``, with
    n the sum of all h. G_j is linear in the counts, with weight alpha up to j and
    -(1 - alpha) beyond, so its noise is sub-Gaussian with variance
    ``std^2 * sum_i w_i^2``. By the Chernoff bound and a union over the M edges, all G_j
    lie above their noisy values less ``sd_j * sqrt(2 ln(M / failure))`` with probability
    1 - failure. The first edge whose noisy value exceeds that is safe.
    """
    n_entries = len(counts)
    below = np.arange(1, n_entries + 1)
    noisy = np.cumsum(counts) - (1.0 - alpha) * (counts.sum() + n_groups)
    squares = below * alpha**2 + (n_entries - below) * (1.0 - alpha) ** 2
    margin = std * np.sqrt(squares) * math.sqrt(2.0 * math.log(n_entries / failure))
    safe = np.flatnonzero(noisy >= margin)
    # The last entry is no edge: it stands for the set of all classes, which is always safe.
    return int(safe[0]) if len(safe) else n_entries - 1
