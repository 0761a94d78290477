from __future__ import annotations

import numpy as np
import pytest

from fedinfer_flower.ensemble.base import RULES, Array, Disclosure, EnsembleRule
from fedinfer_flower.errors import InvalidScoresError, InvalidValueError
from fedinfer_flower.privacy import KeyPair, ScorePlan
from fedinfer_flower.privacy.plain import Plain


class Combined(EnsembleRule):
    """A rule whose `combine` returns what a test asks for."""

    name = "combined"
    discloses = Disclosure.SCORES
    answer: Array

    def score(self, logits: Array, site: object) -> Array:
        return logits

    def combine(self, scores: Array) -> Array:
        return type(self).answer


def test_sum_rule_keeps_one_array_however_many_sites() -> None:
    rule = RULES.get("mean-probability")()
    plan = ScorePlan.for_rule(rule, n_classes=2, n_sites_max=100)
    side = Plain().coordinator_side(plan, n_queries=1, rule=rule, public_key=b"")
    payload = Plain().site_side(plan, public_key=b"").protect(np.array([[0.5, 0.5]]))
    for _ in range(100):
        side.add(payload)

    assert side._scores == []
    opened = Plain().querier_side(plan, keys=KeyPair()).open(side.total(), n_queries=1, n_sites=100)
    assert opened.tolist() == [[50.0, 50.0]]


@pytest.mark.parametrize("answer", [np.zeros((1, 3)), np.zeros(2), np.array([[0.0, np.nan]])])
def test_rule_that_combines_to_something_else_is_named(answer: Array) -> None:
    Combined.answer = answer
    rule = Combined()
    plan = ScorePlan.for_rule(rule, n_classes=2, n_sites_max=1)
    side = Plain().coordinator_side(plan, n_queries=1, rule=rule, public_key=b"")
    side.add(Plain().site_side(plan, public_key=b"").protect(np.zeros((1, 2))))

    with pytest.raises(InvalidValueError, match="'combined'"):
        side.total()


def test_combined_scores_may_exceed_the_bound_of_a_score() -> None:
    Combined.answer = np.array([[100.0, -100.0]])
    rule = Combined()
    plan = ScorePlan.for_rule(rule, n_classes=2, n_sites_max=1)
    side = Plain().coordinator_side(plan, n_queries=1, rule=rule, public_key=b"")
    side.add(Plain().site_side(plan, public_key=b"").protect(np.zeros((1, 2))))

    opened = Plain().querier_side(plan, keys=KeyPair()).open(side.total(), n_queries=1, n_sites=1)

    assert opened.tolist() == [[100.0, -100.0]]


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf, 1.00001])
def test_coordinator_refuses_scores_that_no_site_sends(value: float) -> None:
    rule = RULES.get("mean-probability")()
    plan = ScorePlan.for_rule(rule, n_classes=2, n_sites_max=2)
    side = Plain().coordinator_side(plan, n_queries=1, rule=rule, public_key=b"")
    with pytest.raises(InvalidScoresError):
        side.add(np.array([0.0, value], dtype="<f4").tobytes())
    assert side.n_sites == 0
