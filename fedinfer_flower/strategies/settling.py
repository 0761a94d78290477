"""After the last batch: the sites' signed statements become one receipt."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence

from fedinfer_flower.query import QueryReport, SiteStatus
from fedinfer_flower.receipts.batches import BatchRecord, CohortMember, Dropout
from fedinfer_flower.receipts.disclosure import MODES
from fedinfer_flower.receipts.receipt import Receipt
from fedinfer_flower.receipts.statement import SignedStatement
from fedinfer_flower.wire.directory import SiteCard

__all__ = ["receipt_of"]


def receipt_of(
    statements: Sequence[SignedStatement],
    reports: Sequence[QueryReport],
    cards: Mapping[int, SiteCard],
    *,
    key_at_coordinator: bool,
) -> Receipt | None:
    """Return the receipt of a job.

    None if no site signed anything, or if nobody has written down what the protection
    discloses, as for one of another distribution.
    """
    if not statements or reports[0].protection not in MODES:
        return None
    return Receipt.for_job(
        statements,
        cohort=[CohortMember(name=c.profile.name, key_id=c.key_id) for c in cards.values()],
        batches=[_batch(report) for report in reports],
        issued_at=int(time.time()),
        key_at_coordinator=key_at_coordinator,
    )


def _batch(report: QueryReport) -> BatchRecord:
    return BatchRecord(
        query_id=report.query_id,
        n_rows=report.n_queries,
        answered=tuple(sorted(site.name for site in report.answered)),
        dropped=tuple(
            Dropout(site=s.name, status=s.status.value, error_code=s.error_code)
            for s in sorted(report.sites, key=lambda s: s.name)
            if s.status is not SiteStatus.ANSWERED
        ),
    )
