"""Which rule is asked for, and the question in the words that every site receives."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import numpy as np
import numpy.typing as npt

from fedinfer_flower.ensemble.auto import pick_rule
from fedinfer_flower.ensemble.base import EnsembleRule, Evidence
from fedinfer_flower.ensemble.skew_check import require_low_skew
from fedinfer_flower.errors import IncompatibleProtection
from fedinfer_flower.planning.label_space import class_totals, shared_classes
from fedinfer_flower.privacy.base import Protection
from fedinfer_flower.privacy.legality import require_legal
from fedinfer_flower.query import SiteProfile
from fedinfer_flower.wire.messages import Question
from fedinfer_flower.wire.roster import Roster

__all__ = ["choose_rule", "question_template", "with_batch"]


def choose_rule(
    rule: EnsembleRule | None,
    protection: Protection,
    profiles: Mapping[int, SiteProfile],
    *,
    classes: tuple[str, ...] | None = None,
) -> tuple[EnsembleRule, str]:
    """Return (rule, reason): the one asked for, or what suits these sites.

    Raises
    ------
    IncompatibleProtection
        If a site lacks what the rule needs, or their classes differ too much for it.
    """
    reason = "asked for"
    if rule is None:
        mechanism = protection.options().get("mechanism")
        rule, reason = pick_rule(
            list(profiles.values()),
            protection.name,
            None if mechanism is None else str(mechanism),
        )
        require_legal(rule, protection)
    if Evidence.CLASS_COUNTS in rule.needs:
        names = [p.name for p in profiles.values() if p.class_counts is None]
        if names:
            raise IncompatibleProtection(
                f"rule {rule.name!r} needs class counts or presence bits;"
                f" withheld by {', '.join(names)}",
                hint="use rule 'auto', or ask those sites for share_counts='presence'",
            )
    if Evidence.FAMILIARITY in rule.needs:
        names = [p.name for p in profiles.values() if not p.familiarity]
        if names:
            raise IncompatibleProtection(
                f"rule {rule.name!r} needs familiarity; {', '.join(names)} cannot measure it",
                hint="use rule 'auto', or give LocalModel(reference_inputs=...) there",
            )
    warning = require_low_skew(
        rule.name,
        list(profiles.values()),
        # Classes that are not asked about would hide skew in those that are.
        classes or shared_classes(profiles),
        allow_skew=bool(rule.options().get("allow_skew", False)),
    )
    return rule, f"{reason}. {warning}" if warning else reason


def question_template(
    *,
    inputs: npt.NDArray[np.generic],
    rule: EnsembleRule,
    protection: Protection,
    profiles: Mapping[int, SiteProfile],
    classes: tuple[str, ...],
    public_key: bytes,
    key_id: str,
    roster: Roster,
    weighed: Mapping[int, SiteProfile] | None = None,
    **more: object,
) -> Question:
    """Return the question without its rows: what stays the same over all batches.

    Parameters
    ----------
    profiles : mapping of int to SiteProfile
        The sites that are asked.
    weighed : mapping of int to SiteProfile, optional
        Sites over which class weights are normalised, where more than those asked.
    **more
        Further fields of `Question`.
    """
    totals, kind = class_totals(profiles if weighed is None else weighed, classes)
    return Question(
        query_id="template",
        inputs=inputs[:0],
        classes=classes,
        n_sites=len(profiles),
        rule=rule.name,
        protection=protection.name,
        rule_options=rule.options(),
        protection_options=protection.options(),
        class_totals=totals,
        counts_kind=kind,
        public_key=public_key,
        key_id=key_id,
        roster=roster,
        **more,  # type: ignore[arg-type]
    )


def with_batch(template: Question, query_id: str, inputs: npt.NDArray[np.generic]) -> Question:
    """Return the question of one batch."""
    return dataclasses.replace(template, query_id=query_id, inputs=inputs)
