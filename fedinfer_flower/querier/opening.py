"""From a combined batch to scores: unmask, decrypt, or combine what was relayed."""

from __future__ import annotations

import logging

import numpy as np
import numpy.typing as npt

from fedinfer_flower.ensemble.base import EnsembleRule
from fedinfer_flower.errors import FedInferError
from fedinfer_flower.observability.tracing import span
from fedinfer_flower.privacy.base import KeyPair, Protection, ScorePlan
from fedinfer_flower.privacy.cohort import Cohort
from fedinfer_flower.wire.documents import CombinedAnswer, CombinedBatch
from fedinfer_flower.wire.identity import Identity
from fedinfer_flower.wire.relayed import read_relayed
from fedinfer_flower.wire.sealed_query import open_answer

__all__ = ["OpenedBatch", "open_batch"]

log = logging.getLogger("fedinfer_flower.querier")

OpenedBatch = tuple[npt.NDArray[np.float64], int]
"""Combined scores of shape (n_queries, width), and the sites in them."""


def open_batch(
    batch: CombinedBatch,
    combined: CombinedAnswer,
    *,
    rule: EnsembleRule,
    protection: Protection,
    keys: KeyPair,
    identity: Identity,
) -> OpenedBatch:
    """Open one batch.

    Raises
    ------
    FedInferError
        If it does not open to scores that the sites in it could have sent.
    """
    plan = ScorePlan.for_rule(
        rule, n_classes=len(combined.classes), n_sites_max=combined.n_sites_asked
    )
    cohort = (
        Cohort(
            query_id=batch.query_id,
            roster=combined.roster,
            public_key=keys.public_key,
            content=bytes(batch.content),
        )
        if protection.needs_roster
        else None
    )
    total: bytes | memoryview = batch.total
    n_sites = batch.n_sites
    if combined.relayed:
        total, n_sites = _combine_here(batch, combined, rule, protection, plan, identity)
    side = protection.querier_side(plan, keys=keys, cohort=cohort)
    with span("querier.open", query_id=batch.query_id, protection=protection.name):
        return side.open(total, n_queries=batch.n_queries, n_sites=n_sites), n_sites


def _combine_here(
    batch: CombinedBatch,
    combined: CombinedAnswer,
    rule: EnsembleRule,
    protection: Protection,
    plan: ScorePlan,
    identity: Identity,
) -> tuple[bytes, int]:
    """Do the coordinator's part at the querier; a bad answer is left out."""
    side = protection.coordinator_side(plan, n_queries=batch.n_queries, rule=rule, public_key=b"")
    for key_id, sealed in read_relayed(batch.total):
        try:
            site = combined.roster.seats[combined.roster.place_of(key_id)].identity
            payload = open_answer(sealed, identity=identity, query_id=batch.query_id, site=site)
            side.add(payload, sender=key_id)
        except FedInferError as exc:
            log.warning("%s", exc.at_site(key_id[:16]))
    return side.total(), side.n_sites
