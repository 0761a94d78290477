"""Every registered selector keeps the contract; a new selector is tested by existing."""

import copy
import dataclasses
import math

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fedinfer_flower.errors import FedInferError, InvalidValueError, SelectionError
from fedinfer_flower.profile import CountsKind, SiteProfile
from fedinfer_flower.query import SiteId
from fedinfer_flower.selection import (
    SELECTORS,
    AuditTally,
    Candidate,
    SelectionNeed,
    SiteRecord,
    make_selector,
)

SEED = 20260302
CLASSES = ("a", "b", "c")
# Options of selectors that cannot choose without being told something.
OPTIONS = {"fixed": {"sites": "s0,s1,s2,s3,s4,s5"}}
# Selectors that refuse where others choose fewer: their set is the user's, or a policy's.
ALL_OR_NOTHING = {"fixed"}

every_selector = pytest.mark.parametrize("name", SELECTORS.names())
# Deterministic; each example is a handful of small objects.
thorough = settings(
    max_examples=20,
    derandomize=True,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)


def selector_of(name):
    return make_selector(name, OPTIONS.get(name))


def sites(n=8, *, seed=SEED, price=1.0, silent=False):
    """Return sites that differ in everything that a selector may look at."""
    rng = np.random.default_rng(seed)
    return [site(k, rng, price=price, silent=silent) for k in range(n)]


def site(number, rng, *, price, silent):
    kind = list(CountsKind)[rng.integers(3)] if not silent else CountsKind.WITHHELD
    counts = {
        CountsKind.COUNTS: tuple(float(n) for n in rng.integers(0, 500, len(CLASSES))),
        CountsKind.PRESENCE: tuple(float(n) for n in rng.integers(0, 2, len(CLASSES))),
        CountsKind.WITHHELD: None,
    }[kind]
    profile = SiteProfile(
        name=f"s{number}",
        classes=CLASSES,
        counts_kind=kind,
        class_counts=counts,
        familiarity=True,
        price_per_query=price * float(rng.uniform(0.5, 2.0)),
    )
    return Candidate(
        site_id=SiteId(100 + 7 * number),
        profile=profile,
        key_id=f"{number:064x}",
        record=SiteRecord() if silent else record_of(number, rng),
    )


def record_of(number, rng):
    tallies = []
    for epoch in range(int(rng.integers(0, 4))):
        asked = {c: float(rng.integers(1, 30)) for c in CLASSES}
        right = {c: float(rng.integers(0, asked[c] + 1)) for c in CLASSES}
        tallies.append(AuditTally(epoch=epoch, right=right, asked=asked))
    return SiteRecord(
        owner=f"owner-{number}",
        tallies=tuple(tallies),
        merits=tuple((epoch, float(rng.normal())) for epoch in range(int(rng.integers(0, 4)))),
        latencies_s=tuple(rng.uniform(0.1, 1.0, 5).tolist()),
        last_seen_at=1_000.0,
        reputation=(float(rng.uniform(1, 9)), 1.0),
    )


def need_of(**changes):
    # A rule that uses familiarity, so that no selector has a reason to refuse the rule.
    given = {"classes": CLASSES, "rule": "open-set", "n_queries": 10, "epoch": 4, "seed": 3}
    return SelectionNeed(**(given | changes))


def without_order(candidates, order):
    return [candidates[k] for k in order]


# -- what every selector does ------------------------------------------------------------


@every_selector
@pytest.mark.parametrize("silent", [False, True])
def test_selector_without_limits_names_known_sites_once_with_reasons(name, silent):
    candidates = sites(silent=silent)
    selection = selector_of(name).select(candidates, need_of())

    known = {candidate.site_id for candidate in candidates}
    chosen = selection.site_ids
    assert chosen
    assert len(set(chosen)) == len(chosen)
    assert set(chosen) <= known
    assert set(selection.reasons) == set(chosen)
    assert all(reason and reason.isprintable() for reason in selection.reasons.values())
    assert set(selection.scores) == known
    assert not set(selection.refused) & set(chosen)
    assert selection.expected_accuracy is None or 0.0 <= selection.expected_accuracy <= 1.0


@every_selector
@pytest.mark.parametrize("silent", [False, True])
@pytest.mark.parametrize("n", [1, 8])
def test_selector_scores_are_finite_one_a_site(name, silent, n):
    candidates = sites(n, silent=silent)
    scores = selector_of(name).score(candidates, need_of())
    assert scores.shape == (n,)
    assert scores.dtype == np.float64
    assert np.isfinite(scores).all()


@every_selector
@thorough
@given(
    n=st.integers(1, 9),
    seed=st.integers(0, 2**16),
    at_least=st.integers(1, 6),
    slack=st.one_of(st.none(), st.integers(0, 6)),
    budget=st.one_of(st.none(), st.floats(0.0, 120.0)),
    price=st.sampled_from([0.0, 1.0]),
)
def test_selector_keeps_every_limit_or_refuses(name, n, seed, at_least, slack, budget, price):
    candidates = sites(n, seed=seed, price=price)
    at_most = None if slack is None else at_least + slack
    need = need_of(at_least=at_least, at_most=at_most, budget=budget)

    try:
        selection = selector_of(name).select(candidates, need)
    except SelectionError:
        return
    chosen = [c for c in candidates if c.site_id in selection.site_ids]
    assert len(chosen) >= at_least
    assert at_most is None or len(chosen) <= at_most
    # One part in a billion: sums of at most nine prices round far less.
    spent = sum(need.cost(candidate) for candidate in chosen)
    assert budget is None or spent <= budget * (1 + 1e-9)
    if selector_of(name).sequential:
        assert len(selection.groups[0]) >= at_least
        assert all(len(group) >= need.group_size for group in selection.groups)
    else:
        assert len(selection.groups) == 1


@pytest.mark.parametrize(
    "name",
    [n for n in SELECTORS.names() if n not in ALL_OR_NOTHING and not SELECTORS.get(n).sequential],
)
@thorough
@given(seed=st.integers(0, 2**16), at_least=st.integers(1, 5), spare=st.floats(0.0, 20.0))
def test_selector_finds_a_set_whenever_there_is_one(name, seed, at_least, spare):
    candidates = sites(seed=seed)
    need = need_of(at_least=at_least, at_most=6)
    cheapest = sum(sorted(need.cost(candidate) for candidate in candidates)[:at_least])
    need = dataclasses.replace(need, budget=cheapest + spare)
    assert len(selector_of(name).select(candidates, need).site_ids) >= at_least


@every_selector
@pytest.mark.parametrize(
    "limits",
    [{"at_least": 9}, {"at_least": 6, "budget": 1e-6}],
    ids=["more-than-there-are", "no-money"],
)
def test_selector_within_impossible_limits_raises_selection_error(name, limits):
    with pytest.raises(SelectionError):
        selector_of(name).select(sites(), need_of(**limits))


@every_selector
def test_selector_without_candidates_raises_selection_error(name):
    with pytest.raises(SelectionError):
        selector_of(name).select([], need_of())


@every_selector
@pytest.mark.parametrize("silent", [False, True])
def test_selector_is_deterministic_for_a_seed(name, silent):
    candidates = sites(silent=silent)
    once, again = (selector_of(name).select(candidates, need_of(at_least=2)) for _ in range(2))
    assert once == again


@every_selector
@pytest.mark.parametrize("silent", [False, True])
@pytest.mark.parametrize("limits", [{}, {"at_least": 3, "at_most": 4}, {"budget": 60.0}])
def test_selector_does_not_look_at_places_in_the_list(name, silent, limits):
    if name in ALL_OR_NOTHING:
        limits = {}
    candidates = sites(silent=silent)
    straight = selector_of(name).select(candidates, need_of(**limits))
    rng = np.random.default_rng(SEED)
    for _ in range(3):
        shuffled = without_order(candidates, rng.permutation(len(candidates)))
        found = selector_of(name).select(shuffled, need_of(**limits))
        assert [set(g) for g in found.groups] == [set(g) for g in straight.groups]
        assert found.scores == pytest.approx(straight.scores, rel=1e-9, abs=1e-12)


@every_selector
@pytest.mark.parametrize("seed", [-1, 2**70])
def test_selector_takes_any_whole_number_as_seed(name, seed):
    assert selector_of(name).select(sites(), need_of(seed=seed)).site_ids


@every_selector
def test_selector_changes_nothing_that_it_is_given(name):
    candidates = sites()
    # Profiles hold mapping proxies, which cannot be copied deeply: records can.
    records = copy.deepcopy([candidate.record for candidate in candidates])
    commitments = [candidate.profile.commitment() for candidate in candidates]
    selector_of(name).select(candidates, need_of())
    assert [candidate.record for candidate in candidates] == records
    assert [candidate.profile.commitment() for candidate in candidates] == commitments


@every_selector
def test_selector_options_make_the_same_selector(name):
    selector = selector_of(name)
    assert make_selector(name, selector.options()) == selector
    assert all(isinstance(v, str | int | float | bool) for v in selector.options().values())


@every_selector
def test_selector_refuses_unknown_and_wrong_options(name):
    with pytest.raises(InvalidValueError):
        make_selector(name, {"no-such-option": 1})
    for option, value in selector_of(name).options().items():
        wrong = 7 if isinstance(value, str) else "seven"
        with pytest.raises(InvalidValueError):
            make_selector(name, {option: wrong})


@every_selector
def test_selector_states_what_it_needs(name):
    cls = SELECTORS.get(name)
    assert cls.name == name
    assert isinstance(cls.needs, frozenset)
    assert "Privacy" in (cls.__doc__ or "")


# -- hostile sites -----------------------------------------------------------------------


@every_selector
def test_selector_stands_extreme_claims(name):
    huge = SiteProfile(
        name="s0",
        classes=CLASSES,
        counts_kind=CountsKind.COUNTS,
        class_counts=(1e12,) * 3,
        familiarity=True,
        price_per_query=1e300,
    )
    candidates = [dataclasses.replace(sites()[0], profile=huge), *sites()[1:]]
    selector = selector_of(name)
    assert np.isfinite(selector.score(candidates, need_of(n_queries=1))).all()
    found = selector.select(candidates, need_of(n_queries=1))
    assert all(math.isfinite(score) for score in found.scores.values())


@every_selector
def test_selector_fails_typed_where_sites_know_none_of_the_classes(name):
    strangers = [
        dataclasses.replace(
            c, profile=SiteProfile(name=c.profile.name, classes=("z",), familiarity=True)
        )
        for c in sites()
    ]
    try:
        found = selector_of(name).select(strangers, need_of())
    except FedInferError:
        return
    assert all(math.isfinite(score) for score in found.scores.values())
