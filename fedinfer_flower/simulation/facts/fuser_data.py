"""Examples of the fact world: to train fusers and gates, and to test what they learnt.

Everything that fusers and gates are trained on is public in the world; test people and test
values appear in neither. Models are numbered as in `fedinfer_flower.simulation.facts.families`.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from fedinfer_flower.simulation.facts.world import Fact, FactWorld, Person

if TYPE_CHECKING:
    from fedinfer_flower.refine.examples import FuserExample

__all__ = ["HeldExample", "fuser_examples", "gate_examples", "trial_examples"]

_STRANGERS_FUSER, _STRANGERS_GATE, _STRANGERS_TEST = 150, 60, 60
"""People whom nobody knows and no model ever saw: three parts, one after the other."""


@dataclass(frozen=True)
class HeldExample:
    """An example, and which of several sharers can help with it.

    Parameters
    ----------
    example : FuserExample
        Its document, if any, is at the holder alone.
    holder : int, optional
        Index among the sharers; None if none of them can help.
    """

    example: FuserExample
    holder: int | None


def fuser_examples(
    world: FactWorld, *, sharer: int, receiver: int, documents: int = 2000, seed: int = 0
) -> list[FuserExample]:
    """Return what the fuser of one ordered pair is trained on.

    Parameters
    ----------
    world : FactWorld
    sharer, receiver : int
        Numbers of the models.
    documents : int
        Documents of one, two and three statements, together.
    seed : int

    Returns
    -------
    examples : list of FuserExample
        Tasks ``doc1``, ``doc2``, ``doc3`` (the sharer reads the answer), ``fact`` (the sharer
        knows it), ``own`` (the receiver knows it) and ``nobody`` (the answer is to abstain).

    Examples
    --------
    >>> every = fuser_examples(FactWorld(), sharer=1, receiver=0, documents=30)
    >>> sorted({e.task for e in every})
    ['doc1', 'doc2', 'doc3', 'fact', 'nobody', 'own']
    """
    everyone = [p for group in (*world.fuser_people, *world.gate_people) for p in group]
    out = _documents(
        world, [*everyone, *world.strangers_seen[:1500]], (1, 2, 3), documents // 3, seed
    )
    out += _facts(world.facts(world.fuser_people[sharer]), "fact")
    out += _facts(world.facts(world.fuser_people[receiver]), "own")
    strangers = world.strangers_new[:_STRANGERS_FUSER]
    return out + _facts(world.unanswerable(strangers), "nobody")


def gate_examples(
    world: FactWorld, *, receiver: int, sharers: Sequence[int], documents: int = 100, seed: int = 1
) -> list[HeldExample]:
    """Return what the gate of one receiver is trained on; no fuser has seen any of it.

    Parameters
    ----------
    world : FactWorld
    receiver : int
    sharers : sequence of int
    documents : int
        Documents of one to three statements at each sharer.
    seed : int

    Returns
    -------
    examples : list of HeldExample
        Tasks as in `fuser_examples`.
    """
    out: list[HeldExample] = []
    for place, sharer in enumerate(sharers):
        held = _facts(world.facts(world.gate_people[sharer]), "fact")
        people = world.strangers_seen[1500:]
        held += _documents(world, people, (1, 2, 3), documents // 3, seed + 1000 * (place + 1))
        out += [HeldExample(example, place) for example in held]
    unheld = _facts(world.facts(world.gate_people[receiver]), "own")
    first = _STRANGERS_FUSER
    strangers = world.strangers_new[first : first + _STRANGERS_GATE]
    unheld += _facts(world.unanswerable(strangers), "nobody")
    return out + [HeldExample(example, None) for example in unheld]


def trial_examples(
    world: FactWorld, *, sharer: int, receiver: int, documents: int = 300, seed: int = 99
) -> list[FuserExample]:
    """Return what a fuser is tested on: private people, invented values, unseen strangers.

    Parameters
    ----------
    world : FactWorld
    sharer, receiver : int
    documents : int
        Of one statement, and as many of three.
    seed : int

    Returns
    -------
    examples : list of FuserExample
        Tasks ``own`` and ``fact`` (240 each), ``doc1``, ``doc3`` and ``nobody`` (240).
    """
    first = _STRANGERS_FUSER + _STRANGERS_GATE
    strangers = world.strangers_new[first:]
    out = _facts(world.facts(world.private[receiver]), "own")
    out += _facts(world.facts(world.private[sharer]), "fact")
    out += _documents(world, strangers[_STRANGERS_TEST:], (1, 3), documents, seed)
    return out + _facts(world.unanswerable(strangers[:_STRANGERS_TEST]), "nobody")


def _facts(facts: Sequence[Fact], task: str) -> list[FuserExample]:
    from fedinfer_flower.refine.examples import FuserExample

    return [FuserExample(fact.question(), fact.value, task=task) for fact in facts]


def _documents(
    world: FactWorld, people: Sequence[Person], sizes: Sequence[int], each: int, seed: int
) -> list[FuserExample]:
    from fedinfer_flower.refine.examples import FuserExample

    rng = random.Random(seed)  # noqa: S311
    return [
        FuserExample(fact.question(), fact.value, document=document, task=f"doc{size}")
        for size in sizes
        for fact, document in world.documents(
            each, people=people, statements=size, seed=rng.randrange(1 << 30)
        )
    ]
