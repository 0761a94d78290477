"""Coverage greedy: its bound, its limits, and what sites that say less or lie can do."""

import itertools
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from fedinfer_flower.errors import SelectionError
from fedinfer_flower.profile import CountsKind, SiteProfile
from fedinfer_flower.selection import Candidate, SelectionNeed, SiteRecord, make_selector
from fedinfer_flower.selection.class_counts import comparable_counts
from fedinfer_flower.selection.coverage_greedy import coverage, coverage_order

CLASSES = ("a", "b", "c")


def site(number, counts=None, *, kind=CountsKind.COUNTS, price=0.0, latencies=()):
    profile = SiteProfile(
        name=f"s{number}",
        classes=CLASSES,
        counts_kind=kind if counts is not None else CountsKind.WITHHELD,
        class_counts=None if counts is None else tuple(counts),
        price_per_query=price,
    )
    record = SiteRecord(latencies_s=tuple(latencies))
    return Candidate(site_id=number, profile=profile, record=record)


def need_of(**limits):
    return SelectionNeed(classes=CLASSES, **limits)


def greedy(**options):
    # Counts as they are: the bound is on coverage of these numbers.
    return make_selector("coverage-greedy", {"count_cap": 1e12} | options)


counts = arrays(np.float64, (6, 3), elements=st.integers(0, 50).map(float))


@given(counts_kc=counts, chosen=st.sets(st.integers(0, 5)), more=st.integers(0, 5))
def test_coverage_is_monotone_and_submodular(counts_kc, chosen, more):
    smaller = [k for k in chosen if k % 2]
    gain = coverage(counts_kc, {*chosen, more}) - coverage(counts_kc, chosen)
    gain_before = coverage(counts_kc, {*smaller, more}) - coverage(counts_kc, smaller)
    # Sums of three logarithms below 7.
    assert gain >= -1e-12
    if more not in chosen:
        assert gain <= gain_before + 1e-12


@given(counts_kc=counts, most=st.integers(1, 6))
def test_greedy_covers_as_much_as_the_bound_promises(counts_kc, most):
    candidates = [site(k, row) for k, row in enumerate(counts_kc)]
    found = greedy().select(candidates, need_of(at_most=most)).site_ids
    sets = itertools.combinations(range(6), most)
    best = max(coverage(counts_kc, chosen) for chosen in sets)
    assert len(found) == most
    # Nemhauser, Wolsey and Fisher; the slack is rounding of sums below 50.
    assert coverage(counts_kc, found) >= (1.0 - 1.0 / math.e) * best - 1e-9


@given(
    counts_kc=counts,
    prices=arrays(np.float64, 6, elements=st.integers(1, 20).map(float)),
    budget=st.integers(1, 60),
)
def test_greedy_within_a_budget_covers_as_much_as_the_bound_promises(counts_kc, prices, budget):
    candidates = [site(k, row, price=prices[k]) for k, row in enumerate(counts_kc)]
    affordable = [
        chosen
        for size in range(1, 7)
        for chosen in itertools.combinations(range(6), size)
        if prices[list(chosen)].sum() <= budget
    ]
    if not affordable:
        with pytest.raises(SelectionError):
            greedy().select(candidates, need_of(budget=float(budget)))
        return
    found = greedy().select(candidates, need_of(budget=float(budget))).site_ids
    best = max(coverage(counts_kc, chosen) for chosen in affordable)
    assert prices[list(found)].sum() <= budget
    # Leskovec et al., theorem 3.
    assert coverage(counts_kc, found) >= 0.5 * (1.0 - 1.0 / math.e) * best - 1e-9


def test_budget_uses_the_best_single_site_where_cheap_ones_cover_little():
    # By gain a credit the crumb comes first, and then the loaf does not fit.
    crumb, loaf = site(1, (1, 0, 0), price=0.1), site(2, (900, 900, 900), price=10.0)
    assert greedy().select([crumb, loaf], need_of(budget=10.0)).site_ids == (2,)


def test_budget_uses_gain_a_credit_where_one_dear_site_eats_the_money():
    dear = site(0, (30, 30, 30), price=9.0)
    cheap = [site(k, np.eye(3)[k - 1] * 25, price=3.0) for k in (1, 2, 3)]
    found = greedy().select([dear, *cheap], need_of(budget=9.0))
    assert set(found.site_ids) == {0}
    fine = [site(k, np.full(3, 20.0), price=3.0) for k in (1, 2, 3)]
    found = greedy().select([dear, *fine], need_of(budget=9.0))
    assert set(found.site_ids) == {1, 2, 3}


def test_budget_leaves_money_for_the_fewest_that_are_needed():
    dear = site(0, (900, 900, 900), price=9.0)
    cheap = [site(k, (1, 1, 1), price=1.0) for k in (1, 2, 3)]
    found = greedy().select([dear, *cheap], need_of(budget=10.0, at_least=3))
    assert set(found.site_ids) == {1, 2, 3}


def test_sites_that_are_known_to_be_slow_are_passed_over_and_unknown_ones_are_not():
    slow, quick = site(0, (900, 900, 900), latencies=[5.0] * 3), site(1, (1, 1, 1))
    found = greedy().select([slow, quick], need_of(latency_s=1.0))
    assert found.site_ids == (1,)
    with pytest.raises(SelectionError):
        greedy().select([slow, quick], need_of(latency_s=1.0, at_least=2))


def test_price_weight_stops_where_a_site_does_not_pay_for_itself():
    good, poor = site(0, (90, 90, 90), price=1.0), site(1, (1, 0, 0), price=1.0)
    assert greedy(price_weight=2.0).select([good, poor], need_of()).site_ids == (0,)
    assert greedy().select([good, poor], need_of()).site_ids == (0, 1)
    both = greedy(price_weight=2.0).select([good, poor], need_of(at_least=2))
    assert both.site_ids == (0, 1)


def test_a_site_that_adds_a_class_goes_before_a_larger_one_that_does_not():
    candidates = [site(0, (500, 500, 0)), site(1, (400, 400, 0)), site(2, (0, 0, 5))]
    assert greedy().select(candidates, need_of(at_most=2)).site_ids == (0, 2)
    assert make_selector("largest").select(candidates, need_of(at_most=2)).site_ids == (0, 1)


def test_order_of_greedy_is_that_of_its_selection():
    rng = np.random.default_rng(7)
    counts_kc = rng.integers(0, 300, (12, 3)).astype(float)
    candidates = [site(k, row) for k, row in enumerate(counts_kc)]
    order = coverage_order(counts_kc)
    assert sorted(order) == list(range(12))
    assert greedy().select(candidates, need_of(at_most=5)).site_ids == order[:5]
    assert coverage_order(counts_kc, 5) == order[:5]


def test_one_site_that_claims_a_trillion_does_not_hide_what_others_add():
    liar = site(0, (1e12, 1e12, 1e12))
    honest = [site(1, (50, 0, 0)), site(2, (0, 50, 0)), site(3, (40, 0, 0)), site(4, (0, 0, 50))]
    capped = make_selector("coverage-greedy").select([liar, *honest], need_of(at_most=4))
    # The liar is asked: claims are not checked. But the others still fill the gaps.
    assert set(capped.site_ids) == {0, 1, 2, 4}
    counts_kc = comparable_counts([liar, *honest], CLASSES, cap=10.0)
    gains = [coverage(counts_kc, [0, k]) - coverage(counts_kc, [0]) for k in (1, 2, 3, 4)]
    raw_kc = comparable_counts([liar, *honest], CLASSES)
    raw = [coverage(raw_kc, [0, k]) - coverage(raw_kc, [0]) for k in (1, 2, 3, 4)]
    # Uncapped, fifty examples beside a trillion are lost in the eleventh digit.
    assert min(gains) > 0.05
    assert max(raw) < 1e-9


# -- sites that say less -----------------------------------------------------------------


def test_presence_bits_alone_count_one():
    bits = [site(k, row, kind=CountsKind.PRESENCE) for k, row in enumerate(np.eye(3))]
    assert (comparable_counts(bits, CLASSES) == np.eye(3)).all()
    found = greedy().select([*bits, site(3, (1, 0, 0), kind=CountsKind.PRESENCE)], need_of())
    assert found.site_ids[3] in {0, 3}


def test_sites_that_say_less_stand_at_what_can_be_expected_of_them():
    stated = [site(0, (100, 0, 0)), site(1, (300, 60, 0))]
    bits = site(2, (1, 1, 0), kind=CountsKind.PRESENCE)
    silent = site(3)
    counts_kc = comparable_counts([*stated, bits, silent], CLASSES)
    assert counts_kc[2].tolist() == [200.0, 60.0, 0.0]
    # Of three that say anything, two have the class and each stands at its mean.
    assert counts_kc[3].tolist() == [200.0, pytest.approx(40.0), 0.0]


def test_saying_nothing_of_all_leaves_what_models_know():
    narrow = Candidate(site_id=1, profile=SiteProfile(name="n", classes=("b",)))
    assert comparable_counts([narrow, site(2)], CLASSES).tolist() == [[0, 1, 0], [1, 1, 1]]


def test_counts_of_no_candidates_have_a_column_for_each_class():
    assert comparable_counts([], CLASSES).shape == (0, 3)


@given(counts_kc=counts, cap=st.floats(1.0, 100.0))
def test_cap_bounds_counts_by_the_median_and_raises_none(counts_kc, cap):
    candidates = [site(k, row) for k, row in enumerate(counts_kc)]
    capped_kc = comparable_counts(candidates, CLASSES, cap=cap)
    assert (capped_kc <= counts_kc).all()
    for c in range(3):
        positive = counts_kc[:, c][counts_kc[:, c] > 0]
        if len(positive):
            # At most the median: of an even number, the lower of the two in the middle.
            assert capped_kc[:, c].max() <= cap * np.median(positive)
