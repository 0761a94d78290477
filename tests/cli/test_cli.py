"""The `fedinfer` command: what a person types."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

FEDINFER = str(Path(sys.executable).parent / "fedinfer")


def fedinfer(*words: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run([FEDINFER, *words], cwd=cwd, capture_output=True, text=True, timeout=280)


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_demo_on_wine_leaves_report_and_figures_that_agree(tmp_path: Path) -> None:
    done = fedinfer(
        *("demo", "--dataset", "wine", "--sites", "3", "--alpha", "0.5", "--json"),
        *("--out", "report"),
        cwd=tmp_path,
    )

    assert done.returncode == 0, done.stderr[-3000:]
    results = json.loads(done.stdout)
    page = (tmp_path / "report" / "report.html").read_text()
    protections = {p["label"]: p for p in results["protections"]}
    assert results == json.loads((tmp_path / "report" / "results.json").read_text())
    assert "http://" not in page.replace("http://www.w3.org", "")
    # The same rule on the same models: encryption is exact to 1/65536 of a score, so at
    # most a query that is all but a tie may change.
    gap = protections["he"]["accuracy"] - protections["plain"]["accuracy"]
    assert abs(gap) <= 1 / results["n_queries"] + 1e-9
    assert not protections["he"]["key_at_coordinator"]
    assert results["warnings"] == []
    assert len(results["sites"]) == 3


def test_demo_illegal_rule_and_protection_ends_with_typed_error(tmp_path: Path) -> None:
    done = fedinfer("demo", "--rule", "median", "--protect", "he", cwd=tmp_path)

    assert done.returncode == 2
    assert "FI203" in done.stderr
    assert "Traceback" not in done.stderr


def test_demo_too_few_sites_for_protection_ends_with_typed_error(tmp_path: Path) -> None:
    done = fedinfer("demo", "--sites", "2", "--dataset", "wine", cwd=tmp_path)

    assert done.returncode == 2
    assert "at least 3 sites" in done.stderr


def test_demo_unknown_dataset_ends_with_typed_error(tmp_path: Path) -> None:
    done = fedinfer("demo", "--dataset", "imagenet", cwd=tmp_path)

    assert done.returncode == 2
    assert "FI202" in done.stderr


def test_doctor_here_finds_all_extras(tmp_path: Path) -> None:
    done = fedinfer("doctor", "--json", cwd=tmp_path)

    findings = {f["subject"]: f for f in json.loads(done.stdout)}
    assert findings["flwr"]["ok"]
    assert findings["extra he"]["status"] == "installed"
    assert done.returncode == (0 if all(f["ok"] for f in findings.values()) else 1)


def test_querier_ask_existing_key_file_keeps_job_and_key(tmp_path: Path) -> None:
    np.save(tmp_path / "x.npy", np.zeros((3, 4)))
    words = (
        "querier",
        "ask",
        "--clear",
        "--inputs",
        "x.npy",
        "--secret",
        "me.key",
        "--job",
        "job.fi",
    )
    assert fedinfer(*words, cwd=tmp_path).returncode == 0
    job, key = (tmp_path / "job.fi").read_bytes(), (tmp_path / "me.key").read_bytes()

    again = fedinfer(*words, cwd=tmp_path)

    assert again.returncode == 2
    assert (tmp_path / "job.fi").read_bytes() == job
    assert (tmp_path / "me.key").read_bytes() == key
    assert (tmp_path / "me.key").stat().st_mode & 0o077 == 0
    assert key[200:300] not in job  # the secret key is not in the public file


def test_querier_ask_reuse_keeps_the_key_id(tmp_path: Path) -> None:
    np.save(tmp_path / "x.npy", np.zeros((3, 4)))
    first = ("querier", "ask", "--clear", "--inputs", "x.npy", "--secret", "a.key", "--job", "a.fi")
    second = (
        "querier",
        "ask",
        "--clear",
        "--inputs",
        "x.npy",
        "--secret",
        "b.key",
        "--job",
        "b.fi",
    )

    one = fedinfer(*first, cwd=tmp_path).stdout.split("key id ")[1]
    two = fedinfer(*second, "--reuse", "a.key", cwd=tmp_path).stdout.split("key id ")[1]

    assert one == two


def test_querier_open_foreign_answer_ends_with_typed_error(tmp_path: Path) -> None:
    np.save(tmp_path / "x.npy", np.zeros((3, 4)))
    words = (
        "querier",
        "ask",
        "--clear",
        "--inputs",
        "x.npy",
        "--secret",
        "me.key",
        "--job",
        "job.fi",
    )
    fedinfer(*words, cwd=tmp_path)
    (tmp_path / "answer.fi").write_bytes(b"FIEV" + bytes(40))

    done = fedinfer("querier", "open", "--answer", "answer.fi", "--secret", "me.key", cwd=tmp_path)

    assert done.returncode == 2
    assert "FI30" in done.stderr
