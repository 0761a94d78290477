"""The plan of a query: what it counts, what it refuses, what it says."""

import json

import pytest

from fedinfer_flower.errors import InvalidValueError, SelectionError
from fedinfer_flower.profile import CountsKind, SiteProfile
from fedinfer_flower.selection import (
    AuditTally,
    Candidate,
    Selection,
    SelectionNeed,
    SiteRecord,
    make_selector,
    plan_query,
)
from fedinfer_flower.selection.accuracy import audited_accuracy
from fedinfer_flower.selection.base import Selector
from fedinfer_flower.selection.gates import make_gate

CLASSES = ("a", "b")


def site(number, *, counts=None, price=0.0, right=None, asked=10.0, card=None, **record):
    profile = SiteProfile(
        name=f"site-{number}",
        classes=CLASSES,
        counts_kind=CountsKind.WITHHELD if counts is None else CountsKind.COUNTS,
        class_counts=counts,
        price_per_query=price,
        model_card=card or {},
    )
    if right is not None:
        tally = AuditTally(
            epoch=0,
            right=dict(zip(CLASSES, right, strict=True)),
            asked=dict.fromkeys(CLASSES, asked),
        )
        record["tallies"] = (tally,)
    return Candidate(site_id=number, profile=profile, record=SiteRecord(**record))


def need_of(**changes):
    return SelectionNeed(classes=CLASSES, **({"n_queries": 100, "reply_bytes": 800} | changes))


class InGroups(Selector):
    """Two groups: the first three sites, then the rest."""

    name = "in-groups"
    sequential = True

    def score(self, candidates, need):
        return [0.0] * len(candidates)

    def select(self, candidates, need):
        ids = tuple(candidate.site_id for candidate in candidates)
        return Selection(
            groups=(ids[:3], ids[3:]),
            reasons=dict.fromkeys(ids, "in turn"),
            expected_accuracy=0.875,
        )


def test_plan_adds_up_price_bytes_and_epsilon():
    candidates = [site(k, price=0.5 * k) for k in range(4)]
    plan = plan_query(
        candidates,
        need_of(epsilon_per_query=0.01, budget=160.0),
        selector=make_selector("all"),
        request_bytes=6_400,
    )
    assert plan.site_ids == (0, 1, 2)
    assert plan.passed_over == (3,)
    assert plan.price == 150.0
    assert [s.price for s in plan.sites] == [0.0, 50.0, 100.0]
    assert plan.total_bytes == 3 * 7_200
    assert plan.epsilon_per_site == pytest.approx(1.0)
    assert plan.accuracy == (None, "unknown: no audits")


def test_plan_says_who_was_refused_by_which_gate():
    candidates = [site(1, jurisdiction="eu"), site(2, jurisdiction="us"), site(3)]
    gates = [make_gate("jurisdiction", {"allowed": "eu"})]
    plan = plan_query(candidates, need_of(), selector=make_selector("all"), gates=gates)
    assert plan.site_ids == (1,)
    assert plan.refused == {
        2: "jurisdiction: 'us' is not allowed",
        3: "jurisdiction: unknown",
    }


def test_plan_with_too_few_left_names_the_gate_that_refused_most():
    candidates = [site(1), site(2), site(3, reputation=(1.0, 9.0))]
    gates = [make_gate("jurisdiction", {"allowed": "eu"}), make_gate("reputation")]
    with pytest.raises(SelectionError, match=r"0 of 3 sites pass .* by gate 'jurisdiction'"):
        plan_query(candidates, need_of(), selector=make_selector("all"), gates=gates)


def test_plan_asks_gates_about_each_group_that_is_summed():
    owners = ["one", "one", "one", "two", "three", "four"]
    candidates = [site(k, owner=owner) for k, owner in enumerate(owners)]
    quorum = make_gate("quorum")
    # All together are four parties, but the first group is one.
    assert quorum.admit(candidates, need_of()) == {}
    with pytest.raises(SelectionError, match="1 party, 3 are needed"):
        plan_query(candidates, need_of(), selector=InGroups(), gates=[quorum])
    plan_query(
        [site(k, owner=f"o{k}") for k in range(6)], need_of(), selector=InGroups(), gates=[quorum]
    )


def test_plan_with_owner_cap_meets_the_quorum():
    owners = ["one", "one", "one", "two", "three"]
    candidates = [site(k, owner=owner, price=float(k > 2)) for k, owner in enumerate(owners)]
    need = need_of(at_least=3, at_most=3)
    quorum = make_gate("quorum")
    with pytest.raises(SelectionError, match="owner-cap"):
        plan_query(candidates, need, selector=make_selector("all"), gates=[quorum])
    gates = [quorum, make_gate("owner-cap")]
    plan = plan_query(candidates, need, selector=make_selector("all"), gates=gates)
    assert {s.owner for s in plan.sites} == {"one", "two", "three"}


def test_plan_of_groups_prices_the_first_and_all():
    candidates = [site(k, price=1.0) for k in range(5)]
    plan = plan_query(candidates, need_of(), selector=InGroups())
    assert plan.groups == ((0, 1, 2), (3, 4))
    assert plan.price_per_group == (300.0, 200.0)
    assert "price: 300 to 500 credits" in plan.summary()
    assert "group 2: site-3: in turn" in plan.summary()
    assert plan.accuracy == (0.875, "selector 'in-groups'")


def test_plan_refuses_two_candidates_with_one_id():
    with pytest.raises(InvalidValueError, match="distinct"):
        plan_query([site(1), site(1)], need_of(), selector=make_selector("all"))


def test_plan_passes_on_what_a_selector_itself_left_out():
    able = Candidate(site_id=1, profile=SiteProfile(name="able", classes=CLASSES, familiarity=True))
    plan = plan_query(
        [able, site(2)], need_of(rule="open-set"), selector=make_selector("dynamic-competence")
    )
    assert plan.site_ids == (1,)
    assert "familiarity" in plan.refused[2]
    assert plan.passed_over == ()


# -- expected accuracy -------------------------------------------------------------------


def test_accuracy_weighs_sites_by_their_share_of_each_class():
    # Beta(1, 1) posterior means of 98 audits: 0.9 and 0.5 on class a, 0.1 and 0.9 on class b.
    one = site(1, counts=(75.0, 0.0), right=(89.0, 9.0), asked=98.0)
    two = site(2, counts=(25.0, 50.0), right=(49.0, 89.0), asked=98.0)
    value, basis = audited_accuracy([one, two], CLASSES)
    assert value == pytest.approx((0.75 * 0.9 + 0.25 * 0.5 + 0.9) / 2)
    assert basis == "audits of 2 of 2 sites, 2 of 2 classes"


def test_accuracy_leaves_out_sites_and_classes_that_were_not_audited():
    tally = AuditTally(epoch=0, right={"a": 7.0}, asked={"a": 8.0})
    seen = Candidate(
        site_id=1,
        profile=SiteProfile(name="s", classes=CLASSES),
        record=SiteRecord(tallies=(tally,)),
    )
    assert audited_accuracy([seen, site(2)], CLASSES) == (
        pytest.approx(0.8),
        "audits of 1 of 2 sites, 1 of 2 classes",
    )


@pytest.mark.parametrize("chosen", [[], [site(1)], [site(1, merits=((1, 0.5),))]])
def test_accuracy_without_audits_is_unknown(chosen):
    assert audited_accuracy(chosen, CLASSES) == (None, "unknown: no audits")


def test_accuracy_stands_extreme_counts():
    huge = [site(k, counts=(1e12, 1e12), right=(5, 5)) for k in range(3)]
    assert audited_accuracy(huge, CLASSES).value == pytest.approx(0.5)


# -- text --------------------------------------------------------------------------------


def test_summary_is_a_tree_with_every_part():
    candidates = [
        site(1, price=0.5, right=(9, 9), jurisdiction="eu"),
        site(2, price=9.0, right=(9, 9), jurisdiction="eu"),
        site(3),
    ]
    gates = [make_gate("jurisdiction", {"allowed": "eu"})]
    plan = plan_query(
        candidates,
        need_of(at_most=1, epsilon_per_query=0.02, protection="dp"),
        selector=make_selector("all"),
        gates=gates,
        request_bytes=100,
    )
    assert plan.summary() == "\n".join(
        [
            "QueryPlan",
            "├── question: 100 rows, rule auto, protection dp",
            "├── sites: 1 of 3, by 'all'",
            "│   └── site-1: all: -0.5 (50 credits)",
            "├── refused: 1",
            "│   └── site-3: jurisdiction: unknown",
            "├── not chosen: site-2",
            "├── expected accuracy: about 83 % (audits of 1 of 1 sites, 2 of 2 classes)",
            "├── price: 50 credits",
            "├── payload: 900 bytes (100 to and 800 from each site)",
            "└── epsilon: 2 at each site (basic composition)",
        ]
    )


def test_summary_of_many_sites_is_cut():
    candidates = [site(k) for k in range(500)]
    text = plan_query(candidates, need_of(), selector=make_selector("all")).summary()
    assert "and 488 more" in text
    assert len(text.splitlines()) < 30


def test_plan_as_plain_values_is_json_with_all_totals():
    candidates = [site(1, price=1.0), site(2, reputation=(1.0, 9.0))]
    plan = plan_query(
        candidates, need_of(), selector=make_selector("all"), gates=[make_gate("reputation")]
    )
    plain = json.loads(json.dumps(plan.to_dict(), allow_nan=False))
    assert plain["groups"] == [[1]]
    assert plain["sites"][0] == {
        "site_id": 1,
        "name": "site-1",
        "owner": "site 1",
        "group": 0,
        "reason": "all: -1",
        "price": 100.0,
    }
    assert plain["refused"][0]["name"] == "site-2"
    assert plain["price"] == 100.0
    assert plain["total_bytes"] == 800
    assert plain["expected_accuracy"] is None
    assert plain["accuracy_basis"] == "unknown: no audits"
