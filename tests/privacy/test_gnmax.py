"""GNMax: the mechanism, its account, and bounds against divergences that are integrated.

Statistical tests have a significance of 1e-6: the noise has no seed.
"""

from __future__ import annotations

import dataclasses
import json
import math
from decimal import Decimal, localcontext

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from scipy import stats
from scipy.special import log_ndtr, logsumexp

from fedinfer_flower.errors import (
    BudgetExceededError,
    InvalidScoresError,
    InvalidValueError,
    ShapeError,
)
from fedinfer_flower.privacy import noise
from fedinfer_flower.privacy.gaussian_dp import delta_of, epsilon_of
from fedinfer_flower.privacy.gnmax import ABSTAIN, ConfidenceCheck, GNMax, vote_counts
from fedinfer_flower.privacy.gnmax_account import GNMaxAccount
from fedinfer_flower.privacy.gnmax_accounting import (
    ORDERS,
    data_dependent_rdp,
    epsilon_of_rdp,
    log_other_label,
    log_rarer_check,
    public_epsilon,
)

SIGNIFICANCE = 1e-6
SOME_ORDERS = np.array([1.1, 1.5, 2.0, 3.0, 5.0, 10.0, 30.0, 100.0])
# Divergences below this are lost in the rounding of sums that make up 1.
RESOLUTION = 1e-10


# -- oracles: written from the definitions, sharing no code with the package -----------------


def log_label_chances(counts, sigma: float) -> np.ndarray:
    """Integrate P(argmax of counts + noise = i) = int phi(x; n_i) prod_j Phi(x; n_j) dx."""
    counts = np.asarray(counts, float)
    # The rule of rectangles converges faster than any power for Gaussians. Even a class far
    # below the top has its mass between itself and a little above the top.
    x = np.linspace(counts.min() - 12 * sigma, counts.max() + 20 * sigma, 4001)
    z = (x[:, None] - counts) / sigma
    log_cdf = log_ndtr(z)
    others = log_cdf.sum(axis=1, keepdims=True) - log_cdf
    log_chances = logsumexp(stats.norm.logpdf(z) + others, axis=0) + np.log((x[1] - x[0]) / sigma)
    assert abs(logsumexp(log_chances)) < 1e-9
    return log_chances


def divergence(log_p: np.ndarray, log_q: np.ndarray, order: float) -> float:
    return float(logsumexp(order * log_p + (1.0 - order) * log_q)) / (order - 1.0)


def neighbours(counts):
    for source in range(len(counts)):
        for target in range(len(counts)):
            if source != target and counts[source] > 0:
                moved = list(counts)
                moved[source] -= 1
                moved[target] += 1
                yield moved


def bound(counts, sigma: float, *, any_neighbour: bool = False) -> np.ndarray:
    log_q = log_other_label(np.array([counts]), sigma=sigma, any_neighbour=any_neighbour)
    return data_dependent_rdp(log_q, mu=math.sqrt(2.0) / sigma, orders=SOME_ORDERS)[0]


def theorem_6(log_q: float, mu: float, order: float) -> float | None:
    """Evaluate the formulas of the paper with 60 digits; None where it says nothing."""
    with localcontext(prec=60):
        q, slope, lam = Decimal(log_q).exp(), Decimal(mu) ** 2 / 2, Decimal(order)
        m2 = ((1 / q).ln() / slope).sqrt()
        m1 = m2 + 1
        if m2 <= 1 or lam > m1:
            return None
        e1, e2 = m1 * slope, m2 * slope
        if q > ((m2 - 1) * e2).exp() / (m1 / (m1 - 1) * m2 / (m2 - 1)) ** m2:
            return None
        inner = (q * e2.exp()) ** ((m2 - 1) / m2)
        if inner >= 1:
            return None
        a, b = (1 - q) / (1 - inner), e1.exp() / q ** (1 / (m1 - 1))
        total = (1 - q) * a ** (lam - 1) + q * b ** (lam - 1)
        return float(total.ln() / (lam - 1))


# -- bounds on any data ----------------------------------------------------------------------


def test_price_on_any_data_is_the_closed_form() -> None:
    sigma = 7.0
    # q = 1 says nothing of the data: order / sigma^2 is left (proposition 8).
    rdp = data_dependent_rdp(np.array([0.0]), mu=math.sqrt(2.0) / sigma)
    np.testing.assert_allclose(rdp[0], ORDERS / sigma**2, rtol=1e-14)
    assert GNMax(sigma=sigma).row_mu_squared / 2.0 == pytest.approx(1 / sigma**2)


def test_renyi_divergence_of_neighbouring_noisy_counts_is_the_closed_form() -> None:
    # Two counts move by one: D_a of two unit-distance Gaussians each, integrated.
    sigma, order = 2.0, 3.0
    x = np.linspace(-60.0, 60.0, 20_001)
    log_p, log_q = stats.norm.logpdf(x, 0.0, sigma), stats.norm.logpdf(x, 1.0, sigma)
    one_count = divergence(log_p + math.log(x[1] - x[0]), log_q + math.log(x[1] - x[0]), order)
    assert 2.0 * one_count == pytest.approx(order / sigma**2, rel=1e-9)


@given(st.floats(0.01, 30.0), st.sampled_from([1e-3, 1e-5, 1e-9]))
def test_public_epsilon_is_the_smaller_of_two_valid_bounds(mu: float, delta: float) -> None:
    epsilon = public_epsilon(mu**2, delta=delta)
    assert epsilon == pytest.approx(epsilon_of(mu, delta), rel=1e-9)
    # The Renyi bound is valid too, and never smaller than the exact one.
    renyi = epsilon_of_rdp(ORDERS * mu**2 / 2.0, delta=delta)
    assert epsilon <= renyi * (1 + 1e-12)


def test_conversion_from_renyi_agrees_with_opacus() -> None:
    analysis = pytest.importorskip("opacus.accountants.analysis.rdp")
    rdp = ORDERS * 0.37
    theirs, _ = analysis.get_privacy_spent(orders=list(ORDERS), rdp=list(rdp), delta=1e-5)
    assert epsilon_of_rdp(rdp, delta=1e-5) == pytest.approx(theirs, rel=1e-9)


# -- bounds on these data ----------------------------------------------------------------------

HISTOGRAMS = st.lists(st.integers(0, 40), min_size=2, max_size=4).filter(any)
SIGMAS = st.sampled_from([0.5, 1.0, 2.0, 4.0, 8.0, 16.0])


@settings(max_examples=150, deadline=None)
@given(HISTOGRAMS, SIGMAS)
@example([40, 0], 0.5)
@example([20, 20], 4.0)
@example([30, 10, 9], 8.0)
@example([1, 0], 2.0)
def test_no_neighbour_is_farther_than_the_bound(counts: list[int], sigma: float) -> None:
    here = log_label_chances(counts, sigma)
    one_sided, both = bound(counts, sigma), bound(counts, sigma, any_neighbour=True)
    for moved in neighbours(counts):
        there = log_label_chances(moved, sigma)
        for order, most, most_both in zip(SOME_ORDERS, one_sided, both, strict=True):
            assert divergence(here, there, order) <= most * (1 + 1e-9) + RESOLUTION
            assert divergence(there, here, order) <= most_both * (1 + 1e-9) + RESOLUTION


def test_the_published_bound_holds_in_one_direction_only() -> None:
    counts, moved, sigma, order = [29, 15], [28, 16], 0.5, np.array([4.0])
    here, there = log_label_chances(counts, sigma), log_label_chances(moved, sigma)
    bounds = {}
    for both in (False, True):
        log_q = log_other_label(np.array([counts]), sigma=sigma, any_neighbour=both)
        bounds[both] = float(data_dependent_rdp(log_q, mu=math.sqrt(2) / sigma, orders=order)[0, 0])

    reverse = divergence(there, here, 4.0)

    assert divergence(here, there, 4.0) <= bounds[False] < 1e-8
    assert 2.0 < reverse <= bounds[True]


@settings(max_examples=100, deadline=None)
@given(HISTOGRAMS, SIGMAS)
def test_q_covers_the_chance_of_another_label(counts: list[int], sigma: float) -> None:
    top = int(np.argmax(counts))

    def other(histogram) -> float:
        return float(np.exp(np.delete(log_label_chances(histogram, sigma), top)).sum())

    batch = np.array([counts])
    q = float(np.exp(log_other_label(batch, sigma=sigma)[0]))
    worst = float(np.exp(log_other_label(batch, sigma=sigma, any_neighbour=True)[0]))
    assert other(counts) <= q * (1 + 1e-9) + 1e-300
    for moved in neighbours(counts):
        assert other(moved) <= worst * (1 + 1e-9) + 1e-300
    assert q <= worst


def test_q_is_the_sum_of_the_paper_but_for_a_grid_step() -> None:
    counts, sigma = np.array([50.0, 30.0, 12.0]), 11.0
    direct = sum(0.5 * math.erfc((50.0 - n) / (2.0 * sigma)) for n in counts[1:])
    q = math.exp(log_other_label(np.array([[50, 30, 12]]), sigma=sigma)[0])
    assert direct < q < direct * (1 + 1e-3)  # a step of 2^-12 votes, density over q at most 4


@given(st.floats(-700.0, -1e-3), st.floats(0.02, 4.0), st.sampled_from(list(SOME_ORDERS)))
def test_bound_is_theorem_6_where_it_applies_and_any_data_elsewhere(log_q, mu, order) -> None:
    got = float(data_dependent_rdp(np.array([log_q]), mu=mu, orders=np.array([order]))[0, 0])
    any_data = order * mu**2 / 2.0
    expected = theorem_6(log_q, mu, order)
    if expected is None:
        assert got == pytest.approx(any_data, rel=1e-12)
    else:
        # Doubles sum logarithms near 0: absolute error of a few units of rounding.
        assert got == pytest.approx(min(expected, any_data), rel=1e-7, abs=1e-13)


def test_a_large_q_falls_back_to_any_data() -> None:
    sigma = 20.0
    for counts in ([25, 25], [30, 20], [100, 99, 98]):
        np.testing.assert_allclose(bound(counts, sigma), SOME_ORDERS / sigma**2, rtol=1e-14)
    # Orders above m_1 are not covered by the theorem, however small q is.
    mu, log_q = 1.0, -50.0
    m_1 = math.sqrt(2.0 * 50.0) + 1.0
    got = data_dependent_rdp(np.array([log_q]), mu=mu, orders=np.array([m_1 * 1.01, 2.0]))[0]
    assert got[0] == pytest.approx(m_1 * 1.01 / 2.0)
    assert got[1] < 1e-3


def test_bound_falls_with_the_margin_to_nothing() -> None:
    sigma = 5.0
    for both in (False, True):
        bounds = np.array(
            [bound([50 + gap, 50], sigma, any_neighbour=both) for gap in range(0, 400, 5)]
        )
        assert (np.diff(bounds, axis=0) <= 1e-12).all()
        assert bounds[-1, 2] < 1e-12
        assert (bounds <= SOME_ORDERS / sigma**2 * (1 + 1e-12)).all()


def test_q_beyond_floats_is_no_trouble() -> None:
    log_q = np.array([-math.inf, -1e15, -1e5, -1e-300, 0.0, 1.0])
    rdp = data_dependent_rdp(log_q, mu=0.3)
    assert np.isfinite(rdp).all()
    assert (rdp >= 0.0).all()
    assert rdp[0, 50] == 0.0
    np.testing.assert_allclose(rdp[-1], ORDERS * 0.045, rtol=1e-12)


@settings(max_examples=100, deadline=None)
@given(st.integers(0, 40), st.floats(1.0, 40.0), SIGMAS)
def test_no_neighbour_is_farther_than_the_bound_of_the_check(top, threshold, sigma) -> None:
    def log_chances(count: float) -> np.ndarray:
        on_grid = round(threshold * 4096) / 4096
        above = (count - on_grid + 0.5 / 4096) / sigma
        return np.array([log_ndtr(above), log_ndtr(-above)])

    counts, mu = np.array([[top, 0]]), 1.0 / sigma
    options = {"threshold": threshold, "sigma": sigma}
    rdp = data_dependent_rdp(log_rarer_check(counts, **options), mu=mu, orders=SOME_ORDERS)[0]
    log_q = log_rarer_check(counts, **options, any_neighbour=True)
    both = data_dependent_rdp(log_q, mu=mu, orders=SOME_ORDERS)[0]
    for moved in (top - 1, top + 1):
        here, there = log_chances(top), log_chances(moved)
        for order, most, most_both in zip(SOME_ORDERS, rdp, both, strict=True):
            assert divergence(here, there, order) <= most * (1 + 1e-9) + RESOLUTION
            assert divergence(there, here, order) <= most_both * (1 + 1e-9) + RESOLUTION


# -- mechanism ---------------------------------------------------------------------------------


def test_labels_come_with_the_chances_of_noisy_counts() -> None:
    counts, sigma, n_rows = [12, 9, 5], 4.0, 100_000
    labels = GNMax(sigma=sigma).release(np.tile(counts, (n_rows, 1)))
    expected = n_rows * np.exp(log_label_chances(counts, sigma))
    assert stats.chisquare(np.bincount(labels), expected).pvalue > SIGNIFICANCE


def test_check_passes_with_its_chance() -> None:
    n_rows, check = 50_000, ConfidenceCheck(threshold=60.0, sigma=10.0)
    labels = GNMax(sigma=1.0, check=check).release(np.tile([55, 0], (n_rows, 1)))
    answered = int((labels != ABSTAIN).sum())
    assert stats.binomtest(answered, n_rows, stats.norm.sf(0.5)).pvalue > SIGNIFICANCE


def test_ties_go_to_the_lowest_class(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        noise, "gaussian_integers", lambda shape, std: np.zeros(shape, dtype=np.int64)
    )
    counts = np.array([[3, 3, 0], [0, 3, 3], [2, 2, 2], [0, 0, 0]])
    assert GNMax(sigma=1.0).release(counts).tolist() == [0, 1, 0, 0]
    check = ConfidenceCheck(threshold=3.0, sigma=1.0)
    assert GNMax(sigma=1.0, check=check).release(counts).tolist() == [0, 1, ABSTAIN, ABSTAIN]


def test_noise_is_integers_of_the_stated_size(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def record(shape, std):
        asked.append((shape, std))
        return np.zeros(shape, dtype=np.int64)

    monkeypatch.setattr(noise, "gaussian_integers", record)
    check = ConfidenceCheck(threshold=3.0, sigma=7.0)
    GNMax(sigma=2.0, check=check).release(np.array([[3, 1], [2, 2]]))
    # One draw a count for the answer, and noise of its own for the check.
    assert asked == [((2, 2), 2.0 * 4096), ((2,), 7.0 * 4096)]


def audited_epsilon(first: np.ndarray, second: np.ndarray, label: int, delta: float) -> float:
    """Lower bound of epsilon from how often a label comes out; Clopper-Pearson."""
    hits, n = int((first == label).sum()), len(first)
    low = stats.beta.ppf(SIGNIFICANCE / 2, hits, n - hits + 1)
    misses = int((second == label).sum())
    high = stats.beta.ppf(1 - SIGNIFICANCE / 2, misses + 1, len(second) - misses)
    return math.log(max(low - delta, 1e-12) / high)


def test_audit_finds_no_more_than_is_claimed_and_all_of_it_without_noise() -> None:
    n_rows, delta = 200_000, 1e-5
    here, there = np.tile([26, 25], (n_rows, 1)), np.tile([25, 26], (n_rows, 1))
    for sigma in (1.0, 3.0):
        mechanism = GNMax(sigma=sigma)
        found = audited_epsilon(mechanism.release(here), mechanism.release(there), 0, delta)
        claimed = public_epsilon(mechanism.row_mu_squared, delta=delta)
        # Two Gaussians sqrt(2) apart in L2: arg max of two classes is their best test.
        best = stats.norm.cdf(1 / (math.sqrt(2) * sigma)) / stats.norm.sf(
            1 / (math.sqrt(2) * sigma)
        )
        assert 0.9 * math.log(best) < found <= claimed
    # The unprotected form: one voter turns the label for certain.
    found = audited_epsilon(here.argmax(axis=1), there.argmax(axis=1), 0, delta)
    assert found > 8.0


def test_hypothesis_test_by_label_keeps_to_the_exact_delta() -> None:
    sigma = 2.0
    here, there = (np.exp(log_label_chances(c, sigma)) for c in ([26, 25], [25, 26]))
    for epsilon in (0.0, 0.3, 0.6):
        gap = float(np.maximum(here - math.exp(epsilon) * there, 0.0).sum())
        assert gap <= delta_of(epsilon, math.sqrt(2.0) / sigma) * (1 + 1e-9)  # quadrature
    # At epsilon 0 the label is the best test there is: nothing is wasted.
    gap = float(np.maximum(here - there, 0.0).sum())
    assert gap == pytest.approx(delta_of(0.0, math.sqrt(2.0) / sigma), rel=1e-6)


# -- account -----------------------------------------------------------------------------------

CHECK = ConfidenceCheck(threshold=70.0, sigma=30.0)
COUNTS = np.array([[95, 3, 2], [40, 35, 25], [80, 20, 0]])


def test_account_adds_up_rows_and_answers() -> None:
    account = GNMaxAccount(GNMax(sigma=10.0, check=CHECK), epsilon_cap=8.0, delta=1e-5)
    labels = np.concatenate([account.release(COUNTS), account.release(COUNTS[:1])])
    report = account.report()
    answered = int((labels != ABSTAIN).sum())
    assert (report.n_rows, report.n_answered) == (4, answered)
    expected = answered * 2.0 / 100.0 + 4 / 900.0
    assert report.mu_squared == pytest.approx(expected, rel=1e-9)
    assert report.public_epsilon == pytest.approx(epsilon_of(math.sqrt(expected), 1e-5), rel=1e-6)


def test_nothing_asked_costs_nothing() -> None:
    account = GNMaxAccount(GNMax(sigma=10.0, check=CHECK), epsilon_cap=8.0, delta=1e-5)
    assert account.release(np.empty((0, 3), dtype=np.int64)).shape == (0,)
    report = account.report()
    assert (report.public_epsilon, report.mu_squared, report.n_rows) == (0.0, 0.0, 0)
    assert report.private_epsilon == 0.0


def test_agreement_is_cheap_on_these_data_only() -> None:
    epsilons = {}
    for name, row in {"agree": [250, 0], "split": [125, 125]}.items():
        account = GNMaxAccount(GNMax(sigma=20.0), epsilon_cap=50.0, delta=1e-5)
        account.release(np.tile(row, (500, 1)))
        report = account.report()
        epsilons[name] = report
        assert report.private_epsilon_one_sided <= report.private_epsilon <= report.public_epsilon
    assert epsilons["agree"].public_epsilon == epsilons["split"].public_epsilon
    assert epsilons["split"].private_epsilon == epsilons["split"].public_epsilon
    assert epsilons["agree"].private_epsilon < epsilons["agree"].public_epsilon / 5.0


def test_what_a_report_writes_does_not_depend_on_the_votes() -> None:
    written = []
    for row in ([250, 0], [126, 124]):
        account = GNMaxAccount(GNMax(sigma=20.0), epsilon_cap=50.0, delta=1e-5)
        account.release(np.tile(row, (100, 1)))
        report = account.report()
        assert report.private_epsilon >= 0.0  # worked out, and still not written
        serialisers = (
            lambda r: json.dumps(r.to_dict()),
            lambda r: json.dumps(dataclasses.asdict(r)),
            repr,
            str,
        )
        written.append([serialise(report) for serialise in serialisers])
        assert "private" not in " ".join(written[-1])
        with pytest.raises(TypeError):
            json.dumps(vars(report))
    assert written[0] == written[1]


@settings(max_examples=30, deadline=None)
@given(st.lists(st.integers(1, 12), min_size=1, max_size=12), st.booleans())
def test_cap_holds_for_any_sequence_of_batches(sizes: list[int], confident: bool) -> None:
    mechanism = GNMax(sigma=15.0, check=CHECK if confident else None)
    account = GNMaxAccount(mechanism, epsilon_cap=2.0, delta=1e-5)
    rng = np.random.default_rng(1)
    for size in sizes:
        before = account.report()
        try:
            account.release(COUNTS[rng.integers(0, 3, size)])
        except BudgetExceededError:
            assert account.report() == before
            most = before.mu_squared + size * mechanism.row_mu_squared
            assert epsilon_of(math.sqrt(most), 1e-5) > 2.0
        assert account.report().public_epsilon <= 2.0


def test_earlier_spending_counts() -> None:
    first = GNMaxAccount(GNMax(sigma=10.0), epsilon_cap=2.0, delta=1e-5)
    first.release(COUNTS)
    spent = first.report().mu_squared
    second = GNMaxAccount(GNMax(sigma=10.0), epsilon_cap=2.0, delta=1e-5, mu_squared_before=spent)
    assert second.report().public_epsilon == pytest.approx(first.report().public_epsilon)
    assert second.report().private_epsilon == pytest.approx(first.report().public_epsilon)
    with pytest.raises(BudgetExceededError):
        GNMaxAccount(GNMax(sigma=10.0), epsilon_cap=2.0, delta=1e-5, mu_squared_before=1e3)


# -- votes and options ---------------------------------------------------------------------------


@given(st.integers(1, 6), st.integers(0, 5), st.integers(2, 4), st.integers(0, 2**32 - 1))
def test_counts_are_counts(n_voters: int, n_rows: int, n_classes: int, seed: int) -> None:
    labels = np.random.default_rng(seed).integers(0, n_classes, (n_voters, n_rows))
    counts = vote_counts(labels, n_classes=n_classes)
    for row in range(n_rows):
        for label in range(n_classes):
            assert counts[row, label] == sum(int(v == label) for v in labels[:, row])


@pytest.mark.parametrize(
    ("call", "error"),
    [
        (lambda: vote_counts([[0, 3]], n_classes=3), InvalidScoresError),
        (lambda: vote_counts([[0, -1]], n_classes=3), InvalidScoresError),
        (lambda: vote_counts([0, 1], n_classes=3), ShapeError),
        (lambda: vote_counts([[0.0, 1.0]], n_classes=3), ShapeError),
        (lambda: GNMax(sigma=1.0).release(np.array([[1.5, 0.0]])), ShapeError),
        (lambda: GNMax(sigma=1.0).release(np.array([[1]])), ShapeError),
        (lambda: GNMax(sigma=1.0).release(np.array([[-1, 2]])), InvalidScoresError),
        (lambda: GNMax(sigma=1.0).release(np.array([[2**32, 2]])), InvalidScoresError),
        (lambda: GNMax(sigma=0.0), InvalidValueError),
        (lambda: GNMax(sigma=math.nan), InvalidValueError),
        (lambda: GNMax(sigma=math.inf), InvalidValueError),
        (lambda: ConfidenceCheck(threshold=0.0, sigma=1.0), InvalidValueError),
        (lambda: ConfidenceCheck(threshold=math.nan, sigma=1.0), InvalidValueError),
        (lambda: ConfidenceCheck(threshold=1.0, sigma=-1.0), InvalidValueError),
        (lambda: GNMaxAccount(GNMax(sigma=1.0), epsilon_cap=0.0, delta=0.1), InvalidValueError),
        (lambda: GNMaxAccount(GNMax(sigma=1.0), epsilon_cap=1.0, delta=1.0), InvalidValueError),
        (
            lambda: GNMaxAccount(
                GNMax(sigma=1.0), epsilon_cap=1.0, delta=0.1, mu_squared_before=-1.0
            ),
            InvalidValueError,
        ),
        (lambda: epsilon_of_rdp(ORDERS, delta=0.0), InvalidValueError),
    ],
)
def test_what_makes_no_sense_is_refused(call, error) -> None:
    with pytest.raises(error):
        call()
