"""Under seal the coordinator carries what it cannot read; in clear it can."""

from __future__ import annotations

import os
import time

import pytest

from fedinfer_flower.errors import (
    BindingError,
    ConfigError,
    NotEnoughNodesError,
    ProtocolError,
    QuorumNotMetError,
    UntrustedKeyError,
)
from fedinfer_flower.querier.language_querier import LanguageQuerier
from fedinfer_flower.wire.envelope import Envelope, Kind, encode
from fedinfer_flower.wire.pins import Pins
from fedinfer_flower.wire.refine_job import RefineAnswer, RefineJob

from .conftest import Federation, bank_for, strategy

CANARIES = ("varip", "volev", "zzqcanary")
QUESTIONS = [f"Q city of {CANARIES[0]} {CANARIES[1]} ?", f"Q job of {CANARIES[0]} {CANARIES[2]} ?"]


def run_sealed(federation: Federation, **options):
    """Return (opened answers, result, job) of questions that a querier seals."""
    asking = {"receiver": "north", "allow": ("text", "cache"), "rephrase": "none"}
    asking |= {"decoding": {"max_new_tokens": 4}}
    asking |= options.pop("asking", {})
    with federation.grid() as grid:
        ours = strategy(**options)
        querier = LanguageQuerier(ours.collect(grid))
        job = querier.ask(QUESTIONS, **asking)
        result = ours.start(grid, job.to_bytes())
    opened = querier.open(result.answer.to_bytes())
    return opened, result, job


@pytest.mark.parametrize("medium", ["cache", "text", "own"])
def test_sealed_answers_are_those_in_clear(untrained, medium):
    opened, result, _ = run_sealed(Federation(untrained), medium=medium)
    clear = Federation(untrained).ask(QUESTIONS, medium=medium)

    assert opened["north"].texts == clear.answers["north"]
    helpers = [set(row) for row in clear.receivers[0].used]
    assert [set(row) for row in opened["north"].used] == helpers
    assert result.answers == {"north": (None, None)}
    assert result.receivers[0].answered == (True, True)
    assert result.sealed


def clear_texts() -> set[bytes]:
    """Return the words that an eavesdropper looks for: all rewrites keep them."""
    words = {word for question in QUESTIONS for word in question.split() if len(word) > 3}
    words |= set(CANARIES)
    return {word.encode() for word in words}


@pytest.mark.parametrize("medium", ["cache", "text"])
@pytest.mark.parametrize("rephrase", ["none", "template"])
def test_nothing_that_passes_the_coordinator_shows_a_word(untrained, medium, rephrase):
    federation = Federation(untrained)
    opened, result, job = run_sealed(
        federation,
        medium=medium,
        receiver="all",
        asking={"receiver": "all", "rephrase": rephrase},
    )
    carried = b"".join(data for _, _, data in federation.seen)
    carried += job.to_bytes() + result.answer.to_bytes()

    assert len(federation.verbs("north")) >= 8
    for word in clear_texts():
        assert word not in carried
    said = {t for each in opened.values() for text in each.texts for t in (text or "").split()}
    for word in said:
        # Shorter words could stand in ciphertext by chance.
        assert len(word) < 4 or word.encode() not in carried


def test_in_clear_the_coordinator_reads_questions_and_answers(untrained):
    """The words above would have been found: without the seal they are."""
    federation = Federation(untrained)
    result = federation.ask(QUESTIONS, medium="text", receiver="all")
    carried = b"".join(data for _, _, data in federation.seen)

    for word in clear_texts():
        assert word in carried
    assert (result.answers["north"][0] or "").split()[0].encode() in carried


def test_what_goes_between_sites_is_sealed_even_when_asked_in_clear(untrained):
    federation = Federation(untrained)
    federation.ask(QUESTIONS, medium="text", sharers=["south"])

    at_the_sharer = b"".join(data for name, _, data in federation.seen if name == "south")
    for word in clear_texts():
        assert word not in at_the_sharer


def test_rounds_under_seal_run_to_the_jobs_limit(untrained):
    _, result, _ = run_sealed(Federation(untrained), rounds=4, asking={"rounds": 2})

    # Answers that it cannot read, the coordinator cannot compare.
    assert result.rounds == (2,)


def test_job_of_another_run_is_refused(untrained):
    federation = Federation(untrained)
    with federation.grid() as grid:
        job = LanguageQuerier(strategy().collect(grid)).ask(QUESTIONS, receiver="north")
    with federation.grid() as grid, pytest.raises(BindingError, match="another run"):
        strategy().start(grid, job)


def test_job_without_consent_to_the_medium_is_refused(untrained):
    with pytest.raises(ConfigError, match="does not consent"):
        run_sealed(Federation(untrained), medium="cache", asking={"allow": ("text",)})


def test_sealed_job_and_fusers_at_the_coordinator_are_refused(untrained):
    with pytest.raises(ConfigError, match="would read every cache"):
        run_sealed(Federation(untrained), fusers=bank_for(untrained[0], untrained))


def test_receiver_of_a_job_that_left_is_reported(untrained):
    federation = Federation(untrained)
    gone = []

    def west_leaves(action, name, message, context, handle):
        if name == "west" and gone:
            raise ValueError
        return handle(message, context)

    federation.intercept = west_leaves
    with federation.grid() as grid:
        ours = strategy(receiver="all", medium="text")
        querier = LanguageQuerier(ours.collect(grid))
        job = querier.ask(QUESTIONS, receiver=["north", "west"])
        gone.append(True)
        result = ours.start(grid, job)

    opened = querier.open(result.answer)
    assert opened["west"].texts == (None, None)
    assert all(opened["north"].texts)
    assert list(result.answer.failures.values()) == ["FI405"]


def test_only_receiver_of_a_job_that_left_is_a_typed_error(untrained):
    federation = Federation(untrained)
    gone = []

    def north_leaves(action, name, message, context, handle):
        if name == "north" and gone:
            raise ValueError
        return handle(message, context)

    federation.intercept = north_leaves
    with federation.grid() as grid:
        ours = strategy(receiver="all", medium="text")
        job = LanguageQuerier(ours.collect(grid)).ask(QUESTIONS, receiver="north")
        gone.append(True)
        with pytest.raises(NotEnoughNodesError, match="no receiver of the job"):
            ours.start(grid, job)


def test_sites_that_do_not_know_the_querier_answer_nothing(untrained):
    options = {"north": {"querier_key_ids": ["0" * 64]}}
    with pytest.raises(QuorumNotMetError, match="FI311"):
        run_sealed(Federation(untrained, options=options))


def test_sharer_that_the_querier_did_not_name_is_not_asked(untrained):
    federation = Federation(untrained)
    opened, result, _ = run_sealed(federation, asking={"sharers": ["south"]})

    assert all(row == ("south",) for row in opened["north"].used)
    assert "share" not in federation.verbs("west")
    assert not result.degraded


def test_coordinator_that_adds_a_sharer_is_refused_by_the_receiver(untrained):
    federation = Federation(untrained)
    with federation.grid() as grid:
        ours = strategy()
        querier = LanguageQuerier(ours.collect(grid))
        job = querier.ask(QUESTIONS, receiver="north", sharers=["south"], allow=("text", "cache"))
        every = LanguageQuerier(ours.collect(grid)).ask(QUESTIONS, receiver="north")
        widened = RefineJob(**(job.__dict__ | {"sharers": every.sharers}))
        result = ours.start(grid, widened)

    assert [(o.sharer, o.error_code) for o in result.failures] == [("west", "FI311")]
    assert {name for row in querier.open(result.answer, job=job)["north"].used for name in row} == {
        "south"
    }


def test_coordinator_that_widens_the_media_is_refused_by_the_receiver(untrained):
    federation = Federation(untrained)
    with federation.grid() as grid:
        ours = strategy()
        querier = LanguageQuerier(ours.collect(grid))
        job = querier.ask(QUESTIONS, receiver="north", allow=("text",))
        result = ours.start(grid, RefineJob(**(job.__dict__ | {"media": ("cache", "text")})))

    # The receiver asks in text, which the querier allows, and says why.
    assert {plan.medium for plan in result.plans} == {"text"}
    assert all("FI320" in plan.reason for plan in result.plans)


def test_expired_job_is_answered_by_nobody(untrained):
    federation = Federation(untrained)
    with federation.grid() as grid:
        ours = strategy(medium="text")
        job = LanguageQuerier(ours.collect(grid)).ask(QUESTIONS, receiver="north", ttl_s=0.01)
        time.sleep(0.05)
        with pytest.raises(QuorumNotMetError, match="FI314"):
            ours.start(grid, job)


def test_job_is_answered_once(untrained):
    federation = Federation(untrained)
    with federation.grid() as grid:
        ours = strategy(medium="text")
        job = LanguageQuerier(ours.collect(grid)).ask(QUESTIONS, receiver="north")
        ours.start(grid, job)
        with pytest.raises(QuorumNotMetError, match="FI313"):
            ours.start(grid, job)


def test_pinned_sites_only(untrained):
    federation = Federation(untrained)
    with federation.grid() as grid:
        cards = strategy().collect(grid)
    with pytest.raises(UntrustedKeyError):
        LanguageQuerier(cards, pins=Pins(sites={"north": "0" * 64}))


# -- documents ---------------------------------------------------------------------------


def test_job_and_answers_travel_as_bytes(untrained):
    _, result, job = run_sealed(Federation(untrained))

    assert RefineJob.from_bytes(job.to_bytes()) == job
    assert RefineAnswer.from_bytes(result.answer.to_bytes()) == result.answer


@pytest.mark.parametrize("document", [RefineJob, RefineAnswer])
def test_bytes_of_something_else_are_refused(document):
    for data in (b"", os.urandom(200), encode(Envelope(kind=Kind.PING)), b"FIEV" + bytes(60)):
        with pytest.raises(ProtocolError):
            document.from_bytes(data)


def test_damaged_job_is_a_protocol_error_and_nothing_else(untrained):
    _, _, job = run_sealed(Federation(untrained))
    data = job.to_bytes()
    for place in range(0, len(data), 7):
        damaged = data[:place] + bytes([data[place] ^ 0x55]) + data[place + 1 :]
        try:
            read = RefineJob.from_bytes(damaged)
        except ProtocolError:
            continue
        assert isinstance(read, RefineJob)
