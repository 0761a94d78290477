"""Answers train a copy; noise within a budget does not let them."""

from __future__ import annotations

import numpy as np
import pytest

from fedinfer_flower.attacks.stealing import AnswersForSale, Stealing, rows_within
from fedinfer_flower.errors import InvalidValueError
from fedinfer_flower.privacy.base import ScorePlan
from fedinfer_flower.privacy.dp import DP
from fedinfer_flower.privacy.plain import Plain
from fedinfer_flower.privacy.secagg import SecAgg


def results(federation, protection, **options):
    attack = Stealing(**options)
    return [
        attack.run(evidence, mode=mode)
        for mode, evidence in attack.evidence(federation, protection).items()
    ]


@pytest.mark.parametrize("protection", [Plain(), SecAgg()])
def test_exact_answers_train_a_copy(federation, protection) -> None:
    (result,) = results(federation, protection)

    # 0.92 and 0.94 on 500 held-out rows, with a standard error of 0.01.
    assert result.value > 0.85
    assert result.succeeded
    assert result.claim == "none"


def test_more_questions_make_a_better_copy(federation) -> None:
    (result,) = results(federation, Plain())

    assert result.detail["fidelity at 30"] < result.detail["fidelity at 300"]


def test_noise_within_a_budget_stops_it(federation) -> None:
    _, within = results(federation, DP(epsilon=1.0))

    assert within.detail["answered"] == 3
    assert within.detail["refused"] == "FI315"
    assert (within.verdict, within.claim) == ("stopped", "kept")


def test_rows_within_a_budget_cost_no_more_than_it(federation) -> None:
    plan = ScorePlan.for_rule(federation.rule, n_classes=10, n_sites_max=5)
    dp = DP(epsilon=0.5)

    rows = rows_within(dp, plan, total_epsilon=3.0)

    # The calibration rounds noise up, so both totals may be a hair below.
    assert dp.total_epsilon(rows) <= 3.0 + 1e-6
    assert dp.total_epsilon(rows + 1) > 3.0
    with pytest.raises(InvalidValueError):
        rows_within(Plain(), plan, total_epsilon=3.0)


def test_a_model_that_answers_nothing_is_guessed_by_its_commonest_label() -> None:
    from fedinfer_flower.errors import ExpiredError

    def ask(rows):
        raise ExpiredError("too late")

    truth = np.eye(3)[[0, 0, 1, 2]]
    silent = AnswersForSale(ask=ask, inputs=np.ones((9, 2)), held_out=np.ones((4, 2)), truth=truth)
    result = Stealing(n_queries="5,9").run(silent)

    assert result.value == result.baseline == 0.5
    assert result.detail["refused"] == "FI314"


@pytest.mark.parametrize("n_queries", ["1,5", "9,5", "0"])
def test_sizes_that_do_not_rise_are_refused(n_queries: str) -> None:
    with pytest.raises(InvalidValueError):
        Stealing(n_queries=n_queries)
