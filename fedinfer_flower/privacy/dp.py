"""Local differential privacy: each site adds noise before its answer leaves."""

from __future__ import annotations

from dataclasses import dataclass

from fedinfer_flower.ensemble.base import Disclosure, EnsembleRule, ScoreKind
from fedinfer_flower.errors import InvalidValueError
from fedinfer_flower.privacy import gaussian_dp
from fedinfer_flower.privacy.base import (
    PROTECTIONS,
    CoordinatorSide,
    KeyPair,
    Protection,
    QuerierSide,
    ScorePlan,
    SiteSide,
)
from fedinfer_flower.privacy.charge import Charge
from fedinfer_flower.privacy.cohort import Cohort
from fedinfer_flower.privacy.gaussian_mechanism import GaussianMechanism
from fedinfer_flower.privacy.randomised_response import RandomisedResponse
from fedinfer_flower.wire.identity import Identity

__all__ = ["DP"]

_MAX_EPSILON = 64.0
"""Beyond this a promise bounds nothing: the odds of two answers may differ by e^64."""

_MAX_DELTA = 1e-3


@PROTECTIONS.register("dp")
@dataclass(frozen=True, kw_only=True)
class DP(Protection):
    """Add noise at the site, so that nobody sees its exact answer.

    Use where coordinator and querier may be one party, or pool what they see. Prefer `he`
    where they do not: noise at every site costs accuracy, and pays from about fifty sites,
    or for few queries.

    Parameters
    ----------
    mechanism : str
        ``"gaussian"``: Gaussian noise on probabilities or other bounded scores.
        ``"randomised-response"``: the site's label, or by chance another one; for rules
        that vote, and more accurate than Gaussian noise on votes. It uses its epsilon to
        the full: an attacker gets all that the promise allows.
    epsilon : float
        Privacy of one row of one site's answer, in (0, 64]. **A site's total grows with
        every row that it answers**; see `total_epsilon_delta`.
    delta : float
        In (0, 1e-3]. Per row under ``"gaussian"``; under ``"randomised-response"`` only
        used to compose rows. Choose it below one over ten times the number of a site's
        records.

    Raises
    ------
    InvalidValueError
        If an option is out of range.

    Privacy
    -------
    Neighbours: one site's whole answer to a row is replaced by any other answer that its
    rule allows; hence also its model, or all its data. Each row is (epsilon, delta)-private
    towards everyone who sees the answer: coordinator, querier and all other sites, alone or
    colluding. Rows compose: what a site gives away with K rows, to all queriers who pool
    what they get, is `total_epsilon_delta` of K. Not hidden: the query, and that a site
    answered. Nothing is claimed for a site that leaves out its noise, nor against side
    channels at the site.

    References
    ----------
    .. [1] Balle and Wang, ICML 2018 (exact calibration of the Gaussian mechanism).
    .. [2] Kairouz, Bonawitz and Ramage, ICML 2016 (k-ary randomised response).

    Examples
    --------
    >>> import numpy as np
    >>> from fedinfer_flower.ensemble import RULES
    >>> rule = RULES.get("mean-probability")()
    >>> plan = ScorePlan.for_rule(rule, n_classes=2, n_sites_max=1)
    >>> dp = DP(epsilon=4.0)
    >>> len(dp.site_side(plan, public_key=b"").protect(np.array([[0.25, 0.75]])))
    8
    >>> epsilon, delta = dp.total_epsilon_delta(100)
    >>> round(epsilon)
    81
    """

    mechanism: str = GaussianMechanism.name
    epsilon: float = 1.0
    delta: float = 1e-5

    reveals = Disclosure.SCORES

    def __post_init__(self) -> None:
        super().__post_init__()
        known = (GaussianMechanism.name, RandomisedResponse.name)
        if self.mechanism not in known:
            raise InvalidValueError(
                f"protection 'dp' has no mechanism {self.mechanism[:32]!r}",
                hint=f"mechanisms: {', '.join(known)}",
            )
        for option, most in (("epsilon", _MAX_EPSILON), ("delta", _MAX_DELTA)):
            value = getattr(self, option)
            if not 0.0 < value <= most:
                raise InvalidValueError(
                    f"{option} (per query row and site) is in (0, {most:g}], got {value!r}"
                )

    def check_rule(self, rule: EnsembleRule) -> str:
        """Refuse raw logits, and randomised response of anything but votes."""
        if rule.score_kind is ScoreKind.LOGIT:
            return (
                f"rule {rule.name!r} sends raw logits, whose range is so wide that noise"
                " for it drowns the answer"
            )
        if not self._is_gaussian and rule.score_kind is not ScoreKind.VOTE:
            return (
                f"rule {rule.name!r} sends {rule.score_kind.value} scores, and randomised"
                " response can send one label only"
            )
        return ""

    def epsilon_delta(self, plan: ScorePlan) -> tuple[float, float]:  # noqa: ARG002
        """Return (epsilon, delta) of one row; a site's total grows with every row."""
        return (self.epsilon, self.delta if self._is_gaussian else 0.0)

    def charge(self, plan: ScorePlan, n_rows: int) -> Charge:
        """Return what `n_rows` drawn answers cost; the noise really used, not the promise."""
        if self._is_gaussian:
            return Charge.gaussian(self._gaussian(plan).mu, n_rows)
        return Charge.pure(self.epsilon, n_rows)

    def total_epsilon_delta(self, n_rows: int) -> tuple[float, float]:
        """Return (epsilon, delta) of all of one site's answers to `n_rows` rows together.

        Exact composition for the Gaussian mechanism, with this `delta` in total, not per
        row. For randomised response the smaller of two bounds, of which one has delta 0:
        see `gaussian_dp.pure_epsilon_total`.

        Parameters
        ----------
        n_rows : int
            At least 1; all rows that the site ever answered to those who pool answers.

        Raises
        ------
        InvalidValueError
            If `n_rows` is not positive.

        Examples
        --------
        >>> DP(mechanism="randomised-response", epsilon=2.0).total_epsilon_delta(3)
        (6.0, 0.0)
        """
        if n_rows < 1:
            raise InvalidValueError(f"n_rows is at least 1, got {n_rows!r}")
        if not self._is_gaussian:
            return gaussian_dp.pure_epsilon_total(self.epsilon, n_rows, self.delta)
        # The noise is rounded up, so what is really spent is never more than this.
        mu = gaussian_dp.compose_mu(gaussian_dp.mu_for(self.epsilon, self.delta), n_rows)
        return gaussian_dp.epsilon_of(mu, self.delta), self.delta

    def total_epsilon(self, n_rows: int) -> float:
        """Return the epsilon of `total_epsilon_delta`; it holds at this `delta` in total."""
        return self.total_epsilon_delta(n_rows)[0]

    def payload_bytes(self, plan: ScorePlan, n_queries: int) -> int:
        """Return four bytes an entry, or two (four beyond 65536 classes) a label."""
        if self._is_gaussian:
            return 4 * n_queries * plan.width
        return n_queries * self._response(plan).label_bytes

    def site_side(
        self,
        plan: ScorePlan,
        *,
        public_key: bytes,  # noqa: ARG002
        cohort: Cohort | None = None,  # noqa: ARG002
        identity: Identity | None = None,  # noqa: ARG002
    ) -> SiteSide:
        """Build the site's side; there is no key.

        Raises
        ------
        CapacityError
            If so small an epsilon needs noise that 32-bit entries cannot hold.
        InvalidValueError
            If the plan is not one of votes, under randomised response.
        """
        mechanism = self._gaussian(plan) if self._is_gaussian else self._response(plan)
        return mechanism.site_side(plan)

    def coordinator_side(
        self,
        plan: ScorePlan,
        *,
        n_queries: int,
        rule: EnsembleRule,
        public_key: bytes,  # noqa: ARG002
        cohort: Cohort | None = None,  # noqa: ARG002
    ) -> CoordinatorSide:
        """Build the coordinator's side; there is no key."""
        mechanism = self._gaussian(plan) if self._is_gaussian else self._response(plan)
        return mechanism.coordinator_side(self, plan, n_queries, rule)

    def querier_side(
        self,
        plan: ScorePlan,
        *,
        keys: KeyPair,  # noqa: ARG002
        cohort: Cohort | None = None,  # noqa: ARG002
    ) -> QuerierSide:
        """Build the querier's side; there is no key."""
        mechanism = self._gaussian(plan) if self._is_gaussian else self._response(plan)
        return mechanism.querier_side(self, plan)

    @property
    def _is_gaussian(self) -> bool:
        return self.mechanism == GaussianMechanism.name

    def _gaussian(self, plan: ScorePlan) -> GaussianMechanism:
        return GaussianMechanism.calibrated(plan, epsilon=self.epsilon, delta=self.delta)

    def _response(self, plan: ScorePlan) -> RandomisedResponse:
        return RandomisedResponse.of_plan(plan, epsilon=self.epsilon)
