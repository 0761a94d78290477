"""The example that chooses whom to ask, on Flower's simulation engine."""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from fedinfer_flower.selection import SiteHistory
from fedinfer_flower.wire.identity import Identity

EXAMPLE = Path(__file__).parents[2] / "examples" / "choose-collaborators"
N_SITES = 20

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]


@pytest.fixture(scope="module")
def home(superlink, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    folder = tmp_path_factory.mktemp("choose-collaborators")
    with superlink(folder, "--simulation"):
        yield folder


@pytest.fixture
def run(flwr_run, home: Path) -> Callable[[str], str]:
    """Return a function that runs the app with a run config and returns its output."""
    federation = f"num-supernodes={N_SITES}"

    def run(config: str) -> str:
        return flwr_run(
            EXAMPLE,
            home,
            "--run-config",
            config,
            "--federation-config",
            federation,
            timeout_s=400.0,
        )

    return run


def table(output: str) -> dict[str, tuple[float, float, float]]:
    """Return (accuracy, sites a query, credits) by name."""
    rows = re.findall(
        r"^(coverage-greedy|random|early-exit|everybody).*? ([\d.]+) +([\d.]+) +(\d+)$",
        output,
        flags=re.M,
    )
    return {name: (float(right), float(sites), float(cost)) for name, right, sites, cost in rows}


def test_plan_comes_first_and_fewer_sites_do_nearly_as_well(run) -> None:
    output = run("seed=0")

    found = table(output)
    assert output.index("QueryPlan") < output.index("accuracy  sites a query")
    assert "site-4: jurisdiction: 'us' is not allowed" in output
    assert "1 of 2 sites of 'lakeside group' may be asked" in output
    # Data and models have fixed seeds; half of the sites lose a few points.
    assert found["everybody"][0] > 0.9
    assert found["coverage-greedy"][0] > 0.94 * found["everybody"][0]
    assert found["early-exit"][0] > 0.94 * found["everybody"][0]
    # Fifteen sites pass the gates, so a query that goes to all groups asks 15.
    assert found["coverage-greedy"][1] == 10
    assert 6 <= found["early-exit"][1] < 15
    assert found["coverage-greedy"][2] <= 9000 < found["everybody"][2]


def test_sites_are_remembered_and_a_slow_one_is_left_out_next_time(run, tmp_path: Path) -> None:
    first = run(f'state="{tmp_path}"')

    keys = {
        number: Identity.load_or_create(
            tmp_path / "homes" / f"partition-{number}" / "identity.json"
        ).key_id
        for number in range(N_SITES)
    }
    history = SiteHistory.load(tmp_path / "history.json")
    assert "history: 0 sites before, 10 now" in first
    assert set(history.records) < set(keys.values())
    assert all(len(record.latencies_s) == 1 for record in history.records.values())

    # Site 0 is chosen first; from now on it counts as slow.
    assert "site-0: coverage-greedy" in first
    for _ in range(3):
        history.record_answer(keys[0], seconds=500.0, now_s=time.time())
    history.save(tmp_path / "history.json")
    second = run(f'state="{tmp_path}" part=1')

    assert "site-0: latency: 95 % of answers within" in second
    assert "site-0: coverage" not in second
    assert table(second)["coverage-greedy"][1] == 10
    again = SiteHistory.load(tmp_path / "history.json")
    # Nobody changed keys, and only those that were chosen again were timed again.
    assert set(again.records) < set(keys.values())
    assert again[keys[0]] == history[keys[0]]
    assert sum(len(record.latencies_s) for record in again.records.values()) == 10 + 3 + 10

    # The digits of the first run, to other sites: their difference would single sites out.
    third = run(f'state="{tmp_path}" part=0')
    assert "FI316" in third
