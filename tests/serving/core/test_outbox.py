"""The outbox: what is written stays, one job a key, one end a job, nothing left behind."""

from __future__ import annotations

import dataclasses
import os
import stat

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fedinfer_flower.errors import BindingError, ConfigError
from fedinfer_flower.serving.jobs import Job, JobKind, JobRequest, JobState
from fedinfer_flower.serving.outbox import Outbox, request_digest

SECRET = b"canary of a question"


def request(*, owner="a", key="", body=SECRET, timeout_s=5.0, **changes) -> JobRequest:
    values = {"model": "m", "kind": JobKind.ROWS, "facts": {"dtype": "uint8"}, "n_rows": 1}
    return JobRequest(
        owner=owner, body=body, timeout_s=timeout_s, idempotency_key=key, **(values | changes)
    )


def job_of(job_id: str, asked: JobRequest, *, accepted_at: float = 100.0) -> Job:
    return Job(
        job_id=job_id,
        owner=asked.owner,
        model=asked.model,
        kind=asked.kind,
        n_rows=asked.n_rows,
        state=JobState.ACCEPTED,
        accepted_at=accepted_at,
        deadline_at=accepted_at + asked.timeout_s,
    )


@pytest.fixture
def outbox(tmp_path):
    outbox = Outbox(tmp_path / "outbox.db", result_ttl_s=10.0)
    yield outbox
    outbox.close()


def add(outbox: Outbox, job_id: str, asked: JobRequest):
    return outbox.add(job_of(job_id, asked), asked, run_id=2**63 + 1)


def test_job_is_there_after_the_process_is_not(outbox, tmp_path):
    asked = request(key="k")
    add(outbox, "j", asked)
    # No close: what was returned from is on disk.
    again = Outbox(tmp_path / "outbox.db")
    (stored,) = again.unfinished()
    assert stored.request == asked
    assert stored.run_id == 2**63 + 1
    assert stored.job.state is JobState.ACCEPTED
    again.close()


def test_file_is_its_owner_s_alone_and_refused_otherwise(outbox, tmp_path):
    path = tmp_path / "outbox.db"
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    outbox.close()
    path.chmod(0o640)
    with pytest.raises(ConfigError, match="can be read by others"):
        Outbox(path)


@pytest.mark.parametrize("content", [b"", b"no database at all, but long enough to be read"])
def test_empty_file_is_made_good_and_a_strange_one_refused(tmp_path, content):
    path = tmp_path / "outbox.db"
    path.write_bytes(content)
    os.chmod(path, 0o600)
    if content:
        with pytest.raises(ConfigError):
            Outbox(path)
    else:
        Outbox(path).close()


def test_same_key_gives_the_same_job_and_another_request_is_refused(outbox):
    first, new = add(outbox, "j1", request(key="k"))
    again, second_new = add(outbox, "j2", request(key="k", timeout_s=9.0))
    assert (new, second_new) == (True, False)
    assert again.job == first.job
    with pytest.raises(BindingError):
        add(outbox, "j3", request(key="k", body=b"other"))
    with pytest.raises(BindingError):
        outbox.find_key(request(key="k", model="other"))
    _, new = add(outbox, "j4", request(key="k", owner="b"))
    assert new


KEYS = st.lists(
    st.tuples(
        st.sampled_from("ab"), st.sampled_from(["", "x", "y"]), st.sampled_from([b"1", b"2"])
    ),
    max_size=20,
)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=40)
@given(calls=KEYS)
def test_one_job_for_each_owner_and_key_in_any_order(tmp_path_factory, calls):
    outbox = Outbox(tmp_path_factory.mktemp("outbox") / "outbox.db")
    known: dict[tuple[str, str], tuple[str, bytes]] = {}
    made = 0
    for number, (owner, key, body) in enumerate(calls):
        asked = request(owner=owner, key=key, body=body)
        before = known.get((owner, key)) if key else None
        if before is not None and before[1] != body:
            with pytest.raises(BindingError):
                add(outbox, f"j{number}", asked)
            continue
        stored, new = add(outbox, f"j{number}", asked)
        assert new == (before is None)
        made += new
        if before is not None:
            assert stored.job.job_id == before[0]
        elif key:
            known[owner, key] = (stored.job.job_id, body)
    assert len(outbox.unfinished()) == made
    outbox.close()


def test_job_ends_once_and_its_body_is_gone_from_the_file(outbox, tmp_path):
    asked = request()
    job = add(outbox, "j", asked)[0].job
    done = dataclasses.replace(job, state=JobState.DONE, ended_at=101.0, answer=b"answer")
    failed = dataclasses.replace(job, state=JobState.FAILED, ended_at=101.0)

    assert outbox.end(done)
    assert not outbox.end(failed)

    assert outbox.find("j").job.state is JobState.DONE
    assert outbox.find("j").request.body == b""
    outbox.close()  # the last connection writes the log back into the file
    assert SECRET not in (tmp_path / "outbox.db").read_bytes()


def test_results_expire_unless_something_is_still_to_be_paid(outbox):
    for name, money in (("j1", ""), ("j2", "{}")):
        job = add(outbox, name, request())[0].job
        ended = dataclasses.replace(job, state=JobState.FAILED, ended_at=101.0)
        outbox.end(ended, money=money)
    assert outbox.expire(110.0) == 0
    assert outbox.expire(112.0) == 1
    assert outbox.find("j1") is None
    assert [stored.job.job_id for stored in outbox.unsettled()] == ["j2"]


def test_asking_is_noted_with_its_run(outbox):
    add(outbox, "j", request())
    outbox.mark_asking(["j", "unknown"], run_id=7)
    stored = outbox.find("j")
    assert (stored.job.state, stored.run_id) == (JobState.ASKING, 7)


def test_digest_tells_requests_apart_by_everything_but_their_time():
    base = request_digest(request())
    assert request_digest(request(timeout_s=9.0, key="k", owner="b")) == base
    for change in ({"model": "n"}, {"n_rows": 2}, {"facts": {}}, {"body": b""}):
        assert request_digest(request(**change)) != base
