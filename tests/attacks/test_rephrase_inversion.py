"""Rewriting hides wording where it can, and never what is asked, or that it is the same."""

from __future__ import annotations

import json
import random

import numpy as np
import pytest

from fedinfer_flower.attacks.cache_secrets import fact_secrets
from fedinfer_flower.attacks.rephrase_inversion import (
    link_rewrites,
    rank_originals,
    rephrase_report,
    word_similarity,
)
from fedinfer_flower.errors import InvalidValueError
from fedinfer_flower.language.rephrase import make_rephraser
from fedinfer_flower.refine.examples import FuserExample
from fedinfer_flower.simulation.facts.prompts import FactPrompts
from fedinfer_flower.simulation.facts.world import WORDINGS, FactWorld


class Speaker:
    """All that the template rephraser asks of a model: its way to word a question."""

    def __init__(self, world) -> None:
        self.prompts = FactPrompts(world.words)


@pytest.fixture(scope="module")
def world():
    return FactWorld()


@pytest.fixture(scope="module")
def facts(world):
    return world.facts(world.private[0][:25])


def ways_of(fact) -> list[str]:
    return [fact.question(wording) for wording in range(len(WORDINGS))]


def names_of(question: str) -> list[str]:
    found = fact_secrets(FuserExample(question, "-"))
    return [*found["asked first name"], *found["asked last name"], *found["relation"]]


def reported(world, facts, name: str, **options):
    rng = random.Random(0)  # noqa: S311
    asked = [rng.choice(ways_of(fact)) for fact in facts]
    return rephrase_report(
        make_rephraser(name, Speaker(world)),
        asked,
        [fact.question() for fact in facts],
        wordings=[ways_of(fact) for fact in facts],
        entities=names_of,
        **options,
    )


def value(report, attack: str, style: int = 1) -> float:
    (row,) = (r for r in report.rows if r.attack == attack and r.styles[0] == style)
    return row.recovered.share


def test_names_and_relation_survive_every_rewrite(world, facts):
    report = reported(world, facts, "template")

    assert value(report, "names", 1) == value(report, "names", 2) == 1.0
    # Words stay, their order does not.
    assert value(report, "words") > 0.7
    assert value(report, "fours") < 0.5
    assert report.rewritten > 0.5


def test_what_was_asked_is_found_among_candidates(world, facts):
    report = reported(world, facts, "template")

    # 100 candidates, chance 0.01: two names and a relation tell them apart.
    assert value(report, "question", 1) > 0.98
    assert value(report, "question", 2) > 0.98


def test_rewrites_at_two_sharers_are_linked(world, facts):
    assert value(reported(world, facts, "template"), "link") > 0.98


def test_grammar_hides_which_wording_the_user_typed(world, facts):
    report = reported(world, facts, "template")
    (row,) = (r for r in report.rows if r.attack == "wording" and r.styles == (1,))

    # Every wording has the same rewrite, so a guess among four is all there is.
    assert row.recovered.share == row.recovered.chance == 0.25
    assert not row.recovered.above_chance


def test_question_that_is_not_rewritten_shows_its_wording(world, facts):
    report = reported(world, facts, "none")

    assert value(report, "wording") == 1.0
    assert value(report, "fours") == 1.0
    assert report.rewritten == 0.0


def test_frame_around_a_question_hides_nothing():
    ways = (
        ("Is Ibuprofen safe with Lithium?", "ibuprofen and lithium, safe?"),
        ("Does Ward 7 have a free bed?", "Free bed in ward 7?"),
        ("Can Maria Keller leave?", "May Maria Keller go home?"),
    )
    asked = [way[0] for way in ways]

    report = rephrase_report(make_rephraser("template", None), asked, asked, wordings=ways)

    assert report.rewritten == 1.0
    assert value(report, "fours") == 1.0
    assert value(report, "wording") == 1.0
    assert value(report, "link") == 1.0


def test_candidates_in_other_words_are_still_found(world, facts):
    rewrites = [fact.question(3) for fact in facts]
    candidates = [fact.question(0) for fact in facts]

    found = rank_originals(rewrites, candidates).argmax(axis=1)

    assert float((found == np.arange(len(facts))).mean()) > 0.98


def test_known_rephraser_decides_between_candidates_with_the_same_words():
    candidates = ["Did Ben pay Anna?", "Did Anna pay Ben?"]
    shuffled = make_rephraser("template", None)
    rewrites = shuffled.rephrase([candidates[1]], style=2)

    by_words = rank_originals(rewrites, candidates)
    by_rephraser = rank_originals(
        rewrites, candidates, rewrite=lambda q: shuffled.rephrase(q, style=2)
    )

    assert by_words[0, 0] == pytest.approx(by_words[0, 1])
    assert by_rephraser.argmax() == 1


def test_ties_are_guesses():
    same = ["same words", "same words", "same words", "same words"]

    report = rephrase_report(make_rephraser("none", None), same, same)

    assert value(report, "question") == value(report, "link") == 0.25


def test_rare_words_count_more():
    corpus = ["the city of ann"] * 20

    scores = word_similarity(
        ["the city of ben"], ["the pet of ben", "the city of ann"], corpus=corpus
    )

    assert scores[0, 0] > scores[0, 1]
    assert word_similarity(["a b"], ["b a"])[0, 0] == pytest.approx(1.0)
    assert word_similarity([""], ["a"]).tolist() == [[0.0]]


def test_report_is_plain_values_without_any_question(world, facts):
    report = reported(world, facts, "template")
    plain, table = json.dumps(report.to_dict()), report.markdown()

    assert facts[0].person.last not in plain + table
    assert len(table.splitlines()) == len(report.rows) + 2
    assert {r.succeeded for r in report.results() if r.attack == "rephrase-wording"} == {False}
    assert all(r.succeeded for r in report.results() if r.attack == "rephrase-question")


@pytest.mark.parametrize(
    "wrong",
    [
        {"questions": ["a ?"], "candidates": ["a ?"]},
        {"questions": ["a ?", "b ?"], "candidates": ["a ?"]},
        {"styles": (1,)},
        {"wordings": [["a ?"]]},
        {"wordings": [["x"], ["y"]]},
    ],
)
def test_lists_that_do_not_fit_are_refused(wrong):
    options = {"questions": ["a ?", "b ?"], "candidates": ["a ?", "b ?"]} | wrong
    with pytest.raises(InvalidValueError):
        rephrase_report(make_rephraser("none", None), **options)


def test_nothing_to_compare_is_refused():
    with pytest.raises(InvalidValueError):
        rank_originals([], ["a"])
    with pytest.raises(InvalidValueError):
        link_rewrites(["a"], [])
