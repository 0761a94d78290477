"""The rule x protection matrix, exhaustively."""

from __future__ import annotations

import itertools

import pytest

from fedinfer_flower.ensemble.base import RULES, Array, Disclosure, EnsembleRule, ScoreKind
from fedinfer_flower.errors import IncompatibleProtection
from fedinfer_flower.privacy import (
    PROTECTIONS,
    Protection,
    legality_matrix,
    make_protection,
    refusal,
    require_legal,
)

SUM, SCORES = Disclosure.SUM, Disclosure.SCORES
VARIANTS = {
    "plain": make_protection("plain"),
    "he-bfv": make_protection("he"),
    "he-ckks": make_protection("he", {"scheme": "ckks"}),
    "dp-gaussian": make_protection("dp"),
    "dp-response": make_protection("dp", {"mechanism": "randomised-response"}),
    "secagg": make_protection("secagg"),
    "secagg-self": make_protection("secagg", {"self_mask": True}),
    "secagg+dp": make_protection("secagg+dp"),
    "he+dp": make_protection("he+dp"),
}
EXACT_SUMS = {"he-bfv", "he-ckks", "secagg", "secagg-self"}
NOISY_SUMS = {"secagg+dp", "he+dp"}
ALL_SUMS = EXACT_SUMS | NOISY_SUMS

# What a rule declares -> the protections it works under. All other pairs are refused.
LEGAL = {
    (SUM, ScoreKind.VOTE): {"plain", "dp-gaussian", "dp-response"} | ALL_SUMS,
    (SUM, ScoreKind.PROBABILITY): {"plain", "dp-gaussian"} | ALL_SUMS,
    (SUM, ScoreKind.LOG_PROBABILITY): {"plain", "dp-gaussian"} | ALL_SUMS,
    (SUM, ScoreKind.LOGIT): {"plain"} | EXACT_SUMS,
    (SCORES, ScoreKind.VOTE): {"plain", "dp-gaussian", "dp-response"},
    (SCORES, ScoreKind.PROBABILITY): {"plain", "dp-gaussian"},
    (SCORES, ScoreKind.LOG_PROBABILITY): {"plain", "dp-gaussian"},
    (SCORES, ScoreKind.LOGIT): {"plain"},
}

# What well-known rules must declare: a change here is a change of what leaves a site.
DECLARED = {
    "majority-vote": (SUM, ScoreKind.VOTE),
    "mean-probability": (SUM, ScoreKind.PROBABILITY),
    "class-share": (SUM, ScoreKind.PROBABILITY),
    "entropy-weighted": (SUM, ScoreKind.PROBABILITY),
    "borda": (SUM, ScoreKind.PROBABILITY),
    "product-of-experts": (SUM, ScoreKind.LOG_PROBABILITY),
    "competence-vote": (SUM, ScoreKind.LOG_PROBABILITY),
    "mean-logit": (SUM, ScoreKind.LOGIT),
    "median": (SCORES, ScoreKind.PROBABILITY),
    "trimmed-mean": (SCORES, ScoreKind.PROBABILITY),
    "geometric-median": (SCORES, ScoreKind.PROBABILITY),
    "dawid-skene": (SCORES, ScoreKind.VOTE),
}


class Declares(EnsembleRule):
    """A rule that declares what a test asks for."""

    name = "declares"

    def score(self, logits: Array, site: object) -> Array:
        return logits


def rule_that(disclosed: Disclosure, kind: ScoreKind) -> EnsembleRule:
    return type("Rule", (Declares,), {"discloses": disclosed, "score_kind": kind})()


def test_table_covers_every_declaration_and_every_protection() -> None:
    assert set(LEGAL) == set(itertools.product(Disclosure, ScoreKind))
    assert {p.name for p in VARIANTS.values()} == set(PROTECTIONS.names())


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize(("disclosed", "kind"), LEGAL)
def test_matrix_by_declaration(disclosed: Disclosure, kind: ScoreKind, variant: str) -> None:
    reason = refusal(rule_that(disclosed, kind), VARIANTS[variant])
    assert (reason == "") == (variant in LEGAL[disclosed, kind]), reason


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("name", RULES.names())
def test_matrix_of_registered_rules(name: str, variant: str) -> None:
    rule = RULES.get(name)()
    declared = DECLARED.get(name, (rule.discloses, rule.score_kind))
    assert (rule.discloses, rule.score_kind) == declared

    reason = refusal(rule, VARIANTS[variant])

    assert (reason == "") == (variant in LEGAL[declared]), reason


def test_published_matrix_is_that_of_the_defaults() -> None:
    matrix = legality_matrix()
    assert set(matrix) == set(RULES.names())
    defaults = {name: make_protection(name) for name in PROTECTIONS.names()}
    for rule_name, row in matrix.items():
        rule = RULES.get(rule_name)()
        assert row == {name: refusal(rule, p) for name, p in defaults.items()}


@pytest.mark.parametrize(
    ("rule", "variant", "reason", "hint"),
    [
        (
            "median",
            "he-bfv",
            "needs each site's own scores, but protection 'he' reveals only their sum",
            "rule 'mean-probability' with 'he', or protection 'dp' with 'median'",
        ),
        (
            "dawid-skene",
            "he-ckks",
            "needs each site's own scores",
            "rule 'majority-vote' with 'he', or protection 'dp' with 'dawid-skene'",
        ),
        (
            "mean-logit",
            "dp-gaussian",
            "raw logits",
            "rule 'mean-probability' with 'dp', or protection 'he' with 'mean-logit'",
        ),
        (
            "mean-logit",
            "secagg+dp",
            "raw logits",
            "rule 'mean-probability' with 'secagg+dp', or protection 'he' with 'mean-logit'",
        ),
        (
            "mean-logit",
            "he+dp",
            "raw logits",
            "rule 'mean-probability' with 'he+dp', or protection 'he' with 'mean-logit'",
        ),
        (
            "median",
            "secagg",
            "reveals only their sum",
            "rule 'mean-probability' with 'secagg', or protection 'dp' with 'median'",
        ),
        (
            "mean-probability",
            "dp-response",
            "one label only",
            (
                "rule 'majority-vote' with 'dp', or protection 'dp' with mechanism='gaussian'"
                " with 'mean-probability'"
            ),
        ),
    ],
)
def test_refusal_says_why_and_what_to_do(rule: str, variant: str, reason: str, hint: str) -> None:
    with pytest.raises(IncompatibleProtection) as caught:
        require_legal(RULES.get(rule)(), VARIANTS[variant])
    assert caught.value.code == "FI203"
    assert reason in caught.value.message
    assert caught.value.hint == f"use {hint}"


@pytest.mark.parametrize("protection", VARIANTS.values(), ids=VARIANTS)
@pytest.mark.parametrize("name", RULES.names())
def test_every_hint_is_legal_itself(name: str, protection: Protection) -> None:
    rule = RULES.get(name)()
    if not refusal(rule, protection):
        require_legal(rule, protection)
        return
    with pytest.raises(IncompatibleProtection) as caught:
        require_legal(rule, protection)
    other = caught.value.hint.partition("rule '")[2].partition("'")[0]
    assert refusal(RULES.get(other)(), protection) == ""
    assert "protection '" in caught.value.hint
