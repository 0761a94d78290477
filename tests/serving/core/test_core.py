"""The gateway core over real sites: answers, batches, deadlines, refusals."""

from __future__ import annotations

import dataclasses
import json
import threading
import time

import numpy as np
import pytest
from flwr.app import Message

from fedinfer_flower import Querier
from fedinfer_flower.errors import (
    BindingError,
    IncompatibleProtection,
    InvalidValueError,
    KeyAtCoordinatorError,
    QuotaExceededError,
    ShapeError,
    UnavailableError,
    UnknownQueryError,
)
from fedinfer_flower.serving.jobs import JobState
from fedinfer_flower.wire import messages
from fedinfer_flower.wire.directory import Directory
from fedinfer_flower.wire.documents import CombinedAnswer
from fedinfer_flower.wire.records import pack, unpack

SECAGG = {"m": {"protection": "secagg"}}


@pytest.mark.parametrize("protection", ["plain", "secagg"])
def test_rows_are_answered_as_by_the_clear_rule(bed, rows, mean_probability, protection):
    core = bed.core(bed.sites(), models={"m": {"protection": protection}})

    job = bed.ended(core, core.submit(bed.request(rows)))

    assert job.state is JobState.DONE, job.error
    answer = json.loads(job.answer)
    # Fixed point under masks: far below what could change a label here.
    wanted = mean_probability(rows)
    np.testing.assert_allclose(answer["probabilities"], wanted, atol=1e-4)
    assert answer["indices"] == wanted.argmax(axis=1).tolist()
    assert answer["labels"] == [answer["classes"][i] for i in answer["indices"]]
    assert job.provenance["sites_answered"] == 3
    assert not job.provenance["degraded"]
    assert json.loads(job.receipt)


def test_jobs_of_eight_threads_share_messages_and_get_their_own_answers(bed, mean_probability):
    sites = bed.sites()
    core = bed.core(sites, batching={"window-s": 0.2})
    found: dict[int, list] = {}

    def ask(number: int) -> None:
        mine = np.random.default_rng(number).standard_normal((number % 3 + 1, 4))
        job = bed.ended(core, core.submit(bed.request(mine, owner=f"key{number % 4}")))
        found[number] = [json.loads(job.answer)["probabilities"], mean_probability(mine)]

    threads = [threading.Thread(target=ask, args=(n,)) for n in range(24)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

    assert len(found) == 24
    for got, wanted in found.values():
        np.testing.assert_allclose(got, wanted, atol=1e-6)
    # One batch of all, or a few if a thread came late: far fewer than 24 times 3 sites.
    assert sites.n_asked() <= 24


def test_same_row_of_two_callers_is_asked_once_and_answered_to_both(bed, rows):
    sites = bed.sites()
    core = bed.core(sites, batching={"window-s": 0.3})
    sites.rows.clear()

    jobs = [core.submit(bed.request(rows, owner=owner)) for owner in ("alice", "bob")]
    answers = [json.loads(bed.ended(core, job).answer) for job in jobs]

    assert answers[0] == answers[1]
    assert sites.rows == [len(rows)] * 3


def test_big_job_is_cut_and_does_not_starve_a_single_row(bed, mean_probability):
    sites = bed.sites()
    core = bed.core(sites, batching={"max-rows": 20, "in-flight": 2, "window-s": 0.0})
    big = np.random.default_rng(1).standard_normal((600, 4))
    order: list[str] = []

    def tell(name):
        return lambda job: order.append(name) if job.state.ended else None

    first = core.submit(bed.request(big, owner="alice"))
    core.listen(first.job_id, owner="alice", tell=tell("big"))
    second = core.submit(bed.request(big[:1], owner="bob"))
    core.listen(second.job_id, owner="bob", tell=tell("one"))
    done = bed.ended(core, first)

    assert order == ["one", "big"]
    np.testing.assert_allclose(
        json.loads(done.answer)["probabilities"], mean_probability(big), atol=1e-6
    )
    assert done.provenance["batches"] >= 30
    assert len(json.loads(done.receipt)["receipts"]) == done.provenance["batches"]


def test_sealed_job_is_passed_on_and_opened_by_its_querier_alone(bed, rows, mean_probability):
    core = bed.core(bed.sites(), models=SECAGG)
    querier = Querier(protection="secagg")
    directory = Directory.from_bytes(core.directory("m"))
    sealed = querier.ask(rows, directory=directory, rule="mean-probability", batch_size=2)

    job = bed.ended(core, core.submit(bed.sealed(sealed.to_bytes(), len(rows))))

    assert job.state is JobState.DONE, job.error
    found = querier.open(CombinedAnswer.from_bytes(job.answer))
    np.testing.assert_allclose(found.probabilities, mean_probability(rows), atol=1e-4)
    assert job.provenance["batches"] == 3


def test_sealed_job_again_is_refused_by_the_sites_with_a_typed_error(bed, rows):
    core = bed.core(bed.sites(), models=SECAGG)
    querier = Querier(protection="secagg")
    sealed = querier.ask(rows, directory=Directory.from_bytes(core.directory("m")))
    request = bed.sealed(sealed.to_bytes(), len(rows))
    first = bed.ended(core, core.submit(request))
    assert first.state is JobState.FAILED or first.answer  # whatever rule was picked

    again = bed.ended(core, core.submit(request))

    assert again.state is JobState.FAILED
    assert again.error["code"] == "FI402"
    assert "FI313" in again.error["message"]


@pytest.mark.parametrize(
    ("change", "error"),
    [
        ({"run_id": 1}, BindingError),
        ({"protection": "secagg+dp"}, BindingError),
        ({"rule": "majority-vote"}, BindingError),
    ],
    ids=["run", "protection", "rule"],
)
def test_sealed_job_for_something_else_is_refused_when_it_comes(bed, rows, change, error):
    core = bed.core(bed.sites(), models=SECAGG)
    sealed = Querier(protection="secagg").ask(
        rows, directory=Directory.from_bytes(core.directory("m")), rule="mean-probability"
    )
    wrong = dataclasses.replace(sealed, **change)

    with pytest.raises(error):
        core.submit(bed.sealed(wrong.to_bytes(), len(rows)))


def test_deadline_ends_a_job_while_a_site_hangs_and_late_answers_are_dropped(bed, rows):
    sites = bed.sites()
    core = bed.core(sites, models={"m": {"quorum": 3}})
    sites.instead = sites.hang
    begun = time.monotonic()

    job = bed.ended(core, core.submit(bed.request(rows, timeout_s=0.6)))

    assert job.state is JobState.FAILED
    assert job.error["code"] == "FI402"
    assert time.monotonic() - begun < 5.0
    sites.hanging.set()
    sites.instead = None
    assert bed.ended(core, core.submit(bed.request(rows))).state is JobState.DONE


def test_hanging_site_leaves_a_degraded_answer_at_the_deadline(bed, rows, mean_probability):
    sites = bed.sites()
    core = bed.core(sites, models={"m": {"quorum": 2}})
    sites.instead = sites.hang

    job = bed.ended(core, core.submit(bed.request(rows, timeout_s=0.6)))

    assert job.state is JobState.DONE, job.error
    assert job.provenance["degraded"]
    assert job.provenance["sites_answered"] == 2
    np.testing.assert_allclose(
        json.loads(job.answer)["probabilities"], mean_probability(rows, range(2)), atol=1e-6
    )


def test_straggler_is_not_waited_for_once_the_quorum_has_answered(bed, rows, mean_probability):
    sites = bed.sites(4)
    core = bed.core(sites, models={"m": {"protection": "secagg", "quorum": 3, "straggler-s": 0.1}})
    sites.instead = sites.hang

    job = bed.ended(core, core.submit(bed.request(rows, timeout_s=20.0)))

    assert job.state is JobState.DONE, job.error
    assert job.provenance["degraded"]
    assert job.provenance["seconds"] < 10.0
    np.testing.assert_allclose(
        json.loads(job.answer)["probabilities"], mean_probability(rows, [0, 1, 3]), atol=1e-4
    )


def test_cancelled_job_is_over_at_once_and_its_answer_is_dropped(bed, rows):
    sites = bed.sites()
    core = bed.core(sites)
    sites.instead = sites.hang
    job = core.submit(bed.request(rows))
    bed.until(lambda: sites.n_asked() == 3)

    ended = core.cancel(job.job_id, owner="alice")
    sites.hanging.set()

    assert ended.state is JobState.CANCELLED
    assert ended.error["code"] == "FI416"
    assert core.drain(10.0)
    assert core.find(job.job_id, owner="alice") == ended


def test_cancelled_job_in_the_queue_is_never_asked(bed, rows):
    sites = bed.sites()
    core = bed.core(sites, batching={"window-s": 0.5})
    job = core.submit(bed.request(rows))

    ended = core.cancel(job.job_id, owner="alice")

    assert ended.state is JobState.CANCELLED
    assert core.drain(10.0)
    assert sites.n_asked() == 0


def test_job_of_another_owner_is_unknown(bed, rows):
    core = bed.core(bed.sites())
    job = core.submit(bed.request(rows))

    for act in (core.find, core.cancel):
        with pytest.raises(UnknownQueryError):
            act(job.job_id, owner="mallory")
    with pytest.raises(UnknownQueryError):
        core.listen(job.job_id, owner="mallory", tell=print)
    done = bed.ended(core, job)
    with pytest.raises(UnknownQueryError):
        core.find(done.job_id, owner="mallory")


def test_full_queue_is_refused_and_has_room_again_afterwards(bed, rows):
    sites = bed.sites()
    core = bed.core(sites, limits={"queued-rows": 8})
    sites.instead = sites.hang
    job = core.submit(bed.request(rows))

    with pytest.raises(QuotaExceededError):
        core.submit(bed.request(rows))

    core.cancel(job.job_id, owner="alice")
    sites.hanging.set()
    sites.instead = None
    assert bed.ended(core, core.submit(bed.request(rows))).state is JobState.DONE


def test_listener_hears_every_state_in_order_and_a_broken_one_harms_nobody(bed, rows):
    core = bed.core(bed.sites(), batching={"window-s": 0.05})
    heard: list[JobState] = []
    job = core.submit(bed.request(rows))

    def broken(job):
        raise RuntimeError("not a good listener")

    core.listen(job.job_id, owner="alice", tell=broken)
    core.listen(job.job_id, owner="alice", tell=lambda j: heard.append(j.state))
    bed.ended(core, job)

    bed.until(lambda: heard[-1:] == [JobState.DONE])
    assert heard[0] is JobState.ACCEPTED
    assert sorted(heard, key=list(JobState).index) == heard
    later: list[JobState] = []
    core.listen(job.job_id, owner="alice", tell=lambda j: later.append(j.state))
    assert later == [JobState.DONE]


def test_too_few_sites_wait_and_then_fail_with_the_reason(bed, rows):
    sites = bed.sites(2)
    core = bed.core(sites, start=False, models=SECAGG)
    core.start()
    assert not core.ready()[0]

    job = bed.ended(core, core.submit(bed.request(rows, timeout_s=0.3)))

    assert job.error["code"] == "FI405"
    assert sites.n_asked() == 0


def test_closing_gateway_refuses_new_jobs_and_ends_accepted_ones(bed, rows):
    core = bed.core(bed.sites(), batching={"window-s": 0.2})
    job = core.submit(bed.request(rows))

    assert core.drain(20.0)

    assert core.find(job.job_id, owner="alice").state is JobState.DONE
    assert core.ready() == (False, "the gateway is closing")
    with pytest.raises(UnavailableError):
        core.submit(bed.request(rows))


@pytest.mark.parametrize(
    ("changes", "error"),
    [
        ({"model": "other"}, InvalidValueError),
        ({"facts": {"dtype": "float64", "shape": [5, 5]}}, ShapeError),
        ({"facts": {"dtype": "float64", "shape": [20]}}, ShapeError),
        ({"facts": {"dtype": "object", "shape": [5, 4]}}, ShapeError),
        ({"facts": {"dtype": "float64", "shape": [5, 2**62]}}, ShapeError),
        ({"n_rows": 4}, ShapeError),
        ({"idempotency_key": "k" * 256}, InvalidValueError),
    ],
    ids=["model", "size", "one-axis", "dtype", "huge", "rows", "key"],
)
def test_request_that_does_not_fit_is_refused_before_it_is_kept(bed, rows, changes, error):
    core = bed.core(bed.sites())
    with pytest.raises(error):
        core.submit(dataclasses.replace(bed.request(rows), **changes))
    assert core.drain(0.1)


@pytest.mark.parametrize(
    ("model", "error"),
    [
        ({"protection": "he"}, KeyAtCoordinatorError),
        ({"protection": "secagg", "rule": "median"}, IncompatibleProtection),
    ],
    ids=["key", "rule"],
)
def test_model_that_cannot_work_is_refused_when_the_gateway_is_built(bed, model, error):
    with pytest.raises(error):
        bed.core(bed.sites(), start=False, models={"m": model})


def test_stale_card_is_fetched_again_and_the_query_asked_again(bed, rows):
    sites = bed.sites()
    core = bed.core(sites, models={"m": {"quorum": 3}})
    refused = []

    def other_model_once(action, partition, message, context, handle):
        if action == "fi_predict" and partition == 1 and not refused:
            refused.append(partition)
            query_id = unpack(message.content).query_id
            error = BindingError("the query was made for another model or profile")
            return Message(
                pack(
                    messages.error(
                        error, run_id=context.run_id, sender=context.node_id, query_id=query_id
                    )
                ),
                reply_to=message,
            )
        return None

    sites.instead = other_model_once
    n_hellos = sites.asked["fi_hello", 1]

    job = bed.ended(core, core.submit(bed.request(rows)))

    assert job.state is JobState.DONE, job.error
    assert not job.provenance["degraded"]
    assert sites.asked["fi_hello", 1] == n_hellos + 1


def test_rows_that_make_sites_fail_do_not_fail_another_caller_s(bed, rows):
    sites = bed.sites()
    sites.poison = 777.0
    core = bed.core(sites, models={"m": {"quorum": 3}}, batching={"window-s": 0.3})
    bad = rows[:1].copy()
    bad[0, 0] = sites.poison

    jobs = [
        core.submit(bed.request(some, owner=owner))
        for owner, some in (("alice", rows[:2]), ("mallory", bad), ("bob", rows[2:]))
    ]
    ended = [bed.ended(core, job) for job in jobs]

    assert [job.state.value for job in ended] == ["done", "failed", "done"]
    assert "FI404" in ended[1].error["message"]


def test_row_that_was_asked_before_travels_alone_under_exact_sums(bed, rows):
    sites = bed.sites()
    core = bed.core(sites, models=SECAGG, batching={"window-s": 0.3})
    assert bed.ended(core, core.submit(bed.request(rows[:1]))).state is JobState.DONE
    sites.rows.clear()

    jobs = [
        core.submit(bed.request(rows[:1], owner="alice")),
        core.submit(bed.request(rows[1:], owner="bob")),
    ]
    ended = [bed.ended(core, job) for job in jobs]

    assert [job.state for job in ended] == [JobState.DONE, JobState.DONE]
    assert sorted(sites.rows) == [1, 1, 1, 4, 4, 4]
