"""`fedinfer fuser`: train on two folders, look at one."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

import fedinfer_flower.simulation
from fedinfer_flower.cli.fuser import fuser_app
from fedinfer_flower.errors import (
    FuserError,
    InvalidValueError,
    ModelError,
    UnknownNameError,
)
from fedinfer_flower.kv.fuser_file import load_fuser
from fedinfer_flower.refine.examples import FuserExample, write_examples
from fedinfer_flower.refine.fuser_card import FuserCard
from fedinfer_flower.simulation.facts.fuser_data import fuser_examples
from fedinfer_flower.simulation.facts.world import FactWorld

FOLDER = Path(fedinfer_flower.simulation.__file__).parent / "checkpoints"
RECEIVER, SHARER = str(FOLDER / "qwen3"), str(FOLDER / "llama")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> str:
    every = fuser_examples(FactWorld(), sharer=1, receiver=0, documents=30)
    kept = [e for task in ("doc1", "nobody") for e in every if e.task == task][:30]
    kept += [e for e in every if e.task == "fact"][:200]
    path = tmp_path_factory.mktemp("data") / "examples.jsonl"
    write_examples(kept, path)
    return str(path)


def invoke(*words: str, code: int = 0) -> str:
    done = CliRunner().invoke(fuser_app, words, catch_exceptions=False)
    assert done.exit_code == code
    return done.stdout


def train(data: str, out: Path, *words: str) -> str:
    models = ("--receiver", RECEIVER, "--sharer", SHARER, "--prompts", "facts")
    quick = ("--steps", "3", "--batch", "8", "--width", "8")
    return invoke("train", *models, "--data", data, "--out", str(out), *quick, *words)


def test_train_writes_a_fuser_with_its_card(data: str, tmp_path: Path) -> None:
    shown = train(data, tmp_path / "f", "--seed", "7", "--layer-map", "terminal")

    fuser = load_fuser(tmp_path / "f")
    card = FuserCard.from_dict(fuser.card)
    assert (card.kind, card.steps, card.seed) == ("last-token", 3, 7)
    assert (fuser.spec.layer_map, fuser.spec.width) == ("terminal", 8)
    assert fuser.scales is not None
    for task in card.counts:
        assert any(line.split()[:1] == [task] for line in shown.splitlines())
    assert "another question's cache" in shown
    assert f"{card.parameters:,} parameters" in shown
    assert "helps on: no task" in shown  # three steps teach nothing


def test_train_json_is_the_card_and_share_options_reach_the_fuser(
    data: str, tmp_path: Path
) -> None:
    shown = train(data, tmp_path / "f", "--json", "--last", "2", "--decode", "0", "--hidden")

    fuser = load_fuser(tmp_path / "f")
    assert FuserCard.from_dict(json.loads(shown)).to_dict() == fuser.card
    share = fuser.spec.share
    assert (share.last, share.decode, share.hidden) == (2, 0, True)


def test_probe_says_what_has_to_travel(data: str) -> None:
    words = ("probe", "--sharer", SHARER, "--data", data, "--prompts", "facts", "--last", "2")

    table, found = invoke(*words), json.loads(invoke(*words, "--json"))

    assert "Train with --last 1 --decode" in table
    assert found["decoded"] > 0.8
    assert found["advice"]["last"] == 1
    assert len(found["layers"]) == 5


def test_wrong_words_are_typed_errors_and_write_nothing(data: str, tmp_path: Path) -> None:
    with pytest.raises(UnknownNameError, match="no fuser is called"):
        train(data, tmp_path / "f", "--kind", "last-tokens")
    with pytest.raises(UnknownNameError, match="no prompt format"):
        train(data, tmp_path / "f", "--prompts", "fact")
    with pytest.raises(FuserError, match="last tokens"):
        train(data, tmp_path / "f", "--last", "0")
    with pytest.raises(InvalidValueError, match="layer_map"):
        train(data, tmp_path / "f", "--layer-map", "deep")
    with pytest.raises(InvalidValueError, match="cannot be read"):
        train(str(tmp_path / "none.jsonl"), tmp_path / "f")
    with pytest.raises(ModelError, match="no model folder 'none'"):
        invoke("probe", "--sharer", str(tmp_path / "none"), "--data", data)

    assert not (tmp_path / "f").exists()


def test_malformed_line_is_named_without_its_words(tmp_path: Path) -> None:
    path = tmp_path / "e.jsonl"
    write_examples([FuserExample("q", "a")], path)
    path.write_text(path.read_text() + '{"question": "secret"}\n')

    with pytest.raises(InvalidValueError, match="line 2") as caught:
        invoke("probe", "--sharer", SHARER, "--data", str(path))

    assert "secret" not in str(caught.value)


def test_attack_says_what_the_shared_cache_gives_away(data: str) -> None:
    words = ("attack", "--sharer", SHARER, "--data", data, "--steps", "5", "--prompts", "facts")
    report = json.loads(invoke(*words, "--json"))
    # The decoded token is in the dictionary of its own model: no training is needed for it.
    looked_up = {row["share"] for row in report["rows"] if row["attacker"] == "look-up"}
    assert max(looked_up) > 0.9
    assert "|" in invoke(*words)
