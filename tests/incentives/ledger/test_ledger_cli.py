"""`fedinfer ledger`: what a person types, and the exit status that a script reads."""

from __future__ import annotations

import json
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
from typer.testing import CliRunner

from fedinfer_flower.cli.ledger import URL_VARIABLE, ledger_app
from fedinfer_flower.errors import (
    ConfigError,
    EnvelopeError,
    InvalidValueError,
    LedgerError,
    UntrustedKeyError,
)

from .conftest import COORDINATOR, FEE, NAMES, QUERIER_KEY, SITES, Opened, make_receipt

KEYS = {name: site.key_id for name, site in SITES.items()}


def fedinfer_ledger(*words, env=None):
    return CliRunner().invoke(
        ledger_app,
        [str(word) for word in words],
        env={"COLUMNS": "200"} | (env or {}),
        catch_exceptions=False,
    )


@pytest.fixture
def files(sqlite_url: str, tmp_path: Path) -> SimpleNamespace:
    """A ledger with money of the querier's, a fresh receipt, and scores."""
    opened = Opened(sqlite_url, clock=time.time)
    opened.ledger.migrate()
    opened.ledger.deposit(QUERIER_KEY, 10 * FEE, key="first")
    receipt, scores = tmp_path / "receipt.json", tmp_path / "scores.json"
    receipt.write_bytes(make_receipt(now=int(time.time())).to_bytes())
    scores.write_text(json.dumps({KEYS["east"]: 3.0, KEYS["north"]: 1, KEYS["west"]: -0.5}))
    return SimpleNamespace(
        opened=opened,
        path=Path(sqlite_url.removeprefix("sqlite:///")),
        receipt=receipt,
        scores=scores,
        folder=tmp_path,
    )


def settle(files, *words, fee=FEE):
    return fedinfer_ledger(
        *("settle", files.receipt, "--scores", files.scores, "--fee", fee),
        *("--coordinator", COORDINATOR.key_id, "--file", files.path, *words),
    )


def test_settle_pays_by_score_and_again_changes_nothing(files) -> None:
    done = settle(files)
    assert done.exit_code == 0, done.output
    ledger = files.opened.ledger
    assert [ledger.balance(KEYS[name]) for name in NAMES] == [750_000, 250_000, 0]
    assert ledger.balance(QUERIER_KEY) == 9 * FEE
    assert KEYS["east"] in done.output
    head = ledger.head()
    again = json.loads(settle(files, "--json").stdout)
    assert (again["seq"], again["hash"]) == (head.seq, head.hash)
    assert ledger.head() == head


def test_settle_pays_to_accounts_and_checks_pins(files) -> None:
    accounts = files.folder / "accounts.json"
    accounts.write_text(json.dumps({KEYS["east"]: "East Clinic"}))
    pins = files.folder / "pins.toml"
    lines = [f'{name} = "{key_id}"' for name, key_id in KEYS.items()]
    pins.write_text("\n".join(["[sites]", *lines]))
    done = settle(files, "--accounts", accounts, "--pins", pins)
    assert done.exit_code == 0, done.output
    assert files.opened.ledger.balance("East Clinic") == 750_000


def test_settle_refuses_before_the_queriers_money_moves(files) -> None:
    pins = files.folder / "pins.toml"
    pins.write_text(f'[sites]\neast = "{"0" * 64}"')
    with pytest.raises(UntrustedKeyError):
        settle(files, "--pins", pins)
    with pytest.raises(UntrustedKeyError):
        settle(files, "--coordinator", "0" * 64)
    assert files.opened.ledger.balance(QUERIER_KEY) == 10 * FEE


def test_settle_another_fee_than_in_escrow_is_refused(files) -> None:
    settle(files)
    with pytest.raises(LedgerError):
        settle(files, fee=2 * FEE)
    files.receipt.write_bytes(make_receipt("next", now=int(time.time())).to_bytes())
    with pytest.raises(LedgerError, match="holds"):
        settle(files, fee=20 * FEE)


@pytest.mark.parametrize(
    ("scores", "error"),
    [
        ("{}", InvalidValueError),
        ("[]", EnvelopeError),
        ('{"a": 1', EnvelopeError),
        ('{"east": 1}', InvalidValueError),
        (f'{{"{"0" * 64}": 1}}', LedgerError),
        (f'{{"{KEYS["east"]}": NaN}}', EnvelopeError),
        (f'{{"{KEYS["east"]}": "much"}}', EnvelopeError),
    ],
    # Keys are fresh in every process: without names the cases would have other ones in each.
    ids=["none", "list", "cut off", "no key", "unknown key", "not a number", "text"],
)
def test_settle_scores_that_are_none(files, scores: str, error) -> None:
    files.scores.write_text(scores)
    with pytest.raises(error):
        settle(files)
    assert files.opened.ledger.verify().ok


def test_settle_without_files_is_a_typed_error(files) -> None:
    files.receipt.unlink()
    with pytest.raises(ConfigError, match="receipt"):
        settle(files)


def test_show_says_balances_and_jobs(files) -> None:
    settle(files)
    done = fedinfer_ledger("show", "--file", files.path)
    assert done.exit_code == 0
    assert "9.000000" in done.output
    assert "released" in done.output
    assert "the ledger verifies: 4 entries" in done.output
    plain = json.loads(fedinfer_ledger("show", "--file", files.path, "--json").stdout)
    assert plain["balances"][KEYS["east"]] == 750_000
    assert plain["jobs"][0]["status"] == "released"


def test_show_markup_in_a_name_is_text(files) -> None:
    files.opened.ledger.deposit("x[red]y", 5, key="m")
    assert "x[red]y" in fedinfer_ledger("show", "--file", files.path).output


def test_verify_ends_with_status_1_and_names_the_row(files) -> None:
    settle(files)
    assert fedinfer_ledger("verify", "--file", files.path).exit_code == 0
    files.opened.unguard()
    files.opened.sql("UPDATE ledger_postings SET amount = amount * 2 WHERE seq = 3")
    done = fedinfer_ledger("verify", "--file", files.path)
    assert done.exit_code == 1
    assert "row 3" in done.output
    assert fedinfer_ledger("show", "--file", files.path).exit_code == 1
    plain = json.loads(fedinfer_ledger("verify", "--file", files.path, "--json").stdout)
    assert plain["first_bad"]["seq"] == 3


def test_verify_against_a_head(files) -> None:
    head = files.opened.ledger.head()
    assert fedinfer_ledger("verify", "--file", files.path, "--head", head).exit_code == 0
    other = f"{head.seq + 1}:{head.hash}"
    assert fedinfer_ledger("verify", "--file", files.path, "--head", other).exit_code == 1


def test_export_can_be_verified_elsewhere_and_overwrites_nothing(files) -> None:
    out = files.folder / "ledger.jsonl"
    words = ("export", out, "--form", "json", "--file", files.path)
    assert fedinfer_ledger(*words).exit_code == 0
    assert out.stat().st_mode & 0o077 == 0
    assert fedinfer_ledger("verify", "--export", out).exit_code == 0
    with pytest.raises(ConfigError, match="FileExistsError"):
        fedinfer_ledger(*words)
    out.write_text(out.read_text().replace('"amount"', '"x"').replace("10000000", "20000000"))
    assert fedinfer_ledger("verify", "--export", out).exit_code == 1


def test_verify_export_that_is_none_ends_with_status_1(files) -> None:
    out = files.folder / "ledger.jsonl"
    out.write_text("not one\n")
    done = fedinfer_ledger("verify", "--export", out)
    assert done.exit_code == 1
    assert "line 1" in done.output


def test_missing_ledger_is_not_made(files) -> None:
    missing = files.folder / "missing.db"
    for verb in ("show", "verify"):
        with pytest.raises(ConfigError):
            fedinfer_ledger(verb, "--file", missing)
    with pytest.raises(ConfigError, match=URL_VARIABLE):
        fedinfer_ledger("show", env={URL_VARIABLE: ""})
    assert not missing.exists()


def test_url_comes_from_the_environment_and_is_not_shown(files) -> None:
    done = fedinfer_ledger("verify", env={URL_VARIABLE: files.opened.url})
    assert done.exit_code == 0
    assert str(files.folder) not in done.output
    help_text = fedinfer_ledger("verify", "--help", env={URL_VARIABLE: "canary"}).output
    assert "canary" not in help_text
