"""The sections on rewards and selection, from figures made by hand."""

from __future__ import annotations

import doctest
import importlib

import pytest

from fedinfer_flower.reporting import write_report
from fedinfer_flower.reporting.rewards_section import as_credits, reward_sentences
from fedinfer_flower.reporting.selection_plots import frontier_lines

KEYS = ("paid", "shapley", "equal", "final-agreement", "entropy")


def site(number, *, paid, shares, rider=False):
    return {
        "name": f"site-{number}",
        "kind": "k-NN",
        "is_free_rider": rider,
        "accuracy": 0.5,
        "score": 0.25,
        "paid": paid,
        "shares": dict(zip(KEYS, shares, strict=True)),
    }


def split(key, *, rider):
    return {
        "key": key,
        "label": f"by {key}",
        "f": 0.9,
        "f_above_chance": 0.8,
        "spearman": None if key == "shapley" else 0.75,
        "rider_share": rider,
    }


def rewards(*, with_rider):
    sites = [
        site(0, paid=700_001, shares=(0.7, 0.6, 1 / 3, 0.4, 0.2)),
        site(1, paid=299_999, shares=(0.3, 0.4, 1 / 3, 0.4, 0.3)),
        site(2, paid=0, shares=(0.0, 0.0, 1 / 3, 0.2, 0.5), rider=with_rider),
    ]
    riders = dict(zip(KEYS, (0.0, 0.0, 1 / 3, 0.2, 0.5), strict=True))
    return {
        "scheme": "audited-blend",
        "payment": "proportional",
        "protection": "secagg",
        "rule": "mean-probability",
        "n_audits": 200,
        "n_queries": 340,
        "joint": {"accuracy": 0.7, "low": 0.65, "high": 0.75},
        "noise_scale": 0.0,
        "fee": 1_000_000,
        "refund": 0,
        "shapley": "shapley",
        "clear_difference": 2e-6,
        "largest_score": 0.25,
        "sites": sites,
        "splits": [split(key, rider=riders[key] if with_rider else None) for key in KEYS],
        "who_learns": [{"party": "querier alone", "learns": "sums"}],
        "ledger": {
            "file": "ledger.db",
            "ok": True,
            "head": "4:" + "ab" * 32,
            "entries": [
                {"kind": "deposit", "postings": [["external", -2_000_000], ["querier", 2_000_000]]}
            ],
            "balances": {"external": -2_000_000, "querier": 2_000_000},
        },
    }


def point(name, setting, asked, accuracy):
    return {
        "selector": name,
        "setting": setting,
        "accuracy": accuracy,
        "low": accuracy - 0.02,
        "high": accuracy + 0.02,
        "sites_asked": asked,
        "credits_per_row": 0.001 * asked,
    }


SELECTION = {
    "rule": "class-share",
    "n_queries": 340,
    "n_audits": 200,
    "price": 0.001,
    "points": [
        point("all", "5 sites", 5.0, 0.9),
        point("random", "4 sites", 4.0, 0.8),
        point("random", "3 sites", 3.0, 0.7),
    ],
    "left_out": [{"selector": "dynamic-competence", "reason": "rule does not use it"}],
    "selector": "early-exit",
    "sites_asked": 3.5,
    "accuracy": 0.88,
    "plan": {
        "sites": [
            {"name": "site-0", "group": 0, "reason": "first"},
            {"name": "site-1", "group": 1, "reason": "second"},
        ],
        "n_groups": 2,
        "passed_over": ["site-2"],
        "expected_accuracy": None,
        "accuracy_basis": "unknown: no audits",
    },
}


def page_of(results, tmp_path):
    return write_report(results, tmp_path / "report.html").read_text()


def section(page, name):
    return page.split(f'<h2 id="{name}">')[1].split("<h2 ")[0]


@pytest.mark.parametrize("with_rider", [True, False])
def test_pay_is_written_to_the_last_micro_credit(results, tmp_path, with_rider):
    shown = section(
        page_of(results | {"rewards": rewards(with_rider=with_rider)}, tmp_path), "rewards"
    )

    for amount in ("0.700001", "0.299999", "-2.000000"):
        assert amount in shown
    assert ("free rider" in shown) == with_rider
    assert "4:" + "ab" * 32 in shown
    assert "0.75" in shown
    assert shown.count("<svg") == 1


def test_sentences_say_what_the_free_rider_gets(results):
    said = " ".join(reward_sentences(results | {"rewards": rewards(with_rider=True)}))
    assert "gets 0.0 % of the pot" in said
    assert "33.3 %" in said
    assert "rider" not in " ".join(
        reward_sentences(results | {"rewards": rewards(with_rider=False)})
    )


def test_selection_shows_plan_groups_points_and_what_was_not_measured(results, tmp_path):
    shown = section(page_of(results | {"selection": SELECTION}, tmp_path), "selection")

    assert "Passed over: site-2" in shown
    assert "group, and not the federation" in shown
    assert "dynamic-competence (rule does not use it)" in shown
    assert "unknown: no audits" in shown
    assert shown.count("<svg") == 1
    assert "Dashed: asking everybody" in shown
    lines = frontier_lines({"selection": SELECTION})
    assert [p["sites_asked"] for p in lines["random"]] == [3.0, 4.0]


def test_one_group_says_nothing_of_groups(results, tmp_path):
    plan = SELECTION["plan"] | {"n_groups": 1, "sites": SELECTION["plan"]["sites"][:1]}
    shown = section(
        page_of(results | {"selection": SELECTION | {"plan": plan}}, tmp_path), "selection"
    )
    assert "Groups are asked" not in shown


def test_a_ledger_that_does_not_fit_is_said_to(results, tmp_path):
    paid = rewards(with_rider=True)
    paid["ledger"]["ok"] = False
    shown = section(page_of(results | {"rewards": paid}, tmp_path), "rewards")
    assert "A row does not fit." in shown
    assert "Every row fits" not in shown


def test_credits_are_exact():
    assert as_credits(10**15) == "1000000000.000000"
    assert as_credits(-1) == "-0.000001"


def test_doctests():
    module = importlib.import_module("fedinfer_flower.reporting.rewards_section")
    result = doctest.testmod(module)
    assert result.attempted > 0
    assert result.failed == 0
