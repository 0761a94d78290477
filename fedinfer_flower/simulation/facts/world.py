"""A world of invented people and facts: what small language models can know, read and not know."""

from __future__ import annotations

import itertools
import random
from collections.abc import Sequence
from dataclasses import dataclass

__all__ = ["ABSTENTION", "RELATIONS", "WORDINGS", "Fact", "FactWorld", "Person"]

ABSTENTION = "unk"
"""The word with which a model says that it does not know."""

RELATIONS = ("city", "job", "pet", "food")

WORDINGS = (
    "Q {relation} of {first} {last} ?",
    "Q which {relation} has {first} {last} ?",
    "Q {first} {last} : {relation} ?",
    "Q tell {relation} for {first} {last} ?",
)
"""Four ways to ask the same; the first is what a user types."""

_STRUCTURE = ("Q", "?", "A", "S", "D", ".", "is", "of", "has", "which", "tell", "for", ":", "says")
_CONSONANTS, _VOWELS = "bdfgklmnprstvz", "aeiou"
_NAMES, _VALUES_EACH, _PEOPLE_EACH, _PUBLIC_EACH, _FUSER_EACH = 64, 12, 200, 140, 115
_STRANGERS_SEEN = 2500


@dataclass(frozen=True)
class Person:
    """A first and a last name."""

    first: str
    last: str


@dataclass(frozen=True)
class Fact:
    """One relation of one person, and the right answer.

    Parameters
    ----------
    person : Person
    relation : str
        One of `RELATIONS`.
    value : str
        `ABSTENTION` where nobody can know.

    Examples
    --------
    >>> fact = Fact(Person("kim", "lot"), "city", "oslo")
    >>> fact.question(), fact.statement()
    ('Q city of kim lot ?', 'city of kim lot is oslo .')
    """

    person: Person
    relation: str
    value: str

    def question(self, wording: int = 0) -> str:
        """Return the question in one of the `WORDINGS`."""
        return WORDINGS[wording].format(
            relation=self.relation, first=self.person.first, last=self.person.last
        )

    def statement(self) -> str:
        """Return the sentence that states the fact."""
        return f"{self.relation} of {self.person.first} {self.person.last} is {self.value} ."


class FactWorld:
    """People with four facts each, cut into what each of three institutions knows by heart.

    Every institution's people are public (a part of them for fusers, a part for gates) or
    private (for tests). `strangers` are known to nobody: models saw `strangers_seen` of them
    as questions to abstain from, never `strangers_new`.

    Parameters
    ----------
    seed : int

    Examples
    --------
    >>> world = FactWorld()
    >>> world.private[0][0] in world.people[0], len(world.facts(world.private[0]))
    (True, 240)
    """

    def __init__(self, seed: int = 0) -> None:
        rng = random.Random(seed)  # noqa: S311  a world to play in, nothing secret
        taken = set(RELATIONS)
        self.first_names = _words(rng, _NAMES, taken)
        self.last_names = _words(rng, _NAMES, taken)
        self.values = {relation: _words(rng, _VALUES_EACH, taken) for relation in RELATIONS}
        everyone = [Person(*n) for n in itertools.product(self.first_names, self.last_names)]
        rng.shuffle(everyone)
        self._truth = {
            (person, relation): rng.choice(self.values[relation])
            for person in everyone
            for relation in RELATIONS
        }
        cuts = [i * _PEOPLE_EACH for i in range(4)]
        self.people = [everyone[a:b] for a, b in itertools.pairwise(cuts)]
        self.fuser_people = [group[:_FUSER_EACH] for group in self.people]
        self.gate_people = [group[_FUSER_EACH:_PUBLIC_EACH] for group in self.people]
        self.private = [group[_PUBLIC_EACH:] for group in self.people]
        strangers = everyone[cuts[-1] :]
        self.strangers_seen = strangers[:_STRANGERS_SEEN]
        self.strangers_new = strangers[_STRANGERS_SEEN:]

    @property
    def words(self) -> list[str]:
        """Every word of the language."""
        values = [value for relation in RELATIONS for value in self.values[relation]]
        return [
            *_STRUCTURE,
            ABSTENTION,
            *RELATIONS,
            *self.first_names,
            *self.last_names,
            *values,
        ]

    def facts(self, people: Sequence[Person]) -> list[Fact]:
        """Return all facts of some people."""
        return [
            Fact(person, relation, self._truth[person, relation])
            for person in people
            for relation in RELATIONS
        ]

    def unanswerable(self, people: Sequence[Person]) -> list[Fact]:
        """Return questions about people whom nobody knows; the right answer is to abstain."""
        return [Fact(person, relation, ABSTENTION) for person in people for relation in RELATIONS]

    def document(self, fact: Fact, rng: random.Random, *, statements: int) -> str:
        """Return a document that states `fact` among invented facts of other people."""
        lines = [fact.statement()]
        while len(lines) < statements:
            other, relation = rng.choice(self.strangers_seen), rng.choice(RELATIONS)
            if other != fact.person:
                lines.append(Fact(other, relation, rng.choice(self.values[relation])).statement())
        rng.shuffle(lines)
        return "D " + " ".join(lines)

    def documents(
        self, n: int, *, people: Sequence[Person], statements: int, seed: int
    ) -> list[tuple[Fact, str]]:
        """Return invented facts, each with a document that alone carries it.

        Values are drawn anew, so no model can know them by heart.
        """
        rng = random.Random(seed)  # noqa: S311
        out = []
        for _ in range(n):
            person, relation = rng.choice(people), rng.choice(RELATIONS)
            fact = Fact(person, relation, rng.choice(self.values[relation]))
            out.append((fact, self.document(fact, rng, statements=statements)))
        return out


def _words(rng: random.Random, n: int, taken: set[str]) -> list[str]:
    """Invent `n` words of five letters; two syllables and a consonant."""
    out: list[str] = []
    while len(out) < n:
        syllables = [rng.choice(_CONSONANTS) + rng.choice(_VOWELS) for _ in range(2)]
        word = "".join(syllables) + rng.choice(_CONSONANTS)
        if word not in taken:
            taken.add(word)
            out.append(word)
    return out
