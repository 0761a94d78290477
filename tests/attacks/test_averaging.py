"""Repeats wash fresh noise out; an answer cache or a budget stops that."""

from __future__ import annotations

import numpy as np
import pytest

from fedinfer_flower.attacks.averaging import Averaging, RepeatedAnswers
from fedinfer_flower.attacks.reading import recovered_share
from fedinfer_flower.attacks.rounds import read_one
from fedinfer_flower.errors import InvalidValueError
from fedinfer_flower.privacy.base import ScorePlan
from fedinfer_flower.privacy.charge import Charge
from fedinfer_flower.privacy.dp import DP
from fedinfer_flower.privacy.he import HomomorphicEncryption
from fedinfer_flower.privacy.plain import Plain
from fedinfer_flower.privacy.secagg_dp import SecAggDP
from fedinfer_flower.privacy.site_budget import BudgetPolicy, SiteBudget


def results(federation, protection, **options):
    attack = Averaging(**options)
    return [
        attack.run(evidence, mode=mode)
        for mode, evidence in attack.evidence(federation, protection).items()
    ]


def test_clear_answers_need_one_question(federation) -> None:
    (result,) = results(federation, Plain(), repeats=1)

    assert result.succeeded
    assert result.value == pytest.approx(1.0, abs=1e-6)


# Noise of 5.3 an entry at epsilon 1: 0.08 after 4000 repeats, where a guess errs by 0.27.
# Over 200 entries the error varies by 5 %, so that 0.7 +- 0.02 is far from 0.5.
@pytest.mark.parametrize("protection", [DP(epsilon=1.0), SecAggDP(epsilon=1.0)])
def test_fresh_noise_averages_out_and_kept_noise_does_not(federation, protection) -> None:
    fresh, kept = results(federation, protection)

    assert fresh.succeeded
    assert fresh.claim == "none"
    assert not kept.succeeded
    assert kept.claim == "kept"
    assert kept.detail["repeats"] == 4000


def test_few_repeats_are_not_enough(federation) -> None:
    fresh, _ = results(federation, DP(epsilon=1.0), repeats=50)

    # 0.75 an entry after 50: three times the error of a guess.
    assert fresh.value == 0.0


def test_a_sum_without_noise_offers_nothing_to_average(federation) -> None:
    assert Averaging().evidence(federation, HomomorphicEncryption()) == {}


def test_a_budget_ends_the_repeats(federation, tmp_path) -> None:
    dp, rule = DP(epsilon=1.0), federation.rule
    scores = federation.scores(federation.inputs[:20])[0]
    plan = ScorePlan.for_rule(rule, n_classes=10, n_sites_max=5)
    policy = BudgetPolicy(epsilon_per_querier=8.0, epsilon_global=8.0)
    budget = SiteBudget(tmp_path / "budget.db", policy)
    asked = 0

    def ask():
        nonlocal asked
        asked += 1
        cost = dp.charge(plan, len(scores))
        assert isinstance(cost, Charge)
        paid = budget.reserve(
            querier="attacker", query_id=str(asked), charge_querier=cost, charge_global=cost
        )
        answer = read_one(dp, rule, scores, n_classes=10)
        budget.commit(paid)
        return answer

    result = Averaging().run(RepeatedAnswers(ask=ask, truth=scores, claimed=True))

    # 38 rows at epsilon 1 make 8 in total: one question of twenty rows.
    assert result.detail["repeats"] == 1
    assert result.detail["refused"] == "FI315"
    assert result.claim == "kept"


def test_recovered_share_of_an_empty_attack_is_nothing() -> None:
    truth = np.eye(3)
    assert recovered_share(np.broadcast_to(truth.mean(axis=0), (3, 3)), truth) == 0.0
    assert recovered_share(np.ones((3, 3)), np.ones((3, 3))) == 0.0


@pytest.mark.parametrize("options", [{"repeats": 0}, {"n_rows": 1}])
def test_impossible_options_are_refused(options) -> None:
    with pytest.raises(InvalidValueError):
        Averaging(**options)
