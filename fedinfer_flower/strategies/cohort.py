"""Who is asked, and in which words: cohort, label space, rule, totals."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping

import numpy as np
import numpy.typing as npt

from fedinfer_flower.ensemble.auto import pick_rule
from fedinfer_flower.ensemble.base import EnsembleRule, Evidence
from fedinfer_flower.errors import FedInferError, IncompatibleProtection, QuorumNotMetError
from fedinfer_flower.privacy.base import Protection
from fedinfer_flower.privacy.legality import require_legal
from fedinfer_flower.query import SiteProfile
from fedinfer_flower.strategies.onboarding import class_totals
from fedinfer_flower.wire.documents import QueryJob
from fedinfer_flower.wire.messages import Question

__all__ = ["choose_cohort", "choose_rule", "question_template", "with_batch"]


def choose_cohort(
    profiles: Mapping[int, SiteProfile],
    failures: Mapping[int, FedInferError],
    *,
    fraction: float,
    at_least: int,
) -> dict[int, SiteProfile]:
    """Return the sites to ask: all, or a random part drawn once a run.

    Once a run and not once a batch: the difference of two overlapping cohorts' answers
    to one query would single out a site.

    Raises
    ------
    QuorumNotMetError
        If fewer than `at_least` sites were onboarded.
    """
    if len(profiles) < at_least:
        reasons = "; ".join(f"{n}: {e.code} {e.message}" for n, e in failures.items())
        raise QuorumNotMetError(
            f"{len(profiles)} sites can answer, {at_least} are needed ({reasons or 'none failed'})",
            hint="start more sites, or mend those named",
        )
    wanted = max(math.ceil(fraction * len(profiles)), at_least)
    if wanted >= len(profiles):
        return dict(profiles)
    lots = np.random.default_rng().permutation(sorted(profiles))[:wanted]
    return {node_id: profiles[node_id] for node_id in sorted(int(n) for n in lots)}


def choose_rule(
    rule: EnsembleRule | None, protection: Protection, profiles: Mapping[int, SiteProfile]
) -> tuple[EnsembleRule, str]:
    """Return (rule, reason): the one asked for, or what suits these sites.

    Raises
    ------
    IncompatibleProtection
        If a site lacks what the rule needs.
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
    return rule, reason


def question_template(
    job: QueryJob,
    rule: EnsembleRule,
    protection: Protection,
    profiles: Mapping[int, SiteProfile],
    classes: tuple[str, ...],
) -> Question:
    """Return the question without its rows: what stays the same over all batches."""
    totals, kind = class_totals(dict(profiles), classes)
    return Question(
        query_id="template",
        inputs=job.inputs[:0],
        classes=classes,
        n_sites=len(profiles),
        rule=rule.name,
        protection=protection.name,
        rule_options=rule.options(),
        protection_options=protection.options(),
        class_totals=totals,
        counts_kind=kind,
        public_key=job.public_key,
        key_id=job.key_id,
    )


def with_batch(template: Question, query_id: str, inputs: npt.NDArray[np.generic]) -> Question:
    """Return the question of one batch."""
    return dataclasses.replace(template, query_id=query_id, inputs=inputs)
