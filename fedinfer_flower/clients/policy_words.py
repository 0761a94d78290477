"""A site policy in plain words: what can leave the site, to whom, how protected, at what cost."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from fedinfer_flower.ensemble.base import Disclosure
from fedinfer_flower.privacy.base import PROTECTIONS

if TYPE_CHECKING:
    from fedinfer_flower.clients.policy import SitePolicy

__all__ = ["PolicyReport", "explain"]

_KINDS: Final = {
    "votes": "which class is likeliest, for each row",
    "ranks": "the order of the classes, for each row",
    "scores": "a number for every class, for each row: probabilities, logits",
    "candidates": "how likely the language model finds answers that the querier gives",
    "text": "what the language model writes",
    "cache": "KV entries of the last tokens of a prompt: whoever holds them can read much of it",
    "full-cache": "KV entries of whole prompts: whoever holds them can read the prompts",
}
_FURTHER: Final = {
    "settlement": "a second copy of each answer in secret shares, from which rewards are made",
    "settlement-ckks": "a second copy of each answer, encrypted to the querier",
    "stacking": "held-out inputs to the other sites, and answers to theirs, in clear to them",
    "calibration": "a histogram of how well the model does on held-out rows",
}
_ENCRYPTED: Final = "encrypted-query"


@dataclass(frozen=True, kw_only=True)
class PolicyReport:
    """A policy in words.

    Parameters
    ----------
    leaves, to_whom, protection, cost, code : tuple of str
        One sentence each.
    warnings : tuple of str
        Weak choices: what they mean, and what would be stronger.
    """

    leaves: tuple[str, ...]
    to_whom: tuple[str, ...]
    protection: tuple[str, ...]
    cost: tuple[str, ...]
    code: tuple[str, ...]
    warnings: tuple[str, ...]


def explain(policy: SitePolicy) -> PolicyReport:
    """Say in words what a policy allows.

    Examples
    --------
    >>> from fedinfer_flower.clients.policy import SitePolicy
    >>> report = explain(SitePolicy.from_mapping({
    ...     "site": {"name": "north", "home": "state"},
    ...     "model": {"loader": "ward.models:load_model"},
    ...     "answers": {"protections": ["plain"], "require-seal": False, "anyone": True},
    ... }))
    >>> report.warnings[0].split(';')[0]
    "plain: whoever asks gets this site's own scores"
    """
    return PolicyReport(
        leaves=tuple(_leaves(policy)),
        to_whom=tuple(_to_whom(policy)),
        protection=tuple(_protection(policy)),
        cost=tuple(_cost(policy)),
        code=tuple(_code(policy)),
        warnings=tuple(_warnings(policy)),
    )


def _leaves(policy: SitePolicy) -> list[str]:
    answers = policy.answers
    words = [f"{kind}: {_KINDS[kind]}" for kind in answers.kinds if _can_leave(kind, policy)]
    if answers.rules:
        words.append(f"answers by these ensemble rules only: {', '.join(answers.rules)}")
    if policy.model is not None and policy.has_classifier and "hello" in answers.actions:
        words.append(
            "the profile: site and class names, model card and digest, temperature, price, and of"
            f" the training data's classes: {policy.model.share_counts}"
        )
    if policy.language is not None and "introduce" in answers.actions:
        words.append("the language card: the model's shape, what it shares, and which fusers")
    words += [f"{work}: {_FURTHER[work]}" for work in answers.agrees_to]
    if answers.receipts:
        words.append("a signed statement with every answer: who asked, how much, at what cost")
    return words


def _can_leave(kind: str, policy: SitePolicy) -> bool:
    verbs = set(policy.answers.actions)
    if kind in ("votes", "ranks", "scores"):
        return policy.has_classifier and bool(verbs & {"predict", "encrypted", "stack"})
    if policy.language is None:
        return False
    shares = policy.language_policy
    return {
        "candidates": shares.candidates and "candidates" in verbs,
        "text": (shares.answers and bool(verbs & {"refine", "rephrase"}))
        or (shares.text and "generate" in verbs),
        "cache": shares.cache and "share-cache" in verbs,
        "full-cache": shares.full_cache and "share-cache" in verbs,
    }[kind]


def _to_whom(policy: SitePolicy) -> list[str]:
    answers = policy.answers
    if answers.anyone:
        words = ["anyone whom the SuperLink lets ask"]
    else:
        words = [f"querier {name}, key {key}" for name, key in policy.queriers.items()]
    words.append(
        "only queries that are sealed to this site and signed; the coordinator cannot read them"
        if answers.require_seal
        else "queries in clear as well: the coordinator can read them, and make them up"
    )
    words += [f"with other site {name}, key {key}" for name, key in policy.sites.items()]
    return words


def _protection(policy: SitePolicy) -> list[str]:
    words = []
    for name in policy.answers.protections:
        if name == _ENCRYPTED:
            words.append(
                f"{name}: the site cannot read the query; the querier alone decrypts the sum"
            )
            continue
        protection = PROTECTIONS.get(name)()
        if protection.reveals is Disclosure.SCORES:
            noisy = name == "dp"
            words.append(
                f"{name}: each answer of this site is seen"
                f"{', with noise' if noisy else ' as it is'}"
            )
        else:
            least = max(protection.min_cohort, policy.answers.min_cohort)
            words.append(f"{name}: only sums of at least {least} sites are seen")
    if policy.language is not None:
        words.append("language: nothing hides text and caches from those who get them")
    return words


def _cost(policy: SitePolicy) -> list[str]:
    answers, budget, limits = policy.answers, policy.budget, policy.limits
    words = []
    if answers.price_per_query is not None:
        words.append(f"{answers.price_per_query:g} credits a row")
    if answers.max_epsilon_per_query is not None:
        words.append(f"at most epsilon {answers.max_epsilon_per_query:g} a row")
    if budget is not None:
        words.append(
            f"at most epsilon {budget.epsilon_per_querier:g} to one querier and"
            f" {budget.epsilon_global:g} to all together, delta {budget.delta:g}, for ever"
        )
    words.append(f"{limits.rows_per_query} rows and {limits.bytes_per_query} bytes a message")
    for number, what in (
        (limits.queries_per_minute, "queries a minute of one querier"),
        (limits.rows_per_day, "rows a day of one querier"),
        (limits.rows_per_day_in_all, "rows a day of all together"),
    ):
        words.append(f"{number} {what}" if number else f"no limit on {what}")
    return words


def _code(policy: SitePolicy) -> list[str]:
    if policy.code.app == "own":
        words = ["this site's installed package answers; no code of a FAB runs in the worker"]
    else:
        words = [f"code of {len(policy.code.fab_hashes)} listed FABs runs in the worker"]
    if policy.audit.enabled:
        words.append(f"decisions are written to {policy.audit.log}, or nothing is answered")
    return words


def _warnings(policy: SitePolicy) -> list[str]:
    answers, limits = policy.answers, policy.limits
    found = []
    if "plain" in answers.protections:
        found.append(
            "plain: whoever asks gets this site's own scores; enough of them copy the model."
            " secagg or he hide them in a sum"
        )
    if not answers.require_seal:
        found.append("require-seal is off: the coordinator reads queries, and can ask for itself")
    if answers.anyone:
        found.append("anyone = true: list the key ids of known queriers under [queriers] instead")
    noisy = [name for name in answers.protections if name == "dp" or name.endswith("+dp")]
    if noisy and policy.budget is None:
        found.append(
            f"{noisy[0]} without [budget]: noise averages out over many questions, and nothing"
            " counts them"
        )
    if not (limits.rows_per_day or limits.rows_per_day_in_all or policy.budget):
        found.append("no [limits] rows-per-day: a querier may ask until it has copied the model")
    if answers.anyone and limits.rows_per_day and not limits.rows_per_day_in_all:
        found.append(
            "rows-per-day counts by key, and anyone can have many: set rows-per-day-in-all"
        )
    hidden = [n for n in answers.protections if n not in ("plain", "dp", _ENCRYPTED)]
    if hidden and not policy.sites:
        found.append(
            f"{hidden[0]} without [sites]: a coordinator can make up all other sites of a sum, and"
            " see this one's answer"
        )
    if policy.code.app == "fab":
        found.append(
            "code.app = 'fab': that code sees every query and the model, and is not held to this"
            " policy unless it uses site_app"
        )
    if policy.model is not None and policy.has_classifier and not policy.model.digest:
        found.append("no [model] digest: a file that was exchanged is not noticed")
    if not policy.audit.enabled:
        found.append("the audit log is off: nobody can tell later what was answered")
    return found
