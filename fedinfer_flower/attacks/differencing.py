"""Ask a cohort, ask it again without one site, subtract.

Two exact sums give away what neither does alone. The second cohort need not be asked on
purpose: a site that was offline does as well.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass

from fedinfer_flower.attacks.base import ATTACKS, Attack, AttackResult, Position
from fedinfer_flower.attacks.federation import TargetFederation
from fedinfer_flower.attacks.reading import RECOVERED_SHARE, promises_noise, recovered_share
from fedinfer_flower.attacks.rounds import label_of, read_sum
from fedinfer_flower.ensemble.base import Array, Disclosure
from fedinfer_flower.errors import FedInferError
from fedinfer_flower.privacy.base import Protection, ScorePlan
from fedinfer_flower.privacy.cohort_guard import CohortGuard

__all__ = ["Differencing", "TwoSums"]


@dataclass(frozen=True, kw_only=True, eq=False)
class TwoSums:
    """Two cohorts that differ in one site.

    Parameters
    ----------
    with_site, without_site : callable
        Return the opened sums, shape (n_queries, width). May raise a `FedInferError`, such
        as `DifferencingError`: then the attack fails.
    truth : float array of shape (n_queries, width)
        The site's clear answer, for scoring.
    claimed : bool
        Whether the mode promises that this does not work.
    """

    with_site: Callable[[], Array]
    without_site: Callable[[], Array]
    truth: Array
    claimed: bool = False


@ATTACKS.register("differencing")
@dataclass(frozen=True, kw_only=True)
class Differencing(Attack[TwoSums]):
    """Subtract the sums of two cohorts that differ in one site.

    Parameters
    ----------
    n_rows : int
        Rows that `evidence` asks about.

    Privacy
    -------
    Exact sums, masked or encrypted, promise nothing here. Noise for each site's answer
    does: the difference is two private answers. Otherwise sites must refuse the same rows
    to another cohort.

    Examples
    --------
    >>> import numpy as np
    >>> own, others = np.eye(3), np.ones((3, 3))
    >>> sums = TwoSums(with_site=lambda: own + others, without_site=lambda: others, truth=own)
    >>> Differencing().run(sums).verdict
    'succeeds'
    """

    n_rows: int = 20

    sees = frozenset({Position.QUERIER})
    threat = "Two sums over cohorts that differ in one site give that site's answer away."
    stopped_by = frozenset({"dp", "secagg+dp", "he+dp"})

    def evidence(
        self,
        federation: TargetFederation,
        protection: Protection,
        *,
        seed: int = 0,  # noqa: ARG002
    ) -> dict[str, TwoSums]:
        """Ask all sites, and all but the first; empty if the rest is too small a cohort."""
        scores = federation.scores(federation.inputs[: self.n_rows])
        if len(scores) - 1 < protection.least_sites(len(scores) - 1):
            return {}
        rule, n_classes = federation.rule, federation.n_classes
        plan = ScorePlan.for_rule(rule, n_classes=n_classes, n_sites_max=len(scores))

        def with_site() -> Array:
            return read_sum(protection, rule, scores, n_classes=n_classes)

        def without_site() -> Array:
            return read_sum(protection, rule, scores[1:], n_classes=n_classes)

        promised = protection.name in self.stopped_by and promises_noise(protection, plan)
        sums = TwoSums(
            with_site=with_site, without_site=without_site, truth=scores[0], claimed=promised
        )
        label = label_of(protection)
        if promised or protection.reveals is Disclosure.SCORES:
            return {label: sums}
        # Of a site that is in both cohorts: all of them are honest here.
        guard = CohortGuard(None)
        rows = [hashlib.sha256(row.tobytes()).digest() for row in federation.inputs[: self.n_rows]]

        def guarded(ask: Callable[[], Array], query_id: str, roster: bytes) -> Callable[[], Array]:
            def asked() -> Array:
                guard.admit(query_id, rows, roster, survivors_known=True)
                return ask()

            return asked

        refused = TwoSums(
            with_site=guarded(with_site, "q-1", b"all sites"),
            without_site=guarded(without_site, "q-2", b"all but one"),
            truth=scores[0],
            claimed=True,
        )
        return {label: sums, f"{label}, cohort guard": refused}

    def run(self, evidence: TwoSums, *, mode: str = "", seed: int = 0) -> AttackResult:  # noqa: ARG002
        """Subtract, and compare with the site's clear answer."""
        refused, value = "", 0.0
        try:
            value = recovered_share(evidence.with_site() - evidence.without_site(), evidence.truth)
        except FedInferError as exc:
            refused = exc.code
        return AttackResult(
            attack=self.name,
            mode=mode,
            statistic="share of the site's answer recovered",
            value=value,
            baseline=0.0,
            threshold=RECOVERED_SHARE,
            threshold_reason="half of the error of a guess is gone",
            claim_limit=RECOVERED_SHARE if evidence.claimed else None,
            detail={"rows": len(evidence.truth), "refused": refused},
        )
