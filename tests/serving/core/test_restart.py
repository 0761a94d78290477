"""A second process on the state of the first: what is asked again, what fails, and how."""

from __future__ import annotations

import dataclasses
import json
import time

import numpy as np
import pytest

from fedinfer_flower import Querier
from fedinfer_flower.errors import AuditLogError, BindingError
from fedinfer_flower.observability.audit_log import AuditLog, verify_audit_log
from fedinfer_flower.serving.jobs import JobState
from fedinfer_flower.wire.directory import Directory

SECAGG = {"m": {"protection": "secagg"}}


@pytest.mark.parametrize("state", ["accepted", "asking"])
@pytest.mark.parametrize("protection", ["plain", "secagg"])
def test_clear_job_is_asked_again(bed, rows, mean_probability, state, protection):
    sites = bed.sites()
    models = {"m": {"protection": protection, "quorum": 3}}
    first = bed.core(sites, models=models, batching={"window-s": 5.0 * (state == "accepted")})
    if state == "asking":
        sites.instead = sites.hang
    job = first.submit(bed.request(rows, key="k"))
    if state == "asking":
        bed.until(lambda: sites.n_asked() == 3)
    assert first.find(job.job_id, owner="alice").state.value == state
    first.close()
    sites.hanging.set()
    sites.instead = None

    second = bed.core(sites, models=models)
    ended = bed.ended(second, job)

    assert ended.state is JobState.DONE, ended.error
    assert ended.deadline_at == job.deadline_at
    got = json.loads(ended.answer)["probabilities"]
    assert abs(mean_probability(rows) - got).max() < 1e-4
    again = second.submit(bed.request(rows, key="k"))
    assert again == ended


def test_job_whose_time_passed_meanwhile_fails_typed(bed, rows):
    sites = bed.sites()
    first = bed.core(sites, batching={"window-s": 5.0})
    job = first.submit(bed.request(rows, timeout_s=0.05))
    first.close()
    time.sleep(0.06)

    ended = bed.core(sites).find(job.job_id, owner="alice")

    assert ended.state is JobState.FAILED
    assert ended.error["code"] == "FI402"


@pytest.mark.parametrize("case", ["other-run", "asked"])
def test_sealed_job_of_before_fails_with_the_way_out(bed, rows, case):
    sites = bed.sites()
    first = bed.core(sites, models=SECAGG | {"m": SECAGG["m"] | {"quorum": 3}})
    querier = Querier(protection="secagg")
    sealed = querier.ask(
        rows, directory=Directory.from_bytes(first.directory("m")), rule="mean-probability"
    )
    sites.instead = sites.hang
    job = first.submit(bed.sealed(sealed.to_bytes(), len(rows)))
    bed.until(lambda: sites.n_asked() == 3)
    first.close()

    run_id = 12345 if case == "other-run" else None
    second = bed.core(sites, models=SECAGG, run_id=run_id, start=False)
    second.start()
    ended = second.find(job.job_id, owner="alice")

    assert ended.state is JobState.FAILED
    assert ended.error["code"] == BindingError.code
    assert "seal" in ended.error["hint"]


def test_model_that_is_gone_fails_its_jobs(bed, rows):
    sites = bed.sites()
    first = bed.core(sites, batching={"window-s": 5.0})
    job = first.submit(bed.request(rows))
    first.close()

    second = bed.core(sites, models={"other": {}})

    assert second.find(job.job_id, owner="alice").error["code"] == "FI417"


def test_result_is_kept_for_its_owner_over_a_restart(bed, rows):
    sites = bed.sites()
    first = bed.core(sites)
    done = bed.ended(first, first.submit(bed.request(rows)))
    first.close()

    second = bed.core(sites)

    assert second.find(done.job_id, owner="alice") == dataclasses.replace(
        done, progress=second.find(done.job_id, owner="alice").progress
    )


def test_audit_log_has_every_job_and_no_answer_without_it(bed, rows, tmp_path, monkeypatch):
    audit = AuditLog(tmp_path / "audit.jsonl", role="gateway")
    core = bed.core(bed.sites(), audit=audit)
    job = bed.ended(core, core.submit(bed.request(rows)))
    assert job.state is JobState.DONE

    append = AuditLog.append

    def full(self, event, **facts):
        if event == "done":
            raise AuditLogError("no room on the disk")
        return append(self, event, **facts)

    monkeypatch.setattr(AuditLog, "append", full)
    refused = bed.ended(core, core.submit(bed.request(rows)))

    assert (refused.state, refused.answer) == (JobState.FAILED, b"")
    assert refused.error["code"] == "FI323"
    assert core.ready() == (False, "no room on the disk")
    lines = (tmp_path / "audit.jsonl").read_text().splitlines()
    events = [json.loads(line).get("event") for line in lines]
    assert events.count("accepted") == 2
    assert events.count("done") == 1
    assert verify_audit_log(tmp_path / "audit.jsonl").ok


def test_status_shows_what_happened_and_nothing_that_was_asked(bed, rows):
    sites = bed.sites()
    core = bed.core(sites, models={"m": {"protection": "dp", "rule": "mean-probability"}})
    marker = np.full_like(rows, 123456.789)
    marker[:, 0] = np.arange(len(rows))
    job = bed.ended(core, core.submit(bed.request(marker)))
    assert job.state is JobState.DONE, job.error

    status = core.status()

    text = json.dumps(status)
    assert "123456.789" not in text
    assert status["gateway"]["ready"]
    assert [s["name"] for s in status["sites"]] == ["site-0", "site-1", "site-2"]
    assert all(s["online"] and s["answers"] == 1 for s in status["sites"])
    assert sum(status["queries_a_minute"]) == len(rows)
    assert len(status["queries_a_minute"]) == 60
    assert status["models"][0]["jobs"] == 1
    assert status["protections"] == {"dp": len(rows)}
    spent = job.provenance["epsilon_per_query"] * len(rows)
    assert [e["spent"] for e in status["epsilon"]] == pytest.approx([spent] * 3)
    assert status["epsilon"][0]["querier"] == bed.identity.key_id
    assert status["receipts"][0]["job_id"] == job.job_id


def test_lost_superlink_is_reported(bed, rows, monkeypatch):
    sites = bed.sites()
    core = bed.core(sites)
    assert core.lost == ""
    core._lost_after_s = 0.2

    def away(*_):
        raise ConnectionError("refused")

    with monkeypatch.context() as patched:
        for name in ("get_node_ids", "pull_messages", "push_messages"):
            patched.setattr(sites.grid, name, away)
        bed.until(lambda: core.lost != "")
        assert not core.ready()[0]
        job = bed.ended(core, core.submit(bed.request(rows, timeout_s=0.3)))
        assert job.state is JobState.FAILED
    bed.until(lambda: core.lost == "")


def test_models_say_what_they_take(bed):
    core = bed.core(bed.sites(), models=SECAGG)
    (model,) = core.models()
    assert (model["id"], model["kind"], model["protection"]) == ("m", "classifier", "secagg")
    assert json.dumps(core.models())
