"""Noise shared out over sites: `secagg+dp` and `he+dp`. Significance 1e-6: noise has no seed."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable

import numpy as np
import pytest
from scipy import stats

from fedinfer_flower.ensemble.base import RULES
from fedinfer_flower.errors import (
    CapacityError,
    EnvelopeError,
    IncompatibleProtection,
    InvalidValueError,
    ProtectionRefusedError,
    QuorumNotMetError,
)
from fedinfer_flower.privacy import ScorePlan, make_protection, require_legal
from fedinfer_flower.privacy.base import Array, NoisySiteSide
from fedinfer_flower.privacy.cohort import Cohort
from fedinfer_flower.privacy.distributed_noise import MIN_SITE_STD, DistributedNoise
from fedinfer_flower.privacy.gaussian_dp import delta_of, mu_for
from fedinfer_flower.privacy.gaussian_mechanism import GaussianMechanism
from fedinfer_flower.privacy.he_dp import HeDP
from fedinfer_flower.privacy.he_schemes import BFV
from fedinfer_flower.privacy.mask_recovery import MaskedSum
from fedinfer_flower.privacy.recovery_messages import Phase, RecoveryRequest
from fedinfer_flower.privacy.secagg_dp import SecAggDP
from fedinfer_flower.wire.identity import Identity
from fedinfer_flower.wire.roster import Roster, Seat

SIGNIFICANCE = 1e-6
RULE = RULES.get("mean-probability")()
VOTE = RULES.get("majority-vote")()
STEP = 2.0**-12
noisy = pytest.mark.parametrize("kind", [SecAggDP, HeDP], ids=["secagg+dp", "he+dp"])
Noisy = type[SecAggDP] | type[HeDP]


def plan_of(n_sites: int, *, n_classes: int = 3) -> ScorePlan:
    return ScorePlan.for_rule(RULE, n_classes=n_classes, n_sites_max=n_sites)


def opened_sum(
    protection: SecAggDP | HeDP, n_sites: int, who: Iterable[int], scores: Array
) -> Array:
    """Let these sites of a cohort answer with the same scores, and open the sum."""
    plan = plan_of(n_sites, n_classes=scores.shape[1])
    keys = protection.make_keys()
    sites = [Identity.generate() for _ in range(n_sites)]
    seats = tuple(Seat(identity=s.public, commitment="0" * 64) for s in sites)
    cohort = Cohort(query_id="q-0", roster=Roster(seats), public_key=keys.public_key)
    side = protection.coordinator_side(
        plan, n_queries=len(scores), rule=RULE, public_key=keys.public_key, cohort=cohort
    )
    for site in (sites[number] for number in who):
        mine = protection.site_side(plan, public_key=keys.public_key, cohort=cohort, identity=site)
        side.add(mine.protect(scores), sender=site.key_id)
    while isinstance(side, MaskedSum) and (requests := side.recovery_requests()):
        assert isinstance(protection, SecAggDP)
        for site in sites:
            if site.key_id in requests:
                reply = protection.recovery_reply(
                    requests[site.key_id], cohort=cohort, identity=site, admit=lambda dropped: None
                )
                side.add_recovery(reply, sender=site.key_id)
    querier = protection.querier_side(plan, keys=keys, cohort=cohort)
    return querier.open(side.total(), n_queries=len(scores), n_sites=side.n_sites)


# -- how much noise ------------------------------------------------------------------------


@noisy
@pytest.mark.parametrize("dropped", [0, 3])
def test_noise_of_the_opened_sum_is_as_calibrated(kind: Noisy, dropped: int) -> None:
    protection, n_sites = kind(epsilon=4.0), 9
    noise = protection.calibrated(plan_of(n_sites))
    scores = np.full((6000, 3), 1 / 3)
    n_answered = n_sites - dropped

    opened = opened_sum(protection, n_sites, range(dropped, n_sites), scores)

    steps = (opened - n_answered * np.rint(scores / STEP) * STEP) / STEP
    np.testing.assert_array_equal(steps, np.rint(steps))
    # Rounding adds a twelfth of a step squared for each site.
    expected = math.sqrt(n_answered * (noise.site_std**2 + 1 / 12))
    # The sample variance of n normals, times n over theirs, is chi-square with n degrees.
    low, high = stats.chi2.ppf([SIGNIFICANCE / 2, 1 - SIGNIFICANCE / 2], steps.size)
    assert low < (steps**2).sum() / expected**2 < high
    assert abs(steps.mean()) < 4.9 * expected / math.sqrt(steps.size)
    # Never less than one site needs, even without the most sites that may drop out.
    needed = (math.sqrt(2.0) / STEP + math.sqrt(3)) / mu_for(4.0, 1e-5)
    assert expected >= needed
    assert (steps**2).sum() / needed**2 > low


@noisy
def test_noise_is_provisioned_for_dropouts_and_colluding_sites(kind: Noisy) -> None:
    plan = plan_of(30)
    sensitivity = math.sqrt(2.0) / STEP + math.sqrt(3)
    for dropout_share, collusion_share in ((0.0, 0.0), (1 / 3, 0.0), (0.2, 0.1), (0.45, 0.45)):
        protection = kind(epsilon=2.0, dropout_share=dropout_share, collusion_share=collusion_share)
        noise = protection.calibrated(plan)
        n_honest = protection.least_sites(30) - math.floor(collusion_share * 30)
        assert n_honest >= 1
        left = noise.site_std * math.sqrt(n_honest)
        assert delta_of(2.0, sensitivity / left) <= 1e-5
        assert noise.mu == pytest.approx(sensitivity / left, rel=1e-12)
        # One step less would break the promise: no noise is wasted.
        assert delta_of(2.0, sensitivity / ((noise.site_std - 1) * math.sqrt(n_honest))) > 1e-5


@noisy
def test_noise_of_sites_is_independent(kind: Noisy) -> None:
    protection, plan = kind(epsilon=4.0), plan_of(9)
    a, b = (protection.noise(plan, (4000, 3)).ravel() for _ in range(2))
    assert abs(np.corrcoef(a, b)[0, 1]) < 4.9 / math.sqrt(a.size)


@noisy
def test_sum_of_many_sites_is_more_accurate_than_one_noisy_site(kind: Noisy) -> None:
    plan = plan_of(100)
    site = kind(epsilon=1.0).calibrated(plan).site_std
    alone = GaussianMechanism.calibrated(plan, epsilon=1.0, delta=1e-5).std
    # sqrt(N - D - c) = sqrt(57) less at each site, so sqrt(100 / 57) of it in the whole sum.
    assert site == math.ceil(alone / math.sqrt(57)) or site == math.ceil(
        (alone - 1) / math.sqrt(57)
    )
    assert site * math.sqrt(100) < 1.33 * alone


# -- the promise, on the exact distribution --------------------------------------------------


def site_pmf(std: float) -> np.ndarray:
    """Return the probabilities of a rounded Gaussian on -m .. m, m 14 deviations."""
    most = math.ceil(14 * std)
    edges = np.arange(-most, most + 2) - 0.5
    # Differences in the lower tail keep their relative precision; the rest by symmetry.
    lower = np.diff(stats.norm.cdf(edges[: most + 2] / std))
    return np.concatenate([lower, lower[-2::-1]])


def sum_pmf(std: float, n_sites: int) -> np.ndarray:
    pmf = site_pmf(std)
    total = pmf
    for _ in range(n_sites - 1):
        total = np.convolve(total, pmf)  # of positive numbers: no cancellation
    return total


def hockey_stick(pmf: np.ndarray, shift: int, epsilon: float) -> float:
    """Return the exact delta between a distribution and itself, moved."""
    padded = np.concatenate([np.zeros(shift), pmf, np.zeros(shift)])
    moved = np.concatenate([np.zeros(2 * shift), pmf])
    deltas = [
        float(np.maximum(p - math.exp(epsilon) * q, 0.0).sum())
        for p, q in ((padded, moved), (moved, padded))
    ]
    return max(deltas)


@pytest.mark.parametrize("n_sites", [1, 2, 3, 8])
@pytest.mark.parametrize("epsilon", [0.1, 0.5, 1.0, 2.0, 4.0])
@pytest.mark.parametrize("shift", [1, 3, 7, 20])
def test_sum_of_the_smallest_noise_is_as_private_as_the_gaussian(
    n_sites: int, epsilon: float, shift: int
) -> None:
    pmf = sum_pmf(MIN_SITE_STD, n_sites)
    assert pmf.sum() == pytest.approx(1.0, abs=1e-12)
    claimed = delta_of(epsilon, shift / (MIN_SITE_STD * math.sqrt(n_sites)))
    assert hockey_stick(pmf, shift, epsilon) <= claimed + 1e-12


def test_noise_of_a_fraction_of_a_step_would_break_the_promise() -> None:
    # Why there is a smallest noise: its rounding leaves supports apart.
    pmf = sum_pmf(0.2, 2)
    assert hockey_stick(pmf, 1, 1.0) > delta_of(1.0, 1 / (0.2 * math.sqrt(2))) + 1e-3


@pytest.mark.parametrize("moved", [(5, 4), (7, 0), (1, 1), (6, -3)])
def test_sum_in_two_entries_is_as_private_as_the_gaussian(moved: tuple[int, int]) -> None:
    pmf, epsilon, n_sites = sum_pmf(MIN_SITE_STD, 3), 1.0, 3
    size, (right, down) = len(pmf), moved
    here = np.zeros((size + 14, size + 14))
    here[7 : 7 + size, 7 : 7 + size] = np.outer(pmf, pmf)
    there = np.roll(here, moved, axis=(0, 1))
    delta = float(np.maximum(here - math.exp(epsilon) * there, 0.0).sum())
    claimed = delta_of(epsilon, math.hypot(right, down) / (MIN_SITE_STD * math.sqrt(n_sites)))
    assert delta <= claimed + 1e-12


@noisy
@pytest.mark.parametrize("epsilon", [1.0, 8.0, 64.0])
def test_calibrated_sum_keeps_the_promise_on_its_exact_distribution(
    kind: Noisy, epsilon: float
) -> None:
    protection = kind(epsilon=epsilon, delta=1e-5)
    noise = protection.calibrated(plan_of(4, n_classes=2))
    sensitivity = math.sqrt(2.0) / STEP + math.sqrt(2.0)
    # The same ratio on a coarser grid, where there are few enough outcomes to convolve.
    shift = 700
    pmf = sum_pmf(noise.site_std * shift / sensitivity, protection.least_sites(4))
    delta = hockey_stick(pmf, shift, epsilon)
    assert 0.5e-5 < delta <= 1e-5 + 1e-12


@noisy
def test_charge_is_that_of_the_noise_which_is_certain(kind: Noisy) -> None:
    protection, plan = kind(epsilon=2.0), plan_of(30)
    noise = protection.calibrated(plan)
    charge = protection.charge(plan, 50)
    assert charge.n_rows == 50
    assert charge.mu_squared == pytest.approx(50 * noise.mu**2, rel=1e-12)
    assert charge.mu_squared >= 50 * noise.mu**2 * (1 - 1e-15)
    assert noise.mu <= mu_for(2.0, 1e-5)
    assert protection.epsilon_delta(plan) == (2.0, 1e-5)
    assert delta_of(2.0, noise.mu) <= 1e-5


def test_neighbours_are_no_farther_apart_than_the_sensitivity() -> None:
    rng = np.random.default_rng(3)
    plan = plan_of(9, n_classes=6)
    codec = SecAggDP(epsilon=2.0).codec(plan)
    answers = np.concatenate([np.eye(6), rng.dirichlet(np.full(6, 0.05), 400)])
    encoded = codec.encode(answers).astype(float)
    distances = np.linalg.norm(encoded[:, None] - encoded[None], axis=2)
    assert distances.max() <= plan.sensitivity_l2 / STEP + math.sqrt(plan.width)
    # Two votes are that far apart, so the bound is no larger than needs be.
    assert distances.max() >= plan.sensitivity_l2 / STEP


# -- what is refused -------------------------------------------------------------------------


@noisy
def test_fewer_survivors_than_the_noise_needs_end_the_batch(kind: Noisy) -> None:
    protection = kind(epsilon=4.0)
    least = protection.least_sites(9)
    assert least == 6
    scores = np.full((2, 3), 1 / 3)
    assert opened_sum(protection, 9, range(least), scores).shape == (2, 3)
    with pytest.raises(QuorumNotMetError):
        opened_sum(protection, 9, range(least - 1), scores)


@noisy
def test_querier_refuses_a_sum_of_fewer(kind: Noisy) -> None:
    protection, plan = kind(epsilon=4.0), plan_of(9)
    for n_sites in (0, 3, 5, 10):
        with pytest.raises(EnvelopeError, match="combines 6 to 9"):
            protection.check_cohort(n_sites, plan)
    protection.check_cohort(6, plan)


def test_sites_refuse_to_open_a_sum_of_fewer() -> None:
    protection, sites = SecAggDP(epsilon=4.0), [Identity.generate() for _ in range(9)]
    seats = tuple(Seat(identity=s.public, commitment="0" * 64) for s in sites)
    keys = protection.make_keys()
    cohort = Cohort(query_id="q-0", roster=Roster(seats), public_key=keys.public_key)
    request = RecoveryRequest(
        phase=Phase.REVEAL, context=cohort.context(), survivors=frozenset(range(5))
    )
    site = next(s for s in sites if cohort.roster.place_of(s.key_id) == 0)
    with pytest.raises(ProtectionRefusedError, match="6 sites or more"):
        protection.recovery_reply(
            request.to_bytes(9), cohort=cohort, identity=site, admit=lambda dropped: None
        )


@noisy
def test_raw_logits_are_refused(kind: Noisy) -> None:
    with pytest.raises(IncompatibleProtection, match="raw logits"):
        require_legal(RULES.get("mean-logit")(), kind())
    require_legal(RULE, kind())
    require_legal(VOTE, kind())


@noisy
@pytest.mark.parametrize(
    "options",
    [
        {"epsilon": 0.0},
        {"epsilon": -1.0},
        {"epsilon": 64.5},
        {"epsilon": math.inf},
        {"epsilon": math.nan},
        {"delta": 0.0},
        {"delta": 0.01},
        {"delta": math.nan},
        {"dropout_share": 0.5},
        {"dropout_share": -0.1},
        {"dropout_share": math.nan},
        {"collusion_share": 0.5},
        {"collusion_share": -0.1},
        {"collusion_share": math.nan},
        {"epsilon": "2"},
        {"unknown": 1},
    ],
    ids=str,
)
def test_option_out_of_range_is_refused(kind: Noisy, options: dict[str, object]) -> None:
    with pytest.raises(InvalidValueError):
        make_protection(kind.name, options)


def test_ckks_is_refused() -> None:
    with pytest.raises(InvalidValueError, match="ckks"):
        HeDP(scheme="ckks")
    with pytest.raises(InvalidValueError):
        make_protection("he+dp", {"scheme": "bgv"})


@noisy
def test_noise_that_does_not_fit_is_refused(kind: Noisy) -> None:
    # So much noise is wider than the ring that it is added in.
    with pytest.raises(CapacityError):
        kind(epsilon=1e-6).codec(plan_of(9))


def test_noise_that_is_too_fine_for_the_grid_is_refused() -> None:
    plan = dataclasses.replace(plan_of(9), sensitivity_l2=2.0**-12)
    with pytest.raises(CapacityError, match="grid steps"):
        DistributedNoise.calibrated(plan, epsilon=8.0, delta=1e-3, n_honest=9, modulus=2**32)


@noisy
@pytest.mark.parametrize("n_sites", [3, 9, 100, 1000])
def test_ring_has_room_for_all_scores_and_ten_deviations_of_noise(
    kind: Noisy, n_sites: int
) -> None:
    noise = kind(epsilon=1.0).calibrated(plan_of(n_sites))
    largest = n_sites * noise.codec.entry_max
    largest += math.ceil(10 * noise.site_std * math.sqrt(n_sites))
    assert largest < noise.codec.modulus // 2
    assert noise.codec.modulus == (BFV.plain_modulus if kind is HeDP else 2**32)


@noisy
def test_every_role_works_out_the_same_noise(kind: Noisy) -> None:
    one, again = kind(epsilon=2.0), make_protection(kind.name, kind(epsilon=2.0).options())
    assert isinstance(again, kind)
    assert one.calibrated(plan_of(9)) == again.calibrated(plan_of(9))


def test_drawn_answer_that_is_sent_twice_is_the_same_answer() -> None:
    # A site that keeps what it drew adds no second noise to the same row.
    protection, plan = SecAggDP(epsilon=2.0), plan_of(3)
    sites = [Identity.generate() for _ in range(3)]
    seats = tuple(Seat(identity=s.public, commitment="0" * 64) for s in sites)
    keys = protection.make_keys()
    cohort = Cohort(query_id="q-0", roster=Roster(seats), public_key=keys.public_key)
    side = protection.site_side(plan, public_key=keys.public_key, cohort=cohort, identity=sites[0])
    assert isinstance(side, NoisySiteSide)
    drawn = side.draw(np.full((2, 3), 1 / 3))
    assert drawn.shape == (2, 3)
    assert side.finish(drawn) == side.finish(drawn)
    assert side.finish(drawn) != side.finish(side.draw(np.full((2, 3), 1 / 3)))
