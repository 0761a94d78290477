"""Bandits: little regret, a window that forgets, a floor that holds, and what they fall back on."""

import numpy as np
import pytest

from fedinfer_flower.errors import InvalidValueError, SelectionError
from fedinfer_flower.profile import SiteProfile
from fedinfer_flower.selection.bandit import gather_cells
from fedinfer_flower.selection.bandit_thompson import BanditThompson
from fedinfer_flower.selection.bandit_ucb import BanditUcb
from fedinfer_flower.selection.base import SelectionNeed, make_selector
from fedinfer_flower.selection.candidate import AuditTally, Candidate, SiteRecord

SEED = 20261121
NAMES = ["bandit-ucb", "bandit-thompson"]


def site(number, tallies=(), *, classes=("x",), merits=(), price=0.0):
    return Candidate(
        site_id=number,
        profile=SiteProfile(name=f"s{number}", classes=classes, price_per_query=price),
        record=SiteRecord(tallies=tuple(tallies), merits=tuple(merits)),
    )


def tally(right, asked, *, epoch=1, name="x"):
    return AuditTally(epoch=epoch, right={name: float(right)}, asked={name: float(asked)})


def need(**limits):
    return SelectionNeed(**({"classes": ("x",)} | limits))


def play(selector, accuracy_ek, *, m, audits=5):
    """Return the accuracy given up in each epoch; only sites that are asked are audited."""
    rng = np.random.default_rng(SEED)
    n_epochs, n_sites = accuracy_ek.shape
    seen = [[] for _ in range(n_sites)]
    lost = []
    for epoch in range(n_epochs):
        truth = accuracy_ek[epoch]
        asked = need(at_most=m, epoch=epoch, seed=SEED)
        chosen = selector.select([site(k, seen[k]) for k in range(n_sites)], asked).site_ids
        assert len(chosen) == m
        for k in chosen:
            right = rng.binomial(audits, truth[k])
            seen[k].append(tally(right, audits, epoch=epoch))
            if not selector.window and len(seen[k]) > 1:  # the same counts, fewer objects
                old = seen[k][0]
                seen[k] = [tally(old.right["x"] + right, old.asked["x"] + audits, epoch=epoch)]
        lost.append(np.sort(truth)[-m:].mean() - truth[list(chosen)].mean())
    return np.array(lost)


# -- learning ----------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_regret_on_a_stationary_toy_dies_out(name):
    accuracy = np.tile([0.4, 0.5, 0.5, 0.6, 0.6, 0.6, 0.85, 0.9], (300, 1))
    selector = make_selector(name, {"epsilon": 0.0, "eta": 1.0, "top": 2})

    lost = play(selector, accuracy, m=2)

    by_lot = 0.875 - accuracy[0].mean()  # 0.26, what asking at random gives up
    # A site that is 0.25 worse takes some 1.5 ln(3000) / 0.25^2 = 190 audits to rule out,
    # 40 epochs of five; six such sites, two asked at a time: learnt after 120 epochs.
    assert lost[-100:].mean() < 0.15 * by_lot
    assert lost[150:].sum() < lost[:150].sum()


@pytest.mark.parametrize("name", NAMES)
def test_window_finds_out_that_sites_have_changed(name):
    before, after = [0.9, 0.9, 0.5, 0.5, 0.5], [0.3, 0.3, 0.5, 0.9, 0.9]
    accuracy = np.array([before] * 150 + [after] * 40)
    options = {"epsilon": 0.1, "eta": 1.0, "top": 2}

    forgets = play(make_selector(name, options | {"window": 20}), accuracy, m=2)
    remembers = play(make_selector(name, options), accuracy, m=2)

    soon = slice(150, 190)  # two windows; staying with the old ones gives up 0.6
    assert forgets[soon].mean() < 0.3
    assert forgets[soon].mean() < 0.8 * remembers[soon].mean()


@pytest.mark.parametrize("name", NAMES)
def test_each_class_gets_a_site_that_knows_it(name):
    def specialist(number, good):
        tallies = [tally(95 if c == good else 5, 100, name=c) for c in ("x", "y", "z")]
        return site(number, tallies, classes=("x", "y", "z"))

    goods = ["x", "x", "x", "y", "z"]
    sites = [specialist(k, good) for k, good in enumerate(goods)]
    asked = need(classes=("x", "y", "z"), at_most=3)

    found = make_selector(name, {"epsilon": 0.0}).select(sites, asked)

    assert {goods[k] for k in found.site_ids} == {"x", "y", "z"}
    # Posterior means of the best site of each class: (95 + 1) / (100 + 2).
    assert found.expected_accuracy == pytest.approx(96 / 102)


def test_index_is_the_formula():
    sites = [site(0, [tally(50, 100)]), site(1, [tally(390, 400)]), site(2)]

    scores = BanditUcb(width=1.5).score(sites, need())

    expected = 0.5 + np.sqrt(1.5 * np.log(500.0) / 100.0)
    assert scores == pytest.approx([expected, 1.0, 1.0])
    narrow = BanditUcb(width=0.0).score(sites, need())
    assert narrow == pytest.approx([0.5, 0.975, 1.0])


def test_class_that_the_model_does_not_know_has_no_index():
    stranger = site(0, [tally(9, 10, name="y")], classes=("y",))

    for name in NAMES:
        assert make_selector(name).score([stranger], need()).tolist() == [0.0]


def test_draws_follow_the_posterior():
    sites = [site(0, [tally(30, 40)])]
    drawn = np.array([BanditThompson().score(sites, need(seed=s))[0] for s in range(400)])

    # Beta(31, 11): mean 0.738, standard deviation 0.067; five standard errors of 400 draws.
    assert abs(drawn.mean() - 31 / 42) < 5 * 0.067 / 20
    assert 0.05 < drawn.std() < 0.085


# -- what is not risked, and what is always tried ------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_incumbents_stay_where_the_index_would_risk_too_much(name):
    known = [site(0, [tally(95, 100)]), *(site(k) for k in range(1, 5))]
    risky = make_selector(name, {"epsilon": 0.0, "eta": 1.0})
    careful = make_selector(name, {"epsilon": 0.0, "eta": 0.1})

    bold = {risky.select(known, need(at_most=1, seed=s)).site_ids[0] for s in range(30)}
    safe = {careful.select(known, need(at_most=1, seed=s)).site_ids[0] for s in range(30)}

    assert bold - {0}
    assert safe == {0}


@pytest.mark.parametrize("name", NAMES)
def test_floor_holds_for_every_seed(name):
    rng = np.random.default_rng(SEED)
    sites = [site(k, [tally(rng.binomial(20, 0.2 + 0.07 * k), 20)]) for k in range(10)]
    means = gather_cells(sites, need(), 0).means()[:, 0]
    best = np.sort(means)[-3:].mean()

    for seed in range(40):
        selector = make_selector(name, {"epsilon": 0.0, "eta": 0.05, "top": 3})
        chosen = selector.select(sites, need(at_most=3, seed=seed)).site_ids
        assert means[list(chosen)].mean() >= 0.95 * best - 1e-12


def test_every_site_is_tried_now_and_then():
    sites = [site(0, [tally(1000, 1000)]), *(site(k, [tally(0, 1000)]) for k in range(1, 5))]
    selector = BanditUcb(epsilon=0.2)

    chosen = [
        selector.select(sites, need(at_most=1, epoch=e, seed=SEED)).site_ids[0] for e in range(400)
    ]

    tried = sum(k != 0 for k in chosen)
    # Binomial(400, 0.2): 80 with standard deviation 8, and five of them.
    assert 40 < tried < 120
    assert set(chosen) == {0, 1, 2, 3, 4}
    never = BanditUcb(epsilon=0.0)
    assert never.select(sites, need(at_most=1)).site_ids == (0,)


def test_site_drawn_by_lot_keeps_to_the_budget():
    rich = [tally(1000, 1000)]
    sites = [site(0, rich, price=1.0), site(1, rich, price=1.0), site(2, price=50.0), site(3)]
    selector = BanditUcb(epsilon=1.0, top=2)

    for seed in range(20):
        found = selector.select(sites, need(at_most=2, budget=2.0, seed=seed))
        assert 2 not in found.site_ids
        assert len(found.site_ids) == 2
        assert "lot" in found.reasons[found.site_ids[-1]]


# -- where there are no audits -------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_merits_stand_in_where_nothing_was_audited(name):
    merits = {0: 0.001, 1: 0.09, 2: 0.05}
    sites = [site(k, merits=[(e, v) for e in range(200)]) for k, v in merits.items()]
    selector = make_selector(name, {"epsilon": 0.0})

    found = selector.select(sites, need(at_most=1))

    assert found.site_ids == (1,)
    assert found.expected_accuracy is None  # a merit is no accuracy


def test_window_forgets_merits_as_well():
    sites = [
        site(0, merits=[(0, 0.9), (9, 0.1)]),
        site(1, merits=[(0, 0.1), (9, 0.2)]),
    ]

    cells = gather_cells(sites, need(epoch=9), 3)

    assert cells.right_ka.ravel().tolist() == [0.0, 1.0]
    assert cells.asked_ka.ravel().tolist() == [1.0, 1.0]


@pytest.mark.parametrize("name", NAMES)
def test_without_any_record_sites_are_taken_by_lot(name):
    sites = [site(k) for k in range(6)]

    first = {make_selector(name).select(sites, need(at_most=1, seed=s)).site_ids for s in range(60)}

    assert len(first) >= 4


@pytest.mark.parametrize("name", NAMES)
def test_too_few_sites_are_refused(name):
    with pytest.raises(SelectionError):
        make_selector(name).select([], need())
    with pytest.raises(SelectionError):
        make_selector(name).select([site(0, price=2.0)], need(budget=1.0))
    with pytest.raises(InvalidValueError):
        make_selector(name, {"epsilon": 1.1})
