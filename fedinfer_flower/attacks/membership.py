"""Was this record in that site's training data? The likelihood-ratio attack (LiRA).

The attacker trains many worlds of its own in which each record is now a member of a site's
shard and now not, and learns for every record how the answer differs. Then it compares the
likelihoods of the one answer that it has. It knows architecture, training and data pool:
a strong attacker, as a test should have.

Axes: n records, R rows (world, target site), F features.

References
----------
.. [1] Carlini, Chien, Nasr, Song, Terzis and Tramer, IEEE S&P 2022, algorithm 1; with one
   variance for all records, as its section VI-C advises for few shadow models.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final
from weakref import WeakKeyDictionary

import numpy as np

from fedinfer_flower.attacks.base import ATTACKS, Attack, AttackResult, Position
from fedinfer_flower.attacks.federation import TargetFederation
from fedinfer_flower.attacks.measures import (
    ERROR_RATE,
    area_under_curve,
    bootstrapped_rates,
    dp_bound,
    student_quantile,
    true_positive_rate,
)
from fedinfer_flower.attacks.rounds import label_of
from fedinfer_flower.attacks.shadow_worlds import (
    MembershipEvidence,
    ShadowWorlds,
    plain_view,
    protected_view,
    secure_sum_view,
)
from fedinfer_flower.ensemble.base import Array, Disclosure, make_rule
from fedinfer_flower.privacy.base import Protection, ScorePlan

__all__ = ["Membership", "likelihood_ratios"]

_FALSE_POSITIVE_RATE: Final = 0.01
_MEMBER_SHARE: Final = 0.36
"""Of the pool, in each world: 650 of the 1797 digits."""


def likelihood_ratios(evidence: MembershipEvidence) -> Array:
    """Return the log-likelihood ratio of membership up to a factor, shape (R, n).

    The attacker's knowledge of a target comes from all other worlds. Leaving out the target
    row alone would be wrong: under a sum the other sites of its world show the same answer.
    A record that is a member in no other world has ratio 0: nothing is known about it.
    """
    shadow = evidence.shadow.astype(np.float64)
    inside = evidence.members[:, :, None]
    n_in, n_out = inside.sum(axis=0), (~inside).sum(axis=0)
    sum_all, sum_in = shadow.sum(axis=0), np.where(inside, shadow, 0.0).sum(axis=0)
    ratios = np.empty(evidence.members.shape)
    for group in np.unique(evidence.groups):
        rows = evidence.groups == group
        own, member = shadow[rows], inside[rows]
        left_in = n_in - member.sum(axis=0)
        left_out = n_out - (~member).sum(axis=0)
        own_in = np.where(member, own, 0.0).sum(axis=0)
        mean_in = (sum_in - own_in) / np.maximum(left_in, 1)
        mean_out = (sum_all - sum_in - own.sum(axis=0) + own_in) / np.maximum(left_out, 1)
        seen = evidence.observed[rows].astype(np.float64)
        ratio = ((seen - mean_out) ** 2 - (seen - mean_in) ** 2).sum(axis=-1)
        ratios[rows] = np.where(((left_in > 0) & (left_out > 0))[:, 0], ratio, 0.0)
    return ratios


_WORLDS: WeakKeyDictionary[TargetFederation, dict[tuple[int, int, int], ShadowWorlds]] = (
    WeakKeyDictionary()
)


@ATTACKS.register("membership")
@dataclass(frozen=True, kw_only=True)
class Membership(Attack[MembershipEvidence]):
    """Tell a site's training records from answers to them.

    Reported: the true positive rate at a false positive rate of 1 %, over records and
    target sites. Thresholds on the loss miss most of this leak.

    Parameters
    ----------
    n_worlds : int
        Worlds that `evidence` trains; more give a stronger attacker and a narrower interval.
    n_sites : int
        Sites of a world.
    false_positive_rate : float

    Privacy
    -------
    `dp` bounds it: no test finds more than `measures.dp_bound` from one row. A secure sum
    of N sites hinders it and promises nothing: a sum carries information on members.
    """

    n_worlds: int = 32
    n_sites: int = 10
    false_positive_rate: float = _FALSE_POSITIVE_RATE

    sees = frozenset({Position.COORDINATOR, Position.QUERIER})
    threat = "Who sees a site's answer to a record learns whether the site trained on it."
    stopped_by = frozenset({"dp", "secagg+dp", "he+dp"})

    def evidence(
        self, federation: TargetFederation, protection: Protection, *, seed: int = 0
    ) -> dict[str, MembershipEvidence]:
        """Train worlds on the federation's records, and look through the protection."""
        worlds = self._worlds(federation, seed)
        rule = make_rule("mean-probability")
        if protection.check_rule(rule):
            rule, worlds = make_rule("majority-vote"), worlds.as_votes()
        plan = ScorePlan.for_rule(rule, n_classes=federation.n_classes, n_sites_max=self.n_sites)
        promise = protection.epsilon_delta(plan)
        is_sum = protection.reveals is not Disclosure.SCORES
        label = label_of(protection) + (f", sum of {self.n_sites}" if is_sum else "")
        clear = secure_sum_view if is_sum else plain_view
        if promise is None:
            # Exact up to the grid: the clear view, without thousands of encryptions.
            return {label: worlds.seen_through(clear)}
        view = protected_view(protection, rule)
        return {
            label: worlds.seen_through(view, noiseless=clear, logit=False, epsilon_delta=promise)
        }

    def _worlds(self, federation: TargetFederation, seed: int) -> ShadowWorlds:
        """Train worlds once for all protections of a federation."""
        known = _WORLDS.setdefault(federation, {})
        key = (self.n_worlds, self.n_sites, seed)
        if key not in known:
            known[key] = ShadowWorlds.train(
                federation.inputs,
                federation.labels,
                n_classes=federation.n_classes,
                n_worlds=self.n_worlds,
                n_sites=self.n_sites,
                n_members=int(_MEMBER_SHARE * len(federation.inputs)),
                seed=seed,
            )
        return known[key]

    def run(self, evidence: MembershipEvidence, *, mode: str = "", seed: int = 0) -> AttackResult:
        """Compute likelihood ratios and the rate at which they find members."""
        fpr = self.false_positive_rate
        ratios = likelihood_ratios(evidence)
        rate = true_positive_rate(ratios, evidence.members, false_positive_rate=fpr)
        resampled = bootstrapped_rates(
            ratios, evidence.members, evidence.groups, false_positive_rate=fpr, seed=seed
        )
        n_worlds = len(np.unique(evidence.groups))
        room = student_quantile(ERROR_RATE, n_groups=n_worlds) * float(resampled.std())
        limit = None
        if evidence.epsilon_delta is not None:
            epsilon, delta = evidence.epsilon_delta
            limit = dp_bound(fpr, epsilon=epsilon, delta=delta) + room
        low, high = np.quantile(resampled, [0.025, 0.975])
        return AttackResult(
            attack=self.name,
            mode=mode,
            statistic=f"true positive rate at {fpr:.0%} false positives",
            value=rate,
            baseline=fpr,
            threshold=fpr + room,
            threshold_reason=(
                f"guessing finds {fpr:.0%}; Student bound at {ERROR_RATE:g}, standard error"
                " from resampled worlds"
            ),
            claim_limit=limit,
            interval=(float(low), float(high)),
            detail=self._loss_threshold(evidence)
            | {
                "auc": area_under_curve(ratios, evidence.members),
                "targets": len(evidence.members),
                "records": evidence.members.shape[1],
                "worlds": n_worlds,
            },
        )

    def _loss_threshold(self, evidence: MembershipEvidence) -> dict[str, float]:
        """Return what the simpler attack finds that calls a small loss a member."""
        if evidence.observed.shape[-1] != 1:
            return {}
        rate = true_positive_rate(
            evidence.observed[..., 0].astype(np.float64),
            evidence.members,
            false_positive_rate=self.false_positive_rate,
        )
        return {"rate of a loss threshold": rate}
