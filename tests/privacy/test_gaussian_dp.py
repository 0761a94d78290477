from __future__ import annotations

import math

import pytest
from scipy import integrate, stats

from fedinfer_flower.errors import InvalidValueError
from fedinfer_flower.privacy.gaussian_dp import (
    compose_mu,
    delta_of,
    epsilon_of,
    mu_for,
    pure_epsilon_total,
)

DELTA = 1e-5

# Noise multiplier z, rows K, exact epsilon; dp-accounting's PLD gives the same 4 decimals.
EXACT = [
    (1, 1, 4.3772),
    (1, 100, 91.8173),
    (1, 1000, 633.93),
    (2, 10, 7.5113),
    (5, 100, 9.9973),
    (10, 1000, 17.8566),
    (50, 1, 0.0586),
    (100, 10_000, 4.3772),
]


@pytest.mark.parametrize(("z", "n_rows", "epsilon"), EXACT)
def test_epsilon_of_known_noise(z: float, n_rows: int, epsilon: float) -> None:
    # The table has 4 decimals, and 2 for the largest.
    slack = 5e-3 if epsilon > 100 else 6e-5
    assert abs(epsilon_of(compose_mu(1.0 / z, n_rows), DELTA) - epsilon) < slack


@pytest.mark.parametrize(("epsilon", "z"), [(1.0, 3.73), (3.0, 1.39), (8.0, 0.60), (16.0, 0.34)])
def test_noise_for_known_epsilon(epsilon: float, z: float) -> None:
    assert round(1.0 / mu_for(epsilon, DELTA), 2) == z


@pytest.mark.parametrize("epsilon", [0.0, 0.1, 1.0, 5.0])
@pytest.mark.parametrize("mu", [0.1, 1.0, 3.0])
def test_delta_is_the_integral_of_its_definition(epsilon: float, mu: float) -> None:
    def excess(x: float) -> float:
        return max(stats.norm.pdf(x - mu) - math.exp(epsilon) * stats.norm.pdf(x), 0.0)

    crossing = epsilon / mu + mu / 2.0
    integral = integrate.quad(excess, crossing, crossing + 12.0, epsabs=1e-14)[0]
    assert abs(delta_of(epsilon, mu) - integral) < 1e-10


@pytest.mark.parametrize("epsilon", [1e-6, 1e-2, 1.0, 16.0, 64.0])
@pytest.mark.parametrize("delta", [1e-12, 1e-9, 1e-5, 1e-3])
def test_calibration_keeps_the_promise_and_wastes_nothing(epsilon: float, delta: float) -> None:
    mu = mu_for(epsilon, delta)

    assert delta_of(epsilon, mu) <= delta
    assert delta_of(epsilon, mu * (1.0 + 1e-6)) > delta
    # Two roots, each found to about 1e-9 of its size at the smallest epsilon.
    assert epsilon_of(mu, delta) == pytest.approx(epsilon, rel=1e-6)


def test_extremes_neither_overflow_nor_fail() -> None:
    assert delta_of(1e6, 1.0) == 0.0
    assert delta_of(700.0, 100.0) == pytest.approx(1.0)
    assert 0.0 <= delta_of(64.0, 1e-12) < 1e-300
    assert mu_for(64.0, 1e-300) > 0.0
    assert epsilon_of(0.0, DELTA) == 0.0
    assert epsilon_of(1e-9, DELTA) == 0.0


@pytest.mark.filterwarnings("ignore")  # opacus and torch warn when they are imported
@pytest.mark.parametrize(("z", "n_rows"), [(1.0, 1), (1.0, 100), (2.0, 10), (5.0, 100)])
def test_composition_agrees_with_opacus(z: float, n_rows: int) -> None:
    prv = pytest.importorskip("opacus.accountants").PRVAccountant()
    for _ in range(n_rows):
        prv.step(noise_multiplier=z, sample_rate=1.0)

    ours = epsilon_of(compose_mu(1.0 / z, n_rows), DELTA)

    # PRV adds its own error bound of 0.01 to be on the safe side.
    assert abs(prv.get_epsilon(DELTA) - ours) <= 0.02


def test_pure_epsilon_takes_the_smaller_bound() -> None:
    assert pure_epsilon_total(1.0, 1, DELTA) == (1.0, 0.0)
    epsilon, delta = pure_epsilon_total(0.1, 10_000, DELTA)
    rho = 10_000 * 0.1**2 / 2.0
    assert epsilon == pytest.approx(rho + 2.0 * math.sqrt(rho * math.log(1e5)))
    assert epsilon < 1000.0
    assert delta == DELTA


def test_nonsense_is_refused() -> None:
    for epsilon, delta in [(0.0, 0.1), (-1.0, 0.1), (1.0, 0.0), (1.0, 1.0), (math.nan, 0.1)]:
        with pytest.raises(InvalidValueError):
            mu_for(epsilon, delta)
    for mu, delta in [(-1.0, 0.1), (math.inf, 0.1), (1.0, 0.0)]:
        with pytest.raises(InvalidValueError):
            epsilon_of(mu, delta)
