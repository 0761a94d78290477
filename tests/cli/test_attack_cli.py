"""`fedinfer attack`: on the demo's sites, and on a federation of one's own."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from fedinfer_flower.cli.main import app
from fedinfer_flower.errors import InvalidValueError

OWN = """
import numpy as np
from fedinfer_flower.attacks import TargetFederation

rng = np.random.default_rng(0)
weights = rng.standard_normal((4, 5, 3))
inputs = rng.standard_normal((60, 5))
mine = lambda: TargetFederation(
    sites=tuple(lambda x, w=w: x @ w for w in weights),
    inputs=inputs,
    labels=(inputs @ weights[0]).argmax(axis=1),
    n_classes=3,
)
number = 3
"""


def test_own_federation_is_attacked(tmp_path: Path, monkeypatch) -> None:
    (tmp_path / "sites_for_attack.py").write_text(OWN)
    monkeypatch.chdir(tmp_path)

    words = ["attack", "differencing", "--federation", "sites_for_attack:mine", "--json"]
    done = CliRunner().invoke(app, [*words, "--protect", "plain", "--protect", "secagg"])

    assert done.exit_code == 0, done.output
    results = json.loads(done.stdout)
    assert results
    assert all(r["attack"] == "differencing" for r in results)
    assert any(r["succeeded"] for r in results)  # exact sums promise nothing against it


@pytest.mark.parametrize("name", ["no_such_module:mine", "sites_for_attack", "json:no", ":x"])
def test_federation_that_is_none_raises_typed_error(tmp_path: Path, monkeypatch, name) -> None:
    monkeypatch.chdir(tmp_path)
    done = CliRunner().invoke(app, ["attack", "differencing", "--federation", name])
    assert isinstance(done.exception, InvalidValueError)


def test_something_else_than_a_federation_raises_typed_error(tmp_path: Path, monkeypatch) -> None:
    (tmp_path / "other_for_attack.py").write_text("number = 3")
    monkeypatch.chdir(tmp_path)
    words = ["attack", "differencing", "--federation", "other_for_attack:number"]
    assert isinstance(CliRunner().invoke(app, words).exception, InvalidValueError)


def test_attacks_are_listed(tmp_path: Path) -> None:
    done = CliRunner().invoke(app, ["attack", "--json"])
    assert {"membership", "averaging", "differencing"} <= json.loads(done.stdout).keys()
