"""After the last batch of a job: batches, reports and statements become one result."""

from __future__ import annotations

from collections.abc import Sequence

from fedinfer_flower.privacy.base import Protection
from fedinfer_flower.query import QueryReport, SiteStatus
from fedinfer_flower.receipts.statement import SignedStatement
from fedinfer_flower.selection.plan import QueryPlan
from fedinfer_flower.settlement.book import EvidenceBook
from fedinfer_flower.settlement.forms import EvidenceForm, wanted_form
from fedinfer_flower.strategies.opening import LocalQuerier, open_here
from fedinfer_flower.strategies.preparing import Prepared
from fedinfer_flower.strategies.result import InferenceResult
from fedinfer_flower.strategies.settling import receipt_of
from fedinfer_flower.wire.documents import CombinedAnswer, CombinedBatch, QueryJob
from fedinfer_flower.wire.sealed_job import SealedJob

__all__ = ["new_book", "result_of", "seconds_of"]


def new_book(
    job: QueryJob | SealedJob,
    protection: Protection,
    evidence: bool | str,
    *,
    classes: tuple[str, ...],
) -> EvidenceBook | None:
    """Return an empty book for the evidence of a job; None where none is collected.

    Raises
    ------
    IncompatibleProtection
        If the protection would be undone by a second copy of an answer.
    """
    form = wanted_form(protection, evidence, sealed=isinstance(job, SealedJob))
    return EvidenceBook(EvidenceForm(form), classes=classes) if form else None


def result_of(
    job: QueryJob | SealedJob,
    prepared: Prepared,
    batches: Sequence[CombinedBatch],
    reports: Sequence[QueryReport],
    *,
    protection: Protection,
    querier: LocalQuerier | None,
    statements: Sequence[SignedStatement],
    key_here: bool,
    onboarding_s: float,
    plan: QueryPlan | None,
    book: EvidenceBook | None,
) -> InferenceResult:
    """Return what `start` returns, opened if that is done here."""
    combined = CombinedAnswer(
        job_id=job.job_id,
        rule=prepared.rule.name,
        protection=protection.name,
        rule_options=prepared.rule.options(),
        protection_options=protection.options(),
        classes=prepared.template.classes,
        n_sites_asked=prepared.template.n_sites,
        key_id=job.key_id,
        batches=tuple(batches),
        roster=prepared.template.roster,
        relayed=prepared.template.relay,
    )
    return InferenceResult(
        combined=combined,
        reports=tuple(reports),
        profiles={n: card.profile for n, card in prepared.cards.items()},
        prediction=open_here(querier, combined),
        onboarding_s=onboarding_s,
        receipt=receipt_of(
            statements,
            tuple(reports),
            prepared.cards,
            key_at_coordinator=key_here,
            roster=combined.roster,
        ),
        plan=plan,
        evidence=book,
    )


def seconds_of(reports: Sequence[QueryReport], *, timeout_s: float) -> dict[int, float]:
    """Return the longest wait for each site, by node id.

    A site that was late counts as twice the deadline: it is to be told from one that just
    made it, and how late it would have been nobody knows.
    """
    waits: dict[int, float] = {}
    for report in reports:
        for site in report.sites:
            if site.status is SiteStatus.FAILED:
                continue
            late = site.status is SiteStatus.LATE
            waited = 2.0 * timeout_s if late else site.seconds
            waits[site.site_id] = max(waits.get(site.site_id, 0.0), waited)
    return waits
