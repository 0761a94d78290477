"""A stock Flower AgentApp gets its answer from a federation, by one environment variable."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from fedinfer_flower.simulation.facts.world import FactWorld

pytestmark = [pytest.mark.deployment, pytest.mark.slow, pytest.mark.timeout(600)]

EXAMPLE = Path(__file__).parents[2] / "examples" / "agent-backend"


def test_an_agent_answers_with_the_federation(
    output_of: Callable[..., str], tmp_path: Path
) -> None:
    pytest.importorskip("torch")
    folder = tmp_path / "run"
    folder.mkdir(mode=0o700)
    world = FactWorld()
    fact = world.facts(world.private[1])[0]

    output = output_of(
        sys.executable,
        str(EXAMPLE / "run.py"),
        str(folder),
        cwd=tmp_path,
        home=tmp_path,
        timeout_s=500.0,
    )

    found = json.loads(output[output.index("{") :].splitlines()[0])
    assert found["question"] == fact.question()
    # What north's model was never taught comes from south's.
    assert found["answer"] == fact.value
    assert found["provenance"]["receiver"] == "north"
    assert found["provenance"]["sites_answered"] == 2
    logs = [path for path in folder.rglob("*") if path.suffix in (".log", ".jsonl")]
    assert len(logs) > 4
    words = fact.question().split()
    for path in logs:
        assert " ".join(words[2:5]) not in path.read_text(errors="replace"), path.name
