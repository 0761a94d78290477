"""One question, one model, one protected payload: the site's part of a query's life."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from fedinfer_flower.clients.site_model import SiteModel
from fedinfer_flower.ensemble.base import Array, EnsembleRule, Evidence
from fedinfer_flower.errors import (
    BindingError,
    InvalidScoresError,
    InvalidValueError,
    ProtectionRefusedError,
)
from fedinfer_flower.privacy.base import Protection, ScorePlan, key_id_of
from fedinfer_flower.privacy.legality import require_legal
from fedinfer_flower.wire.messages import Question

__all__ = ["Consent", "answer_question"]


@dataclass(frozen=True, kw_only=True)
class Consent:
    """What a site agrees to. The coordinator cannot widen it.

    Parameters
    ----------
    protections : frozenset of str, optional
        Protections under which the site answers; None for all.
    querier_key_ids : frozenset of str, optional
        Fingerprints of the queriers' keys for which the site encrypts; None for any.
    max_epsilon_per_query : float, optional
        Most epsilon that the site spends on one query row under `dp`; None for no limit.

    Privacy
    -------
    Without `querier_key_ids` a dishonest coordinator can put a key of its own in place
    of the querier's, and read every answer that is encrypted for it.
    """

    protections: frozenset[str] | None = None
    querier_key_ids: frozenset[str] | None = field(default=None)
    max_epsilon_per_query: float | None = None

    def check(self, asked: Question, protection: Protection, plan: ScorePlan) -> None:
        """Refuse what the site did not agree to.

        Raises
        ------
        ProtectionRefusedError
            With the rule that forbids it.
        """
        if self.protections is not None and protection.name not in self.protections:
            raise ProtectionRefusedError(
                f"this site does not answer under {protection.name!r}",
                hint=f"use {' or '.join(sorted(self.protections))}",
            )
        if asked.n_sites < protection.min_cohort:
            raise ProtectionRefusedError(
                f"{protection.name!r} needs at least {protection.min_cohort} sites in a sum,"
                f" {asked.n_sites} are asked"
            )
        if (
            protection.needs_key
            and self.querier_key_ids is not None
            and asked.key_id not in self.querier_key_ids
        ):
            raise ProtectionRefusedError(
                "this site does not know the querier's key",
                hint="give the site the key id that 'fedinfer querier ask' printed, and ask"
                " again with --reuse",
            )
        spent = protection.epsilon_delta(plan)
        limit = self.max_epsilon_per_query
        if spent is not None and limit is not None and spent[0] > limit:
            raise ProtectionRefusedError(
                f"epsilon {spent[0]:g} a query is above this site's limit of {limit:g}"
            )


def answer_question(model: SiteModel, asked: Question, consent: Consent) -> tuple[bytes, int]:
    """Return (payload, score width) of this site's answer.

    Order matters: consent and legality come before the model sees the query, the
    model before the protection, and a score that is not finite or larger than its rule
    allows is refused before it is protected, where nobody could see it any more.

    Raises
    ------
    FedInferError
        Typed, and safe to send.
    """
    rule, protection, plan = agree(asked, consent)
    logits = model.calibrated_logits(asked.inputs, asked.classes)
    context = model.context(asked, rule)
    if Evidence.AUGMENTED in rule.needs and context.augmented_tbc is None:
        raise InvalidValueError(f"rule {rule.name!r} needs LocalModel(augment=...) at this site")
    scores = checked_scores(rule.score(logits, context), asked.n_queries, plan)
    side = protection.site_side(plan, public_key=asked.public_key)
    return side.protect(scores), plan.width


def agree(asked: Question, consent: Consent) -> tuple[EnsembleRule, Protection, ScorePlan]:
    """Build rule, protection and plan from names and options, and check consent."""
    from fedinfer_flower.ensemble.base import make_rule
    from fedinfer_flower.privacy.base import make_protection

    rule = make_rule(asked.rule, dict(asked.rule_options))
    protection = make_protection(asked.protection, dict(asked.protection_options))
    require_legal(rule, protection)
    if protection.needs_key and key_id_of(asked.public_key) != asked.key_id:
        raise BindingError("the public key is not the one that the key id names")
    plan = ScorePlan.for_rule(rule, n_classes=len(asked.classes), n_sites_max=asked.n_sites)
    consent.check(asked, protection, plan)
    return rule, protection, plan


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
