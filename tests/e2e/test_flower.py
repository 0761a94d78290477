"""The examples on real Flower: its simulation engine, and a SuperLink with SuperNodes."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

EXAMPLES = Path(__file__).parents[2] / "examples"
BIN = Path(sys.executable).parent

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]


@pytest.fixture(scope="module")
def simulation(superlink, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    home = tmp_path_factory.mktemp("simulation")
    with superlink(home, "--simulation"):
        yield home


def test_quickstart_simulated_and_deployed_same_answers(
    flwr_run, superlink, supernodes, simulation: Path, tmp_path: Path
) -> None:
    simulated, deployed = tmp_path / "simulated.txt", tmp_path / "deployed.txt"

    output = flwr_run(EXAMPLES / "quickstart", simulation, "--run-config", f'answer="{simulated}"')
    nodes = [f"partition-id={partition} num-partitions=2" for partition in range(2)]
    with superlink(tmp_path) as port, supernodes(port, *nodes, home=tmp_path):
        flwr_run(EXAMPLES / "quickstart", tmp_path, "--run-config", f'answer="{deployed}"')

    assert "accuracy: 0.9" in output
    answers = simulated.read_text().splitlines()
    assert len(answers) == 540
    assert deployed.read_text().splitlines() == answers


def test_quickstart_deployed_under_secagg_gives_the_labels_of_plain(
    flwr_run, superlink, supernodes, tmp_path: Path
) -> None:
    answers = {name: tmp_path / f"{name}.txt" for name in ("plain", "secagg")}
    nodes = [f"partition-id={partition} num-partitions=3" for partition in range(3)]
    # One site with a home of its own, two whose keys live as long as the run.
    nodes[0] += f' fedinfer-home="{tmp_path / "home"}"'
    with superlink(tmp_path) as port, supernodes(port, *nodes, home=tmp_path):
        for name, path in answers.items():
            config = f'fedinfer.protection="{name}" fedinfer.min-available-nodes=3 answer="{path}"'
            flwr_run(EXAMPLES / "quickstart", tmp_path, "--run-config", config)

    plain, masked = (path.read_text().splitlines() for path in answers.values())
    assert len(plain) == 540
    # Sums are rounded to 2**-16 a site: only a tie could fall otherwise.
    assert sum(a != b for a, b in zip(plain, masked, strict=True)) <= 1
    assert (tmp_path / "home" / "partition-0" / "identity.json").stat().st_mode & 0o077 == 0


def test_quickstart_under_he_querier_outside_opens_what_plain_gives(
    environment, flwr_run, simulation: Path, tmp_path: Path
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
        EXAMPLES / "quickstart",
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


def test_existing_project_trains_as_before_then_answers(flwr_run, simulation: Path) -> None:
    output = flwr_run(EXAMPLES / "existing-project", simulation)

    assert "trained rounds: 3" in output
    accuracy = float(output.split("joint accuracy: ")[1].split()[0])
    assert accuracy > 0.9


def test_private_queries_sealed_receipts_and_a_budget_that_runs_out(
    output_of, simulation: Path, tmp_path: Path
) -> None:
    example = EXAMPLES / "private-queries"
    output = output_of(
        *(sys.executable, "walkthrough.py", "here"),
        cwd=example,
        home=simulation,
        timeout_s=500.0,
        more={"PYTHONPATH": str(example), "TMPDIR": str(tmp_path)},
    )

    assert "3. receipt of 10 clinics: verified" in output
    assert "4. the same queries again: the same noise, nothing charged" in output
    assert "5. 40 new queries: refused, FI315" in output
    # 20 rows of epsilon 4 under delta 1e-5 compose to 25.5; the refused ones cost nothing.
    assert "6. clinic 0 has spent epsilon 25.5 of 30" in output
