"""`fedinfer verify`: what a person types, and the exit status that a script reads."""

from __future__ import annotations

import dataclasses
import json
import time

import pytest
import typer
from typer.testing import CliRunner

from fedinfer_flower.cli.verify import verify
from fedinfer_flower.errors import ConfigError, EnvelopeError, SizeLimitError
from fedinfer_flower.receipts import receipt as receipt_module

from .conftest import make_job, receipt_of

APP = typer.Typer()
APP.command()(verify)


@pytest.fixture
def files(tmp_path):
    """Return a fresh job with its receipt and pin file written."""
    now = int(time.time())
    job = make_job(issued_at=now)
    receipt = tmp_path / "receipt.json"
    receipt.write_bytes(receipt_of(job, issued_at=now).to_bytes())
    pins = tmp_path / "pins.toml"
    lines = [f'{name} = "{key_id}"' for name, key_id in job.pins.items()]
    pins.write_text("\n".join(["[sites]", *lines, "[queriers]", f'registry = "{"ab" * 32}"']))
    return job, receipt, pins


def fedinfer_verify(*words):
    return CliRunner().invoke(APP, [str(word) for word in words], env={"COLUMNS": "200"})


def test_verify_honest_receipt_ends_with_status_0_and_says_who_could_learn_what(files):
    job, receipt, pins = files
    done = fedinfer_verify(receipt, "--pins", pins, "--coordinator", job.coordinator.key_id)
    assert done.exit_code == 0, done.output
    assert "the receipt verifies; 0 checks could not be made" in done.output
    assert "coordinator and querier pooling" in done.output
    assert "asked by 'registry'" in done.output


def test_verify_without_pins_says_what_was_not_checked(files):
    done = fedinfer_verify(files[1])
    assert done.exit_code == 0
    assert "whose keys these are is not known" in done.output
    assert "3 checks could not be made" in done.output


def test_verify_json_has_every_check(files):
    _, receipt, pins = files
    done = fedinfer_verify(receipt, "--pins", pins, "--json")
    found = json.loads(done.stdout)
    assert found["ok"]
    assert {check["outcome"] for check in found["checks"]} == {"ok", "not checked"}
    assert [total["site"] for total in found["totals"]] == ["east", "north", "west"]


def test_verify_altered_receipt_ends_with_status_1(files):
    _, receipt, pins = files
    document = json.loads(receipt.read_text())
    document["statements"][0]["statement"]["n_rows"] = 5
    receipt.write_text(json.dumps(document))
    done = fedinfer_verify(receipt, "--pins", pins)
    assert done.exit_code == 1
    assert "FI310" in done.output
    assert "does NOT verify" in done.output
    assert fedinfer_verify(receipt, "--json").exit_code == 1


def test_verify_wrong_pin_ends_with_status_1_and_names_the_site(files):
    job, receipt, pins = files
    pins.write_text(pins.read_text().replace(job.pins["north"], "0" * 64))
    done = fedinfer_verify(receipt, "--pins", pins)
    assert done.exit_code == 1
    assert "'north' has key" in done.output
    assert "FI311" in done.output


def test_verify_pins_without_queriers_do_not_judge_the_querier(files):
    _, receipt, pins = files
    pins.write_text(pins.read_text().partition("[queriers]")[0])
    done = fedinfer_verify(receipt, "--pins", pins)
    assert done.exit_code == 0
    assert "who asked is not known" in done.output


def test_verify_file_that_is_no_receipt_raises_typed_error(tmp_path):
    other = tmp_path / "other.json"
    other.write_text('["not a receipt"]')
    assert isinstance(fedinfer_verify(other).exception, EnvelopeError)
    assert isinstance(fedinfer_verify(tmp_path / "missing.json").exception, ConfigError)
    assert isinstance(fedinfer_verify(tmp_path).exception, ConfigError)


def test_verify_huge_file_is_refused_unread(files, monkeypatch):
    monkeypatch.setattr(receipt_module, "MAX_RECEIPT_BYTES", 100)
    assert isinstance(fedinfer_verify(files[1]).exception, SizeLimitError)


def test_verify_shows_names_as_text_and_not_as_markup(files):
    _, receipt, _ = files
    document = json.loads(receipt.read_text())
    document["who_can_learn_what"][0]["learns"] = "[red]nothing[/red] [link=x]y[/link]"
    receipt.write_text(json.dumps(document))
    done = fedinfer_verify(receipt)
    assert done.exit_code == 1
    assert "[red]nothing[/red]" in done.output


@pytest.mark.parametrize(
    "path", [("who_can_learn_what", 0, "learns"), ("totals", 0, "site"), ("cohort", 0, "name")]
)
def test_verify_never_sends_control_characters_to_the_terminal(files, path):
    _, receipt, _ = files
    document = json.loads(receipt.read_text())
    table, row, name = path
    document[table][row][name] = "\x1b[2J\x1b]0;x\x07"
    receipt.write_text(json.dumps(document))
    done = fedinfer_verify(receipt)
    assert "\x1b" not in done.output
    assert isinstance(done.exception, EnvelopeError)
    assert "\x1b" not in str(done.exception)


def test_receipt_that_would_be_too_long_to_read_is_not_written(monkeypatch):
    monkeypatch.setattr(receipt_module, "MAX_RECEIPT_BYTES", 1000)
    receipt = receipt_of(make_job())
    with pytest.raises(SizeLimitError):
        dataclasses.replace(receipt).to_bytes()
