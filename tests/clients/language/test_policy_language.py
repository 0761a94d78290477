"""A language model under a site policy: what it does not allow does not leave."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from fedinfer_flower.clients import policy_gate
from fedinfer_flower.clients.policy import SitePolicy
from fedinfer_flower.errors import MediumRefusedError, PolicyRefusedError, SizeLimitError


@pytest.fixture
def under_policy(federation, models, tmp_path: Path):
    """Return a function that makes a site with a policy."""

    def make(name: str, *, language: dict, answers: dict, limits: dict | None = None):
        policy = SitePolicy.from_mapping(
            {
                "site": {"name": name, "home": name},
                "answers": {"require-seal": False, "anyone": True, **answers},
                "language": {"loader": "a:b", "share-speeds": False, **language},
                "limits": limits or {},
            },
            folder=tmp_path,
        )
        site = federation.site(models[name], site_policy=policy, policy=None)
        site.log = tmp_path / name / "audit.jsonl"
        return site

    yield make
    policy_gate._gates.cache_clear()


EVERY = ["introduce", "rephrase", "share-cache", "generate", "refine", "candidates"]


def entries(site) -> list[dict]:
    return [json.loads(line) for line in site.log.read_text().splitlines()]


def test_notes_leave_and_caches_do_not(under_policy, federation, make_ask, questions, refusal):
    asks = {"actions": EVERY, "kinds": ["text"]}
    receiver = under_policy("qwen3", language={}, answers=asks)
    sharer = under_policy("llama", language={"text": True}, answers=asks)
    ask = make_ask(receiver, [sharer], questions, medium="text")
    _, answers = ask.whole()
    assert len(answers.texts) == len(questions)
    words = receiver.log.read_text() + sharer.log.read_text()
    assert not any(question in words for question in questions)
    assert not any(text.strip() and text in words for text in answers.texts)
    last = entries(sharer)[-1]
    assert last["event"] == "answered"
    assert (last["facts"]["action"], last["facts"]["medium"]) == ("generate", "text")
    assert last["facts"]["n_rows"] == len(questions)


def test_medium_that_is_off_is_refused_with_its_rule(under_policy, refusal):
    answers = {"actions": EVERY, "kinds": ["text"]}
    site = under_policy("llama", language={"text": True}, answers=answers)
    assert site.card.media == ("text",)
    # What a share asks first: `language_answering.share`.
    error = refusal(lambda: site.mod._policy.require_medium("cache"), MediumRefusedError)
    assert "[language] cache" in error.hint


def test_verb_that_is_not_listed_is_refused(under_policy, make_ask, questions, refusal):
    site = under_policy("qwen3", language={}, answers={"actions": ["introduce"], "kinds": ["text"]})
    ask = make_ask(site, [], questions, allow=())
    error = refusal(lambda: ask.refined(asked=ask.asked()), PolicyRefusedError)
    assert "[answers] actions" in error.message
    assert not any(question in str(error) for question in questions)


def test_questions_are_counted_once_for_all_steps_of_an_answer(
    under_policy, make_ask, questions, refusal
):
    limits = {"rows-per-day": len(questions) + 1}
    site = under_policy(
        "qwen3", language={}, answers={"actions": EVERY, "kinds": ["text"]}, limits=limits
    )
    first = make_ask(site, [], questions, allow=())
    first.whole()
    second = make_ask(site, [], questions, allow=())
    error = refusal(second.rephrased, PolicyRefusedError)
    assert "[limits] rows-per-day" in error.message
    assert "1 are left" in error.message
    assert entries(site)[-1]["facts"]["rule_name"] == "[limits] rows-per-day"


def test_more_questions_than_the_policy_reads_are_refused(
    under_policy, make_ask, questions, refusal
):
    site = under_policy(
        "qwen3",
        language={},
        answers={"actions": EVERY, "kinds": ["text"]},
        limits={"rows-per-query": len(questions) - 1},
    )
    error = refusal(make_ask(site, [], questions, allow=()).rephrased, SizeLimitError)
    assert "[limits] rows-per-query" in error.message
