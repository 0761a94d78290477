"""One site that lies, masks rubbish or quotes a price: what it does to the others."""

from __future__ import annotations

import math

import numpy as np
import pytest

from fedinfer_flower import FedEnsemble, Querier
from fedinfer_flower.ensemble import make_rule
from fedinfer_flower.ensemble.auto import pick_rule
from fedinfer_flower.ensemble.skew_check import ORDER_STATISTICS
from fedinfer_flower.errors import (
    IncompatibleProtection,
    InvalidValueError,
    SelectionError,
    UntrustedKeyError,
)
from fedinfer_flower.planning.question import choose_rule
from fedinfer_flower.privacy import make_protection
from fedinfer_flower.profile import CountsKind, SiteProfile
from fedinfer_flower.querier.sequential_querier import SequentialQuerier
from fedinfer_flower.query import SiteId
from fedinfer_flower.selection import make_selector
from fedinfer_flower.selection.base import Selection, SelectionNeed
from fedinfer_flower.selection.candidate import Candidate, SiteRecord
from fedinfer_flower.selection.cascade import Cascade
from fedinfer_flower.selection.cascade_policy import CascadePolicy
from fedinfer_flower.selection.gates import make_gate
from fedinfer_flower.selection.plan import plan_query
from fedinfer_flower.strategies.fed_coalitions import FedCoalitions
from fedinfer_flower.strategies.fed_group_median import FedGroupMedian
from fedinfer_flower.strategies.fed_sequential import FedSequential
from fedinfer_flower.uncertainty.federated_quantile import HistogramSpec, safe_threshold
from fedinfer_flower.wire.directory import Directory, SiteCard
from fedinfer_flower.wire.identity import Identity
from fedinfer_flower.wire.pins import Pins


def candidate(number, *, price=0.0, counts=(1.0, 1.0), classes=("x", "y"), record=None):
    return Candidate(
        site_id=SiteId(number),
        key_id=f"{number:064x}",
        profile=SiteProfile(
            name=f"s{number}",
            classes=classes,
            price_per_query=price,
            counts_kind=CountsKind.COUNTS,
            class_counts=tuple(float(n) for n in counts),
        ),
        record=record or SiteRecord(),
    )


# -- rubbish under a mask ------------------------------------------------------------------


def test_group_median_loses_one_group_to_one_hostile_site(federation, rows, one_hostile_mask):
    result = FedGroupMedian(n_groups=4, min_available_nodes=12).start(federation(12), rows)
    assert len(result.missing) == 1
    assert one_hostile_mask


def test_sequential_skips_the_group_of_a_hostile_site(federation, rows, one_hostile_mask):
    result = FedSequential(
        rule="mean-probability", protection="secagg", min_available_nodes=9
    ).start(federation(9), rows)
    assert len(result.failed) == 1
    assert one_hostile_mask


def test_coalitions_without_a_hostile_site_are_kept(federation, rows, one_hostile_mask):
    found = FedCoalitions(
        rows_per_coalition=1, protection="secagg", min_available_nodes=8, seed=3
    ).start(federation(8), rows, np.zeros(8, dtype=int))
    bad = [k for k, key_id in enumerate(found.key_ids) if key_id in one_hostile_mask]
    assert not found.sums.members_tk[:, bad].any()


# -- claims in a profile -------------------------------------------------------------------


def test_class_of_a_site_that_is_not_asked_does_not_stop_the_others(federation, rows):
    grid = federation(8, extra_class={7: "zzz"}, prices={7: 100.0})
    result = FedSequential(
        rule="class-share", protection="secagg", min_available_nodes=8, budget=50.0
    ).start(grid, rows)
    assert result.prediction.classes == ("a", "b", "c")


def test_price_that_nobody_pays_changes_no_choice():
    names = tuple(f"c{k}" for k in range(12))
    one = np.eye(12)
    cheap = [candidate(k, price=1.0, counts=50 * one[k], classes=names) for k in range(12)]
    dear = candidate(20, price=12.0, counts=60 * one[0], classes=names)
    need = SelectionNeed(classes=names, budget=12.0)
    greedy = make_selector("coverage-greedy")
    alone = greedy.select([*cheap, dear], need).site_ids
    bystander = candidate(99, price=1e12, counts=one[1], classes=names)
    # All twelve cheap sites fit the budget; beside the bystander one dear site takes it all.
    assert len(alone) == 12
    assert set(greedy.select([*cheap, dear, bystander], need).site_ids) == set(alone)


def with_a_price_beyond_floats():
    try:
        return [candidate(k, price=1.0) for k in range(3)] + [candidate(9, price=1e308)]
    except InvalidValueError:
        pytest.skip("no profile has such a price")


@pytest.mark.parametrize("name", ["coverage-greedy", "early-exit", "cascade"])
def test_price_beyond_floats_breaks_no_selector(name):
    sites = with_a_price_beyond_floats()
    need = SelectionNeed(classes=("x", "y"), n_queries=100, budget=1000.0)
    assert 9 not in make_selector(name).select(sites, need).site_ids


def test_price_of_a_plan_is_a_number():
    sites = with_a_price_beyond_floats()
    need = SelectionNeed(classes=("x", "y"), n_queries=100)
    assert math.isfinite(plan_query(sites, need, selector=make_selector("all")).price)


def test_cascade_asks_its_add_on_although_a_gate_refused_one_site_of_it():
    sites = [candidate(k) for k in range(6)]
    sites.append(candidate(6, record=SiteRecord(reputation=(1.0, 99.0))))
    keys = [site.key_id for site in sites]
    policy = CascadePolicy(
        classes=("x", "y"),
        groups=(tuple(keys[:3]), tuple(keys[3:])),
        base=0,
        thresholds_c=(2.0, 2.0),
        addons_c=(1, 1),
    )
    selector, need = Cascade(policy=policy.to_json()), SelectionNeed(classes=("x", "y"))
    plan = plan_query(sites, need, selector=selector, gates=[make_gate("reputation")])
    assert len(plan.groups) == 2
    selection = Selection(groups=plan.groups, reasons={s.site_id: "" for s in plan.sites})
    route = selector.route(selection, sites, need, make_rule("mean-probability"))
    assert route.addons_c.tolist() == [1, 1]


def test_card_that_is_not_pinned_bends_no_weight(federation):
    strategy = FedEnsemble(protection="secagg", min_available_nodes=7)
    directory = strategy.directory(federation(7))
    pins = Pins(sites={card.profile.name: card.key_id for card in directory.cards})
    options = {
        "rule": "class-share",
        "classes": ("a", "b", "c"),
        "selector": make_selector("early-exit", {"tau": 0.0, "least_groups": 1}),
    }
    rows = np.random.default_rng(0).standard_normal((30, 4))
    honest = SequentialQuerier(
        Querier(protection="secagg", pins=pins), directory=directory, inputs=rows, **options
    )
    first = directory.cards[int(honest.selection.groups[0][0])]
    ghost = SiteCard.signed(
        SiteProfile(
            name="ghost",
            classes=("a",),
            counts_kind=CountsKind.COUNTS,
            class_counts=(1e12,),
            # The owner of a site without one is its key: claimed, it keeps the ghost out of
            # the first group, so that nobody meets it there.
            model_card={"owner": first.key_id},
        ),
        identity=Identity.generate(),
        run_id=directory.run_id,
    )
    forged = Directory(run_id=directory.run_id, cards=(*directory.cards, ghost))
    with pytest.raises(UntrustedKeyError):
        SequentialQuerier(
            Querier(protection="secagg", pins=pins), directory=forged, inputs=rows, **options
        ).next_job()


def test_liar_under_masks_moves_the_threshold_further_than_its_own_rows():
    # What is opened is checked against the rows of all sites together: a site that masks
    # what it likes has the room that the others leave, and can take their counts away.
    spec = HistogramSpec(n_bins=10, max_rows=1000)
    honest, within, beyond = np.zeros(11), np.zeros(11), np.zeros(11)
    honest[7], within[0], beyond[0] = 400.0, 1000.0, 4000.0

    def threshold(counts):
        found = safe_threshold(counts, spec, n_sites=5, alpha=0.1)
        return found.predictor.threshold

    assert threshold(honest + within) == threshold(honest) == 0.8
    assert threshold(honest + beyond) == 0.1


# -- order statistics ----------------------------------------------------------------------


SKEWED = {
    k: SiteProfile(
        name=name,
        classes=("a", "b", "c"),
        counts_kind=CountsKind.COUNTS,
        class_counts=tuple(10.0 * np.eye(3)[k]),
    )
    for k, name in enumerate("ABC")
}


@pytest.mark.parametrize(
    "name",
    [
        "trimmed-mean",
        pytest.param(
            "deep-set-trimmed",
        ),
    ],
)
def test_trimmed_mean_under_skew_is_refused_under_any_name(name):
    with pytest.raises(IncompatibleProtection):
        choose_rule(make_rule(name), make_protection("plain"), SKEWED)


@pytest.mark.parametrize("protection", ["plain", "he", "secagg", "dp", "secagg+dp"])
@pytest.mark.parametrize("kind", list(CountsKind))
@pytest.mark.parametrize("familiarity", [False, True])
@pytest.mark.parametrize("calibrated", [False, True])
def test_auto_never_picks_an_order_statistic(protection, kind, familiarity, calibrated):
    profiles = [
        SiteProfile(
            name=name,
            classes=classes,
            counts_kind=kind,
            class_counts=None if kind is CountsKind.WITHHELD else (1.0,) * len(classes),
            familiarity=familiarity,
            calibrated=calibrated,
        )
        for name, classes in (("A", ("x", "y")), ("B", ("y",)))
    ]
    rule, _ = pick_rule(profiles, protection, "gaussian" if "dp" in protection else None)
    assert rule.name not in ORDER_STATISTICS


def test_selection_of_too_few_sites_is_typed_whatever_the_selector():
    need = SelectionNeed(classes=("x", "y"))
    for name in ("all", "bandit-ucb", "cascade", "competence", "coverage-greedy", "early-exit"):
        with pytest.raises(SelectionError):
            make_selector(name).select([], need)
