"""Cascade: the learnt policy is the best there is, is read strictly, and is followed."""

import dataclasses
import itertools
import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedinfer_flower.ensemble import make_rule
from fedinfer_flower.errors import InvalidValueError, SelectionError, ShapeError
from fedinfer_flower.profile import SiteProfile
from fedinfer_flower.selection.base import SelectionNeed
from fedinfer_flower.selection.candidate import Candidate, SiteRecord
from fedinfer_flower.selection.cascade import Cascade
from fedinfer_flower.selection.cascade_learning import learn_cascade
from fedinfer_flower.selection.cascade_policy import NOBODY, CascadePolicy
from fedinfer_flower.selection.sequential import SequentialAnswer

CLASSES = ("x", "y", "z")
RULE = make_rule("mean-probability")
thorough = settings(max_examples=60, derandomize=True, deadline=None)


def site(number, *, key_id="", name="", owner="", price=0.0):
    return Candidate(
        site_id=number,
        key_id=key_id,
        profile=SiteProfile(name=name or f"s{number}", classes=CLASSES, price_per_query=price),
        record=SiteRecord(owner=owner),
    )


def need(**limits):
    return SelectionNeed(**({"classes": CLASSES} | limits))


POLICY = CascadePolicy(
    classes=CLASSES,
    groups=(("s0", "s1", "s2"), ("s3", "s4", "s5"), ("s6", "s7", "s8")),
    base=1,
    thresholds_c=(0.5, 0.0, 2.0),
    addons_c=(0, NOBODY, 2),
    accuracy=0.75,
    cost=4.0,
    n_audits=200,
)
SITES = [site(k) for k in range(9)]


# -- learning ----------------------------------------------------------------------------


def audits(seed, *, n_groups, n_audits, n_classes):
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, n_classes, n_audits)
    # Few distinct values, so that margins tie as well.
    totals = rng.integers(0, 4, (n_groups, n_audits, n_classes)) + 0.5
    return totals * rng.choice([1.0, 2.0], (n_groups, 1, 1)), labels


def told(total):
    ordered = np.sort(total, axis=1)
    return total.argmax(axis=1), (ordered[:, -1] - ordered[:, -2]) / total.sum(axis=1)


def best_by_force(totals, labels, costs, budget, shares=None):
    """Return (most right, least cost) over every base, threshold and add-on."""
    n_groups, n_audits, n_classes = totals.shape

    def view(*places):
        total = totals[list(places)].sum(axis=0)
        return total if shares is None else total / shares[list(places)].sum(axis=0)

    best = None
    for base in range(n_groups):
        said, margins = told(view(base))
        cuts = [0.0, *(np.unique(margins) + 1e-9)]
        others = [NOBODY, *(g for g in range(n_groups) if g != base)]
        for plan in itertools.product(itertools.product(cuts, others), repeat=n_classes):
            answer, cost = said.copy(), np.full(n_audits, costs[base])
            for label, (cut, addon) in enumerate(plan):
                rows = (said == label) & (margins < cut)
                if addon != NOBODY:
                    answer[rows] = view(base, addon).argmax(axis=1)[rows]
                    cost[rows] += costs[addon]
            if cost.mean() <= budget * (1 + 1e-12):
                value = (int((answer == labels).sum()), -float(cost.mean()))
                best = value if best is None or value > best else best
    return best


@thorough
@given(
    seed=st.integers(0, 10**6),
    n_groups=st.integers(1, 3),
    budget=st.floats(1.0, 6.0),
    with_shares=st.booleans(),
)
def test_learnt_policy_is_the_best_of_all_policies(seed, n_groups, budget, with_shares):
    totals, labels = audits(seed, n_groups=n_groups, n_audits=6, n_classes=2)
    rng = np.random.default_rng(seed + 1)
    costs = rng.choice([1.0, 1.7, 3.0], n_groups)
    shares = rng.dirichlet(np.ones(n_groups), 2).T if with_shares else None
    if shares is not None:
        totals = totals * shares[:, None, :]
    groups = tuple((f"g{g}",) for g in range(n_groups))
    expected = best_by_force(totals, labels, costs, budget, shares)

    def learn():
        return learn_cascade(
            totals,
            labels,
            rule=RULE,
            classes=("x", "y"),
            groups=groups,
            costs_g=costs,
            budget=budget,
            shares_gc=shares,
        )

    if expected is None:
        with pytest.raises(SelectionError, match="budget"):
            learn()
        return
    policy = learn()
    assert round(policy.accuracy * 6) == expected[0]
    # Sums of the same few prices in another order.
    assert policy.cost == pytest.approx(-expected[1], abs=1e-9)


def followed(policy, totals, costs, *, shares=None, classes=CLASSES, names=None):
    """Play the audits through the selector and its route; return (answer, cost a row)."""
    selector = Cascade(policy=policy.to_json())
    candidates = [site(k) for k in range(9)]
    asked = need(classes=classes, n_queries=totals.shape[1])
    selection = selector.select(candidates, asked)
    route = selector.route(selection, candidates, asked, RULE)
    place = [int(group[0]) // 3 for group in selection.groups]
    answer = SequentialAnswer(
        RULE,
        classes=classes,
        group_sizes=[len(group) for group in selection.groups],
        n_queries=totals.shape[1],
        route=route,
        shares_gc=None if shares is None else shares[place],
    )
    cost = np.zeros(totals.shape[1])
    while answer.group is not None:
        group, rows = answer.group, answer.open_rows
        answer.add(group, totals[place[group]][rows], rows)
        cost[rows] += costs[place[group]]
    return answer.decide(), cost


@thorough
@given(seed=st.integers(0, 10**6), budget=st.floats(1.0, 6.0), with_shares=st.booleans())
def test_followed_policy_costs_and_knows_what_it_was_learnt_to(seed, budget, with_shares):
    rng = np.random.default_rng(seed)
    totals = rng.random((3, 40, 3))
    shares = rng.dirichlet(np.ones(3), 3).T if with_shares else None
    labels, costs = rng.integers(0, 3, 40), np.array([1.0, 2.0, 3.0])
    policy = learn_cascade(
        totals,
        labels,
        rule=RULE,
        classes=CLASSES,
        groups=POLICY.groups,
        costs_g=costs,
        budget=budget,
        shares_gc=shares,
    )

    prediction, cost = followed(policy, totals, costs, shares=shares)

    assert prediction.accuracy(labels) == pytest.approx(policy.accuracy, abs=1e-12)
    assert cost.mean() == pytest.approx(policy.cost, abs=1e-9)
    assert policy.cost <= budget * (1 + 1e-9)


def test_more_budget_never_makes_it_worse_on_the_audits():
    rng = np.random.default_rng(5)
    totals, labels = rng.random((3, 60, 3)), rng.integers(0, 3, 60)

    found = [
        learn_cascade(
            totals,
            labels,
            rule=RULE,
            classes=CLASSES,
            groups=POLICY.groups,
            costs_g=np.full(3, 3.0),
            budget=budget,
        ).accuracy
        for budget in (3.0, 3.5, 4.0, 5.0, 6.0)
    ]

    assert found == sorted(found)
    assert found[-1] > found[0]


@pytest.mark.parametrize(
    ("change", "error"),
    [
        ({"labels_t": np.array([0, 1, 3])}, InvalidValueError),
        ({"labels_t": np.array([0, 1])}, ShapeError),
        ({"costs_g": np.array([1.0, -1.0, 1.0])}, InvalidValueError),
        ({"costs_g": np.array([1.0])}, ShapeError),
        ({"budget": float("nan")}, InvalidValueError),
        ({"shares_gc": np.ones((2, 3))}, ShapeError),
    ],
)
def test_audits_that_do_not_fit_are_refused(change, error):
    given_ = {"labels_t": np.array([0, 1, 2]), "costs_g": np.ones(3), "budget": 2.0} | change
    labels = given_.pop("labels_t")

    with pytest.raises(error):
        learn_cascade(
            np.ones((3, 3, 3)), labels, rule=RULE, classes=CLASSES, groups=POLICY.groups, **given_
        )


# -- the document ------------------------------------------------------------------------


def test_policy_comes_back_as_it_went():
    assert CascadePolicy.from_json(POLICY.to_json()) == POLICY


PLAIN = json.loads(POLICY.to_json())


@pytest.mark.parametrize(
    "change",
    [
        {"format": "fedinfer-cascade/2"},
        {"more": 1},
        {"base": 3},
        {"base": True},
        {"base": -1},
        {"classes": ["x", "x", "z"]},
        {"classes": "xyz"},
        {"groups": [["s0"], ["s0"], ["s1"]]},
        {"groups": [["s0"], [], ["s1"]]},
        {"groups": [["s0"], [1], ["s1"]]},
        {"groups": "abc"},
        {"thresholds_c": [0.5, 0.0]},
        {"thresholds_c": [0.5, 0.0, 2.5]},
        {"thresholds_c": [0.5, 0.0, "1"]},
        {"thresholds_c": [0.5, 0.0, float("nan")]},
        {"addons_c": [0, -2, 2]},
        {"addons_c": [1, -1, 2]},
        {"addons_c": [0.0, -1, 2]},
        {"accuracy": 1.5},
        {"cost": float("inf")},
        {"cost": 10**400},
        {"n_audits": -1},
    ],
)
def test_other_documents_are_refused_when_the_selector_is_built(change):
    with pytest.raises(InvalidValueError, match="policy"):
        Cascade(policy=json.dumps(PLAIN | change))


@pytest.mark.parametrize("text", ["{", "[]", "null", "1", "[" * 100_000, '{"format":1}'])
def test_texts_that_are_no_policy_are_refused(text):
    with pytest.raises(InvalidValueError, match="policy"):
        Cascade(policy=text)


# -- selecting ---------------------------------------------------------------------------


def test_base_comes_first_and_each_label_goes_to_its_add_on():
    selector = Cascade(policy=POLICY.to_json())
    asked = need(n_queries=4)
    selection = selector.select(SITES, asked)
    answer = selector.begin(selection, SITES, asked, RULE)

    rows = np.array([[1.1, 1.0, 0.9], [2.8, 0.1, 0.1], [0.9, 1.1, 1.0], [0.1, 0.1, 2.8]])
    answer.add(0, rows, answer.open_rows)
    first = (answer.group, answer.open_rows.tolist())
    answer.add(1, np.array([[0.0, 3.0, 0.0]]), answer.open_rows)
    second = (answer.group, answer.open_rows.tolist())
    answer.add(2, np.array([[0.0, 0.0, 3.0]]), answer.open_rows)

    assert selection.groups == ((3, 4, 5), (0, 1, 2), (6, 7, 8))
    # Row 0 says x with a small margin, row 1 x with a large one, row 2 y, row 3 z.
    assert (first, second, answer.group) == ((1, [0]), (2, [3]), None)
    assert answer.decide().names == ["y", "x", "y", "z"]
    assert selection.expected_accuracy == 0.75


def test_policy_applies_to_classes_in_another_order():
    selector = Cascade(policy=POLICY.to_json())
    asked = need(classes=("z", "y", "x"))
    selection = selector.select(SITES, asked)

    route = selector.route(selection, SITES, asked, RULE)

    assert route.thresholds_c.tolist() == [2.0, 0.0, 0.5]
    assert route.addons_c.tolist() == [2, -1, 1]
    with pytest.raises(SelectionError, match="other classes"):
        selector.select(SITES, need(classes=("x", "y")))


def test_cascade_without_its_base_is_refused():
    selector = Cascade(policy=POLICY.to_json())

    with pytest.raises(SelectionError, match="lacks 1 of its 3"):
        selector.select([s for s in SITES if s.site_id != 4], need())
    with pytest.raises(SelectionError, match="distinct owners"):
        selector.select([site(k, owner=f"o{k % 2}") for k in range(9)], need())
    with pytest.raises(SelectionError, match="distinct owners"):
        selector.select(SITES, need(at_least=4))
    with pytest.raises(SelectionError, match="at_most"):
        selector.select(SITES, need(at_most=2))
    with pytest.raises(SelectionError, match="budget"):
        selector.select([site(k, price=1.0) for k in range(9)], need(budget=2.0))


@pytest.mark.parametrize(
    ("candidates", "limits", "why"),
    [
        (SITES[:7], {}, "distinct owners"),
        (SITES, {"at_most": 6}, "at_most"),
        ([site(k, price=1.0) for k in range(9)], {"budget": 7.0}, "budget"),
    ],
)
def test_add_on_that_does_not_fit_is_left_out_and_said(candidates, limits, why):
    selector = Cascade(policy=POLICY.to_json())

    selection = selector.select(candidates, need(**limits))

    route = selector.route(selection, candidates, need(**limits), RULE)
    assert selection.groups == ((3, 4, 5), (0, 1, 2))
    assert why in selection.refused[6]
    assert route.addons_c.tolist() == [1, -1, -1]  # rows of z stay with the base


def test_site_with_a_key_is_not_found_by_the_name_it_takes():
    selector = Cascade(policy=POLICY.to_json())
    keyed = [dataclasses.replace(s, key_id=s.profile.name) for s in SITES]
    thief = site(99, key_id="other", name="s4")

    found = selector.select([*keyed, thief], need()).site_ids

    assert 99 not in found
    with pytest.raises(SelectionError, match="lacks"):
        selector.select([*(s for s in keyed if s.site_id != 4), thief], need())
    with pytest.raises(SelectionError, match="lacks"):
        selector.select([*SITES, site(98, name="s4")], need())  # which of the two?


def test_untrained_cascade_asks_two_groups_by_margin():
    asked = need(n_queries=2)
    selection = Cascade().select(SITES, asked)
    answer = Cascade().begin(selection, SITES, asked, RULE)

    answer.add(0, np.array([[2.8, 0.1, 0.1], [1.1, 1.0, 0.9]]), answer.open_rows)

    assert [len(group) for group in selection.groups] == [3, 3]
    assert (answer.group, answer.open_rows.tolist()) == (1, [1])
    one = Cascade().select(SITES[:3], need())
    assert (Cascade().route(one, SITES, need(), RULE).addons_c == -1).all()


def test_shares_make_one_group_speak_as_if_it_were_asked_alone():
    counts = np.array([[1.0, 8.0, 5.0], [9.0, 2.0, 5.0]])
    candidates = [
        dataclasses.replace(
            site(k),
            profile=SiteProfile(
                name=f"s{k}",
                classes=CLASSES,
                counts_kind="counts",
                class_counts=tuple(counts[k // 3] / 3),
            ),
        )
        for k in range(6)
    ]
    rule, asked = make_rule("class-share"), need()
    selection = Cascade().select(candidates, asked)
    totals = counts.sum(axis=0)
    answer = Cascade().begin(selection, candidates, asked, rule, class_totals=totals)
    share = sum(counts[int(k) // 3] / 3 for k in selection.groups[0]) / totals
    assert not np.allclose(share, share[0])  # else dividing by it would change nothing

    answer.add(0, np.array([[0.2, 0.5, 0.3]]) * share, answer.open_rows)

    assert answer.decide().probabilities[0] == pytest.approx([0.2, 0.5, 0.3], abs=1e-12)
