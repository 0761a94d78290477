"""What a site signs about an answer: the raw material of privacy receipts."""

from __future__ import annotations

import hashlib

from fedinfer_flower.clients.answering import Answer
from fedinfer_flower.clients.site_memory import SiteMemory
from fedinfer_flower.errors import MissingExtraError
from fedinfer_flower.privacy.accountant import Accountant
from fedinfer_flower.privacy.charge import Charge
from fedinfer_flower.query import SiteProfile
from fedinfer_flower.receipts.checks import HEX
from fedinfer_flower.receipts.statement import SignedStatement, SiteStatement, cohort_digest
from fedinfer_flower.wire.messages import Question

__all__ = ["signed_statement"]

_DELTA = 1e-5
"""For protections without a delta of their own, where rows compose."""


def signed_statement(
    answer: Answer,
    asked: Question,
    *,
    profile: SiteProfile,
    memory: SiteMemory,
    run_id: int,
    sealed: bool,
    now_s: float,
) -> SignedStatement:
    """Return the site's signed statement of one answer.

    Privacy
    -------
    Goes where the answer goes. Says who asked, how many rows, under which protection, at
    what charge; nothing of the query, nothing of the scores but a digest of the payload.
    """
    charge = answer.charged.to_querier
    epsilon = delta = None
    if charge is not None:
        epsilon = delta = 0.0
        if not charge.is_free:
            promised_delta = float(answer.protection.options().get("delta", _DELTA))
            epsilon, delta = _epsilon_delta(charge, promised_delta)
    statement = SiteStatement(
        query_id=asked.query_id,
        run_id=run_id,
        site=profile.name,
        site_key_id=memory.identity.key_id,
        querier_key_id=asked.querier.key_id if sealed and asked.querier is not None else "",
        session_key_id=asked.key_id,
        query_sealed=sealed,
        protection=asked.protection,
        protection_options=asked.protection_options,
        rule=asked.rule,
        rule_options=asked.rule_options,
        n_rows=asked.n_queries,
        n_fresh_rows=asked.n_queries if charge is None else charge.n_rows,
        n_sites_asked=asked.n_sites,
        cohort_digest=cohort_digest(asked.roster.key_ids),
        min_cohort=answer.protection.min_cohort,
        epsilon=epsilon,
        delta=delta,
        charge=Charge() if charge is None or charge.is_free else charge,
        profile_commitment=profile.commitment(),
        model_digest=_sha256_of(profile),
        record_epsilon=profile.record_epsilon,
        record_delta=profile.record_delta,
        payload_digest=hashlib.sha256(answer.payload).hexdigest(),
        evidence=asked.evidence if answer.evidence else "",
        issued_at=int(now_s),
    )
    return statement.sign(memory.identity)


def _epsilon_delta(charge: Charge, delta: float) -> tuple[float, float]:
    try:
        return Accountant(composition="gaussian").epsilon_delta(charge, delta)
    except MissingExtraError:
        if not charge.is_pure:
            raise
        # Without the extra the sum of epsilons, which holds without a delta.
        return charge.pure_epsilon, 0.0


def _sha256_of(profile: SiteProfile) -> str:
    # A profile may name its model by other text; the commitment covers that in any case.
    digest = profile.model_digest.removeprefix("sha256:")
    return digest if HEX.fullmatch(digest) else ""
