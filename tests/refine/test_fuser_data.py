"""Examples of the fact world: what is public, and what tests keep apart."""

from __future__ import annotations

from collections import Counter

from fedinfer_flower.simulation.facts.fuser_data import (
    fuser_examples,
    gate_examples,
    trial_examples,
)
from fedinfer_flower.simulation.facts.world import ABSTENTION, FactWorld


def test_questions_of_training_gate_and_trial_never_meet(world: FactWorld) -> None:
    trained = {e.question for e in fuser_examples(world, sharer=1, receiver=0)}
    gated = {h.example.question for h in gate_examples(world, receiver=0, sharers=[1, 2])}
    tried = {e.question for e in trial_examples(world, sharer=1, receiver=0)}

    assert not trained & tried
    assert not gated & tried
    own_facts = {e.question for e in fuser_examples(world, sharer=1, receiver=0, documents=3)}
    assert not own_facts & {
        h.example.question
        for h in gate_examples(world, receiver=0, sharers=[1, 2])
        if not h.example.document
    }


def test_tasks_have_the_answer_that_their_name_says(world: FactWorld) -> None:
    known = [{f.question(): f.value for f in world.facts(people)} for people in world.people]

    for e in trial_examples(world, sharer=2, receiver=1):
        if e.task == "own":
            assert known[1][e.question] == e.answer
        elif e.task == "fact":
            assert known[2][e.question] == e.answer
            assert e.question not in known[1]
        elif e.task == "nobody":
            assert e.answer == ABSTENTION
            assert not any(e.question in facts for facts in known)
        else:
            assert e.document.count(" .") == int(e.task.removeprefix("doc"))
            assert e.document.count(f"is {e.answer} .") >= 1


def test_trial_has_the_sizes_that_figures_are_quoted_for(world: FactWorld) -> None:
    counts = Counter(e.task for e in trial_examples(world, sharer=0, receiver=2))

    assert counts == {"own": 240, "fact": 240, "nobody": 240, "doc1": 300, "doc3": 300}


def test_gate_examples_name_who_can_help(world: FactWorld) -> None:
    held = gate_examples(world, receiver=0, sharers=[1, 2], documents=30)

    holders = {(h.example.task, h.holder) for h in held}
    assert {holder for task, holder in holders if task == "fact"} == {0, 1}
    assert {holder for task, holder in holders if task in ("own", "nobody")} == {None}
    assert all(h.holder is not None for h in held if h.example.document)


def test_seed_gives_the_same_examples(world: FactWorld) -> None:
    first, again, other = (
        fuser_examples(world, sharer=1, receiver=0, documents=30, seed=seed) for seed in (5, 5, 6)
    )

    assert first == again
    assert first != other
