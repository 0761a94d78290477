"""The key that opens answers is not where the ciphertexts are, or everybody is told."""

from __future__ import annotations

import json
import subprocess
import sys
import textwrap

import numpy as np
import pytest

from fedinfer_flower import FedEnsemble, Querier
from fedinfer_flower.ensemble.base import RULES
from fedinfer_flower.errors import BindingError, InvalidValueError, KeyAtCoordinatorError
from fedinfer_flower.privacy.dp import DP
from fedinfer_flower.privacy.key_presence import secret_in_process
from fedinfer_flower.wire.documents import QueryJob


def strategy(protection="he", **options) -> FedEnsemble:
    return FedEnsemble(
        rule="mean-probability", protection=protection, min_available_nodes=5, **options
    )


def test_array_under_he_is_refused(federation, grid):
    with pytest.raises(KeyAtCoordinatorError, match="would have it made"):
        strategy().start(grid, federation.queries)


def test_job_of_a_querier_in_this_process_under_he_is_refused(federation, grid):
    querier = Querier(protection="he")
    with pytest.raises(KeyAtCoordinatorError, match="is in the coordinator's process"):
        strategy().start(grid, querier.ask(federation.queries, clear=True))


def test_job_that_went_through_bytes_in_this_process_is_refused_as_well(federation, grid):
    job = QueryJob.from_bytes(
        Querier(protection="he").ask(federation.queries, clear=True).to_bytes()
    )
    with pytest.raises(KeyAtCoordinatorError):
        strategy().start(grid, job)


@pytest.mark.parametrize("protection", ["he", "plain"])
def test_querier_itself_is_refused(grid, protection):
    with pytest.raises(KeyAtCoordinatorError, match="was given a Querier"):
        strategy(protection).start(grid, Querier(protection=protection))


@pytest.mark.parametrize("as_job", [False, True])
def test_coordinator_key_that_is_allowed_is_flagged(federation, grid, as_job):
    queries = federation.queries
    if as_job:
        queries = Querier(protection="he").ask(queries, clear=True)
    result = strategy(allow_coordinator_key=True).start(grid, queries)

    assert all(report.key_at_coordinator for report in result.reports)
    assert "WARNING: the coordinator held the secret key" in result.summary()
    assert result.to_dict()["reports"][0]["key_at_coordinator"] is True
    assert (result.prediction is None) == as_job


@pytest.mark.parametrize("protection", ["plain", "dp"])
def test_protection_without_key_is_not_flagged(federation, grid, protection):
    result = strategy(protection).start(grid, federation.queries)
    assert result.prediction is not None
    assert not any(report.key_at_coordinator for report in result.reports)
    assert "WARNING" not in result.summary()


@pytest.mark.parametrize(
    ("asked", "given"), [("plain", "he"), ("he", "plain"), (DP(epsilon=2.0), DP(epsilon=1.0))]
)
def test_job_under_another_protection_is_refused(federation, grid, asked, given):
    job = Querier(protection=asked).ask(federation.queries, clear=True)
    with pytest.raises(BindingError, match="the job asks for"):
        strategy(given).start(grid, job)


def test_job_whose_key_id_names_another_key_is_refused(federation, grid):
    import dataclasses

    job = Querier(protection="he").ask(federation.queries, clear=True)
    other = Querier(protection="he").key_id
    for key_id in (other, "", "00" * 32):
        with pytest.raises(BindingError):
            strategy().start(grid, dataclasses.replace(job, key_id=key_id))


@pytest.mark.parametrize("queries", [[[1.0, 2.0]], "text", None, 3], ids=str)
def test_queries_that_are_no_array_are_refused(grid, queries):
    with pytest.raises(InvalidValueError):
        strategy("plain").start(grid, queries)


@pytest.mark.parametrize(
    "queries", [np.zeros(4), np.zeros((0, 4)), np.array([["x"]]), np.array([[np.nan] * 4])], ids=str
)
def test_queries_that_cannot_travel_are_refused(grid, queries):
    with pytest.raises(InvalidValueError):
        strategy("plain").start(grid, queries)


def child(code: str, *arguments: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code), *arguments],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_querier_in_another_process_opens_what_this_one_cannot(federation, grid, tmp_path):
    job_file, secret_file, answer_file = (tmp_path / n for n in ("job", "secret", "answer"))
    queries_file = tmp_path / "queries.npy"
    np.save(queries_file, federation.queries)
    child(
        """
        import sys, pathlib, numpy
        from fedinfer_flower import Querier
        queries, job, secret = sys.argv[1:]
        querier = Querier(protection="he")
        asked = querier.ask(numpy.load(queries), batch_size=7, clear=True)
        pathlib.Path(job).write_bytes(asked.to_bytes())
        querier.save_secret(secret)
        """,
        *map(str, (queries_file, job_file, secret_file)),
    )
    job = QueryJob.from_bytes(job_file.read_bytes())

    result = strategy().start(grid, job)
    answer_file.write_bytes(result.combined.to_bytes())

    assert not secret_in_process(job.key_id)
    assert result.prediction is None
    assert not any(report.key_at_coordinator for report in result.reports)
    assert "sealed for the querier" in result.summary()
    secret = json.loads(secret_file.read_text())["secret"]
    for public in (job_file.read_bytes(), answer_file.read_bytes(), repr(result).encode()):
        assert secret[100:164].encode() not in public
    out = child(
        """
        import sys, json, pathlib
        from fedinfer_flower import Querier
        from fedinfer_flower.wire.documents import CombinedAnswer
        secret, answer = sys.argv[1:]
        combined = CombinedAnswer.from_bytes(pathlib.Path(answer).read_bytes())
        querier = Querier.load_secret(secret)
        prediction = querier.open(combined)
        sys.stdout.write(json.dumps(
            [list(prediction.classes), prediction.names, querier.totals(combined).tolist()]
        ))
        """,
        *map(str, (secret_file, answer_file)),
    )
    classes, names, totals = json.loads(out)
    scores = federation.scores(RULES.get("mean-probability")())
    # 2**-16 is the codec's step for probabilities; five sites round by half a step each.
    np.testing.assert_allclose(totals, scores.sum(axis=0), rtol=0.0, atol=5 * 2.0**-17)
    assert classes == ["a", "b", "c", "d"]
    assert names == [classes[label] for label in scores.sum(axis=0).argmax(axis=1)]
