"""What `auto` picks, and that it says why."""

import pytest

from fedinfer_flower.ensemble.auto import AUTO_CAP, pick_rule
from fedinfer_flower.ensemble.base import Disclosure, Evidence
from fedinfer_flower.ensemble.entropy_weighted import EntropyWeighted
from fedinfer_flower.query import CountsKind, SiteProfile

COUNTS = {"counts_kind": CountsKind.COUNTS, "class_counts": (10.0, 20.0)}
PRESENCE = {"counts_kind": CountsKind.PRESENCE, "class_counts": (1.0, 0.0)}
FAMILIAR = {"familiarity": True}
CALIBRATED = {"calibrated": True, "temperature": 1.5}


def sites(*facts):
    return [
        SiteProfile(name=f"site-{i}", classes=("a", "b"), **fact) for i, fact in enumerate(facts)
    ]


@pytest.mark.parametrize(
    ("facts", "expected", "word"),
    [
        ([COUNTS, COUNTS], "class-share", "class counts"),
        ([PRESENCE, PRESENCE], "class-share", "know"),
        ([COUNTS, PRESENCE], "class-share", "know"),
        ([COUNTS | FAMILIAR, PRESENCE | FAMILIAR], "open-set-class-share", "unfamiliar"),
        ([COUNTS | FAMILIAR, COUNTS], "class-share", "class counts"),
        ([FAMILIAR, FAMILIAR | COUNTS], "open-set", "unfamiliar"),
        ([CALIBRATED, CALIBRATED | COUNTS], "entropy-weighted", "calibrated"),
        ([CALIBRATED, {}], "mean-probability", "alike"),
        ([{}, COUNTS], "mean-probability", "alike"),
        ([], "mean-probability", "alike"),
    ],
)
def test_pick_rule_without_noise_follows_what_sites_share(facts, expected, word):
    rule, reason = pick_rule(sites(*facts), "secagg", None)

    assert rule.name == expected
    assert word in reason


def test_pick_rule_for_calibrated_sites_caps_the_weight():
    rule, _ = pick_rule(sites(CALIBRATED), "he", None)

    assert rule == EntropyWeighted(cap=AUTO_CAP)
    assert AUTO_CAP < 1.0


@pytest.mark.parametrize(
    ("protection", "mechanism"),
    [("dp", None), ("dp", "gaussian"), ("secagg+dp", None), ("he-dp", None), ("other", "gaussian")],
)
def test_pick_rule_under_noise_picks_votes(protection, mechanism):
    rule, reason = pick_rule(sites(COUNTS | FAMILIAR), protection, mechanism)

    assert rule.name == "majority-vote"
    assert "noise" in reason


@pytest.mark.parametrize("fact", [{}, COUNTS, PRESENCE, FAMILIAR, CALIBRATED, COUNTS | FAMILIAR])
@pytest.mark.parametrize("protection", ["plain", "dp", "secagg", "he"])
def test_pick_rule_always_gives_one_sentence_and_a_rule_that_sums(fact, protection):
    rule, reason = pick_rule(sites(fact, fact), protection, None)

    assert reason.endswith(".")
    assert reason.count(".") == 1
    assert rule.discloses is Disclosure.SUM
    assert rule.needs <= {Evidence.CLASS_COUNTS, Evidence.FAMILIARITY}


@pytest.mark.parametrize(
    ("protection", "mechanism", "expected"),
    [
        ("secagg+dp", None, "open-set"),
        ("dp", "gaussian", "open-set"),
        # A label is all that it can send.
        ("dp", "randomised-response", "majority-vote"),
    ],
)
def test_noise_and_sites_that_know_different_classes(protection, mechanism, expected):
    profiles = [
        SiteProfile(name="a", classes=("x", "y"), familiarity=True),
        SiteProfile(name="b", classes=("y", "z"), familiarity=True),
    ]
    rule, reason = pick_rule(profiles, protection, mechanism)
    assert rule.name == expected
    assert "noise" in reason
    blind = [SiteProfile(name=p.name, classes=p.classes) for p in profiles]
    assert pick_rule(blind, protection, mechanism)[0].name == "majority-vote"
