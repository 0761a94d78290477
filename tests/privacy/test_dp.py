"""Protection `dp`. Statistical tests have a significance of 1e-6: the noise has no seed."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy import stats

from fedinfer_flower.ensemble.base import RULES
from fedinfer_flower.errors import (
    CapacityError,
    InvalidScoresError,
    InvalidValueError,
    MissingExtraError,
)
from fedinfer_flower.privacy import KeyPair, ScorePlan, base
from fedinfer_flower.privacy.dp import DP
from fedinfer_flower.privacy.gaussian_dp import delta_of
from fedinfer_flower.privacy.gaussian_mechanism import GaussianMechanism
from fedinfer_flower.privacy.randomised_response import RandomisedResponse

SIGNIFICANCE = 1e-6
PROBABILITY = RULES.get("mean-probability")()
VOTE = RULES.get("majority-vote")()


def plan_of(rule, *, n_classes: int, n_sites: int = 9) -> ScorePlan:
    return ScorePlan.for_rule(rule, n_classes=n_classes, n_sites_max=n_sites)


def sent_integers(dp: DP, plan: ScorePlan, scores: np.ndarray) -> np.ndarray:
    payload = dp.site_side(plan, public_key=b"").protect(scores)
    return np.frombuffer(payload, "<i4").reshape(scores.shape).astype(np.int64)


# -- Gaussian -----------------------------------------------------------------------------


@pytest.mark.parametrize("epsilon", [0.1, 1.0, 8.0, 64.0])
@pytest.mark.parametrize("n_classes", [2, 10, 1000])
def test_noise_covers_the_rounded_sensitivity(epsilon: float, n_classes: int) -> None:
    plan = plan_of(PROBABILITY, n_classes=n_classes)
    mechanism = GaussianMechanism.calibrated(plan, epsilon=epsilon, delta=1e-5)

    sensitivity = math.sqrt(2.0) * 4096 + math.sqrt(n_classes)
    assert delta_of(epsilon, sensitivity / mechanism.std) <= 1e-5
    # One grid step less would break the promise: nothing is wasted.
    assert delta_of(epsilon, sensitivity / (mechanism.std - 1)) > 1e-5


def test_no_two_neighbours_are_farther_apart_than_the_sensitivity() -> None:
    n_classes = 6
    plan = plan_of(PROBABILITY, n_classes=n_classes)
    codec = GaussianMechanism.calibrated(plan, epsilon=1.0, delta=1e-5).codec
    rng = np.random.default_rng(3)
    answers = np.concatenate([np.eye(n_classes), rng.dirichlet(np.full(n_classes, 0.05), 400)])
    encoded = codec.encode(answers).astype(float)

    distances = np.linalg.norm(encoded[:, None] - encoded[None], axis=-1)

    assert distances.max() <= plan.sensitivity_l2 * 4096 + math.sqrt(n_classes)


def test_gaussian_noise_has_the_calibrated_shape() -> None:
    dp, plan = DP(epsilon=4.0), plan_of(PROBABILITY, n_classes=10)
    std = GaussianMechanism.calibrated(plan, epsilon=4.0, delta=1e-5).std
    exact = np.full((20_000, 10), 0.1)

    noise = sent_integers(dp, plan, exact) - round(0.1 * 4096)

    edges = stats.norm.ppf(np.linspace(0.0, 1.0, 41)) * std
    seen = np.histogram(noise, edges)[0]
    # Edges fall between integers; the shift is below half a step in a std of thousands.
    assert stats.chisquare(seen).pvalue > SIGNIFICANCE
    statistic = float((noise.astype(float) ** 2).sum()) / std**2
    assert SIGNIFICANCE / 2 < stats.chi2.cdf(statistic, noise.size) < 1 - SIGNIFICANCE / 2


def test_low_bits_do_not_tell_the_input() -> None:
    # The attack on floats: which outputs are possible depends on the input. Here every
    # output is a whole number of steps, and its remainders are as likely for any input.
    dp, plan = DP(epsilon=8.0), plan_of(PROBABILITY, n_classes=2)
    remainders = []
    for value in (0.0, 0.7):
        sent = sent_integers(dp, plan, np.full((40_000, 2), value))
        remainders.append(np.bincount(sent.ravel() % 32, minlength=32))

    side = dp.coordinator_side(plan, n_queries=2, rule=PROBABILITY, public_key=b"")
    for _ in range(3):
        side.add(dp.site_side(plan, public_key=b"").protect(np.full((2, 2), 0.3)))
    opened = dp.querier_side(plan, keys=KeyPair()).open(side.total(), n_queries=2, n_sites=3)

    np.testing.assert_array_equal(opened * 4096, np.rint(opened * 4096))
    assert stats.chi2_contingency(np.array(remainders)).pvalue > SIGNIFICANCE


def test_noise_tail_is_clamped_to_the_public_interval(monkeypatch: pytest.MonkeyPatch) -> None:
    from fedinfer_flower.privacy import noise

    dp, plan = DP(epsilon=1.0), plan_of(PROBABILITY, n_classes=2)
    most = GaussianMechanism.calibrated(plan, epsilon=1.0, delta=1e-5).entry_max
    monkeypatch.setattr(
        noise, "gaussian_integers", lambda shape, std: np.full(shape, 2**40, dtype=np.int64)
    )

    sent = sent_integers(dp, plan, np.ones((1, 2)))

    assert (sent == most).all()
    side = dp.coordinator_side(plan, n_queries=1, rule=PROBABILITY, public_key=b"")
    side.add(sent.astype("<i4").tobytes())
    for beyond in (most + 1, -most - 1, -(2**31)):
        with pytest.raises(InvalidScoresError):
            side.add(np.array([0, beyond], dtype="<i4").tobytes())


def test_a_wrapped_total_is_refused() -> None:
    dp, plan = DP(), plan_of(PROBABILITY, n_classes=2)
    querier = dp.querier_side(plan, keys=KeyPair())
    for value in (2**62, -(2**63)):
        with pytest.raises(InvalidScoresError):
            querier.open(np.array([0, value], dtype="<i8").tobytes(), n_queries=1, n_sites=2)


def test_noise_that_does_not_fit_32_bits_is_refused() -> None:
    with pytest.raises(CapacityError, match="larger epsilon"):
        DP(epsilon=1e-6).site_side(plan_of(PROBABILITY, n_classes=2), public_key=b"")


# -- randomised response --------------------------------------------------------------------


def response(epsilon: float) -> DP:
    return DP(mechanism="randomised-response", epsilon=epsilon)


@pytest.mark.parametrize(("n_classes", "epsilon"), [(2, 1.0), (5, 2.0), (1000, 6.0)])
def test_labels_are_kept_and_moved_with_the_stated_chances(n_classes: int, epsilon: float) -> None:
    n_rows, true = 30_000, 1
    plan = plan_of(VOTE, n_classes=n_classes)
    scores = np.zeros((n_rows, n_classes))
    scores[:, true] = 1.0

    payload = response(epsilon).site_side(plan, public_key=b"").protect(scores)
    labels = np.frombuffer(payload, "<u2")

    chances = RandomisedResponse(n_classes=n_classes, epsilon=epsilon)
    odds = math.exp(epsilon)
    assert chances.keep / chances.other == pytest.approx(odds)
    assert chances.keep + (n_classes - 1) * chances.other == pytest.approx(1.0)
    kept = int((labels == true).sum())
    assert stats.binomtest(kept, n_rows, odds / (odds + n_classes - 1)).pvalue > SIGNIFICANCE
    others = np.bincount(labels, minlength=n_classes)[np.arange(n_classes) != true]
    if n_classes > 2:
        assert stats.chisquare(others).pvalue > SIGNIFICANCE


def test_debiased_counts_are_unbiased() -> None:
    n_rows, n_classes, epsilon = 5000, 4, 1.0
    dp, plan = response(epsilon), plan_of(VOTE, n_classes=n_classes, n_sites=4)
    truth = np.array([2, 1, 1, 0])  # votes of four sites
    side = dp.coordinator_side(plan, n_queries=n_rows, rule=VOTE, public_key=b"")
    for label in np.repeat(np.arange(n_classes), truth):
        votes = np.tile(np.eye(n_classes)[label], (n_rows, 1))
        side.add(dp.site_side(plan, public_key=b"").protect(votes))

    opened = dp.querier_side(plan, keys=KeyPair()).open(side.total(), n_queries=n_rows, n_sites=4)

    np.testing.assert_allclose(opened.sum(axis=1), 4.0)
    z = (opened.mean(axis=0) - truth) / (opened.std(axis=0) / math.sqrt(n_rows))
    assert np.abs(z).max() < 5.2  # 2e-7 for each of four classes


def test_split_vote_favours_no_class() -> None:
    n_rows, n_classes = 30_000, 3
    plan = plan_of(VOTE, n_classes=n_classes)
    scores = np.full((n_rows, n_classes), 1.0 / n_classes)

    payload = response(60.0).site_side(plan, public_key=b"").protect(scores)

    assert stats.chisquare(np.bincount(np.frombuffer(payload, "<u2"))).pvalue > SIGNIFICANCE


def test_label_grows_with_the_number_of_classes() -> None:
    sizes = {2: 2, 65_536: 2, 65_537: 4}
    for n_classes, label_bytes in sizes.items():
        plan = plan_of(VOTE, n_classes=n_classes)
        assert response(1.0).payload_bytes(plan, 3) == 3 * label_bytes
    votes = np.zeros((1, 65_537))
    votes[0, 65_536] = 1.0
    payload = response(64.0).site_side(plan, public_key=b"").protect(votes)
    assert np.frombuffer(payload, "<u4").tolist() == [65_536]


def test_counts_of_more_than_one_label_a_site_do_not_open() -> None:
    dp, plan = response(1.0), plan_of(VOTE, n_classes=3)
    querier = dp.querier_side(plan, keys=KeyPair())
    for counts in ([2, 0, 1], [3, -1, 0], [2**62, 2**62, 2 - 2**63]):
        with pytest.raises(InvalidScoresError):
            querier.open(np.array(counts, dtype="<i8").tobytes(), n_queries=1, n_sites=2)


def test_plan_that_is_no_vote_is_refused() -> None:
    plan = ScorePlan(width=4, bound=1.0, sensitivity_l2=1.0, n_sites_max=1, n_classes=3)
    with pytest.raises(InvalidValueError, match="one score a class"):
        response(1.0).site_side(plan, public_key=b"")
    with pytest.raises(InvalidValueError, match="two classes"):
        response(1.0).site_side(plan_of(VOTE, n_classes=1), public_key=b"")


# -- options and totals -------------------------------------------------------------------------


def test_total_epsilon_grows_with_rows_by_exact_composition() -> None:
    assert DP(epsilon=1.0).total_epsilon(1) == pytest.approx(1.0)
    # opacus PRV gives 14.440, its own error of 0.01 included.
    epsilon, delta = DP(epsilon=1.0).total_epsilon_delta(100)
    assert (round(epsilon, 2), delta) == (14.43, 1e-5)
    totals = [DP(epsilon=1.0).total_epsilon(k) for k in (1, 2, 10, 1000)]
    assert totals == sorted(totals)
    with pytest.raises(InvalidValueError):
        DP().total_epsilon(0)


def test_total_epsilon_of_randomised_response_is_the_smaller_bound() -> None:
    assert response(1.0).total_epsilon_delta(2) == (2.0, 0.0)
    epsilon, delta = response(1.0).total_epsilon_delta(1000)
    assert epsilon < 1000.0
    assert delta == 1e-5


def test_epsilon_delta_of_a_row() -> None:
    plan = plan_of(VOTE, n_classes=2)
    assert DP(epsilon=2.0, delta=1e-6).epsilon_delta(plan) == (2.0, 1e-6)
    assert response(2.0).epsilon_delta(plan) == (2.0, 0.0)


@pytest.mark.parametrize(
    "options",
    [
        {"epsilon": 0.0},
        {"epsilon": -1.0},
        {"epsilon": 64.1},
        {"epsilon": math.nan},
        {"epsilon": math.inf},
        {"delta": 0.0},
        {"delta": 1.1e-3},
        {"delta": math.nan},
        {"mechanism": "laplace"},
    ],
)
def test_option_out_of_range_is_refused(options: dict[str, float]) -> None:
    with pytest.raises(InvalidValueError):
        DP(**options)


def test_missing_scipy_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    def absent(module: str) -> None:
        raise ImportError(module)

    monkeypatch.setattr(base.importlib, "import_module", absent)
    with pytest.raises(MissingExtraError, match=r"fedinfer-flower\[dp\]"):
        # Options that no other test uses: calibrations are cached.
        DP(epsilon=1.2345).site_side(plan_of(PROBABILITY, n_classes=2), public_key=b"")
