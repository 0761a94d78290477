"""Early exit: which rows go on, that lossless changes nothing, and who is in a group."""

import dataclasses

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedinfer_flower.ensemble import make_rule
from fedinfer_flower.ensemble.base import SiteContext
from fedinfer_flower.errors import InvalidValueError, SelectionError, ShapeError
from fedinfer_flower.profile import CountsKind, SiteProfile
from fedinfer_flower.selection.base import SelectionNeed, make_selector
from fedinfer_flower.selection.candidate import Candidate, SiteRecord
from fedinfer_flower.selection.early_exit import EarlyExit, MarginRoute
from fedinfer_flower.selection.sequential import SequentialAnswer
from fedinfer_flower.selection.sequential_bound import group_shares, remaining_bound

CLASSES = ("x", "y", "z")
BOUNDED = (
    *("mean-probability", "majority-vote", "class-share", "prior-corrected-class-share"),
    *("open-set", "open-set-class-share", "borda", "product-of-experts", "competence-vote"),
    *("entropy-weighted", "margin-weighted", "confidence-weighted", "mean-logit"),
)
# Deterministic, and no deadline: each example builds a few small arrays.
thorough = settings(max_examples=60, derandomize=True, deadline=None)


def site(number, counts=(5.0, 5.0, 5.0), *, owner="", cluster="", price=0.0, kind="counts"):
    return Candidate(
        site_id=number,
        profile=SiteProfile(
            name=f"s{number}",
            classes=CLASSES,
            counts_kind=CountsKind(kind),
            class_counts=None if kind == "withheld" else tuple(counts),
            price_per_query=price,
        ),
        record=SiteRecord(owner=owner, cluster=cluster),
    )


def need(**limits):
    return SelectionNeed(classes=CLASSES, **limits)


def world(seed, *, n_sites, n_rows, sharpness):
    """Return candidates and logits of sites that know classes to different degrees."""
    rng = np.random.default_rng(seed)
    counts = np.floor(rng.dirichlet([0.5] * n_sites, len(CLASSES)).T * 60)
    counts[:, 0] += 1  # every site has something
    candidates = [site(k, counts[k]) for k in range(n_sites)]
    truth = rng.normal(size=(n_rows, len(CLASSES))) * sharpness
    return candidates, truth + rng.normal(size=(n_sites, n_rows, len(CLASSES)))


def scores_of(rule, candidates, logits):
    counts = np.stack([c.counts(CLASSES) for c in candidates])
    totals = counts.sum(axis=0)
    rows = logits.shape[1]
    found = [
        rule.score(
            logits[k],
            SiteContext(
                present=counts[k] > 0,
                class_counts=counts[k],
                class_totals=totals,
                confusion=np.full((3, 3), 0.2) + 0.4 * np.eye(3),
                familiarity=np.linspace(0.1, 1.0, rows),
            ),
        )
        for k in range(len(candidates))
    ]
    return np.stack(found), totals


def play(answer, selection, scores, place):
    while answer.group is not None:
        group, rows = answer.group, answer.open_rows
        members = [place[site_id] for site_id in selection.groups[group]]
        answer.add(group, scores[members][:, rows].sum(axis=0), rows)
    return answer


def run(selector, rule, candidates, logits):
    asked = need(n_queries=logits.shape[1])
    scores, totals = scores_of(rule, candidates, logits)
    selection = selector.select(candidates, asked)
    answer = selector.begin(selection, candidates, asked, rule, class_totals=totals)
    place = {c.site_id: k for k, c in enumerate(candidates)}
    return play(answer, selection, scores, place), scores.sum(axis=0)


# -- lossless ----------------------------------------------------------------------------


@pytest.mark.parametrize("name", BOUNDED)
@thorough
@given(seed=st.integers(0, 10**6), n_sites=st.integers(6, 13), sharpness=st.floats(0.0, 12.0))
def test_lossless_exit_gives_the_labels_of_all_sites(name, seed, n_sites, sharpness):
    candidates, logits = world(seed, n_sites=n_sites, n_rows=8, sharpness=sharpness)
    rule = make_rule(name)

    answer, total = run(EarlyExit(stop="lossless"), rule, candidates, logits)

    whole = rule.decide(total, n_sites, CLASSES, tie_seed=3)
    assert answer.decide(tie_seed=3).labels.tolist() == whole.labels.tolist()


@pytest.mark.parametrize("name", ["mean-probability", "majority-vote", "class-share", "open-set"])
def test_lossless_exit_saves_answers_where_sites_agree(name):
    candidates, logits = world(1, n_sites=12, n_rows=40, sharpness=8.0)

    answer, _ = run(EarlyExit(stop="lossless"), make_rule(name), candidates, logits)

    assert answer.n_sites_asked.mean() < 11.0


@pytest.mark.parametrize("name", ["mean-probability", "class-share"])
def test_margin_exit_can_change_a_label_that_lossless_keeps(name):
    # The first two groups say x by far; all others together outvote them.
    candidates = [site(k) for k in range(15)]
    logits = np.zeros((15, 1, 3))
    rule = make_rule(name)
    order = EarlyExit().select(candidates, need()).site_ids
    for number, k in enumerate(order):
        logits[k, 0, 0 if number < 6 else 1] = 9.0

    hasty, total = run(EarlyExit(tau=0.3), rule, candidates, logits)
    patient, _ = run(EarlyExit(stop="lossless"), rule, candidates, logits)

    assert rule.decide(total, 15, CLASSES).names == ["y"]
    assert hasty.decide().names == ["x"]
    assert patient.decide().names == ["y"]


def test_lead_equal_to_the_bound_does_not_stop_a_row():
    bounds = np.array([[2.0, 2.0, 2.0], [0.0, 0.0, 0.0]])
    route = MarginRoute(n_groups=2, stop="lossless", remaining_gc=bounds)

    for lead, left in ((2.0, [0]), (2.1, [])):
        answer = SequentialAnswer(
            make_rule("mean-probability"),
            classes=CLASSES,
            group_sizes=(3, 3),
            n_queries=1,
            route=route,
        )
        answer.add(0, np.array([[lead, 0.0, 0.0]]), answer.open_rows)
        assert answer.open_rows.tolist() == left


@pytest.mark.parametrize("name", BOUNDED)
@thorough
@given(seed=st.integers(0, 10**6))
def test_bound_holds_for_the_scores_of_further_sites(name, seed):
    candidates, logits = world(seed, n_sites=5, n_rows=4, sharpness=5.0)
    rule = make_rule(name)
    scores, totals = scores_of(rule, candidates, logits)
    bound = remaining_bound(rule, candidates, CLASSES, class_totals=totals)

    added = scores.sum(axis=0)[:, : len(CLASSES)]
    gain = added[:, :, None] - added[:, None, :]  # of class c against class a

    # A last digit of rounding in a sum of five.
    assert (gain.max(axis=(0, 2)) <= bound + 1e-9).all()


def test_share_rules_are_bounded_class_by_class():
    candidates = [site(0, (9.0, 0.0, 1.0)), site(1, (1.0, 4.0, 0.0))]
    totals = np.array([10.0, 8.0, 2.0])
    rule = make_rule("class-share")

    bound = remaining_bound(rule, candidates, CLASSES, class_totals=totals)
    as_bits = remaining_bound(
        rule,
        candidates,
        CLASSES,
        class_totals=np.array([4.0, 2.0, 2.0]),
        counts_kind=CountsKind.PRESENCE,
    )

    assert bound.tolist() == [1.0, 0.5, 0.5]
    assert as_bits.tolist() == [0.5, 0.5, 0.5]
    assert remaining_bound(rule, candidates, CLASSES) is None
    withheld = [*candidates, site(2, kind="withheld")]
    assert remaining_bound(rule, withheld, CLASSES, class_totals=totals) is None
    assert remaining_bound(make_rule("median"), candidates, CLASSES) is None
    assert group_shares(rule, [candidates[:1]], CLASSES, class_totals=totals).tolist() == [
        [0.9, 0.0, 0.5]
    ]
    with pytest.raises(ShapeError):
        remaining_bound(rule, candidates, CLASSES, class_totals=np.ones(2))


def test_lossless_without_a_bound_is_refused_before_anything_is_asked():
    candidates = [site(k) for k in range(6)]
    selector = EarlyExit(stop="lossless")
    selection = selector.select(candidates, need())

    with pytest.raises(InvalidValueError, match="nothing bounds"):
        selector.begin(selection, candidates, need(), make_rule("class-share"))


# -- the other ways to stop --------------------------------------------------------------


def fresh(route, *, n_queries=2, sizes=(3, 3, 3), rule="mean-probability"):
    return SequentialAnswer(
        make_rule(rule), classes=CLASSES, group_sizes=sizes, n_queries=n_queries, route=route
    )


def test_margin_stops_a_row_only_after_the_least_number_of_groups():
    answer = fresh(MarginRoute(n_groups=3, tau=0.3, least_groups=2))
    sure, unsure = [2.7, 0.2, 0.1], [1.1, 1.0, 0.9]

    answer.add(0, np.array([sure, unsure]), answer.open_rows)
    after_one = answer.open_rows.tolist()
    answer.add(1, np.array([sure, unsure]), answer.open_rows)
    after_two = answer.open_rows.tolist()
    answer.add(2, np.array([unsure]), answer.open_rows)

    assert (after_one, after_two, answer.group) == ([0, 1], [1], None)
    assert answer.n_sites_asked.tolist() == [6, 9]
    assert answer.decide().names == ["x", "x"]


def test_sets_keep_a_row_open_while_more_than_one_class_is_left():
    answer = fresh(MarginRoute(n_groups=3, stop="set", least_groups=1))
    even = np.full((2, 3), 1.0)

    answer.add(
        0, even, answer.open_rows, prediction_sets=np.array([[True, True, False], [False] * 3])
    )
    assert answer.open_rows.tolist() == [0]
    with pytest.raises(InvalidValueError, match="prediction_sets"):
        answer.add(1, even[:1], answer.open_rows)


def test_rows_without_an_answer_are_abstentions():
    answer = fresh(MarginRoute(n_groups=3))
    for _ in range(3):
        answer.skip(answer.group)

    assert answer.group is None
    assert answer.open_rows.tolist() == []
    assert answer.decide().abstained.all()


def test_skipped_group_leaves_the_answer_of_the_others():
    answer = fresh(MarginRoute(n_groups=3), n_queries=1)
    answer.add(0, np.array([[1.0, 1.2, 0.8]]), answer.open_rows)
    answer.skip(1)
    answer.add(2, np.array([[0.5, 1.5, 1.0]]), answer.open_rows, n_sites=2)

    assert answer.decide().names == ["y"]
    assert answer.n_sites_asked.tolist() == [9]


def test_scores_that_are_not_due_are_refused():
    answer = fresh(MarginRoute(n_groups=3))
    rows, good = answer.open_rows, np.ones((2, 3))

    for group, given_rows in ((1, rows), (None, rows), (0, rows[:1])):
        with pytest.raises(InvalidValueError, match="not due"):
            answer.add(group, good, given_rows)
    for bad in (good[:, :2], np.full((2, 3), np.nan)):
        with pytest.raises(ShapeError):
            answer.add(0, bad, rows)
    with pytest.raises(ShapeError):
        answer.add(0, good, rows, prediction_sets=np.ones((2, 2), dtype=bool))
    with pytest.raises(InvalidValueError, match="more answers"):
        answer.add(0, good, rows, n_sites=4)
    answer.add(0, good, rows)
    assert answer.group == 1  # what was refused left no trace
    assert (answer.decide().probabilities == 1 / 3).all()


class Circle:
    """A route that comes back to the first group."""

    def next_groups(self, standing):
        return np.zeros(len(standing.labels), dtype=np.int64)


class Nowhere:
    def next_groups(self, standing):
        return np.full(len(standing.labels), 7)


@pytest.mark.parametrize("route", [Circle(), Nowhere()])
def test_route_that_asks_twice_or_nobody_is_refused(route):
    answer = fresh(route)

    with pytest.raises(InvalidValueError, match="route"):
        answer.add(0, np.ones((2, 3)), answer.open_rows)


def test_rule_that_compares_sites_cannot_be_asked_in_groups():
    with pytest.raises(InvalidValueError, match="in groups"):
        fresh(MarginRoute(n_groups=3), rule="median")


def test_single_class_stops_at_once():
    answer = SequentialAnswer(
        make_rule("mean-probability"),
        classes=("x",),
        group_sizes=(3, 3),
        n_queries=1,
        route=MarginRoute(n_groups=2, least_groups=1),
    )
    answer.add(0, np.array([[3.0]]), answer.open_rows)

    assert answer.group is None
    assert answer.decide().names == ["x"]


# -- groups ------------------------------------------------------------------------------


def owners_of(groups, candidates):
    by_id = {c.site_id: c for c in candidates}
    return [[by_id[site_id].owner for site_id in group] for group in groups]


def test_groups_have_distinct_owners_and_who_would_double_one_is_not_asked():
    owners = ["a", "a", "a", "b", "b", "c", "c", "d"]
    candidates = [site(k, owner=owner) for k, owner in enumerate(owners)]

    groups = EarlyExit().select(candidates, need()).groups

    found = owners_of(groups, candidates)
    # One who drops out of a group of three owners must not leave two sites of one.
    assert all(len(set(group)) == len(group) >= 3 for group in found)
    asked = [s for group in groups for s in group]
    assert len(set(asked)) == len(asked) < 8


def test_no_group_is_smaller_than_asked_for():
    for n_sites in range(3, 12):
        groups = EarlyExit().select([site(k) for k in range(n_sites)], need()).groups
        assert [len(g) for g in groups[:-1]] == [3] * (n_sites // 3 - 1)
        assert 3 <= len(groups[-1]) <= 5


def test_sites_of_one_cluster_count_as_one_owner():
    candidates = [site(k, owner=f"o{k}", cluster="same" if k < 3 else "") for k in range(5)]

    groups = EarlyExit().select(candidates, need()).groups

    assert len(groups) == 1  # clones cannot make up a second group
    with pytest.raises(SelectionError, match="distinct owners"):
        EarlyExit().select(candidates[:4], need())


def test_first_group_alone_keeps_the_quorum():
    groups = EarlyExit().select([site(k) for k in range(12)], need(at_least=5)).groups

    assert len(groups[0]) == 5


def test_all_groups_together_keep_to_the_limits():
    candidates = [site(k, price=1.0) for k in range(12)]

    few = EarlyExit().select(candidates, need(at_most=7))
    cheap = EarlyExit().select(candidates, need(n_queries=10, budget=65.0))

    assert len(few.site_ids) == 7
    assert len(cheap.site_ids) == 6
    with pytest.raises(SelectionError):
        EarlyExit().select(candidates, need(at_most=2))


def test_site_that_covers_most_is_asked_first():
    candidates = [site(k, (1.0, 1.0, 1.0)) for k in range(8)] + [site(8, (50.0, 50.0, 50.0))]

    assert EarlyExit().select(candidates, need()).site_ids[0] == 8


@pytest.mark.parametrize("options", [{"tau": 1.5}, {"least_groups": 0}, {"stop": "soon"}])
def test_option_out_of_range_is_refused_when_built(options):
    with pytest.raises(InvalidValueError):
        make_selector("early-exit", options)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Halves(type(make_rule("mean-probability"))):
    """A rule from elsewhere that says itself what further sites can add."""

    def remaining_bound(self, n_sites, n_classes):
        return np.full(n_classes, 0.5 * n_sites)


def test_rule_from_elsewhere_states_its_own_bound():
    found = remaining_bound(Halves(), [site(k) for k in range(4)], CLASSES)

    assert found.tolist() == [2.0, 2.0, 2.0]
