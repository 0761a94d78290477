"""Secure aggregation in one shot: masks that cancel in the sum, and one for the querier."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Final

import numpy as np
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey

from fedinfer_flower.ensemble.base import Array, Disclosure, EnsembleRule
from fedinfer_flower.errors import (
    BindingError,
    ConfigError,
    EnvelopeError,
    InvalidValueError,
)
from fedinfer_flower.privacy.base import PROTECTIONS, KeyPair, Protection, ScorePlan
from fedinfer_flower.privacy.checks import ROUNDING_SLACK, check_scores, require_within
from fedinfer_flower.privacy.cohort import Cohort
from fedinfer_flower.privacy.fixed_point import FixedPoint, IntArray
from fedinfer_flower.privacy.mask_graph import neighbours
from fedinfer_flower.privacy.mask_recovery import MaskedSum, recovery_reply
from fedinfer_flower.privacy.masked_answer import MaskedAnswer, MaskedTotal
from fedinfer_flower.privacy.masks import leaf, mask, pair_key
from fedinfer_flower.privacy.self_mask import (
    new_secret,
    seal_share,
    self_seed,
    share_threshold,
    split,
)
from fedinfer_flower.wire.identity import Identity

__all__ = ["SecAgg"]

RING: Final = 2**32
_MAX_DROPOUTS_SELF_MASK: Final = 1 / 3 + 1e-9


@PROTECTIONS.register("secagg")
@dataclass(frozen=True, kw_only=True)
class SecAgg(Protection):
    """Mask scores so that only their sum can be opened, and by the querier alone.

    Each site adds to its scores, as integers modulo 2**32, one mask for each pair that it
    forms with another site (plus at one end, minus at the other) and one that it shares
    with the querier. The sum at the coordinator is then masked by the querier's masks only.
    Payload: four bytes a score and 36 a batch.

    Use where nobody may see a single answer, even if coordinator and querier are run by
    one party or pool what they see. Prefer `secagg+dp` where the same federation answers
    many queries: an exact sum over few sites says something about each.

    Parameters
    ----------
    dropout_share : float
        Largest share of the sites that may fail to answer, in [0, 0.5). More end the
        batch: sites do not help to open the sum of few.
    self_mask : bool
        A second mask a site, shared out among its neighbours. Keeps single answers hidden
        from a coordinator and a querier that act together and lie about who dropped out.
        Costs two extra rounds in every batch, and 32 bytes a site and neighbour.

    Raises
    ------
    InvalidValueError
        If an option is out of range.

    Privacy
    -------
    Against parties that follow the protocol: the coordinator alone sees uniform bits, and
    who answered. The querier alone sees the sum. Both together see the sum and no single
    answer; without `self_mask`, also that of a site whose reply arrives after the others
    made good for it, or is refused: nobody has to lie. All sites but one, together with the
    querier, know that one's answer by subtraction; two honest sites hide each other.

    A coordinator alone that lies about who dropped out learns nothing, because the querier's
    masks stay. Coordinator and querier together that lie so see single answers, unless
    `self_mask` is on and fewer than a third of the sites are on their side, and among more
    than 51 sites fewer than 12 (so many can help to cut the circle of masks; 20 of its 50
    neighbours can remove a site's own mask). The options are the querier's to choose: a
    site that does not trust it sets `OptionLimits(require_self_mask=True)`.

    Roster and keys must be genuine: whoever makes up the other sites of a roster sees the
    one real answer. A sum is not differentially private. Nothing here proves that a site
    masked its model's scores and not others.

    References
    ----------
    .. [1] Bonawitz et al., Practical Secure Aggregation for Privacy-Preserving Machine
       Learning, CCS 2017.

    Examples
    --------
    >>> from fedinfer_flower.ensemble import RULES
    >>> from fedinfer_flower.wire.roster import Roster, Seat
    >>> rule = RULES.get("mean-probability")()
    >>> plan = ScorePlan.for_rule(rule, n_classes=2, n_sites_max=3)
    >>> secagg, sites = SecAgg(), [Identity.generate() for _ in range(3)]
    >>> keys = secagg.make_keys()
    >>> seats = tuple(Seat(identity=s.public, commitment="0" * 64) for s in sites)
    >>> cohort = Cohort(query_id="q-0", roster=Roster(seats), public_key=keys.public_key)
    >>> coordinator = secagg.coordinator_side(
    ...     plan, n_queries=1, rule=rule, public_key=keys.public_key, cohort=cohort
    ... )
    >>> for site in sites:
    ...     side = secagg.site_side(
    ...         plan, public_key=keys.public_key, cohort=cohort, identity=site
    ...     )
    ...     coordinator.add(side.protect(np.array([[0.25, 0.75]])), sender=site.key_id)
    >>> querier = secagg.querier_side(plan, keys=keys, cohort=cohort)
    >>> querier.open(coordinator.total(), n_queries=1, n_sites=3)
    array([[0.75, 2.25]])
    """

    dropout_share: float = 1 / 3
    self_mask: bool = False

    reveals = Disclosure.SUM
    needs_roster = True
    min_cohort = 3

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0.0 <= self.dropout_share < 0.5:
            raise InvalidValueError(f"dropout_share is in [0, 0.5), got {self.dropout_share!r}")
        if self.self_mask and self.dropout_share > _MAX_DROPOUTS_SELF_MASK:
            # More, and two sets of survivors could be confirmed with a few sites' help.
            raise InvalidValueError(
                f"with self_mask, dropout_share is at most a third, got {self.dropout_share!r}",
                hint="dropout_share=1/3",
            )

    def dropouts_max(self, n_sites: int) -> int:
        """Return how many of `n_sites` may fail to answer.

        Examples
        --------
        >>> SecAgg().dropouts_max(10)
        3
        """
        # A third of six is two, not 1.9999999999999998.
        allowed = math.floor(self.dropout_share * n_sites + 1e-9)
        return max(min(allowed, n_sites - self.min_cohort), 0)

    def least_sites(self, n_sites_max: int) -> int:
        """Return the fewest sites of a cohort whose sum may be opened."""
        return max(self.min_cohort, n_sites_max - self.dropouts_max(n_sites_max))

    def codec(self, plan: ScorePlan) -> FixedPoint:
        """Return the codec of a plan."""
        return FixedPoint.fitted(clip=plan.bound, n_sites_max=plan.n_sites_max, modulus=RING)

    def payload_bytes(self, plan: ScorePlan, n_queries: int) -> int:
        """Return four bytes an entry and a header; with `self_mask` the shares as well."""
        return MaskedAnswer.size(
            n_queries * plan.width, n_sites=plan.n_sites_max, self_mask=self.self_mask
        )

    def make_keys(self) -> KeyPair:
        """Make a fresh X25519 key pair at the querier."""
        key = X25519PrivateKey.generate()
        return KeyPair(
            public_key=key.public_key().public_bytes_raw(), secret_key=key.private_bytes_raw()
        )

    def site_side(
        self,
        plan: ScorePlan,
        *,
        public_key: bytes,
        cohort: Cohort | None = None,
        identity: Identity | None = None,
    ) -> _SecAggSite:
        """Build the site's side.

        Raises
        ------
        ConfigError
            Without a cohort or an identity.
        BindingError
            If the site is not in the roster, or the key is another than the cohort's.
        CapacityError
            If the cohort does not fit the codec.
        """
        return _SecAggSite(self, plan, _bound(plan, cohort, public_key), _required(identity))

    def coordinator_side(
        self,
        plan: ScorePlan,
        *,
        n_queries: int,
        rule: EnsembleRule,  # noqa: ARG002
        public_key: bytes,
        cohort: Cohort | None = None,
    ) -> MaskedSum:
        """Build the coordinator's side; it holds no key."""
        self.codec(plan)  # capacity, before anything is asked
        return MaskedSum(self, plan, _bound(plan, cohort, public_key), n_queries)

    def querier_side(
        self, plan: ScorePlan, *, keys: KeyPair, cohort: Cohort | None = None
    ) -> _SecAggQuerier:
        """Build the querier's side around its own keys."""
        return _SecAggQuerier(self, plan, _bound(plan, cohort, keys.public_key), keys)

    def recovery_reply(
        self,
        request: bytes | memoryview,
        *,
        cohort: Cohort,
        identity: Identity,
        admit: Callable[[frozenset[str]], None],
    ) -> bytes:
        """Help to make good for dropouts, at a site; see `mask_recovery.recovery_reply`."""
        return recovery_reply(self, request, cohort=cohort, identity=identity, admit=admit)

    def noise(self, plan: ScorePlan, shape: tuple[int, ...]) -> IntArray | None:  # noqa: ARG002
        """Return the noise that one site adds, in grid steps; None for an exact sum."""
        return None

    def sum_slack(self, plan: ScorePlan, n_sites: int) -> float:
        """Return how far a sum of honest sites may lie beyond their bounds."""
        return n_sites * self.codec(plan).step / 2.0


class _SecAggSite:
    def __init__(
        self, protection: SecAgg, plan: ScorePlan, cohort: Cohort, identity: Identity
    ) -> None:
        self._protection, self._plan = protection, plan
        self._cohort, self._identity = cohort, identity
        self._codec = protection.codec(plan)
        self._place = cohort.roster.place_of(identity.key_id)

    def __repr__(self) -> str:
        return f"<{self._protection.name} site side, place {self._place}, keys hidden>"

    def protect(self, scores: Array) -> bytes:
        return self.finish(self.draw(scores))

    def draw(self, scores: Array) -> IntArray:
        """Return the scores as integers of shape (n_queries, width), noise included."""
        check_scores(scores, self._plan)
        exact = self._codec.encode(scores)
        noise = self._protection.noise(self._plan, exact.shape)
        return exact if noise is None else exact + noise

    def finish(self, entries: IntArray) -> bytes:
        """Mask integers that `draw` made."""
        values = entries.ravel() & (RING - 1)
        masked = values.astype(np.uint32)
        cohort, secret = self._cohort, self._identity.agreement
        session, query_id = cohort.session(), cohort.batch_id
        count = masked.size
        shared = leaf(pair_key(secret, cohort.public_key, session), "querier", query_id)
        masked += mask(shared, count)
        pairs: dict[int, bytes] = {}
        for other in neighbours(self._place, len(cohort.roster), cohort.roster.digest()):
            peer = cohort.roster.seats[other].identity.agreement_key
            pairs[other] = pair_key(secret, peer, session)
            stream = mask(leaf(pairs[other], "pair", query_id), count)
            if self._place < other:
                masked += stream
            else:
                masked -= stream
        shares: tuple[bytes, ...] = ()
        if self._protection.self_mask:
            own = new_secret()
            masked += mask(self_seed(own, query_id), count)
            shares = self._sealed_shares(own, pairs)
        return MaskedAnswer(context=cohort.context(), entries=masked, shares=shares).to_bytes()

    def _sealed_shares(self, secret: bytes, pairs: Mapping[int, bytes]) -> tuple[bytes, ...]:
        n_dropouts = self._protection.dropouts_max(len(self._cohort.roster))
        threshold = share_threshold(len(pairs), n_dropouts)
        shares = split(secret, threshold, len(pairs))
        return tuple(
            seal_share(share, pair, self._cohort.batch_id, sender=self._place)
            for share, pair in zip(shares, pairs.values(), strict=True)
        )


class _SecAggQuerier:
    """The only side that can remove the querier's masks."""

    def __init__(self, protection: SecAgg, plan: ScorePlan, cohort: Cohort, keys: KeyPair) -> None:
        self._protection, self._plan, self._cohort = protection, plan, cohort
        try:
            self._secret = X25519PrivateKey.from_private_bytes(keys.secret_key)
        except ValueError:
            raise ConfigError("the querier's secret key is no X25519 key") from None

    def __repr__(self) -> str:
        return f"<{self._protection.name} querier side, secret key hidden>"

    def open(self, total: bytes | memoryview, *, n_queries: int, n_sites: int) -> Array:
        self._protection.check_cohort(n_sites, self._plan)
        cohort, count = self._cohort, n_queries * self._plan.width
        opened = MaskedTotal.from_bytes(
            total, context=cohort.context(), count=count, n_sites=len(cohort.roster)
        )
        if len(opened.survivors) != n_sites:
            raise EnvelopeError("the sum names another number of sites than it claims")
        entries, session = opened.entries.copy(), cohort.session()
        for place in opened.survivors:
            site = cohort.roster.seats[place].identity.agreement_key
            seed = leaf(pair_key(self._secret, site, session), "querier", cohort.batch_id)
            entries -= mask(seed, count)
        scores = self._protection.codec(self._plan).decode(entries)
        # A mask that is left anywhere spreads entries over the whole ring.
        bound = n_sites * self._plan.bound * (1.0 + ROUNDING_SLACK)
        limit = bound + self._protection.sum_slack(self._plan, n_sites)
        require_within(scores, limit, what="the combined scores")
        return scores.reshape(n_queries, self._plan.width)


def _bound(plan: ScorePlan, cohort: Cohort | None, public_key: bytes) -> Cohort:
    if cohort is None:
        raise ConfigError("masks need the roster of the batch", hint="pass cohort=Cohort(...)")
    if cohort.public_key != public_key:
        raise BindingError("the cohort is bound to another querier's key")
    if len(cohort.roster) != plan.n_sites_max:
        raise BindingError(
            f"the roster has {len(cohort.roster)} sites, the plan {plan.n_sites_max}"
        )
    return cohort


def _required(identity: Identity | None) -> Identity:
    if identity is None:
        raise ConfigError("masks need the site's own keys", hint="pass identity=Identity(...)")
    return identity
