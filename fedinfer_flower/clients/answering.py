"""One question, one model, one protected payload: the site's part of a query's life."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field

import numpy as np

from fedinfer_flower.clients.consent import Consent
from fedinfer_flower.clients.policy_gate import OPEN, UNSIGNED, Passage
from fedinfer_flower.clients.recovering import recovery_context
from fedinfer_flower.clients.remembered import Charged, charged_payload
from fedinfer_flower.clients.site_memory import SiteMemory
from fedinfer_flower.clients.site_model import SiteModel
from fedinfer_flower.ensemble.base import (
    Array,
    Disclosure,
    EnsembleRule,
    Evidence,
    make_rule,
    softmax,
)
from fedinfer_flower.errors import (
    BindingError,
    ExpiredError,
    InvalidScoresError,
    InvalidValueError,
    ProtectionRefusedError,
    ReplayError,
)
from fedinfer_flower.privacy.base import Protection, ScorePlan, key_id_of, make_protection
from fedinfer_flower.privacy.cohort import Cohort
from fedinfer_flower.privacy.legality import require_legal
from fedinfer_flower.privacy.row_digest import EXACT_SUM_CONTEXT, row_digests
from fedinfer_flower.settlement.evidence import EvidenceForm, agreed_form, site_evidence
from fedinfer_flower.wire.actions import PREDICT
from fedinfer_flower.wire.messages import Question
from fedinfer_flower.wire.sealed_query import seal_answer

__all__ = ["Answer", "answer_question"]


@dataclass(frozen=True, kw_only=True)
class Answer:
    """What leaves the site for one question, and what it cost.

    Parameters
    ----------
    payload : bytes
    width : int
        Entries of one score.
    protection : Protection
    rule : EnsembleRule
    charged : Charged
    evidence : bytes
        A second copy for settlement; empty where none was asked for.
    """

    payload: bytes = field(repr=False)
    width: int
    protection: Protection
    rule: EnsembleRule
    charged: Charged
    evidence: bytes = field(default=b"", repr=False)


def answer_question(
    model: SiteModel,
    asked: Question,
    consent: Consent,
    memory: SiteMemory,
    *,
    sealed: bool,
    content: bytes,
    run_id: int,
    now_s: float,
    passage: Passage | None = None,
) -> Answer:
    """Answer a question, or refuse it before anything is spent.

    Order matters: expiry, consent and legality come before the query is counted, that before
    the query id is used up, that before the budget, the budget before the model sees the
    query, the model before the protection, and a score that is not finite or larger than its
    rule allows is refused before it is protected, where nobody could see it any more.

    Parameters
    ----------
    sealed : bool
        Whether the question came sealed, with its querier's signature.
    content : bytes
        Digest of the message that asked.
    run_id : int
        Flower's run: a recovery belongs to it.
    now_s : float
        Seconds since 1970.
    passage : Passage, optional
        Rules that count the query; default none.

    Raises
    ------
    FedInferError
        Typed, and safe to send.
    """
    passage = passage or Passage(OPEN, PREDICT)
    account = _account(asked, consent, sealed=sealed)
    passage.note(querier=account, sealed=sealed)
    if asked.expires_at and now_s > asked.expires_at:
        raise ExpiredError(
            "the query expired before it reached this site",
            hint="ask again, with a longer ttl_s; are the clocks right?",
        )
    rule, protection, plan = agree(asked, consent, memory, sealed=sealed, passage=passage)
    cohort = _cohort(asked, protection, model, memory, content)
    side = protection.site_side(
        plan, public_key=asked.public_key, cohort=cohort, identity=memory.identity
    )
    require_evidence(rule, asked, model)
    settles = agreed_to_settle(asked, protection, consent, sealed=sealed)
    context = b"" if cohort is None else recovery_context(cohort, protection, run_id=run_id)
    require_unanswered(asked.query_id, memory)
    passage.count(querier=account, query_id=asked.query_id, n_rows=asked.n_queries)
    _admit(asked, protection, plan, context, memory)
    noisy = protection.charge(plan, 1) is not None

    answered: list[Array] = []

    def scored(rows: Question) -> Array:
        logits = model.calibrated_logits(rows.inputs, rows.classes, neutral=noisy)
        answered.append(logits)
        context = dataclasses.replace(model.context(rows, rule), key_id=memory.identity.key_id)
        return checked_scores(rule.score(logits, context), rows.n_queries, plan)

    payload, charged = charged_payload(
        side, asked, plan, protection=protection, model=model, memory=memory, scored=scored
    )
    if asked.relay:
        assert asked.querier is not None  # noqa: S101  `agree` has seen to it
        payload = seal_answer(
            payload,
            querier=asked.querier,
            query_id=asked.query_id,
            identity=memory.identity,
        )
    evidence = b""
    if settles:
        # Without noise every row is scored here, and once: the copy is of this very answer.
        evidence = site_evidence(
            EvidenceForm(settles),
            softmax(answered[0]),
            querier=asked.querier,
            evidence_key=asked.evidence_key,
            identity=memory.identity,
            query_id=asked.query_id,
        )
    return Answer(
        payload=payload,
        width=plan.width,
        protection=protection,
        rule=rule,
        charged=charged,
        evidence=evidence,
    )


def agree(
    asked: Question,
    consent: Consent,
    memory: SiteMemory,
    *,
    sealed: bool,
    passage: Passage,
) -> tuple[EnsembleRule, Protection, ScorePlan]:
    """Build rule, protection and plan from names and options, and check consent."""
    rule = make_rule(asked.rule, dict(asked.rule_options))
    protection = make_protection(asked.protection, dict(asked.protection_options))
    passage.note(rule=rule.name, protection=protection.name)
    consent.check_rule(rule)
    require_legal(rule, protection)
    if key_id_of(asked.public_key) != asked.key_id:
        raise BindingError("the public key is not the one that the key id names")
    if asked.relay and (not sealed or protection.reveals is not Disclosure.SCORES):
        raise ProtectionRefusedError(
            "answers are sealed to the querier only where the question was, and where the"
            " coordinator does not have to add them"
        )
    plan = ScorePlan.for_rule(rule, n_classes=len(asked.classes), n_sites_max=asked.n_sites)
    consent.check(
        asked,
        protection,
        plan,
        sealed=sealed,
        budgeted=memory.budget is not None,
        own_key_id=memory.identity.key_id,
    )
    spent = protection.epsilon_delta(plan)
    if spent is not None:
        passage.note(epsilon=float(spent[0]))
    return rule, protection, plan


def require_unanswered(query_id: str, memory: SiteMemory) -> None:
    """Refuse a query id that was answered, before it is counted against its querier.

    Raises
    ------
    ReplayError
    """
    try:
        memory.answered(query_id)
    except BindingError:
        return
    raise ReplayError(
        "this site has answered a query with this id", hint="ask again under a fresh query id"
    )


def _account(asked: Question, consent: Consent, *, sealed: bool) -> str:
    """Return the key id that asks, as far as anything shows it."""
    if sealed and asked.querier is not None:
        return asked.querier.key_id
    # In clear a key id is anybody's to write; a pinned one is all that the site accepts.
    return asked.key_id if asked.key_id in (consent.querier_key_ids or ()) else UNSIGNED


def agreed_to_settle(
    asked: Question, protection: Protection, consent: Consent, *, sealed: bool
) -> str:
    """Return the form of the copy for settlement, if one is asked for and agreed to.

    Raises
    ------
    ProtectionRefusedError
        If the site does not take part in settlements, or not in this form.
    IncompatibleProtection
        If the protection would be undone by such a copy.
    """
    if not asked.evidence:
        return ""
    consent.require("settlement")
    form = agreed_form(asked.evidence, protection, sealed=sealed)
    rows = np.ascontiguousarray(asked.inputs).reshape(asked.n_queries, -1)
    if protection.reveals is Disclosure.SUM and len({row.tobytes() for row in rows}) < len(rows):
        # A row sum of one row's copies is that row's answer.
        raise ProtectionRefusedError(
            "evidence of a batch with a row twice", hint="ask each row once, audits too"
        )
    if form is EvidenceForm.CKKS:
        consent.require("settlement-ckks")
    return str(form.value)


def require_evidence(rule: EnsembleRule, asked: Question, model: SiteModel) -> None:
    """Refuse a rule that must fail here, before the model sees a row or anything is spent.

    Raises
    ------
    InvalidValueError
        Naming what is missing.
    """
    has = {
        Evidence.CLASS_COUNTS: asked.class_totals is not None
        and model.profile.class_counts is not None,
        Evidence.AUGMENTED: model.local.augment is not None,
        Evidence.FAMILIARITY: model.familiarity is not None,
    }
    for need, there in has.items():
        if need in rule.needs and not there:
            raise InvalidValueError(
                f"rule {rule.name!r} needs {need.value}, which this site or query does not have",
                hint="use rule 'auto'; see LocalModel for what a site can know",
            )


def _cohort(
    asked: Question,
    protection: Protection,
    model: SiteModel,
    memory: SiteMemory,
    content: bytes,
) -> Cohort | None:
    """Return the cohort, after finding this site in it with its present model."""
    if not len(asked.roster):
        if protection.needs_roster:
            raise BindingError(f"a query under {protection.name!r} without a roster")
        return None
    place = asked.roster.place_of(memory.identity.key_id)
    if asked.roster.seats[place].commitment != model.profile.commitment():
        raise BindingError(
            "the query was made for another model or profile than this site has now",
            hint="fetch the directory again and ask again",
        )
    if not protection.needs_roster:
        return None
    return Cohort(
        query_id=asked.query_id,
        roster=asked.roster,
        public_key=asked.public_key,
        content=content,
    )


def _admit(
    asked: Question,
    protection: Protection,
    plan: ScorePlan,
    context: bytes,
    memory: SiteMemory,
) -> None:
    """Use up the query id, and refuse rows whose sum could be compared with another."""
    exact_sum = protection.reveals is Disclosure.SUM and protection.min_cohort > 1
    if memory.guard is not None and exact_sum:
        # Without noise a row belongs to one cohort, whatever the rule. With noise shared out
        # over the sites another cohort has other noise, which the budget pays for.
        noisy = protection.charge(plan, 1) is not None
        digests = row_digests(
            asked.inputs,
            context=EXACT_SUM_CONTEXT + (asked.roster.digest() if noisy else b""),
            key=memory.row_key(),
        )
        roster = asked.roster.digest() if len(asked.roster) else b"no roster"
        memory.guard.admit(asked.query_id, digests, roster, survivors_known=protection.needs_roster)
    memory.admit(asked.query_id, context)


def checked_scores(scores: Array, n_queries: int, plan: ScorePlan) -> Array:
    """Require finite scores of the agreed shape, within the rule's bound."""
    if scores.shape != (n_queries, plan.width):
        raise InvalidScoresError(
            f"the rule made scores of shape {scores.shape}, expected {(n_queries, plan.width)}"
        )
    # NaN compares false with everything: "not <=" catches it with the rest.
    if not bool((np.abs(scores) <= plan.bound * (1 + 1e-9) + 1e-12).all()):
        raise InvalidScoresError("the rule made scores beyond its own bound, or not finite")
    return np.clip(scores, -plan.bound, plan.bound)
