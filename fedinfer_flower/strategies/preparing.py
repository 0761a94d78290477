"""Before the first batch: who is asked, by which rule, in which words."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from fedinfer_flower.ensemble.base import EnsembleRule
from fedinfer_flower.errors import FedInferError
from fedinfer_flower.planning.label_space import shared_classes
from fedinfer_flower.planning.question import choose_rule, question_template
from fedinfer_flower.privacy.base import Protection
from fedinfer_flower.settlement.forms import wanted_form
from fedinfer_flower.strategies.sealed import sealed_rule, sealed_template, seated
from fedinfer_flower.wire.directory import SiteCard
from fedinfer_flower.wire.documents import QueryJob
from fedinfer_flower.wire.messages import Question
from fedinfer_flower.wire.roster import Roster
from fedinfer_flower.wire.sealed_job import SealedJob

__all__ = ["Prepared", "prepare_job"]


@dataclass(frozen=True, kw_only=True)
class Prepared:
    """What stays the same over all batches of a job.

    Parameters
    ----------
    cards : mapping of node id to SiteCard
        The sites that are asked.
    failures : mapping of node id to FedInferError
        Sites that count as missing.
    rule : EnsembleRule
    reason : str
        Why this rule.
    template : Question
        Without rows, and of a sealed job without what only the sites may read.
    """

    cards: Mapping[int, SiteCard]
    failures: Mapping[int, FedInferError]
    rule: EnsembleRule
    reason: str
    template: Question


def prepare_job(
    job: QueryJob | SealedJob,
    *,
    rule: EnsembleRule | None,
    protection: Protection,
    classes: tuple[str, ...] | None,
    cards: Mapping[int, SiteCard],
    all_cards: Mapping[int, SiteCard],
    failures: Mapping[int, FedInferError],
    run_id: int,
    weighed: Mapping[int, SiteCard] | None = None,
    evidence: bool | str = False,
) -> Prepared:
    """Prepare a job; of a sealed one, the querier has fixed everything.

    Parameters
    ----------
    cards : mapping of node id to SiteCard
        The sites that this coordinator chose, for a job in clear.
    all_cards : mapping of node id to SiteCard
        All sites that are here: of them a sealed job's querier has chosen.
    weighed : mapping of node id to SiteCard, optional
        Sites over which class weights are normalised; default those that are asked.
    evidence : bool or str
        Ask for a second copy of each answer, for settlement, in this form.

    Raises
    ------
    BindingError
        If a sealed job is for another run or rule.
    IncompatibleProtection
        If a site lacks what the rule needs.
    """
    if isinstance(job, SealedJob):
        here, missing = seated(job, all_cards, run_id=run_id)
        picked, reason = sealed_rule(job, rule)
        return Prepared(
            cards=here,
            failures=missing,
            rule=picked,
            reason=reason,
            template=sealed_template(job),
        )
    profiles = {node_id: card.profile for node_id, card in cards.items()}
    picked, reason = choose_rule(rule, protection, profiles, classes=job.classes or classes)
    template = question_template(
        inputs=job.inputs,
        rule=picked,
        protection=protection,
        profiles=profiles,
        classes=job.classes or classes or shared_classes(profiles),
        public_key=job.public_key,
        key_id=job.key_id,
        roster=Roster(tuple(card.seat for card in cards.values())),
        weighed=None if weighed is None else {n: c.profile for n, c in weighed.items()},
        evidence=wanted_form(protection, evidence, sealed=False),
    )
    return Prepared(cards=cards, failures=failures, rule=picked, reason=reason, template=template)
