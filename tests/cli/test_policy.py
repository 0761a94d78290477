"""`fedinfer policy check`: what an operator reads before the site is started."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from fedinfer_flower.cli.policy import policy_app

KEY = "ab" * 32
STRICT = f"""
[site]
name = "north"
home = "state"
[model]
loader = "ward.models:load_model"
digest = "{"12" * 32}"
[answers]
protections = ["secagg"]
[queriers]
registry = "{KEY}"
[sites]
south = "{"cd" * 32}"
[limits]
rows-per-day = 10
"""


def check(tmp_path: Path, text: str, *words: str):
    file = tmp_path / "site.toml"
    file.write_text(text)
    return CliRunner().invoke(policy_app, ["check", str(file), *words], catch_exceptions=False)


def test_words_say_what_leaves_to_whom_how_and_at_what_cost(tmp_path):
    done = check(tmp_path, STRICT)
    assert done.exit_code == 0
    for words in (
        *("Site north", "scores: a number for every class", f"querier registry, key {KEY}"),
        *("only sums of at least 3 sites", "10 rows a day of one querier", "no code of a FAB"),
        *("sealed to this site", "No warnings"),
    ):
        assert words in done.output
    assert not (tmp_path / "state").exists()  # nothing is made or started


def test_json_has_the_same_and_the_digest(tmp_path):
    found = json.loads(check(tmp_path, STRICT, "--json").output)
    assert found["ok"]
    assert found["warnings"] == []
    assert len(found["digest"]) == 64
    assert any(words.startswith("secagg") for words in found["protection"])


WEAK = {
    "plain": ('["secagg"]', '["plain"]', "plain: whoever asks"),
    "clear": ('["secagg"]', '["secagg"]\nrequire-seal = false', "require-seal is off"),
    "anyone": (f'[queriers]\nregistry = "{KEY}"', "", "anyone = true"),
    "dp": ('["secagg"]', '["dp"]', "without [budget]"),
    "fab": ("[limits]", f'[code]\napp = "fab"\nfab-hashes = ["{KEY}"]\n[limits]', "app = 'fab'"),
    "sites": (f'south = "{"cd" * 32}"', "", "without [sites]"),
    "limits": ("rows-per-day = 10", "", "rows-per-day"),
    "digest": (f'digest = "{"12" * 32}"', "", "no [model] digest"),
    "audit": ("[limits]", "[audit]\nenabled = false\n[limits]", "audit log is off"),
}


@pytest.mark.parametrize("case", WEAK)
def test_weak_choice_is_a_warning_and_no_error(tmp_path, case):
    old, new, words = WEAK[case]
    text = STRICT.replace(old, new)
    if case == "anyone":
        text = text.replace('["secagg"]', '["secagg"]\nanyone = true')
    done = check(tmp_path, text)
    assert done.exit_code == 0
    assert words in done.output.split("Warnings", maxsplit=1)[1]


@pytest.mark.parametrize("words", [(), ("--json",)], ids=["words", "json"])
def test_policy_that_cannot_be_used_ends_with_status_1(tmp_path, words):
    done = check(tmp_path, STRICT.replace("protections", "protection"), *words)
    assert done.exit_code == 1
    assert "did you mean" in done.output
    if words:
        found = json.loads(done.output)
        assert not found["ok"]
        assert found["error"]["code"] == "FI206"


def test_file_that_is_missing_ends_with_status_1(tmp_path):
    done = CliRunner().invoke(policy_app, ["check", str(tmp_path / "no.toml")])
    assert done.exit_code == 1
    assert "cannot be read" in done.output
