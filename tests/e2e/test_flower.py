"""The examples on real Flower: its simulation engine, and a SuperLink with SuperNodes."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import numpy as np
import pytest

EXAMPLES = Path(__file__).parents[2] / "examples"
BIN = Path(sys.executable).parent

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]


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
def running(*command: str, home: Path) -> Iterator[subprocess.Popen[bytes]]:
    with (home / f"{Path(command[0]).name}-{time.monotonic_ns()}.log").open("wb") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log, env=environment(home))
        try:
            yield process
        finally:
            process.terminate()
            try:
                process.wait(timeout=20)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


@contextmanager
def superlink(home: Path, *options: str) -> Iterator[int]:
    """Run a SuperLink on loopback and write the connection 'here' for `flwr run`."""
    port = free_port()
    command = [str(BIN / "flower-superlink"), "--insecure", "--host", "127.0.0.1"]
    command += ["--port", str(port), "--disable-runtime-dependency-installation", *options]
    with running(*command, home=home) as process:
        wait_until_listening(port, process)
        (home / "config.toml").write_text(
            f'[superlink]\ndefault = "here"\n[superlink.here]\n'
            f'address = "127.0.0.1:{port}"\ninsecure = true\n'
        )
        yield port


def flwr_run(example: str, home: Path, *options: str) -> str:
    done = subprocess.run(
        [str(BIN / "flwr"), "run", ".", "here", "--stream", *options],
        cwd=EXAMPLES / example,
        env=environment(home),
        capture_output=True,
        text=True,
        timeout=240,
    )
    output = done.stdout + done.stderr
    assert done.returncode == 0, output[-3000:]
    return output


@pytest.fixture(scope="module")
def simulation(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    home = tmp_path_factory.mktemp("simulation")
    with superlink(home, "--simulation"):
        yield home


def test_quickstart_simulated_and_deployed_same_answers(simulation: Path, tmp_path: Path) -> None:
    simulated, deployed = tmp_path / "simulated.txt", tmp_path / "deployed.txt"

    output = flwr_run("quickstart", simulation, "--run-config", f'answer="{simulated}"')
    with ExitStack() as stack:
        port = stack.enter_context(superlink(tmp_path))
        for partition in range(2):
            node_port = free_port()
            command = [str(BIN / "flower-supernode"), "--insecure"]
            command += ["--superlink", f"127.0.0.1:{port}", "--port", str(node_port)]
            command += ["--node-config", f"partition-id={partition} num-partitions=2"]
            process = stack.enter_context(running(*command, home=tmp_path))
            wait_until_listening(node_port, process)
        flwr_run("quickstart", tmp_path, "--run-config", f'answer="{deployed}"')

    assert "accuracy: 0.9" in output
    answers = simulated.read_text().splitlines()
    assert len(answers) == 540
    assert deployed.read_text().splitlines() == answers


def test_quickstart_deployed_under_secagg_gives_the_labels_of_plain(tmp_path: Path) -> None:
    answers = {name: tmp_path / f"{name}.txt" for name in ("plain", "secagg")}
    with ExitStack() as stack:
        port = stack.enter_context(superlink(tmp_path))
        for partition in range(3):
            node_port = free_port()
            command = [str(BIN / "flower-supernode"), "--insecure"]
            command += ["--superlink", f"127.0.0.1:{port}", "--port", str(node_port)]
            # One site with a home of its own, two whose keys live as long as the run.
            home = f' fedinfer-home="{tmp_path / "home"}"' if partition == 0 else ""
            command += ["--node-config", f"partition-id={partition} num-partitions=3{home}"]
            process = stack.enter_context(running(*command, home=tmp_path))
            wait_until_listening(node_port, process)
        for name, path in answers.items():
            config = f'fedinfer.protection="{name}" fedinfer.min-available-nodes=3 answer="{path}"'
            flwr_run("quickstart", tmp_path, "--run-config", config)

    plain, masked = (path.read_text().splitlines() for path in answers.values())
    assert len(plain) == 540
    # Sums are rounded to 2**-16 a site: only a tie could fall otherwise.
    assert sum(a != b for a, b in zip(plain, masked, strict=True)) <= 1
    assert (tmp_path / "home" / "partition-0" / "identity.json").stat().st_mode & 0o077 == 0


def test_quickstart_under_he_querier_outside_opens_what_plain_gives(
    simulation: Path, tmp_path: Path
) -> None:
    sys.path.insert(0, str(EXAMPLES / "quickstart"))
    try:
        from quickstart.task import split
    finally:
        sys.path.pop(0)
    _, queries, _, truth = split(0)
    np.save(tmp_path / "x.npy", queries)
    job, key, answer = (tmp_path / name for name in ("job.fi", "me.key", "answer.fi"))
    fedinfer = [str(BIN / "fedinfer"), "querier"]
    ask = ["ask", "--inputs", str(tmp_path / "x.npy"), "--job", str(job), "--secret", str(key)]
    ask += ["--clear"]
    subprocess.run([*fedinfer, *ask], check=True, env=environment(tmp_path))

    config = 'fedinfer.protection="he" fedinfer.min-available-nodes=3'
    flwr_run(
        "quickstart",
        simulation,
        "--federation-config",
        "num-supernodes=3",
        "--run-config",
        f'{config} job="{job}" answer="{answer}"',
    )
    opened = subprocess.run(
        [*fedinfer, "open", "--answer", str(answer), "--secret", str(key)],
        check=True,
        capture_output=True,
        text=True,
        env=environment(tmp_path),
    )

    labels = [int(json.loads(line)["label"]) for line in opened.stdout.splitlines()]
    assert len(labels) == len(truth)
    # Three sites with a third of the digits each: far above what any one can reach (0.4).
    assert np.mean(np.array(labels) == truth) > 0.9


def test_existing_project_trains_as_before_then_answers(simulation: Path) -> None:
    output = flwr_run("existing-project", simulation)

    assert "trained rounds: 3" in output
    accuracy = float(output.split("joint accuracy: ")[1].split()[0])
    assert accuracy > 0.9


def test_private_queries_sealed_receipts_and_a_budget_that_runs_out(
    simulation: Path, tmp_path: Path
) -> None:
    example = EXAMPLES / "private-queries"
    done = subprocess.run(
        [sys.executable, "walkthrough.py", "here"],
        cwd=example,
        env=environment(simulation) | {"PYTHONPATH": str(example), "TMPDIR": str(tmp_path)},
        capture_output=True,
        text=True,
        timeout=500,
    )

    assert done.returncode == 0, (done.stdout + done.stderr)[-3000:]
    assert "3. receipt of 10 clinics: verified" in done.stdout
    assert "4. the same queries again: the same noise, nothing charged" in done.stdout
    assert "5. 40 new queries: refused, FI315" in done.stdout
    # 20 rows of epsilon 4 under delta 1e-5 compose to 25.5; the refused ones cost nothing.
    assert "6. clinic 0 has spent epsilon 25.5 of 30" in done.stdout
