"""The examples with language models, on Flower's simulation engine."""

from __future__ import annotations

import os
import re
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[2] / "examples"
BIN = Path(sys.executable).parent

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]


def environment(home: Path) -> dict[str, str]:
    return os.environ | {
        "FLWR_HOME": str(home),
        "PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}",
        "PYTHONUNBUFFERED": "1",
    }


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def wait_until_listening(port: int, process: subprocess.Popen[bytes]) -> None:
    for _ in range(300):
        assert process.poll() is None, "the process ended before it listened"
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)) == 0:
                return
        time.sleep(0.2)
    raise AssertionError(f"nothing listens on {port}")


@contextmanager
def superlink(home: Path) -> Iterator[None]:
    """Run a simulating SuperLink on loopback and write the connection 'here' for `flwr run`."""
    port = free_port()
    command = [str(BIN / "flower-superlink"), "--insecure", "--host", "127.0.0.1", "--simulation"]
    command += ["--port", str(port), "--disable-runtime-dependency-installation"]
    with (home / "superlink.log").open("wb") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log, env=environment(home))
        try:
            wait_until_listening(port, process)
            (home / "config.toml").write_text(
                f'[superlink]\ndefault = "here"\n[superlink.here]\n'
                f'address = "127.0.0.1:{port}"\ninsecure = true\n'
            )
            yield
        finally:
            process.terminate()
            try:
                process.wait(timeout=20)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    folder = tmp_path_factory.mktemp("refine-examples")
    with superlink(folder):
        yield folder


def output_of(*command: str, cwd: Path, home: Path, **extra: str) -> str:
    done = subprocess.run(
        command,
        cwd=cwd,
        env=environment(home) | extra,
        capture_output=True,
        text=True,
        timeout=800,
    )
    output = done.stdout + done.stderr
    assert done.returncode == 0, output[-3000:]
    return output


def test_kv_refine_helps_the_receiver_by_text_and_by_cache(home: Path, tmp_path: Path) -> None:
    fusers, example = tmp_path / "fusers", EXAMPLES / "kv-refine"
    short = ("--receiver", "qwen3", "--steps", "100", "--documents", "150")
    trained = output_of(
        sys.executable, "prepare.py", str(fusers), *short, cwd=example, home=home
    ).splitlines()

    output = output_of(
        *(str(BIN / "flwr"), "run", ".", "here", "--stream"),
        *("--federation-config", "num-supernodes=3"),
        *("--run-config", f'fusers="{fusers}" questions=12'),
        cwd=example,
        home=home,
    )

    right = {m: float(s) for m, s in re.findall(r"(\w+): qwen3 ([\d.]+) right", output)}
    assert len([line for line in trained if "held-out facts" in line]) == 2
    # It knows a third by heart; a note from the one who knows is nearly always right.
    assert right["own"] <= 0.45
    assert right["text"] >= 0.8
    # A quarter of the training: far above what the receiver knows, below text.
    assert right["cache"] >= right["own"] + 0.15
    assert "FI" not in "".join(line for line in output.splitlines() if line.startswith("cache:"))


def test_private_documents_travel_in_caches_and_nothing_else(home: Path, tmp_path: Path) -> None:
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
        PYTHONPATH=str(example),
        TMPDIR=str(tmp_path),
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
