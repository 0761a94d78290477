"""After the last batch: the sites' signed statements become one receipt."""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping, Sequence

from fedinfer_flower.errors import FedInferError
from fedinfer_flower.query import QueryReport, SiteOutcome, SiteStatus
from fedinfer_flower.receipts.batches import BatchRecord, CohortMember, Dropout
from fedinfer_flower.receipts.disclosure import MODES
from fedinfer_flower.receipts.receipt import Receipt
from fedinfer_flower.receipts.statement import SignedStatement
from fedinfer_flower.wire.directory import SiteCard
from fedinfer_flower.wire.roster import Roster

__all__ = ["receipt_of"]

log = logging.getLogger("fedinfer_flower.coordinator")


def receipt_of(
    statements: Sequence[SignedStatement],
    reports: Sequence[QueryReport],
    cards: Mapping[int, SiteCard],
    *,
    key_at_coordinator: bool,
    roster: Roster | None = None,
) -> Receipt | None:
    """Return the receipt of a job.

    None if no site signed anything, or if nobody has written down what the protection
    discloses, as for one of another distribution. None, with a warning, if two sites have
    one name or a site signed what no receipt can hold: the answer is worth more than that.

    Parameters
    ----------
    cards : mapping of node id to SiteCard
        The sites that were asked and are in this run.
    roster : Roster, optional
        All sites that were asked. A site of it without a card is named by its key.
    """
    if not statements or reports[0].protection not in MODES:
        return None
    names = {n: card.profile.name for n, card in cards.items()}
    members = [CohortMember(name=names[n], key_id=c.key_id) for n, c in cards.items()]
    here = {card.key_id for card in cards.values()}
    for place, key_id in enumerate(() if roster is None else roster.key_ids):
        if key_id not in here:
            # As `seated` numbers them.
            names[-1 - place] = f"key {key_id[:16]}"
            members.append(CohortMember(name=names[-1 - place], key_id=key_id))
    if len(set(names.values())) != len(names):
        log.warning("no receipt: two sites have the same name")
        return None
    try:
        return Receipt.for_job(
            statements,
            cohort=members,
            batches=[_batch(report, names) for report in reports],
            issued_at=int(time.time()),
            key_at_coordinator=key_at_coordinator,
        )
    except FedInferError as exc:
        log.warning("no receipt: %s", exc)
        return None


def _batch(report: QueryReport, names: Mapping[int, str]) -> BatchRecord:
    # A node that could not be onboarded was never asked.
    asked = [site for site in report.sites if site.site_id in names]
    return BatchRecord(
        query_id=report.query_id,
        n_rows=report.n_queries,
        answered=tuple(sorted(site.name for site in report.answered)),
        dropped=tuple(
            Dropout(site=_name(s, names), status=s.status.value, error_code=s.error_code)
            for s in sorted(asked, key=lambda s: _name(s, names))
            if s.status is not SiteStatus.ANSWERED
        ),
    )


def _name(site: SiteOutcome, names: Mapping[int, str]) -> str:
    return names[site.site_id]
