"""Read membership of unusual records from how familiar a query is to a site.

The open-set rules scale a site's probabilities by a familiarity that is 1 for a query equal
to a training record, and small for a query far from all of them. The length of the score is
the familiarity. So for a record with no near neighbour a single answer says whether it is in
the training data.

Ordinary records have neighbours and are not told apart. The attack therefore plants unusual
ones, as an auditor does: records with their features in random order, half of them among a
site's own.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from fedinfer_flower.attacks.base import ATTACKS, Attack, AttackResult, Position
from fedinfer_flower.attacks.federation import TargetFederation
from fedinfer_flower.attacks.measures import (
    ERROR_RATE,
    area_under_curve,
    binomial_threshold,
    clopper_pearson,
    dp_bound,
    true_positive_rate,
)
from fedinfer_flower.attacks.rounds import label_of, read_one, read_sum
from fedinfer_flower.clients.familiarity import Familiarity
from fedinfer_flower.ensemble.base import Array, Disclosure, EnsembleRule, SiteContext, make_rule
from fedinfer_flower.errors import InvalidValueError
from fedinfer_flower.privacy.base import Protection, ScorePlan

__all__ = ["FamiliarityLeak", "ObservedLengths", "unusual_records"]


def unusual_records(records: Array, *, count: int, seed: int) -> Array:
    """Return records with their features in random order, each in one of its own.

    They have the values of real records and resemble none of them, nor one another.

    Examples
    --------
    >>> unusual_records(np.arange(4.0)[None], count=2, seed=0).sum(axis=1).tolist()
    [6.0, 6.0]
    """
    rng = np.random.default_rng(seed)
    drawn = records[rng.integers(0, len(records), count)]
    return np.asarray(rng.permuted(drawn, axis=1), dtype=float)


@dataclass(frozen=True, kw_only=True, eq=False)
class ObservedLengths:
    """What is seen of records that may be in a site's training data.

    Parameters
    ----------
    lengths : float array of shape (n,)
        Sum of the entries of the score for each record.
    members : bool array of shape (n,)
    epsilon_delta : tuple of float, optional
        What the mode promises for one row of one site's answer.
    """

    lengths: Array
    members: npt.NDArray[np.bool_]
    epsilon_delta: tuple[float, float] | None = None


@ATTACKS.register("familiarity-leak")
@dataclass(frozen=True, kw_only=True)
class FamiliarityLeak(Attack[ObservedLengths]):
    """Call a record a member if the score for it is long.

    Parameters
    ----------
    n_planted : int
        Unusual records among each site's own.
    n_others : int
        Unusual records that no site has, asked of each site.
    false_positive_rate : float

    Privacy
    -------
    Noise with a promise for each row bounds it. A secure sum does not hinder it for records
    that are unusual to all sites: a sum of familiarities is 1 if one of them is, and says of
    whom only that it is one of the cohort.
    """

    n_planted: int = 6
    n_others: int = 20
    false_positive_rate: float = 0.05

    sees = frozenset({Position.COORDINATOR, Position.QUERIER})
    threat = "Under an open-set rule one answer tells whether an unusual record was trained on."
    stopped_by = frozenset({"dp", "secagg+dp", "he+dp"})

    def evidence(
        self, federation: TargetFederation, protection: Protection, *, seed: int = 0
    ) -> dict[str, ObservedLengths]:
        """Plant records, and ask about them under rule `open-set`."""
        rule, n_classes = make_rule("open-set"), federation.n_classes
        if len(federation.site_inputs) != len(federation.sites) or protection.check_rule(rule):
            return {}
        planted, others = self._records(federation, seed)
        measures = [
            Familiarity.fit(np.concatenate([own, extra]))
            for own, extra in zip(federation.site_inputs, planted, strict=True)
        ]
        sees_one = protection.reveals is Disclosure.SCORES
        lengths, members = [], []
        for target, extra in enumerate(planted):
            asked = np.concatenate([extra, others[target]])
            scores = _open_set_scores(federation, rule, measures, asked)
            if sees_one:
                seen = read_one(protection, rule, scores[target], n_classes=n_classes)
            else:
                seen = read_sum(protection, rule, scores, n_classes=n_classes)
            lengths.append(seen.sum(axis=1))
            members.append(np.arange(len(asked)) < len(extra))
        plan = ScorePlan.for_rule(rule, n_classes=n_classes, n_sites_max=len(planted))
        what = "one site" if sees_one else f"sum of {len(planted)}"
        observed = ObservedLengths(
            lengths=np.concatenate(lengths),
            members=np.concatenate(members),
            epsilon_delta=protection.epsilon_delta(plan),
        )
        return {f"{label_of(protection)}, {what}": observed}

    def _records(self, federation: TargetFederation, seed: int) -> tuple[list[Array], list[Array]]:
        """Return for each site the records to plant, and as strange ones that nobody has."""
        n_sites, each = len(federation.sites), self.n_planted + self.n_others
        drawn = unusual_records(federation.inputs, count=n_sites * each, seed=seed)
        by_site = drawn.reshape(n_sites, each, -1)
        return list(by_site[:, : self.n_planted]), list(by_site[:, self.n_planted :])

    def run(self, evidence: ObservedLengths, *, mode: str = "", seed: int = 0) -> AttackResult:  # noqa: ARG002
        """Compare the lengths of members with those of others."""
        fpr, members = self.false_positive_rate, evidence.members
        rate = true_positive_rate(evidence.lengths, members, false_positive_rate=fpr)
        n_in = int(members.sum())
        limit = None
        if evidence.epsilon_delta is not None:
            epsilon, delta = evidence.epsilon_delta
            bound = dp_bound(self._upper_rate(members), epsilon=epsilon, delta=delta)
            limit = binomial_threshold(bound, n_in)
        return AttackResult(
            attack=self.name,
            mode=mode,
            statistic=f"true positive rate at {fpr:.0%} false positives",
            value=rate,
            baseline=fpr,
            threshold=binomial_threshold(self._upper_rate(members), n_in),
            threshold_reason=(
                f"a threshold drawn from the others may let through more than {fpr:.0%}:"
                f" binomial bounds at {ERROR_RATE:g} for both"
            ),
            claim_limit=limit,
            interval=clopper_pearson(round(rate * n_in), n_in),
            detail={
                "auc": area_under_curve(evidence.lengths, members),
                "members": n_in,
                "others": int((~members).sum()),
            },
        )

    def _upper_rate(self, members: npt.NDArray[np.bool_]) -> float:
        """Return the false positive rate that the drawn threshold may really have."""
        return binomial_threshold(self.false_positive_rate, int((~members).sum()))


def _open_set_scores(
    federation: TargetFederation,
    rule: EnsembleRule,
    measures: Sequence[Familiarity | None],
    records: Array,
) -> Array:
    present = np.ones(federation.n_classes, dtype=bool)
    scores = []
    for site, measure in zip(federation.sites, measures, strict=True):
        if measure is None:
            raise InvalidValueError("a site with fewer than 5 training rows has no familiarity")
        context = SiteContext(present=present, familiarity=measure.score(records))
        scores.append(rule.score(np.asarray(site(records), dtype=float), context))
    return np.stack(scores)
