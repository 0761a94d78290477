"""`fedinfer demo --rewards --selector ...`: one real run on a grid in one process, read back."""

from __future__ import annotations

import doctest
import importlib
import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from fedinfer_flower.cli.demo import DemoOptions, demo_steps, run_federation
from fedinfer_flower.cli.demo_modes import DemoMode, mode_of
from fedinfer_flower.cli.demo_results import results_of
from fedinfer_flower.cli.demo_rewards import LEDGER_FILE, REWARDS_STEP, require_rewards
from fedinfer_flower.cli.demo_selection import require_selectors, selectors_of
from fedinfer_flower.errors import (
    ConfigError,
    IncompatibleProtection,
    InvalidValueError,
    UnknownNameError,
)
from fedinfer_flower.incentives.ledger import Ledger
from fedinfer_flower.reporting.report import write_report
from fedinfer_flower.selection import SELECTORS
from fedinfer_flower.simulation.federation import FederationPlan

FEDINFER = str(Path(sys.executable).parent / "fedinfer")
KINDS = ("logistic regression", "k-NN")
OPTIONS = DemoOptions(
    dataset="wine",
    n_sites=6,
    alpha=0.5,
    quick=True,
    rewards=True,
    selector="early-exit,coverage-greedy,cascade,competence,random",
)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """Return (folder, run, results): sites are threads of the child, all else is as always."""
    folder = tmp_path_factory.mktemp("federation")
    quick = lambda name: replace(mode_of(name), kinds=KINDS)  # noqa: E731
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(DemoMode, "in_process", property(lambda _: True))
        patch.setattr("fedinfer_flower.cli.demo.mode_of", quick)
        done = run_federation(OPTIONS, folder, progress=lambda *_: None)
        results = json.loads(json.dumps(results_of(done)))
    return folder, done, results


def test_settled_pay_is_that_of_the_scheme_in_clear(run):
    rewards = run[2]["rewards"]

    # 40 audits of three classes in fixed point of 2^-20, weights from totals on that grid.
    assert rewards["clear_difference"] < 1e-4 * rewards["largest_score"]
    assert rewards["n_audits"] == 40
    assert rewards["n_queries"] == 14


def test_fee_is_paid_out_to_the_last_micro_credit_and_the_rest_withdrawn(run):
    rewards = run[2]["rewards"]
    balances = rewards["ledger"]["balances"]

    # Seven sites, 54 rows, 0.001 credits each.
    assert rewards["fee"] == 7 * 54 * 1000
    assert sum(site["paid"] for site in rewards["sites"]) + rewards["refund"] == rewards["fee"]
    assert {n: balances.get(n, 0) for n in (s["name"] for s in rewards["sites"])} == {
        s["name"]: s["paid"] for s in rewards["sites"]
    }
    assert balances["querier"] == 0
    assert sum(balances.values()) == 0
    kinds = [entry["kind"] for entry in rewards["ledger"]["entries"]]
    assert kinds[1:] == ["deposit", "open-escrow", "release", "withdraw"]


def test_ledger_left_behind_verifies(run):
    folder, _, results = run
    ledger = Ledger(f"sqlite:///{folder / LEDGER_FILE}")
    found = ledger.verify()

    assert found.ok
    assert str(found.head) == results["rewards"]["ledger"]["head"]
    assert found.jobs[0].fee == results["rewards"]["fee"]


def test_free_rider_is_paid_by_label_free_splits_and_not_by_the_settlement(run):
    rewards = run[2]["rewards"]
    rider = rewards["sites"][-1]
    split = {entry["key"]: entry for entry in rewards["splits"]}

    assert rider["is_free_rider"]
    assert [s["is_free_rider"] for s in rewards["sites"]].count(True) == 1
    # The unprotected forms pay it: one part in seven by an equal split, more by entropy.
    assert split["equal"]["rider_share"] == pytest.approx(1 / 7)
    assert split["entropy"]["rider_share"] > 1 / 7
    assert split["paid"]["rider_share"] < split["final-agreement"]["rider_share"]
    assert split["paid"]["rider_share"] < 0.05
    assert split["paid"]["spearman"] > 0.5


def test_free_rider_is_asked_by_the_settled_step_alone(run):
    folder, done, results = run

    for label, outcome in done.outcomes.items():
        asked = {site["name"] for site in outcome.report["reports"][0]["sites"]}
        assert "site-6" not in asked, label
    settled = json.loads((folder / "rewards.report.json").read_text())
    assert "site-6" in {site["name"] for site in settled["reports"][0]["sites"]}
    assert len(results["sites"]) == 6
    assert results["warnings"] == []


def test_main_answer_is_asked_by_the_first_selector_in_groups(run):
    _, done, results = run
    selection = results["selection"]

    assert selection["selector"] == "early-exit"
    assert selection["plan"]["n_groups"] == 2
    assert 3.0 <= selection["sites_asked"] <= 6.0
    groups = [site["group"] for site in selection["plan"]["sites"]]
    assert groups.count(0) >= 3
    assert groups.count(1) >= 3
    main = done.outcomes["protect-secagg"]
    first = {site["name"] for site in main.report["reports"][0]["sites"]}
    assert first == {s["name"] for s in selection["plan"]["sites"] if s["group"] == 0}
    assert len(main.prediction) == 54
    label = next(p["label"] for p in results["protections"] if p["name"] == "secagg")
    assert label.startswith("secagg (early-exit: ")


def test_frontier_has_a_point_for_each_selector_and_setting(run):
    points = run[2]["selection"]["points"]
    by_name = {name: [p for p in points if p["selector"] == name] for name in selectors_of("all")}

    assert [p["setting"] for p in by_name["coverage-greedy"]] == [f"{m} sites" for m in range(3, 7)]
    assert {p["setting"] for p in by_name["early-exit"]} >= {"tau 0.3", "lossless"}
    assert by_name["cascade"]
    for point in points:
        assert 0.0 <= point["low"] <= point["accuracy"] <= point["high"] <= 1.0
        assert point["credits_per_row"] == pytest.approx(0.001 * point["sites_asked"])
        assert 3.0 <= point["sites_asked"] <= 6.0
    # Whoever asks everybody gets what everybody gets; lossless gets it from fewer.
    everybody = {p["accuracy"] for p in points if p["setting"] == "6 sites"}
    lossless = next(p for p in points if p["setting"] == "lossless")
    assert {lossless["accuracy"]} == everybody


def test_report_has_both_sections_and_names_no_row(run, tmp_path):
    page = write_report(run[2], tmp_path / "report.html").read_text()

    for heading in ('id="rewards"', 'id="selection"'):
        assert page.count(heading) == 1
    assert "free rider" in page
    assert "coordinator and querier together" in page
    assert page.count("<svg") >= 4


def test_old_results_without_the_sections_still_draw(run, tmp_path):
    old = {key: value for key, value in run[2].items() if key not in ("rewards", "selection")}

    page = write_report(old, tmp_path / "old.html").read_text()

    assert 'id="rewards"' not in page
    assert 'id="selection"' not in page
    assert 'id="protections"' in page


def test_hostile_names_are_shown_and_not_obeyed(run, tmp_path):
    hostile = json.loads(json.dumps(run[2]))
    hostile["rewards"]["sites"][0]["name"] = "<script>alert(1)</script>"
    hostile["selection"]["plan"]["sites"][0]["reason"] = "<b>best</b>"

    page = write_report(hostile, tmp_path / "report.html").read_text()

    assert "<script" not in page
    assert "<b>best" not in page
    assert "&lt;script&gt;" in page


# -- what is refused before anything starts -------------------------------------------------


def test_without_the_flags_the_steps_are_what_they_were():
    plain = demo_steps(DemoOptions(quick=True))
    assert not any(step.settled or step.grouped for step in plain)
    assert REWARDS_STEP not in plain
    assert "--rewards" not in DemoOptions().command()
    command = DemoOptions(rewards=True, free_rider=False, selector="all").command()
    assert command.endswith("--rewards --no-free-rider --selector all")


def test_plan_of_a_run_survives_its_file(tmp_path):
    plan = FederationPlan(
        n_sites=5,
        share_counts="counts",
        steps=demo_steps(OPTIONS),
        free_riders=1,
        priced=True,
    )
    plan.write(tmp_path)
    assert FederationPlan.read(tmp_path) == plan
    assert plan.n_nodes == 6


@pytest.mark.parametrize("mode", ["encrypted-query", "mpc"])
def test_sites_that_do_not_read_the_query_cannot_settle_or_be_chosen(mode):
    with pytest.raises(IncompatibleProtection, match="second copy"):
        require_rewards(protect=mode, hides_query=True, n_sites=5, n_rows=540)
    with pytest.raises(IncompatibleProtection, match="all asked"):
        require_selectors(("random",), rule="auto", hides_query=True)


def test_too_few_sites_or_rows_cannot_settle():
    with pytest.raises(InvalidValueError, match="at least 3 sites"):
        require_rewards(protect="plain", hides_query=False, n_sites=2, n_rows=540)
    with pytest.raises(InvalidValueError, match="fewer than 30 rows"):
        require_rewards(protect="plain", hides_query=False, n_sites=5, n_rows=39)


def test_selectors_that_cannot_run_are_refused():
    assert set(selectors_of("all")) == set(SELECTORS.names()) - {"fixed"}
    assert selectors_of("") == ()
    with pytest.raises(UnknownNameError):
        selectors_of("largest,psychic")
    with pytest.raises(ConfigError, match="list of sites"):
        selectors_of("fixed")
    with pytest.raises(ConfigError, match="twice"):
        selectors_of("random,random")
    with pytest.raises(ConfigError, match="learned from audits"):
        require_selectors(("cascade",), rule="auto", hides_query=False)
    with pytest.raises(ConfigError, match="compares all scores"):
        require_selectors(("early-exit",), rule="median", hides_query=False)
    require_selectors(("coverage-greedy",), rule="median", hides_query=False)


def test_cli_names_a_wrong_selector(tmp_path):
    done = subprocess.run(
        [FEDINFER, "demo", "--selector", "psychic"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 2
    assert UnknownNameError.code in done.stderr


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_demo_on_the_engine_pays_and_leaves_a_ledger(tmp_path):
    done = subprocess.run(
        [
            *(FEDINFER, "demo", "--dataset", "breast_cancer", "--sites", "3", "--alpha", "0.5"),
            *("--quick", "--rewards", "--no-free-rider", "--selector", "coverage-greedy"),
            *("--json", "--out", "report"),
        ],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=280,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    results = json.loads(done.stdout)
    assert Ledger(f"sqlite:///{tmp_path / 'report' / LEDGER_FILE}").verify().ok
    assert results["rewards"]["splits"][0]["rider_share"] is None
    assert np.isclose(sum(s["shares"]["paid"] for s in results["rewards"]["sites"]), 1.0)
    assert len(results["selection"]["plan"]["sites"]) == 3
    page = (tmp_path / "report" / "report.html").read_text()
    assert "free rider gets" not in page


def test_doctests():
    for name in ("demo_rewards", "demo_selection"):
        result = doctest.testmod(importlib.import_module(f"fedinfer_flower.cli.{name}"))
        assert result.attempted > 0
        assert result.failed == 0
