"""LiRA finds members in clear answers, fewer in sums, and no more than dp allows."""

from __future__ import annotations

import numpy as np
import pytest

from fedinfer_flower.attacks.federation import digits
from fedinfer_flower.attacks.measures import dp_bound
from fedinfer_flower.attacks.membership import Membership, likelihood_ratios
from fedinfer_flower.attacks.shadow_worlds import (
    MembershipEvidence,
    ShadowWorlds,
    distributed_dp_view,
    plain_view,
    protected_view,
    secure_sum_view,
)
from fedinfer_flower.ensemble.base import make_rule
from fedinfer_flower.errors import InvalidValueError
from fedinfer_flower.privacy.base import ScorePlan
from fedinfer_flower.privacy.dp import DP
from fedinfer_flower.privacy.secagg import SecAgg

N_SITES = 10
PLAN = ScorePlan.for_rule(make_rule("mean-probability"), n_classes=10, n_sites_max=N_SITES)


@pytest.fixture(scope="module")
def worlds() -> ShadowWorlds:
    inputs, labels = digits()
    return ShadowWorlds.train(inputs, labels, n_classes=10, n_worlds=16, n_sites=N_SITES, seed=0)


def result_of(evidence: MembershipEvidence):
    return Membership().run(evidence)


def test_one_clear_answer_gives_members_away(worlds) -> None:
    result = result_of(worlds.seen_through(plain_view))

    assert result.succeeded
    # 0.24 with a standard error of 0.004; a loss threshold finds 0.01.
    assert result.value > 0.2
    assert result.interval[0] > 0.2
    assert result.detail["auc"] > 0.85
    assert result.claim == "none"


def test_a_sum_hides_most_of_it_and_not_all(worlds) -> None:
    plain = result_of(worlds.seen_through(plain_view))
    summed = result_of(worlds.seen_through(secure_sum_view))

    assert summed.value < plain.value / 4
    # What is left is more than nothing, and no protection claims otherwise.
    assert summed.succeeded
    assert summed.claim == "none"


def test_the_real_masked_sum_shows_what_the_clear_mean_shows(worlds) -> None:
    scores = worlds.probabilities[0, :, :50].astype(float)

    masked = protected_view(SecAgg())(scores)

    # Ten sites' rounding to the grid of 2^-16 or finer, over ten.
    np.testing.assert_allclose(masked, secure_sum_view(scores), atol=2.0**-16)


@pytest.mark.parametrize("epsilon", [1.0, 4.0])
def test_noise_keeps_the_attack_below_the_bound_of_dp(worlds, epsilon: float) -> None:
    local = worlds.seen_through(
        protected_view(DP(epsilon=epsilon)),
        noiseless=plain_view,
        logit=False,
        epsilon_delta=(epsilon, 1e-5),
    )
    summed = worlds.seen_through(
        distributed_dp_view(PLAN, epsilon=epsilon, delta=1e-5),
        noiseless=secure_sum_view,
        logit=False,
        epsilon_delta=(epsilon, 1e-5),
    )
    for evidence in (local, summed):
        result = result_of(evidence)
        assert result.claim == "kept"
        # The limit leaves room for chance, 3.7 standard errors, and not much of it.
        assert dp_bound(0.01, epsilon=epsilon, delta=1e-5) < result.claim_limit < 0.6


def test_labels_under_randomised_response_stay_below_the_bound(worlds, federation) -> None:
    rates = []
    for epsilon in (1.0, 12.0):
        protection = DP(mechanism="randomised-response", epsilon=epsilon)
        (evidence,) = Membership(n_worlds=8).evidence(federation, protection).values()
        result = result_of(evidence)
        assert evidence.epsilon_delta == (epsilon, 0.0)
        assert result.claim == "kept"
        rates.append(result.value)

    # At 12 nearly every label is the true one: as much as labels alone leak.
    assert rates[0] < rates[1]


def test_weaker_noise_leaks_more(worlds) -> None:
    rates = [
        result_of(
            worlds.seen_through(
                protected_view(DP(epsilon=epsilon)), noiseless=plain_view, logit=False
            )
        ).value
        for epsilon in (1.0, 16.0)
    ]

    # 0.015 and 0.10, with standard errors of 0.002.
    assert rates[0] < 0.03 < rates[1]


def test_a_protection_that_breaks_its_promise_is_found_out(worlds) -> None:
    # Clear answers under a claim of epsilon 1: no bound can be kept.
    result = result_of(worlds.seen_through(plain_view, epsilon_delta=(1.0, 1e-5)))

    assert result.claim == "broken"


@pytest.mark.parametrize("view", [plain_view, secure_sum_view])
def test_members_that_left_no_trace_are_not_found(worlds, view) -> None:
    # Members drawn anew, after training: what is found of them is chance. Guards against
    # an attack that learns the answer from the target's own world.
    rng = np.random.default_rng(5)
    order = rng.permuted(np.tile(np.arange(1797), (16, 1)), axis=1)
    members = np.take_along_axis(worlds.members, order[:, None, :], axis=2)
    shuffled = ShadowWorlds(
        probabilities=worlds.probabilities, members=members, labels=worlds.labels
    )

    result = result_of(shuffled.seen_through(view))

    assert not result.succeeded
    # 10,400 members: five standard errors of 1 % and of an area of one half.
    assert result.value == pytest.approx(0.01, abs=0.006)
    assert result.detail["auc"] == pytest.approx(0.5, abs=0.02)


def test_the_target_world_is_left_out() -> None:
    rng = np.random.default_rng(0)
    members = np.zeros((4, 6), dtype=bool)
    members[0] = members[1] = True  # only world 0 has members
    features = rng.normal(size=(4, 6, 1))
    evidence = MembershipEvidence(
        observed=features, shadow=features, members=members, groups=np.array([0, 0, 1, 1])
    )

    ratios = likelihood_ratios(evidence)

    # World 0 knows no member but its own, world 1 no other non-member: both know nothing.
    np.testing.assert_array_equal(ratios, 0.0)


def test_ratios_agree_with_a_plain_loop() -> None:
    rng = np.random.default_rng(2)
    members, features = rng.random((12, 5)) < 0.5, rng.normal(size=(12, 5, 2))
    groups = np.repeat(np.arange(6), 2)
    evidence = MembershipEvidence(
        observed=features, shadow=features, members=members, groups=groups
    )

    ratios = likelihood_ratios(evidence)

    for row in range(12):
        others = groups != groups[row]
        for record in range(5):
            inside = features[others & members[:, record], record]
            outside = features[others & ~members[:, record], record]
            seen = features[row, record]
            expected = ((seen - outside.mean(0)) ** 2 - (seen - inside.mean(0)) ** 2).sum()
            assert ratios[row, record] == pytest.approx(expected)


@pytest.mark.parametrize("n_members", [5, 1800])
def test_a_pool_that_does_not_fit_is_refused(n_members: int) -> None:
    inputs, labels = digits()
    with pytest.raises(InvalidValueError):
        ShadowWorlds.train(
            inputs, labels, n_classes=10, n_worlds=2, n_sites=N_SITES - 1, n_members=n_members
        )
