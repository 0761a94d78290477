"""With the trained small models: help raises accuracy, and keeps what the receiver knew."""

from __future__ import annotations

import pytest

from fedinfer_flower.kv.fuser import FuserSpec
from fedinfer_flower.kv.fuser_bank import FuserBank
from fedinfer_flower.kv.share import ShareSpec
from fedinfer_flower.language.model import LanguageModel
from fedinfer_flower.refine.fuser_training import train_fuser
from fedinfer_flower.refine.training_loop import TrainingOptions
from fedinfer_flower.simulation.facts.checkpoints import NAMES, load
from fedinfer_flower.simulation.facts.fuser_data import fuser_examples

from .conftest import Federation

TASKS = 32
ABSTAINS = "unk"


@pytest.fixture(scope="module")
def trained() -> list[LanguageModel]:
    return [load(name) for name in NAMES]


def facts_of(world, place: int):
    return world.facts(world.private[place])[:TASKS]


def accuracy(federation: Federation, facts, **options) -> float:
    result = federation.ask([fact.question() for fact in facts], **options)
    assert not result.degraded
    answers = result.answers["north"]
    return sum(a == f.value for a, f in zip(answers, facts, strict=True)) / len(facts)


@pytest.mark.parametrize("place", [1, 2])
def test_notes_of_the_one_who_knows_raise_accuracy(trained, world, place):
    federation = Federation(trained, fusers=False)
    facts = facts_of(world, place)

    alone = accuracy(federation, facts, medium="own")
    helped = accuracy(federation, facts, medium="text")

    # Chance is 1 in 12. The receiver abstains on what it does not know, and a note from the
    # one who knows is nearly always right: both bars are several standard errors (0.07) away.
    assert alone <= 0.2
    assert helped >= 0.8


def test_each_site_answers_all_to_all_what_the_others_know(trained, world):
    federation = Federation(trained, fusers=False)
    facts = [fact for place in range(3) for fact in facts_of(world, place)[:8]]

    result = federation.ask([f.question() for f in facts], receiver="all", medium="text")

    for each in result.receivers:
        right = sum(a == f.value for a, f in zip(each.answers, facts, strict=True))
        # Alone each knows a third.
        assert right / len(facts) >= 0.7, each.name


@pytest.mark.slow
def test_a_trained_fusers_cache_raises_accuracy(trained, world):
    north, south = trained[0], trained[1]
    spec = FuserSpec.for_pair("last-token", south.layout, north.layout, ShareSpec())
    examples = fuser_examples(world, sharer=1, receiver=0, documents=300)
    made = train_fuser(north, south, spec, examples, TrainingOptions(steps=200))
    options = {"north": {"fusers": FuserBank({spec.pair: made.fuser})}}
    federation = Federation(trained, fusers=False, options=options)
    facts = facts_of(world, 1)

    alone = accuracy(federation, facts, medium="own")
    helped = accuracy(federation, facts, medium="cache", sharers=["south"])

    # Half of the usual steps. With 32 questions the standard error is at most 0.09.
    assert helped >= alone + 0.5
