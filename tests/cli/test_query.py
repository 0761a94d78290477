"""`fedinfer query` against a gateway on this machine."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path

import numpy as np
import pytest
import typer
from typer.testing import CliRunner

from fedinfer_flower.cli.query import query, read_rows
from fedinfer_flower.errors import (
    AuthenticationError,
    ConfigError,
    FedInferError,
    InvalidValueError,
    UntrustedKeyError,
)
from fedinfer_flower.receipts.verification import verify
from fedinfer_flower.wire.directory import Directory

_PATH = Path(__file__).parents[1] / "querier" / "conftest.py"
_SPEC = importlib.util.spec_from_file_location("gateway_for_tests", _PATH)
assert _SPEC is not None
assert _SPEC.loader is not None
support = importlib.util.module_from_spec(_SPEC)
sys.modules[_SPEC.name] = support
_SPEC.loader.exec_module(support)
running, site = support.running, support.site
ROWS, LABELS, CLASSES = support.ROWS, support.LABELS, support.CLASSES


@pytest.fixture
def asked(site, tmp_path, monkeypatch):
    """Return a function that runs the command on a file of rows."""
    monkeypatch.setenv("FEDINFER_API_KEY", site.key)
    monkeypatch.delenv("FEDINFER_API_KEY_FILE", raising=False)
    app = typer.Typer()
    app.command()(query)
    file = tmp_path / "rows.npy"
    np.save(file, ROWS)

    def run(*arguments, path=file):
        line = [str(path), "--gateway", site.url, "--model", "triage", *map(str, arguments)]
        return CliRunner().invoke(app, line)

    return run


def raised(result) -> FedInferError:
    assert isinstance(result.exception, FedInferError), result.output
    return result.exception


@pytest.mark.parametrize("how", ["--seal", "--clear"])
def test_query_prints_a_line_for_each_row(asked, how):
    result = asked(how)
    assert result.exit_code == 0, result.output
    lines = [json.loads(line) for line in result.stdout.splitlines()]
    assert [line["label"] for line in lines] == [CLASSES[i] for i in LABELS]
    assert lines[0].keys() == {"label", "probability", "margin", "abstained"}


def test_query_writes_answer_and_receipt(asked, site, tmp_path):
    cards = Directory.from_bytes(site.board.directory("triage")).cards
    known = {card.profile.name: card.key_id for card in cards}
    pins = tmp_path / "pins.toml"
    lines = [f'"{name}" = "{key}"' for name, key in known.items()]
    pins.write_text("\n".join(["[sites]", *lines]))
    out, receipt = tmp_path / "answer.npz", tmp_path / "receipt.json"
    me = tmp_path / "me.id"
    result = asked("--pins", pins, "--identity", me, "--out", out, "--receipt", receipt)
    assert result.exit_code == 0, result.output
    assert "receipt verified" in result.stderr
    assert np.load(out)["labels"].tolist() == LABELS.tolist()
    verify(receipt.read_bytes(), pins=known).require_ok()
    assert me.stat().st_mode & 0o077 == 0


def test_query_writes_json(asked, tmp_path):
    out = tmp_path / "answer.json"
    assert asked("--clear", "--out", out, "--quiet").exit_code == 0
    found = json.loads(out.read_text())
    assert found["labels"] == [CLASSES[i] for i in LABELS]
    assert found["job_id"]


def test_query_warns_where_no_key_was_compared(asked):
    assert "--pins" in asked("--seal").stderr
    assert "--pins" not in asked("--clear").stderr


def test_query_exits_1_where_every_row_is_abstained_from(asked, site):
    import dataclasses

    def silent(job):
        answer = json.loads(job.answer) | {"abstained": [True] * len(ROWS)}
        return dataclasses.replace(job, answer=json.dumps(answer).encode())

    site.board.edit = silent
    assert asked("--clear").exit_code == 1


def test_query_refuses_a_site_that_is_not_pinned(asked, tmp_path):
    pins = tmp_path / "pins.toml"
    pins.write_text("[sites]\n")
    assert isinstance(raised(asked("--pins", pins)), UntrustedKeyError)


def test_query_reads_the_key_from_a_file(asked, site, tmp_path, monkeypatch):
    monkeypatch.setenv("FEDINFER_API_KEY", "fik_00000000_wrong")
    file = tmp_path / "key"
    file.write_text(site.key)
    file.chmod(0o600)
    assert asked("--clear", "--api-key-file", file).exit_code == 0
    assert isinstance(raised(asked("--clear")), AuthenticationError)


def test_query_requires_a_receipt_where_one_is_to_be_written(asked, site, tmp_path):
    file = tmp_path / "receipt.json"
    assert raised(asked("--clear", "--receipt", file)).code == "FI317"
    assert not file.exists()


def test_query_refuses_an_output_of_another_kind_before_it_asks(asked, site, tmp_path):
    assert isinstance(raised(asked("--out", tmp_path / "a.txt")), InvalidValueError)
    assert not site.faults.seen


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.csv", "x,y\n1,2\n3,4\n"),
        ("a.csv", "1,2\r\n3,4\r\n\r\n"),
        ("a.json", "[[1, 2], [3, 4]]"),
        ("a.json", '{"inputs": [[1.0, 2], [3, 4]]}'),
    ],
    ids=["header", "bare", "list", "inputs"],
)
def test_rows_are_read_from_files(tmp_path, name, content):
    path = tmp_path / name
    path.write_text(content)
    assert read_rows(path).tolist() == [[1, 2], [3, 4]]


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.csv", "1,2\n3\n"),
        ("a.csv", "1,2\n3,secret\n"),
        ("a.csv", ""),
        ("a.json", "[1, 2]"),
        ("a.json", '{"rows": 1}'),
        ("a.json", "[" * 100_000),
        ("a.npy", "nonsense"),
        ("a.txt", "1 2"),
        ("missing.npy", None),
    ],
    ids=["ragged", "word", "empty", "flat", "field", "deep", "npy", "kind", "missing"],
)
def test_files_without_rows_are_typed_errors(tmp_path, name, content):
    path = tmp_path / name
    if content is not None:
        path.write_text(content)
    with pytest.raises((ConfigError, InvalidValueError)) as caught:
        read_rows(path)
    assert "secret" not in str(caught.value)


def test_npy_with_objects_is_not_unpickled(tmp_path):
    path = tmp_path / "a.npy"
    np.save(path, np.array([[{"a": 1}]], dtype=object), allow_pickle=True)
    with pytest.raises(InvalidValueError):
        read_rows(path)
