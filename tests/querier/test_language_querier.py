"""What a language querier seals, and what it believes of the answers."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

from fedinfer_flower.errors import (
    BindingError,
    ConfigError,
    EnvelopeError,
    InvalidValueError,
    ProtocolError,
    SealError,
    SignatureError,
    UnknownNameError,
    UntrustedKeyError,
)
from fedinfer_flower.querier.language_querier import LanguageQuerier
from fedinfer_flower.wire.identity import Identity
from fedinfer_flower.wire.language_card import LanguageCard
from fedinfer_flower.wire.pins import Pins
from fedinfer_flower.wire.refine_answers import Answers, pack_answers
from fedinfer_flower.wire.refine_asked import open_asked
from fedinfer_flower.wire.refine_job import RefineAnswer, RefinedPart, RefineJob

RUN = 7
SITES = {name: Identity.generate() for name in ("north", "south", "west")}
LAYOUT = json.dumps({"model_digest": "0" * 64})
QUESTIONS = ["why so ?", "what then ?", "who else ?"]


def card(name: str, **changes) -> LanguageCard:
    fields = {"run_id": RUN, "name": name, "layout": LAYOUT, "media": ("text",)} | changes
    return LanguageCard(**fields).signed(SITES[name])


def cards() -> list[LanguageCard]:
    return [card(name) for name in SITES]


def name_of(key_id: str) -> str:
    return next(name for name, site in SITES.items() if site.key_id == key_id)


def answered(job: RefineJob, querier: Identity, **changes) -> RefineAnswer:
    """Answer every batch as its receiver would."""
    parts = []
    for batch in job.batches:
        site = SITES[name_of(batch.receiver)]
        asked = open_asked(batch.asked, identity=site, run_id=RUN, query_id=batch.query_id)
        texts = tuple(f"{name_of(batch.receiver)}: {q}" for q in asked.questions)
        body = pack_answers(
            Answers(texts=texts),
            identity=site,
            run_id=RUN,
            query_id=batch.query_id,
            round_number=1,
            querier=querier.public,
        )
        parts.append(
            RefinedPart(
                query_id=batch.query_id,
                receiver=batch.receiver,
                round=1,
                n_questions=batch.n_questions,
                answers=body,
            )
        )
    answer = RefineAnswer(job_id=job.job_id, run_id=RUN, parts=tuple(parts))
    return replace(answer, **changes)


def test_every_receiver_gets_the_questions_sealed_with_the_consent():
    querier = LanguageQuerier(cards())
    job = querier.ask(QUESTIONS, allow=("text",), rounds=2, batch_size=2)

    assert job.n_questions == 3
    assert len(job.batches) == 6
    for batch in job.batches:
        site = SITES[name_of(batch.receiver)]
        asked = open_asked(batch.asked, identity=site, run_id=RUN, query_id=batch.query_id)
        assert asked.questions == tuple(QUESTIONS[2 * batch.number :][: batch.n_questions])
        assert asked.consent.querier == querier.identity.public
        assert asked.consent.allow == ("text",)
        assert asked.consent.max_rounds == 2
        assert asked.consent.expires_at == job.expires_at
        assert set(asked.consent.sharers) == {s.key_id for s in SITES.values()} - {batch.receiver}
        other = next(s for s in SITES.values() if s.key_id != batch.receiver)
        with pytest.raises(SealError):
            open_asked(batch.asked, identity=other, run_id=RUN, query_id=batch.query_id)


def test_receivers_of_a_batch_share_its_name():
    job = LanguageQuerier(cards()).ask(QUESTIONS)
    names = {
        open_asked(
            b.asked, identity=SITES[name_of(b.receiver)], run_id=RUN, query_id=b.query_id
        ).consent.batch_id
        for b in job.batches
    }
    assert len(names) == 1
    assert len({b.query_id for b in job.batches}) == 3


def test_answers_open_in_the_order_of_the_questions():
    querier = LanguageQuerier(cards())
    job = querier.ask(QUESTIONS, receiver=["south", "north"], batch_size=2)
    answer = answered(job, querier.identity)
    shuffled = replace(answer, parts=answer.parts[::-1])

    opened = querier.open(shuffled.to_bytes())

    assert opened["north"].texts == tuple(f"north: {q}" for q in QUESTIONS)
    assert opened["south"].texts == tuple(f"south: {q}" for q in QUESTIONS)


def test_another_object_with_the_same_keys_opens_with_the_job():
    querier = LanguageQuerier(cards())
    job = querier.ask(QUESTIONS, receiver="north")
    answer = answered(job, querier.identity)

    again = LanguageQuerier(cards(), identity=querier.identity)
    with pytest.raises(ConfigError, match="another object"):
        again.open(answer)
    assert again.open(answer, job=job.to_bytes()) == querier.open(answer)


def test_missing_answers_are_none():
    querier = LanguageQuerier(cards())
    job = querier.ask(QUESTIONS, receiver=["north", "south"], batch_size=2)
    answer = answered(job, querier.identity)

    opened = querier.open(replace(answer, parts=answer.parts[:1]))

    assert opened["north"].texts == ("north: why so ?", "north: what then ?", None)
    assert opened["south"].texts == (None, None, None)


HOSTILE = {
    "altered": (lambda p, _: replace(p, answers=p.answers[:-1] + b"x"), SealError),
    "of another round": (lambda p, _: replace(p, round=2), BindingError),
    "of another receiver": (lambda p, _: replace(p, receiver="0" * 64), BindingError),
    "of another batch": (lambda p, _: replace(p, query_id="other"), BindingError),
    "of more questions": (lambda p, _: replace(p, n_questions=9), BindingError),
}


@pytest.mark.parametrize(("change", "error"), HOSTILE.values(), ids=HOSTILE)
def test_answers_that_are_not_the_receivers_are_refused(change, error):
    querier = LanguageQuerier(cards())
    job = querier.ask(QUESTIONS, receiver="north")
    answer = answered(job, querier.identity)
    parts = (change(answer.parts[0], job), *answer.parts[1:])

    with pytest.raises(error):
        querier.open(replace(answer, parts=parts))


def test_answers_that_a_coordinator_made_up_are_refused():
    querier = LanguageQuerier(cards())
    job = querier.ask(QUESTIONS, receiver="north")
    batch = job.batches[0]
    forged = pack_answers(
        Answers(texts=("lie",) * 3),
        identity=SITES["south"],
        run_id=RUN,
        query_id=batch.query_id,
        round_number=1,
        querier=querier.identity.public,
    )
    answer = answered(job, querier.identity)
    lie = replace(answer, parts=(replace(answer.parts[0], answers=forged),))

    with pytest.raises((SealError, SignatureError)):
        querier.open(lie)


def test_batch_that_is_answered_twice_is_refused():
    querier = LanguageQuerier(cards())
    job = querier.ask(QUESTIONS, receiver="north")
    answer = answered(job, querier.identity)

    with pytest.raises(BindingError, match="does not have"):
        querier.open(replace(answer, parts=answer.parts * 2))


def test_answers_of_another_job_run_or_querier_are_refused():
    querier = LanguageQuerier(cards())
    job = querier.ask(QUESTIONS, receiver="north")
    answer = answered(job, querier.identity)

    for wrong in (replace(answer, run_id=8), replace(answer, job_id="0")):
        with pytest.raises(BindingError):
            querier.open(wrong, job=job)
    with pytest.raises(BindingError, match="another querier"):
        LanguageQuerier(cards()).open(answer, job=job)


REFUSED = {
    "one text": (("why ?",), {}, "list of texts"),
    "no question": (([],), {}, "list of texts"),
    "unknown receiver": ((QUESTIONS,), {"receiver": "east"}, "no site is called"),
    "unknown sharer": ((QUESTIONS,), {"sharers": ["east"]}, "no site is called"),
    "a name twice": ((QUESTIONS,), {"sharers": ["north", "north"]}, "none twice"),
    "unknown medium": ((QUESTIONS,), {"allow": ("sound",)}, "allow is a list"),
    "medium as text": ((QUESTIONS,), {"allow": "text"}, "allow is a list"),
    "no round": ((QUESTIONS,), {"rounds": 0}, "rounds in"),
    "no time": ((QUESTIONS,), {"ttl_s": 0}, "ttl_s positive"),
}


@pytest.mark.parametrize(("args", "options", "text"), REFUSED.values(), ids=REFUSED)
def test_wrong_question_is_refused_before_anything_is_sealed(args, options, text):
    with pytest.raises(ConfigError, match=text):
        LanguageQuerier(cards()).ask(*args, **options)


def test_cards_are_checked():
    with pytest.raises(InvalidValueError, match="of one run"):
        LanguageQuerier([])
    with pytest.raises(InvalidValueError, match="of one run"):
        LanguageQuerier([card("north"), card("south", run_id=8)])
    with pytest.raises(BindingError, match="same key"):
        LanguageQuerier([card("north"), card("north")])
    with pytest.raises(SignatureError):
        LanguageQuerier([replace(card("north"), name="other")])
    with pytest.raises(UntrustedKeyError):
        LanguageQuerier(cards(), pins=Pins(sites={"north": SITES["north"].key_id}))
    with pytest.raises(ProtocolError):
        LanguageQuerier([b"no card"])
    assert LanguageQuerier([c.to_bytes() for c in cards()]).names == tuple(SITES)


def test_pure_receivers_and_pure_sharers_keep_their_roles():
    querier = LanguageQuerier([card("north"), card("south", answers=False)])

    assert querier.ask(QUESTIONS).receivers == (SITES["north"].key_id,)
    with pytest.raises(UnknownNameError):
        querier.ask(QUESTIONS, receiver="west")


def test_full_caches_include_caches():
    job = LanguageQuerier(cards()).ask(QUESTIONS, allow=("full-cache",))

    assert set(job.media) == {"cache", "full-cache"}


def test_job_without_consent_names_no_sharer():
    assert LanguageQuerier(cards()).ask(QUESTIONS, allow=()).sharers == ()


def test_repr_and_job_show_no_question():
    querier = LanguageQuerier(cards())
    job = querier.ask(["canary ?"])

    assert "canary" not in repr(querier) + repr(job)
    assert b"canary" not in job.to_bytes()
    with pytest.raises(EnvelopeError):
        RefineJob.from_bytes(RefineAnswer(job_id="a", run_id=RUN, parts=()).to_bytes())
