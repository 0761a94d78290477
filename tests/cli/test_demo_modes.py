"""`fedinfer demo --protect ...`: every mode on three sites, and what cannot run."""

from __future__ import annotations

import doctest
import importlib
import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest

from fedinfer_flower.cli.demo import DemoOptions, demo_steps
from fedinfer_flower.cli.demo_modes import mode_of, modes
from fedinfer_flower.errors import (
    IncompatibleProtection,
    InvalidValueError,
    MissingExtraError,
    UnknownNameError,
)

FEDINFER = str(Path(sys.executable).parent / "fedinfer")
_MISSING = [name for name in ("spu", "jax") if importlib.util.find_spec(name) is None]
NEEDS_SPU = pytest.mark.skipif(
    bool(_MISSING),
    reason=f"{' and '.join(_MISSING)} not installed: extra 'mpc', on Python 3.11",
)


def fedinfer(*words: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run([FEDINFER, *words], cwd=cwd, capture_output=True, text=True, timeout=280)


def quick_results(mode: str, folder: Path) -> dict:
    done = fedinfer(
        *("demo", "--dataset", "wine", "--sites", "3", "--alpha", "0.5", "--quick", "--json"),
        *("--protect", mode, "--out", "report"),
        cwd=folder,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert (folder / "report" / "report.html").stat().st_size > 10_000
    return json.loads(done.stdout)


def rows_of(results: dict, mode: str) -> tuple[dict, dict]:
    named = {entry["name"]: entry for entry in results["protections"]}
    assert results["protection"] == mode
    assert results["warnings"] == []
    return named["plain"], named[mode]


@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.parametrize("mode", ["secagg", "he"])
def test_exact_sum_answers_as_plain(mode: str, tmp_path: Path) -> None:
    plain, protected = rows_of(quick_results(mode, tmp_path), mode)
    # Scores are rounded to 1/65536: a query that is all but a tie may change.
    assert abs(plain["accuracy"] - protected["accuracy"]) <= 1 / 54 + 1e-9
    assert protected["epsilon_per_query"] is None


@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.parametrize("mode", ["dp", "secagg+dp", "he+dp"])
def test_noisy_mode_states_what_it_spends(mode: str, tmp_path: Path) -> None:
    _, protected = rows_of(quick_results(mode, tmp_path), mode)
    assert protected["epsilon_per_query"] == pytest.approx(8.0)
    assert protected["epsilon_total"] > 8.0
    # Randomised response, the last of the two rows of dp, has delta 0.
    assert (protected["delta"] == 0.0) == (mode == "dp")
    assert protected["delta"] < 1e-3


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_encrypted_query_answers_as_plain_and_says_who_learns_what(tmp_path: Path) -> None:
    results = quick_results("encrypted-query", tmp_path)
    plain, encrypted = rows_of(results, "encrypted-query")
    assert encrypted["rule"] == plain["rule"] == "mean-logit"
    # Squares need no fit; flooding is 1/1000 of the logits' scale: near ties may change.
    assert abs(plain["accuracy"] - encrypted["accuracy"]) <= 1 / 54 + 1e-9
    assert encrypted["bytes_per_query"] > 100 * plain["bytes_per_query"]
    assert not encrypted["key_at_coordinator"]
    learns = {line["party"]: line["learns"] for line in results["who_learns"] if _of_query(line)}
    assert "ciphertexts" in learns["coordinator alone"]
    assert "ciphertexts" in learns["sites that are asked"]


def _of_query(line: dict) -> bool:
    return line["about"] == "query"


@NEEDS_SPU
@pytest.mark.slow
@pytest.mark.timeout(300)
def test_mpc_answers_as_the_same_networks_in_clear(tmp_path: Path) -> None:
    results = quick_results("mpc", tmp_path)
    _, joint = rows_of(results, "mpc")
    assert joint["rule"] == "mean-logit"
    # Fixed point has 18 fractional bits; a near tie may change.
    n_same = int(results["rule_reason"].split("; ")[1].split(" of ")[0])
    assert n_same >= results["n_queries"] - 1
    assert any(line["party"] == "sites that are asked" for line in results["who_learns"])


def test_unknown_mode_lists_the_modes(tmp_path: Path) -> None:
    done = fedinfer("demo", "--dataset", "wine", "--protect", "cloak", cwd=tmp_path)

    assert done.returncode == 2
    assert UnknownNameError.code in done.stderr
    for name in ("encrypted-query", "mpc", "secagg+dp"):
        assert name in done.stderr
    with pytest.raises(UnknownNameError):
        mode_of("cloak")


@pytest.mark.parametrize("mode", ["encrypted-query", "mpc"])
def test_mode_that_adds_logits_refuses_another_rule(mode: str) -> None:
    with pytest.raises(IncompatibleProtection, match="mean-logit"):
        demo_steps(DemoOptions(protect=mode, rule="majority-vote"))
    labels = {step.label: step.rule for step in demo_steps(DemoOptions(protect=mode))}
    assert labels[f"protect-{mode}"] == labels["protect-plain"] == "mean-logit"


@pytest.mark.parametrize("mode", ["encrypted-query", "mpc", "secagg", "he+dp"])
def test_too_few_sites_are_refused_before_anything_starts(mode: str) -> None:
    with pytest.raises(InvalidValueError, match="at least 3 sites"):
        mode_of(mode).require(2)


def test_mpc_without_its_extra_is_refused_before_anything_starts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = importlib.util.find_spec
    hidden = lambda name, *rest: None if name == "spu" else found(name, *rest)  # noqa: E731
    monkeypatch.setattr(importlib.util, "find_spec", hidden)
    with pytest.raises(MissingExtraError, match=r"fedinfer-flower\[mpc\]"):
        mode_of("mpc").require(3)
    assert list(tmp_path.iterdir()) == []


def test_sites_of_an_encrypted_demo_are_asked_sealed_only() -> None:
    steps = demo_steps(DemoOptions(protect="encrypted-query", quick=True))
    assert all(s.sealed for s in steps)


def test_every_mode_has_steps() -> None:
    for name in modes():
        labels = [step.label for step in demo_steps(DemoOptions(protect=name, quick=True))]
        assert f"protect-{name}" in labels


def test_doctests() -> None:
    module = importlib.import_module("fedinfer_flower.cli.demo_modes")
    result = doctest.testmod(module)
    assert result.attempted > 0
    assert result.failed == 0
