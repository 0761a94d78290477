"""Wire forms: exact round trips, and refusal of everything that is not one."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from fedinfer_flower.encrypted_query.ckks_batch import query_bytes, reply_bytes
from fedinfer_flower.encrypted_query.documents import (
    NAME,
    EncryptedBatch,
    EncryptedJob,
    EncryptedQuestion,
    answer,
    read_answer,
)
from fedinfer_flower.encrypted_query.plans import HIDDEN_LAYER, LINEAR
from fedinfer_flower.errors import (
    BindingError,
    EnvelopeError,
    InvalidValueError,
    ProtocolError,
    ShapeError,
    SizeLimitError,
)
from fedinfer_flower.querier.encrypted_querier import EncryptedQuerier
from fedinfer_flower.wire.documents import CombinedAnswer, CombinedBatch
from fedinfer_flower.wire.envelope import decode, encode

pytest.importorskip("tenseal")


@pytest.fixture(scope="module")
def querier():
    return EncryptedQuerier(depth=1)


@pytest.fixture(scope="module")
def job(querier):
    return querier.ask(np.full((3, 2), 0.25), classes=("a", "b"))


@pytest.fixture
def asked(job):
    return EncryptedQuestion(
        query_id=job.batches[0].query_id,
        n_queries=3,
        n_features=2,
        classes=("a", "b"),
        plan=job.plan,
        input_bound=1.0,
        n_sites=4,
        min_sites=3,
        public_key=job.public_key,
        inputs=job.batches[0].inputs,
        key_id=job.key_id,
    )


def test_job_survives_its_journey(job):
    copy = EncryptedJob.from_bytes(job.to_bytes())
    assert copy == job
    assert copy.n_queries == 3


def test_job_holds_neither_inputs_nor_secret(querier, job):
    data = job.to_bytes()
    assert np.full(2, 0.25).tobytes() not in data
    assert "secret" not in repr(job)
    again = querier.ask(np.full((3, 2), 0.25))
    assert again.batches[0].inputs != job.batches[0].inputs  # encryption is fresh


def test_damaged_job_is_refused(job):
    data = job.to_bytes()
    for bad in (data[:-1], data + b"\0", b"", data[:40] + b"x" + data[41:]):
        with pytest.raises(ProtocolError):
            EncryptedJob.from_bytes(bad)


@pytest.mark.parametrize(
    "change",
    [
        {"n_features": 3},
        {"plan": HIDDEN_LAYER},
        {"input_bound": float("nan")},
        {"input_bound": 0.0},
        {"classes": ("a", "a")},
        {"batches": ()},
        {"public_key": b""},
        {"batches": (EncryptedBatch(query_id="q", n_queries=99_999, inputs=b""),)},
    ],
    ids=lambda change: next(iter(change)),
)
def test_job_that_makes_no_sense_is_refused_when_built(job, change):
    with pytest.raises(InvalidValueError):
        dataclasses.replace(job, **change)


def test_question_survives_its_journey(asked):
    envelope = decode(encode(asked.to_envelope(run_id=7)))
    assert EncryptedQuestion.from_envelope(envelope) == asked


@pytest.mark.parametrize(
    ("change", "error"),
    [
        ({"n_queries": LINEAR.slots + 1}, SizeLimitError),
        ({"n_queries": 0}, SizeLimitError),
        ({"n_features": 3}, ShapeError),
        ({"n_features": 2**40}, ShapeError),
        ({"classes": ()}, EnvelopeError),
        ({"classes": ("a", "a")}, EnvelopeError),
        ({"input_bound": -1.0}, EnvelopeError),
        ({"min_sites": 5}, EnvelopeError),
        ({"inputs": b"short"}, ShapeError),
        ({"public_key": b"short"}, EnvelopeError),
        ({"plan": HIDDEN_LAYER}, EnvelopeError),
        ({"key_id": "0" * 64}, BindingError),
        ({"query_id": ""}, EnvelopeError),
    ],
    ids=lambda value: value.__name__ if isinstance(value, type) else next(iter(value)),
)
def test_question_that_contradicts_itself_is_refused(asked, change, error):
    envelope = dataclasses.replace(asked, **change).to_envelope(run_id=7)
    with pytest.raises(error):
        EncryptedQuestion.from_envelope(envelope)


def test_question_of_another_codec_or_plan_name_is_refused(asked):
    envelope = asked.to_envelope(run_id=7)
    for bad in (
        dataclasses.replace(envelope, codec="float64"),
        dataclasses.replace(envelope, meta={**envelope.meta, "plan": "deep"}),
        dataclasses.replace(envelope, meta={**envelope.meta, "more": 1}),
    ):
        with pytest.raises(EnvelopeError):
            EncryptedQuestion.from_envelope(bad)


def envelope_of_answer(asked, agreement=None):
    logits = bytes(reply_bytes(asked.plan, len(asked.classes)))
    return answer(asked, run_id=7, sender=5, logits=logits, commitment="c", agreement=agreement)


def test_answer_is_read_with_what_it_is_bound_to(asked):
    logits, agreement = read_answer(
        envelope_of_answer(asked, 0.98), asked, run_id=7, sender=5, commitment="c"
    )
    assert len(logits) == reply_bytes(asked.plan, 2)
    assert agreement == 0.98


@pytest.mark.parametrize(
    ("change", "error"),
    [
        ({"run_id": 8}, BindingError),
        ({"sender": 6}, BindingError),
        ({"query_id": "other"}, BindingError),
        ({"key_id": "0" * 64}, BindingError),
        ({"codec": "he"}, BindingError),
        ({"shape": (4, 2)}, ShapeError),
        ({"sections": (("logits", b"short"),)}, ShapeError),
        ({"meta": {"commitment": "d", "agreement": None}}, BindingError),
        ({"meta": {"commitment": "c", "agreement": 1.5}}, EnvelopeError),
        ({"meta": {"commitment": "c", "agreement": "high"}}, EnvelopeError),
        ({"meta": {"commitment": "c"}}, EnvelopeError),
    ],
)
def test_answer_of_something_else_is_refused(asked, change, error):
    envelope = dataclasses.replace(envelope_of_answer(asked), **change)
    with pytest.raises(error):
        read_answer(envelope, asked, run_id=7, sender=5, commitment="c")


# -- the querier -------------------------------------------------------------------------


def test_querier_refuses_inputs_that_it_cannot_encrypt(querier):
    for bad in (np.zeros(4), np.zeros((0, 4)), np.full((2, 4), 2.0), np.full((2, 4), np.nan)):
        with pytest.raises(InvalidValueError):
            querier.ask(bad)
    with pytest.raises(InvalidValueError, match="expected"):
        querier.ask(np.zeros((2, 4)), n_features=5)
    with pytest.raises(InvalidValueError, match="depth"):
        EncryptedQuerier(depth=3)


def test_rows_beyond_one_batch_go_into_the_next(querier):
    job = querier.ask(np.zeros((LINEAR.slots + 1, 1)))
    assert [batch.n_queries for batch in job.batches] == [LINEAR.slots, 1]
    assert {len(batch.inputs) for batch in job.batches} == {query_bytes(LINEAR, 1)}


@pytest.fixture
def combined(querier, job):
    return CombinedAnswer(
        job_id=job.job_id,
        rule="mean-logit",
        protection=NAME,
        rule_options={},
        protection_options={},
        classes=("a", "b"),
        n_sites_asked=4,
        key_id=job.key_id,
        batches=(
            CombinedBatch(query_id=job.batches[0].query_id, n_queries=3, n_sites=3, total=b"none"),
        ),
    )


@pytest.mark.parametrize(
    "change",
    [
        {"job_id": "other"},
        {"key_id": "0" * 64},
        {"protection": "he"},
        {"rule": "median"},
        {"classes": ("b", "a")},
        {"n_sites_asked": 2},
        {"batches": ()},
    ],
    ids=lambda change: next(iter(change)),
)
def test_querier_opens_only_what_answers_its_job(querier, combined, change):
    with pytest.raises(BindingError):
        querier.open(dataclasses.replace(combined, **change))


def test_querier_refuses_bytes_that_are_no_sum(querier, combined):
    with pytest.raises(ProtocolError):
        querier.open(combined)
