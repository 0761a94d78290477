"""What a strategy's `start` returns."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from fedinfer_flower.errors import MissingExtraError
from fedinfer_flower.query import Prediction, QueryReport, SiteProfile, SiteStatus
from fedinfer_flower.receipts.receipt import Receipt
from fedinfer_flower.selection.plan import QueryPlan
from fedinfer_flower.settlement.book import EvidenceBook
from fedinfer_flower.wire.documents import CombinedAnswer

__all__ = ["InferenceResult"]


@dataclass(frozen=True, kw_only=True)
class InferenceResult:
    """Combined answers and what they cost.

    Parameters
    ----------
    combined : CombinedAnswer
        For the querier; under `he` only its secret key opens it.
    reports : tuple of QueryReport
        One a batch.
    profiles : mapping of node id to SiteProfile
        Sites that were onboarded.
    prediction : Prediction, optional
        The opened answer, where the coordinator can open it: under protections without
        a key, or with ``allow_coordinator_key=True``.
    onboarding_s : float
        Seconds that onboarding took, before the first batch.
    receipt : Receipt, optional
        What the sites signed about their answers; `fedinfer verify` checks it offline.
    plan : QueryPlan, optional
        Who was picked, and why, where a selector did it.
    evidence : EvidenceBook, optional
        Second copies of the answers, for a settlement, where they were collected.
    """

    combined: CombinedAnswer
    reports: tuple[QueryReport, ...]
    profiles: Mapping[int, SiteProfile]
    prediction: Prediction | None = None
    onboarding_s: float = 0.0
    receipt: Receipt | None = None
    plan: QueryPlan | None = None
    evidence: EvidenceBook | None = None

    @property
    def degraded(self) -> bool:
        """Whether any batch misses the answer of a site that was asked."""
        return any(report.degraded for report in self.reports)

    @property
    def n_queries(self) -> int:
        """Queries answered."""
        return sum(report.n_queries for report in self.reports)

    @property
    def seconds(self) -> float:
        """Seconds of all batches, without onboarding."""
        return sum(report.seconds for report in self.reports)

    @property
    def reply_bytes_per_query(self) -> float:
        """Payload bytes of all sites' replies together, for one query."""
        return sum(report.reply_bytes for report in self.reports) / self.n_queries

    def epsilon_delta_total(self) -> tuple[float, float] | None:
        """Return the (epsilon, delta) that one site spent on all rows; None without noise.

        As if every row had been drawn for this job: rows that a site remembers are free.
        """
        from fedinfer_flower.ensemble.base import make_rule
        from fedinfer_flower.privacy.accountant import Accountant
        from fedinfer_flower.privacy.base import ScorePlan, make_protection

        answer = self.combined
        protection = make_protection(answer.protection, dict(answer.protection_options))
        plan = ScorePlan.for_rule(
            make_rule(answer.rule, dict(answer.rule_options)),
            n_classes=len(answer.classes),
            n_sites_max=answer.n_sites_asked,
        )
        charge = protection.charge(plan, self.n_queries)
        if charge is None:
            return None
        delta = float(protection.options().get("delta", 1e-5))
        return Accountant(composition="fixed").epsilon_delta(charge, delta)

    def summary(self) -> str:
        """Return a tree of what happened, for a log or a terminal."""
        first = self.reports[0]
        failed = [
            s
            for report in self.reports
            for s in report.sites
            if s.status is not SiteStatus.ANSWERED
        ]
        lines = [
            f"InferenceResult: {self.n_queries} queries in {len(self.reports)} batches,"
            f" {self.seconds:.2f} s",
            f"├── rule: {first.rule} ({first.rule_reason})",
            f"├── protection: {first.protection}",
            f"├── sites: {len(first.sites)} asked, degraded: {'yes' if self.degraded else 'no'}",
            f"├── bytes: {first.request_bytes} a request,"
            f" {self.reply_bytes_per_query:.0f} of replies a query",
        ]
        if first.key_at_coordinator and first.protection.startswith("secagg"):
            lines.append("├── the coordinator asked for itself: it opens the sum, no single answer")
        elif first.key_at_coordinator:
            lines.append(
                "├── WARNING: the coordinator held the secret key:"
                f" {first.protection!r} protects nothing from the server"
            )
        try:
            total = self.epsilon_delta_total()
        except MissingExtraError:  # the run is done; only the sum of its epsilon is not
            total = None
        if total is not None:
            lines.append(
                f"├── epsilon: {first.epsilon_per_query:g} a query and site; for all"
                f" {self.n_queries} queries {total[0]:.3g} a site (delta {total[1]:g})"
            )
        lines += [f"├── {s.status.value}: {s.name}: {s.error_code}" for s in failed[:10]]
        opened = "opened here" if self.prediction is not None else "sealed for the querier"
        lines.append(f"└── answer: {opened}")
        return "\n".join(lines)

    def to_dict(self) -> dict[str, Any]:
        """Return plain values for JSON: no scores, no labels."""
        try:
            total = self.epsilon_delta_total()
        except MissingExtraError:
            total = None
        return {
            "queries": self.n_queries,
            "seconds": self.seconds,
            "onboarding_s": self.onboarding_s,
            "degraded": self.degraded,
            "rule": self.reports[0].rule,
            "rule_reason": self.reports[0].rule_reason,
            "protection": self.reports[0].protection,
            "reply_bytes_per_query": self.reply_bytes_per_query,
            "epsilon_total": None if total is None else total[0],
            "delta_total": None if total is None else total[1],
            "reports": [report.to_dict() for report in self.reports],
            "profiles": {str(n): profile.to_dict() for n, profile in self.profiles.items()},
        }
