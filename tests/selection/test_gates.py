"""Eligibility gates: what each refuses, and what all of them keep to."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedinfer_flower.errors import InvalidValueError, UnknownNameError
from fedinfer_flower.profile import SiteProfile
from fedinfer_flower.selection import Candidate, SelectionNeed, SiteRecord
from fedinfer_flower.selection.gates import GATES, Stage, apply_gates, make_gate

OPTIONS = {"jurisdiction": {"allowed": "eu"}}
every_gate = pytest.mark.parametrize("name", GATES.names())


def gate_of(name):
    return make_gate(name, OPTIONS.get(name))


def site(number, *, price=0.0, card=None, classes=("x",), **record):
    profile = SiteProfile(
        name=f"s{number}", classes=classes, price_per_query=price, model_card=card or {}
    )
    return Candidate(site_id=number, profile=profile, record=SiteRecord(**record))


def need_of(**changes):
    return SelectionNeed(classes=("x",), **changes)


def refused(name, candidates, need=None, **options):
    return make_gate(name, options).admit(candidates, need or need_of())


# -- all gates ---------------------------------------------------------------------------

texts = st.text(max_size=20)
records = st.builds(
    SiteRecord,
    owner=texts,
    jurisdiction=texts,
    cluster=texts,
    latencies_s=st.lists(st.floats(0.0, 1e6), max_size=5).map(tuple),
    last_seen_at=st.one_of(st.none(), st.floats(0.0, 1e12)),
    epsilon_left=st.one_of(st.none(), st.floats(0.0, 1e6)),
    reputation=st.tuples(
        st.floats(0.0, 1.7e308, exclude_min=True), st.floats(0.0, 1.7e308, exclude_min=True)
    ),
)
cards = st.dictionaries(
    st.sampled_from(["owner", "jurisdiction", "protections", "rules", "max-rows"]), texts
)


@every_gate
@given(drawn=st.lists(st.tuples(records, cards), max_size=5), seed=st.integers(-5, 5))
def test_gate_refuses_known_sites_with_a_reason_whatever_they_claim(name, drawn, seed):
    candidates = [
        Candidate(
            site_id=k, profile=SiteProfile(name="s", classes=("x",), model_card=card), record=record
        )
        for k, (record, card) in enumerate(drawn)
    ]
    need = need_of(
        seed=seed, now_s=1e9, latency_s=1.0, epsilon_per_query=0.5, rule="mean-probability"
    )
    out = gate_of(name).admit(candidates, need)
    assert set(out) <= {candidate.site_id for candidate in candidates}
    # Reasons end in terminals: nothing that a site claims may steer one.
    assert all(reason and reason.isprintable() for reason in out.values())
    shuffled = gate_of(name).admit(candidates[::-1], need)
    assert shuffled == out
    assert isinstance(gate_of(name).objection(candidates, need), str)


@every_gate
def test_gate_options_make_the_same_gate(name):
    gate = gate_of(name)
    assert gate.name == name
    assert make_gate(name, gate.options()) == gate
    assert "Privacy" in (type(gate).__doc__ or "")
    for option, value in gate.options().items():
        with pytest.raises(InvalidValueError):
            make_gate(name, {**OPTIONS.get(name, {}), option: 7 if value == str(value) else "7"})
    with pytest.raises(InvalidValueError, match="no-such"):
        make_gate(name, {"no-such": 1})


def test_unknown_gate_names_the_nearest():
    with pytest.raises(UnknownNameError, match="quorum"):
        make_gate("quorm")


# -- one by one --------------------------------------------------------------------------


def test_policy_reads_the_model_card():
    candidates = [
        site(1, card={"protections": "secagg, he"}),
        site(2, card={"protections": "plain"}),
        site(3, card={"rules": "majority-vote"}),
        site(4, card={"max-rows": "5"}),
        site(5, card={"max-rows": "-1"}),
        site(6, card={"max-rows": "٣"}),
        site(7, card={"max-rows": "9" * 5000}),
        site(8, classes=("y",)),
        site(9),
    ]
    need = need_of(protection="plain", rule="mean-probability", n_queries=6)
    assert refused("policy", candidates, need) == {
        1: "does not answer under 'plain'",
        3: "does not answer for rule 'mean-probability'",
        4: "answers at most 5 rows",
        5: "its max-rows is no number",
        6: "its max-rows is no number",
        7: "its max-rows is no number",
        8: "knows none of the classes",
    }


def test_policy_may_refuse_sites_that_say_nothing():
    said = site(1, card={"protections": "plain", "rules": "any"})
    # The rule is not chosen yet, so nothing can be said of it.
    assert list(refused("policy", [said, site(2)], silent=False)) == [2]


def test_jurisdiction_registered_wins_over_claimed_and_unknown_is_refused():
    candidates = [
        site(1, card={"jurisdiction": "EU "}),
        site(2, card={"jurisdiction": "eu"}, jurisdiction="us"),
        site(3, card={"jurisdiction": "us"}, jurisdiction="eu"),
        site(4),
        site(5, card={"jurisdiction": "eu-de"}),
    ]
    assert list(refused("jurisdiction", candidates, allowed="eu,ch")) == [2, 4, 5]
    assert list(refused("jurisdiction", candidates, allowed="eu", unknown=True)) == [2, 5]
    strict = refused("jurisdiction", candidates, allowed="eu", registered_only=True)
    assert list(strict) == [1, 2, 4, 5]


@pytest.mark.parametrize("allowed", ["", " ", "eu,", "eu,,ch"])
def test_jurisdiction_without_tags_is_refused_when_built(allowed):
    with pytest.raises(InvalidValueError, match="jurisdiction"):
        make_gate("jurisdiction", {"allowed": allowed})


def test_quorum_counts_parties_not_sites():
    same = [site(k, owner="one") for k in range(5)]
    others = [site(10, owner="two"), site(11, owner="three")]
    assert set(refused("quorum", same)) == {0, 1, 2, 3, 4}
    assert refused("quorum", [*same, *others]) == {}
    assert set(refused("quorum", [*same, others[0]])) == {0, 1, 2, 3, 4, 10}
    assert refused("quorum", [*same, others[0]], min_parties=2) == {}
    assert refused("quorum", [*same, *others], need_of(group_size=4)) != {}


def test_quorum_counts_a_cluster_of_duplicates_once():
    copies = [site(k, owner=f"o{k}", cluster="c") for k in range(4)]
    assert len(refused("quorum", copies)) == 4
    # The attack: without the clusters four owners look like four.
    assert refused("quorum", [site(k, owner=f"o{k}") for k in range(4)]) == {}


def test_quorum_by_registration_sees_through_made_up_owners():
    sybils = [site(k, card={"owner": f"made-up-{k}"}) for k in range(4)]
    victim = site(9, owner="hospital")
    assert refused("quorum", [victim, *sybils]) == {}
    assert len(refused("quorum", [victim, *sybils], registered_only=True)) == 5


def test_budget_must_cover_all_rows():
    need = need_of(n_queries=10, epsilon_per_query=0.1)
    candidates = [site(1, epsilon_left=1.0), site(2, epsilon_left=0.99), site(3)]
    assert list(refused("budget", candidates, need)) == [2]
    assert list(refused("budget", candidates, need, unknown=False)) == [2, 3]
    assert refused("budget", candidates, need_of(n_queries=10)) == {}


def test_budget_that_is_no_number_is_not_enough():
    need = need_of(epsilon_per_query=0.1)
    assert list(refused("budget", [site(1, epsilon_left=math.nan)], need)) == [1]


def test_staleness_refuses_the_old_and_the_future():
    candidates = [site(1, last_seen_at=900.0), site(2, last_seen_at=880.0), site(3)]
    need = need_of(now_s=1_000.0)
    assert list(refused("staleness", candidates, need, max_age_s=110.0)) == [2]
    assert list(refused("staleness", candidates, need, max_age_s=110.0, never_seen=False)) == [2, 3]
    # Nobody set now_s: better no site than none too old.
    assert list(refused("staleness", candidates, need_of(), max_age_s=110.0)) == [1, 2]


def test_latency_judges_by_a_quantile_of_enough_answers():
    often_late = site(1, latencies_s=(0.1, 9.0, 9.0, 9.0))
    once_late = site(2, latencies_s=(9.0, 9.0))
    quick = site(3, latencies_s=(0.1,) * 20)
    candidates = [often_late, once_late, quick, site(4)]
    need = need_of(latency_s=1.0)
    assert list(refused("latency", candidates, need)) == [1]
    assert list(refused("latency", candidates, need, min_answers=1)) == [1, 2]
    assert refused("latency", candidates, need_of()) == {}


def test_latency_at_the_lowest_quantile_judges_the_best_answer():
    need = need_of(latency_s=1.0)
    mixed, slow = site(1, latencies_s=(0.1, 9.0, 9.0)), site(2, latencies_s=(8.0, 9.0, 9.0))
    assert list(refused("latency", [mixed, slow], need, quantile=0.0)) == [2]


def test_owner_cap_keeps_the_cheapest_and_then_by_lot():
    candidates = [site(k, owner="one", price=p) for k, p in enumerate([3.0, 1.0, 2.0])]
    assert set(refused("owner-cap", candidates)) == {0, 2}
    assert set(refused("owner-cap", candidates, most=2)) == {0}
    equals = [site(k, owner="one") for k in range(4)]
    kept = {
        frozenset({0, 1, 2, 3} - set(refused("owner-cap", equals, need_of(seed=seed))))
        for seed in range(40)
    }
    assert len(kept) == 4


def test_owner_cap_lets_no_stranger_displace_a_registered_site():
    registered = site(1, owner="hospital", price=5.0)
    impostor = site(2, card={"owner": "hospital"}, price=0.0)
    assert set(refused("owner-cap", [impostor, registered])) == {2}


def test_reputation_has_a_floor():
    candidates = [site(1, reputation=(1.0, 9.0)), site(2), site(3, reputation=(9.0, 1.0))]
    assert set(refused("reputation", candidates)) == {1}
    assert set(refused("reputation", candidates, floor=0.6)) == {1, 2}
    assert refused("reputation", [site(1, reputation=(1e308, 1e308))]) == {}


# -- together ----------------------------------------------------------------------------


def test_gates_that_look_at_all_come_after_those_that_look_at_one():
    owners = [site(k, owner=f"o{k}", reputation=(1.0, 9.0 if k else 1.0)) for k in range(3)]
    gates = [make_gate("quorum"), make_gate("reputation")]
    admission = apply_gates(gates, owners, need_of())
    # Given first, but asked last: with two sites gone there is no quorum.
    assert admission.kept == ()
    assert admission.refused[0] == "quorum: 1 party, 3 are needed"
    assert admission.refused[1].startswith("reputation: ")
    assert [gate.stage for gate in gates] == [Stage.WHOLE, Stage.SITE]


def test_no_gates_admit_everybody_in_order():
    candidates = [site(2), site(1)]
    assert apply_gates([], candidates, need_of()) == (tuple(candidates), {})
