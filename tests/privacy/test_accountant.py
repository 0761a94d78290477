"""Charges and their accountant, against three independent ways to the same epsilon."""

from __future__ import annotations

import itertools
import json
import math
from fractions import Fraction
from functools import reduce
from operator import add

import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import integrate, stats

from fedinfer_flower.errors import InvalidValueError, MissingExtraError
from fedinfer_flower.privacy import base
from fedinfer_flower.privacy.accountant import (
    COMPOSITIONS,
    Accountant,
    subsampled_epsilon,
    zcdp_epsilon,
)
from fedinfer_flower.privacy.charge import Charge, gaussian_equivalent_mu, rounded_up
from fedinfer_flower.privacy.gaussian_dp import delta_of, epsilon_of, mu_for, pure_epsilon_total

DELTA = 1e-5
GAUSSIAN = Accountant(composition="gaussian")
CONCENTRATED = Accountant(composition="concentrated")
FIXED = Accountant()

# Noise over sensitivity, rows, delta: 40 cases.
CASES = list(itertools.product((1.0, 3.0, 5.0, 10.0, 50.0), (1, 10, 50, 200), (1e-5, 1e-6)))

costs = st.floats(min_value=1e-6, max_value=20.0)
charges = st.one_of(
    st.builds(Charge.gaussian, costs, st.integers(1, 50)),
    st.builds(Charge.pure, costs, st.integers(1, 50)),
    st.builds(Charge.zcdp, costs, st.integers(1, 50)),
)
gaussian_or_pure = st.one_of(
    st.builds(Charge.gaussian, costs, st.integers(1, 50)),
    st.builds(Charge.pure, costs, st.integers(1, 50)),
)

# -- Gaussian ---------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore")  # opacus and torch warn when they are imported
@pytest.mark.parametrize(("noise", "n_rows", "delta"), CASES)
def test_gaussian_lies_in_the_interval_of_opacus(noise: float, n_rows: int, delta: float) -> None:
    accountant = pytest.importorskip("opacus.accountants").PRVAccountant()
    accountant.history = [(noise, 1.0, n_rows)]
    error = {"eps_error": 0.01, "delta_error": delta / 1000}
    lower, _, upper = accountant._get_dprv(**error).compute_epsilon(
        delta, error["delta_error"], error["eps_error"]
    )

    ours = GAUSSIAN.epsilon(Charge.gaussian(1.0 / noise, n_rows), delta)

    # Its interval holds the true value, and the upper end is what it reports.
    assert lower <= ours <= upper
    assert upper - ours <= 0.02


@pytest.mark.parametrize(("noise", "n_rows", "delta"), CASES)
def test_gaussian_is_never_below_the_truth_and_wastes_nothing(
    noise: float, n_rows: int, delta: float
) -> None:
    mpmath = pytest.importorskip("mpmath")

    def exact_delta(epsilon: float) -> float:
        with mpmath.workdps(60):
            mu = mpmath.sqrt(n_rows) / mpmath.mpf(noise)
            e = mpmath.mpf(epsilon)
            first = mpmath.ncdf(mu / 2 - e / mu)
            return float((first - mpmath.exp(e) * mpmath.ncdf(-mu / 2 - e / mu)) / delta)

    ours = GAUSSIAN.epsilon(Charge.gaussian(1.0 / noise, n_rows), delta)

    # 60 digits against 16: the last of ours may round either way.
    assert exact_delta(ours) <= 1.0 + 1e-9
    if ours > 0.0:
        assert exact_delta(ours * (1.0 - 1e-6)) > 1.0


def test_different_noises_compose_by_their_squares() -> None:
    rows = [Charge.gaussian(1 / 5, 2), Charge.gaussian(1 / 20, 4), Charge.gaussian(1 / 100, 10)]
    total = reduce(add, rows)
    assert GAUSSIAN.epsilon(total, DELTA) == pytest.approx(
        epsilon_of(math.sqrt(2 / 25 + 4 / 400 + 10 / 10_000), DELTA), abs=1e-9
    )
    assert total.n_rows == 16


# -- pure mechanisms --------------------------------------------------------------------


@pytest.mark.parametrize("epsilon", [1e-7, 1e-3, 0.1, 1.0, 2.0, 4.0, 8.0, 16.0, 64.0])
def test_gaussian_equivalent_has_a_trade_off_curve_below(epsilon: float) -> None:
    mu = gaussian_equivalent_mu(epsilon)
    assert mu <= epsilon * math.sqrt(math.pi / 2.0) * (1 + 1e-12)
    for type_one in [10.0**-k for k in range(1, 30)] + [k / 50 for k in range(1, 50)]:
        pure = max(1.0 - math.exp(epsilon) * type_one, math.exp(-epsilon) * (1.0 - type_one))
        gaussian = float(stats.norm.cdf(stats.norm.isf(type_one) - mu))
        # Differences of numbers near 1 are good to 1e-15.
        assert gaussian <= pure + 1e-14


@pytest.mark.parametrize("epsilon", [0.5, 1.0, 3.0])
@pytest.mark.parametrize("n_rows", [1, 4, 20])
def test_randomised_response_is_never_worse_than_promised(epsilon: float, n_rows: int) -> None:
    # The exact delta of many coins: the privacy loss is epsilon times a binomial difference.
    keep = math.exp(epsilon) / (1.0 + math.exp(epsilon))

    def exact_delta(total: float) -> float:
        kept = range(n_rows + 1)
        losses = [(2 * k - n_rows) * epsilon for k in kept]
        chances = stats.binom.pmf(list(kept), n_rows, keep)
        return sum(
            p * -math.expm1(total - x)
            for p, x in zip(chances, losses, strict=True)
            if x > total + 1e-12
        )

    total = Charge.pure(epsilon, n_rows)
    for accountant in (GAUSSIAN, CONCENTRATED, FIXED):
        found, delta = accountant.epsilon_delta(total, DELTA)
        assert exact_delta(found) <= delta + 1e-12
        assert found <= n_rows * epsilon * (1 + 1e-12)


@pytest.mark.parametrize(("epsilon", "n_rows"), [(0.1, 10_000), (1.0, 200), (1.0, 3), (8.0, 50)])
def test_pure_is_not_above_the_usual_bounds(epsilon: float, n_rows: int) -> None:
    usual, _ = pure_epsilon_total(epsilon, n_rows, DELTA)
    assert CONCENTRATED.epsilon(Charge.pure(epsilon, n_rows), DELTA) <= usual * (1 + 1e-12)


# -- zero-concentrated privacy -----------------------------------------------------------


@given(st.floats(1e-12, 1e3), st.floats(1e-12, 1e-3))
def test_concentrated_is_below_the_usual_bound_and_above_exact(rho: float, delta: float) -> None:
    found = zcdp_epsilon(rho, delta)
    assert found <= (rho + 2.0 * math.sqrt(rho * math.log(1.0 / delta))) * (1 + 1e-12)
    # A Gaussian mechanism has this rho, so no bound for all mechanisms may be below its own.
    assert found >= epsilon_of(math.sqrt(2.0 * rho), delta) * (1 - 1e-9)


@pytest.mark.parametrize("order", [1.5, 2.0, 8.0, 40.0])
@pytest.mark.parametrize("mu", [0.3, 1.0, 3.0])
def test_conversion_bounds_the_hockey_stick_by_the_moment(order: float, mu: float) -> None:
    # The step of the proof: (1 - e^(eps - x))+ <= e^((a-1)(x - eps)) (1 - 1/a)^a / (a - 1).
    epsilon = 1.3
    factor = (1.0 - 1.0 / order) ** order / (order - 1.0)
    for x in [epsilon + k / 10 for k in range(-30, 100)]:
        left = max(-math.expm1(epsilon - x), 0.0)
        assert left <= math.exp((order - 1.0) * (x - epsilon)) * factor * (1 + 1e-12)
    log_moment = order * (order - 1.0) * mu**2 / 2.0
    log_bound = log_moment - (order - 1.0) * epsilon + math.log(factor)
    assert math.log(delta_of(epsilon, mu)) <= log_bound + 1e-9


# -- mixtures ---------------------------------------------------------------------------


@pytest.mark.parametrize("accountant", [GAUSSIAN, CONCENTRATED, FIXED])
@pytest.mark.parametrize(("mu", "epsilon"), [(0.5, 0.5), (1.0, 2.0), (2.0, 1.0), (0.2, 6.0)])
def test_noise_and_coin_together_are_never_worse_than_promised(
    accountant: Accountant, mu: float, epsilon: float
) -> None:
    found = accountant.epsilon(Charge.gaussian(mu, 1) + Charge.pure(epsilon, 1), DELTA)

    keep = math.exp(epsilon) / (1.0 + math.exp(epsilon))

    def excess(x: float, loss_of_coin: float) -> float:
        loss = mu * x - mu**2 / 2.0 + loss_of_coin
        return float(stats.norm.pdf(x - mu)) * max(-math.expm1(min(found - loss, 0.0)), 0.0)

    exact = 0.0
    for chance, loss in ((keep, epsilon), (1.0 - keep, -epsilon)):
        start = (found - loss + mu**2 / 2.0) / mu
        exact += chance * integrate.quad(excess, start, max(start, mu) + 14.0, args=(loss,))[0]
    # The integral is good to about 1e-10.
    assert exact <= DELTA + 1e-10


@given(st.lists(gaussian_or_pure, min_size=1, max_size=6), st.floats(1e-10, 1e-3))
def test_no_composition_is_below_the_smallest_bound(rows: list[Charge], delta: float) -> None:
    total = reduce(add, rows)
    smallest = FIXED.epsilon(total, delta)
    for accountant in (GAUSSIAN, CONCENTRATED):
        assert accountant.epsilon(total, delta) >= smallest * (1 - 1e-12)


@given(st.lists(charges, min_size=1, max_size=5), charges, st.floats(1e-10, 1e-3))
def test_epsilon_grows_with_every_charge(rows: list[Charge], more: Charge, delta: float) -> None:
    total = reduce(add, rows)
    for accountant in (CONCENTRATED, FIXED):
        before, after = (accountant.epsilon(t, delta) for t in (total, total + more))
        # The search over orders is good to about nine digits.
        assert after >= before * (1 - 1e-9)


@given(st.lists(gaussian_or_pure, min_size=1, max_size=5), st.floats(0.01, 50.0))
def test_fits_agrees_with_epsilon(rows: list[Charge], cap: float) -> None:
    total = reduce(add, rows)
    for accountant in (GAUSSIAN, CONCENTRATED):
        if accountant.fits(total, cap, DELTA):
            assert accountant.epsilon(total, DELTA) <= cap * (1 + 1e-9)
        else:
            assert accountant.epsilon(total, DELTA) >= cap * (1 - 1e-9)


def test_a_query_of_its_own_cap_fits() -> None:
    total = Charge.gaussian(mu_for(1.0, DELTA), 1)
    assert GAUSSIAN.fits(total, 1.0 + 1e-9, DELTA)
    assert not GAUSSIAN.fits(total + Charge.gaussian(0.01, 1), 1.0 + 1e-9, DELTA)


def test_nothing_costs_nothing() -> None:
    for composition in COMPOSITIONS:
        assert Accountant(composition=composition).epsilon_delta(Charge(), DELTA) == (0.0, 0.0)
    assert zcdp_epsilon(0.0, DELTA) == 0.0


def test_rho_cannot_be_composed_as_gaussian() -> None:
    with pytest.raises(InvalidValueError, match="concentrated"):
        GAUSSIAN.epsilon(Charge.zcdp(0.1, 1), DELTA)


# -- charges ----------------------------------------------------------------------------


@given(st.lists(charges, min_size=1, max_size=30))
def test_sums_of_charges_are_never_below_exact(rows: list[Charge]) -> None:
    total = reduce(add, rows)
    for name in total.to_dict():
        exact = sum(Fraction(getattr(row, name)) for row in rows)
        assert Fraction(getattr(total, name)) >= exact
        assert getattr(total, name) <= float(exact) * (1 + 1e-13)


@given(costs, st.integers(1, 10_000))
def test_rows_of_a_charge_are_never_below_exact(cost: float, n_rows: int) -> None:
    exact = Fraction(cost) * n_rows
    assert Fraction(Charge.gaussian(cost, n_rows).mu_squared) >= Fraction(cost) ** 2 * n_rows
    assert Fraction(Charge.pure(cost, n_rows).pure_epsilon) >= exact
    assert Fraction(Charge.zcdp(cost, n_rows).rho) >= exact


@given(costs, st.integers(1, 100))
def test_pure_rows_are_charged_their_gaussian_equivalent(epsilon: float, n_rows: int) -> None:
    exact = Fraction(gaussian_equivalent_mu(epsilon)) ** 2 * n_rows
    assert Fraction(Charge.pure(epsilon, n_rows).pure_mu_squared) >= exact
    # Not below the equivalent by definition: the type I error at which its curve is fixed.
    kink = float(stats.norm.sf(gaussian_equivalent_mu(epsilon) / 2.0))
    assert kink <= 1.0 / (1.0 + math.exp(epsilon)) * (1 + 1e-12)


@given(charges)
def test_charge_survives_json(charge: Charge) -> None:
    assert Charge.from_dict(json.loads(json.dumps(charge.to_dict()))) == charge


def test_many_small_charges_are_not_lost() -> None:
    # In plain floats 1 + 1e-17 is 1, however often.
    total = Charge.zcdp(1.0, 1)
    for _ in range(100):
        total += Charge.zcdp(1e-17, 1)
    assert sum([1.0] + [1e-17] * 100) == 1.0
    assert Fraction(total.rho) >= 1 + 100 * Fraction(1e-17)


def test_smallest_and_largest_charges() -> None:
    tiny = Charge.pure(5e-324, 1)
    assert tiny.pure_epsilon_squared > 0.0
    assert tiny.pure_mu_squared > 0.0
    assert Charge.pure(0.0, 5).is_free
    assert Charge.gaussian(0.3, 0).is_free
    assert gaussian_equivalent_mu(1e4) > 0.0
    with pytest.raises(InvalidValueError):
        Charge.gaussian(1e200, 1)
    assert rounded_up(Fraction(1, 2)) == 0.5


@pytest.mark.parametrize(
    "fields",
    [
        {"mu_squared": -1.0},
        {"rho": math.nan},
        {"rho": math.inf},
        {"rho": 10**400},
        {"n_rows": 10**400},
        {"n_rows": -1},
        {"n_rows": 1.5},
        {"n_rows": True},
        {"mu_squared": "1"},
        {"pure_epsilon": 1.0},
        {"unknown": 1.0},
    ],
)
def test_nonsense_is_no_charge(fields: dict[str, object]) -> None:
    with pytest.raises(InvalidValueError):
        Charge.from_dict({**Charge().to_dict(), **fields})


def test_nonsense_is_refused() -> None:
    for call in (
        lambda: Charge.gaussian(-0.1, 1),
        lambda: Charge.pure(math.inf, 1),
        lambda: Charge.zcdp(math.nan, 1),
        lambda: Charge.gaussian(0.1, -1),
        lambda: Charge.gaussian(0.1, True),
        lambda: Charge.from_dict({"rho": 1.0}),
        lambda: Charge.from_dict(None),
        lambda: Accountant(composition="best"),
        lambda: FIXED.epsilon(Charge(), 0.0),
        lambda: FIXED.epsilon(Charge(), 1.0),
        lambda: zcdp_epsilon(-1.0, DELTA),
    ):
        with pytest.raises(InvalidValueError):
            call()


# -- training on drawn batches ------------------------------------------------------------

# Noise, rate, steps at delta 1e-5: an independent accountant's value, to three decimals.
DRAWN = [(1.0, 0.1, 100, 7.047), (2.0, 0.5, 10, 3.959), (1.0, 0.01, 1000, 1.828)]


@pytest.mark.filterwarnings("ignore")  # opacus and torch warn when they are imported
@pytest.mark.parametrize(("noise", "rate", "steps", "known"), DRAWN)
def test_drawn_batches_are_charged_from_above(
    noise: float, rate: float, steps: int, known: float
) -> None:
    accountants = pytest.importorskip("opacus.accountants")
    options = {"noise_multiplier": noise, "steps": steps, "delta": DELTA}

    ours = subsampled_epsilon(sample_rate=rate, **options)

    # The upper end of an interval of 0.02, rounded to three decimals.
    assert known - 5e-4 <= ours <= known + 0.02
    assert ours < subsampled_epsilon(sample_rate=1.0, **options)
    # Why its other accountant is not used: it promises more than is kept.
    central_limit = accountants.GaussianAccountant()
    central_limit.history = [(noise, rate, steps)]
    assert central_limit.get_epsilon(delta=DELTA) < known - 0.1


def test_whole_batches_are_exact_and_need_no_opacus(monkeypatch: pytest.MonkeyPatch) -> None:
    real = base.importlib.import_module

    def absent(name: str, *rest: object) -> object:
        if name.startswith("opacus"):
            raise ImportError(name)
        return real(name)

    monkeypatch.setattr(base.importlib, "import_module", absent)
    whole = subsampled_epsilon(noise_multiplier=2.0, sample_rate=1.0, steps=10, delta=DELTA)
    assert whole == pytest.approx(7.5113, abs=6e-5)
    assert subsampled_epsilon(noise_multiplier=2.0, sample_rate=0.5, steps=0, delta=DELTA) == 0.0
    with pytest.raises(MissingExtraError, match="dp-training"):
        subsampled_epsilon(noise_multiplier=2.0, sample_rate=0.5, steps=1, delta=DELTA)


def test_nonsense_training_is_refused() -> None:
    good = {"noise_multiplier": 1.0, "sample_rate": 0.1, "steps": 1, "delta": DELTA}
    for change in (
        {"noise_multiplier": 0.0},
        {"noise_multiplier": math.nan},
        {"sample_rate": 0.0},
        {"sample_rate": 1.1},
        {"steps": -1},
        {"delta": 0.0},
    ):
        with pytest.raises(InvalidValueError):
            subsampled_epsilon(**{**good, **change})
