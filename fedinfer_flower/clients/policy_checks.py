"""Rules of a site policy that contradict each other: found when the policy is read."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from typing import TYPE_CHECKING, Final

from fedinfer_flower.clients.mod_options import check_options
from fedinfer_flower.clients.policy_kinds import LANGUAGE_VERBS, kind_of
from fedinfer_flower.ensemble.base import RULES
from fedinfer_flower.errors import ConfigError, FedInferError, UnknownNameError
from fedinfer_flower.privacy.base import PROTECTIONS

if TYPE_CHECKING:
    from fedinfer_flower.clients.policy import SitePolicy

__all__ = ["check_policy"]

_ENCRYPTED: Final = "encrypted-query"
_MANY: Final = 1_000_000
"""Sites in a sum that could be asked for: more than the wire format allows."""


def check_policy(policy: SitePolicy) -> None:
    """Refuse a policy that contradicts itself, or leaves out what must be said.

    Raises
    ------
    ConfigError
        Naming table and key.
    """
    _check_names(policy)
    _check_queriers(policy)
    _check_cohort(policy)
    _check_kinds(policy)
    _check_actions(policy)
    _check_models(policy)
    try:
        check_options(
            load_model=len,
            share_counts="presence",
            collections={
                "protections": policy.answers.protections,
                "agrees_to": policy.answers.agrees_to,
            },
            budget=policy.budget,
            encrypted=None,
            max_models=1,
        )
    except FedInferError as exc:
        raise type(exc)(f"[budget] and [answers]: {exc.message}", hint=exc.hint) from None


def _check_names(policy: SitePolicy) -> None:
    answers = policy.answers
    if policy.has_classifier and not answers.protections:
        raise ConfigError(
            "[answers] protections is empty: a site says itself under which protections it"
            " answers, there is no default",
            hint='protections = ["secagg"]: no single answer is ever seen; "dp" with a [budget]:'
            ' answers with noise; "plain": whoever asks sees every answer',
        )
    _require(answers.protections, (*PROTECTIONS.names(), _ENCRYPTED), "protections")
    _require(answers.rules, RULES.names(), "rules")


def _require(given: Iterable[str], known: tuple[str, ...], key: str) -> None:
    for name in given:
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1)
            raise UnknownNameError(
                f"[answers] {key} names {name[:64]!r}, which is not installed",
                hint=f"did you mean {near[0]!r}?" if near else f"known: {', '.join(known)}",
            )


def _check_queriers(policy: SitePolicy) -> None:
    if policy.answers.anyone and policy.queriers:
        raise ConfigError(
            "[answers] anyone = true, and [queriers] names some: the table would mean nothing",
            hint="drop one of the two",
        )
    if not (policy.answers.anyone or policy.queriers):
        raise ConfigError(
            "[queriers] is empty: the site would answer nobody",
            hint="a line name = \"key id\" for each querier, as 'fedinfer key' prints it; or"
            " [answers] anyone = true, and then the coordinator can ask as well",
        )


def _check_cohort(policy: SitePolicy) -> None:
    for name in policy.answers.protections:
        if name == _ENCRYPTED:
            continue
        protection = PROTECTIONS.get(name)()
        hides = protection.min_cohort > 1
        if hides and protection.least_sites(_MANY) < policy.answers.min_cohort:
            raise ConfigError(
                f"[answers] min-cohort = {policy.answers.min_cohort}, and {name!r}, under which a"
                f" sum of {protection.least_sites(_MANY)} sites may be opened however many are"
                " asked: a site cannot see how many are in it",
                hint=f"take {name!r} out of protections, or lower min-cohort",
            )


def _check_kinds(policy: SitePolicy) -> None:
    answers = policy.answers
    for name in answers.rules:
        kind = kind_of(RULES.get(name)())
        if kind not in answers.kinds:
            raise ConfigError(
                f"[answers] rules lists {name!r}, which sends {kind}, and kinds does not list them"
            )
    scores = [work for work in answers.agrees_to if work != "calibration"]
    if _ENCRYPTED in answers.protections:
        scores.append(_ENCRYPTED)
    if scores and "scores" not in answers.kinds:
        raise ConfigError(
            f"[answers] agrees to {scores[0]}, which sends scores, and kinds does not list them"
        )


def _check_actions(policy: SitePolicy) -> None:
    answers = policy.answers
    actions = set(answers.actions)
    for verb, work in (("calibrate", "calibration"), ("stack", "stacking")):
        if (verb in actions) != (work in answers.agrees_to):
            raise ConfigError(
                f"[answers] actions {verb!r} and agrees-to {work!r} go together",
                hint="list both, or neither",
            )
    if ("encrypted" in actions) != (_ENCRYPTED in answers.protections):
        raise ConfigError(
            f"[answers] actions 'encrypted' and protections {_ENCRYPTED!r} go together",
            hint="list both, or neither",
        )
    if "encrypted" in actions and answers.anyone:
        raise ConfigError(
            "[answers] anyone = true, and encrypted queries, which only pinned keys may ask"
        )
    if "calibrate" in actions and answers.require_seal:
        raise ConfigError(
            "[answers] actions lists 'calibrate', which travels in clear, and require-seal is on"
        )
    language = actions & set(LANGUAGE_VERBS)
    if language and policy.language is None:
        raise ConfigError(
            f"[answers] actions lists {min(language)!r}, and there is no table [language]"
        )
    if policy.language is not None:
        policy.language.policy_for(answers.kinds)


def _check_models(policy: SitePolicy) -> None:
    if policy.model is None and not policy.has_language_source:
        raise ConfigError(
            "a site policy has no table [model]",
            hint='[model] with loader = "my_package.models:load_model"',
        )
    no_classifier = not policy.has_classifier
    asked = sorted(set(policy.answers.actions) & {"encrypted", "calibrate", "stack"})
    if no_classifier and asked:
        raise ConfigError(
            f"[answers] actions lists {asked[0]!r}, and the site has no classifier",
            hint="give [language] a loader of its own; [model] is the classifier's then",
        )
    if policy.model is not None and no_classifier and (policy.model.digest or policy.model.classes):
        raise ConfigError("[model] digest and classes are of a classifier, which the site has not")
