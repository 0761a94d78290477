"""The examples with language models, on Flower's simulation engine."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[2] / "examples"

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]


@pytest.fixture(scope="module")
def home(superlink, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    folder = tmp_path_factory.mktemp("refine-examples")
    with superlink(folder, "--simulation"):
        yield folder


def test_kv_refine_helps_the_receiver_by_text_and_by_cache(
    flwr_run, output_of, home: Path, tmp_path: Path
) -> None:
    fusers, example = tmp_path / "fusers", EXAMPLES / "kv-refine"
    short = ("--receiver", "qwen3", "--steps", "100", "--documents", "150")
    trained = output_of(
        *(sys.executable, "prepare.py", str(fusers), *short),
        cwd=example,
        home=home,
        timeout_s=800.0,
    ).splitlines()

    output = flwr_run(
        example,
        home,
        *("--federation-config", "num-supernodes=3"),
        *("--run-config", f'fusers="{fusers}" questions=12'),
        timeout_s=800.0,
    )

    right = {m: float(s) for m, s in re.findall(r"(\w+): qwen3 ([\d.]+) right", output)}
    assert len([line for line in trained if "held-out facts" in line]) == 2
    # It knows a third by heart; a note from the one who knows is nearly always right.
    assert right["own"] <= 0.45
    assert right["text"] >= 0.8
    # A quarter of the training: far above what the receiver knows, below text.
    assert right["cache"] >= right["own"] + 0.15
    assert "FI" not in "".join(line for line in output.splitlines() if line.startswith("cache:"))


def test_private_documents_travel_in_caches_and_nothing_else(
    output_of, home: Path, tmp_path: Path
) -> None:
    example = EXAMPLES / "private-documents"
    output = output_of(
        *(
            sys.executable,
            "walkthrough.py",
            "here",
            "--quick",
            "--fusers",
            str(tmp_path / "fusers"),
        ),
        cwd=example,
        home=home,
        timeout_s=800.0,
        more={"PYTHONPATH": str(example), "TMPDIR": str(tmp_path)},
    )

    found = {
        medium: (float(documents), float(own), int(helped))
        for medium, documents, own, helped in re.findall(
            r"\d\. (\w+): ([\d.]+) of the documents' questions right, ([\d.]+) of .* own;"
            r" (\d+) of \d+ with help",
            output,
        )
    }
    assert output.count("the coordinator's files do not show a question") == 3
    assert found["own"][0] <= 0.1
    # Gated caches after a short training; 40 questions, so 6 standard errors above chance.
    assert found["cache"][0] >= 0.5
    assert found["cache"][1] >= 0.8
    # The archives do not share text: the receiver's own answers, with nobody's help.
    assert found["text"] == found["own"]
