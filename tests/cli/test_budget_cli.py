"""`fedinfer budget show`: what an operator reads."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from fedinfer_flower.cli.budget import budget_app
from fedinfer_flower.errors import ConfigError, InvalidValueError
from fedinfer_flower.privacy.charge import Charge
from fedinfer_flower.privacy.site_budget import BudgetPolicy, SiteBudget

QUERIER = "0123456789abcdef" * 4


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """A budget with one answer that left, one cancelled, and one still open."""
    path = tmp_path / "budget.db"
    budget = SiteBudget(path, BudgetPolicy(epsilon_per_querier=4.0, epsilon_global=8.0))
    cost = Charge.pure(0.5, 2)
    taken = [
        budget.reserve(querier=QUERIER, query_id=f"q{i}", charge_querier=cost, charge_global=cost)
        for i in range(3)
    ]
    budget.commit(taken[0])
    budget.cancel(taken[1])
    return path


def show(*words: str) -> str:
    done = CliRunner().invoke(budget_app, ["show", *words], catch_exceptions=False)
    assert done.exit_code == 0
    return done.output


def test_table_has_a_line_for_all_and_one_a_querier(path: Path) -> None:
    lines = [line.split() for line in show(str(path)).splitlines()]

    everyone = next(line for line in lines if line[:2] == ["all", "together"])
    querier = next(line for line in lines if line[:1] == [QUERIER[:16]])
    assert everyone[2:5] == ["2.000", "/", "8"]
    assert querier[1:4] == ["2.000", "/", "4"]
    assert querier[-3:] == everyone[-3:] == ["2", "4", "1"]
    assert QUERIER not in show(str(path))


def test_json_has_policy_and_lines(path: Path) -> None:
    found = json.loads(show(str(path), "--json"))

    assert found["policy"]["epsilon_per_querier"] == 4.0
    everyone, querier = found["lines"]
    assert everyone["querier"] is None
    assert querier["querier"] == QUERIER
    assert querier["spent"] == 2.0
    assert querier["remaining"] == 2.0
    assert querier["n_open"] == 1


def test_another_policy_is_shown_and_not_kept(path: Path) -> None:
    asked = json.loads(show(str(path), "--policy-epsilon-per-querier", "1.5", "--json"))
    assert asked["lines"][1]["cap"] == 1.5
    assert asked["lines"][1]["remaining"] == 0.0
    assert json.loads(show(str(path), "--json"))["lines"][1]["cap"] == 4.0


def test_showing_changes_nothing(path: Path) -> None:
    before = path.read_bytes()
    show(str(path))
    assert path.read_bytes() == before
    assert [entry.name for entry in path.parent.iterdir()] == [path.name]


def test_missing_foreign_or_tampered_file_is_a_typed_error(path: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no budget file"):
        show(str(tmp_path / "missing.db"))
    assert not (tmp_path / "missing.db").exists()
    other = tmp_path / "other.db"
    other.write_text("not a database, but long enough to look at" * 50)
    other.chmod(0o600)
    with pytest.raises(ConfigError, match="or damaged"):
        show(str(other))
    with pytest.raises(InvalidValueError):
        show(str(path), "--policy-delta", "0.5")
