"""Random, fixed, largest and competence; lots, parties and the purse under them."""

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedinfer_flower.errors import InvalidValueError, SelectionError
from fedinfer_flower.profile import CountsKind, SiteProfile
from fedinfer_flower.selection import (
    AuditTally,
    Candidate,
    SelectionNeed,
    SiteRecord,
    make_selector,
)
from fedinfer_flower.selection.lots import lots
from fedinfer_flower.selection.parties import parties
from fedinfer_flower.selection.purse import Purse

CLASSES = ("a", "b")
NEED = SelectionNeed(classes=CLASSES)


def site(number, *, name=None, key_id="", price=0.0, classes=CLASSES, card=None, **record):
    profile = SiteProfile(
        name=name or f"s{number}",
        classes=classes,
        price_per_query=price,
        model_card=card or {},
    )
    return Candidate(site_id=number, profile=profile, key_id=key_id, record=SiteRecord(**record))


def audited(number, right, asked, *, epoch=0, **record):
    tally = AuditTally(
        epoch=epoch,
        right=dict(zip(CLASSES, right, strict=True)),
        asked=dict(zip(CLASSES, asked, strict=True)),
    )
    return site(number, tallies=(tally,), **record)


# -- random ------------------------------------------------------------------------------


def test_random_draws_each_site_about_as_often():
    candidates = [site(k) for k in range(5)]
    selector = make_selector("random", {"m": 2})
    drawn = np.zeros(5)
    for seed in range(2000):
        need = SelectionNeed(classes=CLASSES, seed=seed)
        drawn[list(selector.select(candidates, need).site_ids)] += 1
    # Binomial(2000, 0.4) has a standard deviation of 22; six of them, fixed seeds.
    assert (abs(drawn - 800) < 132).all()


def test_random_draws_as_many_as_it_is_told():
    candidates = [site(k) for k in range(9)]

    def drawn(m, **limits):
        found = make_selector("random", {"m": m}).select(
            candidates, SelectionNeed(classes=CLASSES, **limits)
        )
        return len(found.site_ids)

    assert drawn(4) == 4
    assert drawn(4, at_most=3) == 3
    assert drawn(20) == 9
    assert drawn(0, at_least=2) == 2
    assert drawn(0, at_least=2, at_most=5) == 5


def test_random_below_the_fewest_needed_raises():
    with pytest.raises(SelectionError, match="draws 2"):
        make_selector("random", {"m": 2}).select(
            [site(k) for k in range(9)], SelectionNeed(classes=CLASSES, at_least=3)
        )


# -- fixed -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "sites", ["", "a,", ",a", "a,,b", "a,a", "key:", "key:12", "key:UPPERCASE", "key:" + "a" * 65]
)
def test_fixed_with_a_bad_list_is_refused_when_built(sites):
    with pytest.raises(InvalidValueError):
        make_selector("fixed", {"sites": sites})


def test_fixed_finds_names_and_beginnings_of_key_ids_in_its_own_order():
    candidates = [site(1, key_id="ab" * 32), site(2, key_id="cd" * 32), site(3, name="köln 1")]
    fixed = make_selector("fixed", {"sites": "köln 1, key:cdcdcdcd,s1"})
    assert fixed.select(candidates, NEED).site_ids == (3, 2, 1)


def test_fixed_never_takes_a_name_for_a_key():
    # An impostor that calls itself by another's key id, while that other is away.
    impostor = site(1, name="key:abababab", key_id="ee" * 32)
    with pytest.raises(SelectionError, match="not there"):
        make_selector("fixed", {"sites": "key:abababab"}).select([impostor], NEED)


@pytest.mark.parametrize(
    ("sites", "limits", "text"),
    [
        ("s1,s9", {}, "'s9'"),
        ("twin", {}, "2 sites go by"),
        ("key:abababab", {}, "2 sites go by"),
        ("s1,key:11111111", {}, "same site"),
        ("s1,s2", {"at_most": 1}, "1 fit"),
        ("s1,s2", {"budget": 1.5}, "1 fit"),
        ("s1", {"at_least": 2}, "2 are needed"),
    ],
)
def test_fixed_that_cannot_be_asked_as_it_is_raises(sites, limits, text):
    candidates = [
        site(1, key_id="11" * 32, price=1.0),
        site(2, price=1.0),
        site(3, name="twin", key_id="ab" * 32),
        site(4, name="twin", key_id="abababab" + "0" * 56),
    ]
    with pytest.raises(SelectionError, match=text):
        make_selector("fixed", {"sites": sites}).select(
            candidates, SelectionNeed(classes=CLASSES, **limits)
        )


# -- competence --------------------------------------------------------------------------


def test_competence_prefers_audited_accuracy_to_size_and_claims():
    boast = SiteProfile(
        name="boast",
        classes=CLASSES,
        counts_kind=CountsKind.COUNTS,
        class_counts=(1e9, 1e9),
        model_card={"accuracy": "1.0"},
    )
    bad = AuditTally(epoch=0, right={"a": 2.0}, asked={"a": 40.0, "b": 40.0})
    loud = Candidate(site_id=1, profile=boast, record=SiteRecord(tallies=(bad,)))
    good = audited(2, (30, 30), (40, 40))
    assert make_selector("competence").select([loud, good], NEED).site_ids == (2, 1)


def test_competence_shrinks_few_audits_towards_one_half():
    lucky, steady = audited(1, (1, 1), (1, 1)), audited(2, (90, 90), (100, 100))
    scores = make_selector("competence").score([lucky, steady], NEED)
    assert scores.tolist() == pytest.approx([2 / 3, 91 / 102])


def test_competence_weights_classes_equally_or_as_they_were_audited():
    # Right on the frequent class, wrong on the rare one; the other is the reverse.
    frequent, rare = audited(1, (90, 0), (90, 10)), audited(2, (45, 10), (90, 10))
    uniform = make_selector("competence")
    asked = make_selector("competence", {"weighting": "asked"})
    assert uniform.select([frequent, rare], NEED).site_ids[0] == 2
    assert asked.select([frequent, rare], NEED).site_ids[0] == 1


def test_competence_gives_nothing_for_classes_that_the_model_does_not_know():
    narrow = site(1, classes=("a",))
    known = audited(2, (5, 5), (10, 10))
    scores = make_selector("competence").score([narrow, known], NEED)
    assert scores[0] == 0.25


def test_competence_window_forgets_old_epochs():
    faded = [
        AuditTally(epoch=1, right={"a": 50.0}, asked={"a": 50.0}),
        AuditTally(epoch=9, right={"a": 5.0}, asked={"a": 50.0}),
    ]
    was_good = site(1, tallies=tuple(faded))
    need = SelectionNeed(classes=("a",), epoch=9)
    assert make_selector("competence").score([was_good], need)[0] > 0.5
    assert make_selector("competence", {"window": 3}).score([was_good], need)[0] < 0.2


def test_competence_without_audits_falls_back_on_settled_merits():
    worse = site(1, merits=((1, -0.1), (2, 0.0)))
    better = site(2, merits=((1, 0.2), (2, 0.3)))
    new = site(3)
    found = make_selector("competence").select([worse, new, better], NEED)
    assert found.site_ids == (2, 3, 1)


def test_competence_with_some_audits_does_not_compare_merits_with_accuracy():
    paid, seen = site(1, merits=((1, 0.9),)), audited(2, (7, 7), (10, 10))
    assert make_selector("competence").score([paid, seen], NEED)[0] == 0.5


def test_competence_with_an_unknown_weighting_is_refused_when_built():
    with pytest.raises(InvalidValueError, match="weighting"):
        make_selector("competence", {"weighting": "by-mood"})


# -- lots, parties, purse ----------------------------------------------------------------


def test_lots_differ_by_site_and_seed_and_lie_in_the_unit_interval():
    candidates = [site(k) for k in range(200)]
    one, two = lots(candidates, 1), lots(candidates, 2)
    assert len({*one, *two}) == 400
    assert ((one >= 0.0) & (one < 1.0)).all()


def test_parties_join_owners_and_clusters_even_in_a_chain():
    chain = [
        site(0, owner="x", cluster="c1"),
        site(1, owner="y", cluster="c1"),
        site(2, owner="y"),
        site(3, owner="z"),
        site(4),
    ]
    assert parties(chain) == ((0, 1, 2), (3,), (4,))


def test_parties_by_registration_alone_do_not_believe_claims():
    candidates = [site(0, owner="x"), site(1, card={"owner": "p"}), site(2, card={"owner": "q"})]
    assert len(parties(candidates)) == 3
    assert parties(candidates, registered_only=True) == ((0,), (1, 2))


def test_parties_without_owners_are_keys():
    assert parties([site(0, key_id="k"), site(1, key_id="k"), site(2)]) == ((0, 1), (2,))


prices = st.lists(st.integers(0, 9).map(float), min_size=1, max_size=7)


@given(
    prices=prices,
    budget=st.integers(0, 30).map(float),
    at_least=st.integers(1, 7),
    order=st.randoms(use_true_random=False),
)
def test_purse_ends_with_enough_sites_exactly_when_that_is_possible(
    prices, budget, at_least, order
):
    places = list(range(len(prices)))
    order.shuffle(places)
    purse = Purse(prices, budget=budget, at_least=at_least, at_most=7)
    taken = []
    for place in places:
        if purse.fits(place):
            purse.take(place)
            taken.append(place)
    possible = len(prices) >= at_least and sum(sorted(prices)[:at_least]) <= budget
    assert sum(prices[k] for k in taken) <= budget
    assert (len(taken) >= at_least) == possible


@given(prices=prices, budget=st.integers(0, 30).map(float), at_least=st.integers(1, 7))
def test_purse_refuses_a_first_site_only_where_no_set_with_it_fits(prices, budget, at_least):
    purse = Purse(prices, budget=budget, at_least=at_least, at_most=7)
    if len(prices) < at_least:
        return
    for place in range(len(prices)):
        rest = [k for k in range(len(prices)) if k != place]
        sets = itertools.combinations(rest, at_least - 1)
        fits = any(prices[place] + sum(prices[k] for k in s) <= budget for s in sets)
        assert purse.fits(place) == fits
