"""Test questions of the fact world, and the documents that sites hold about some of them."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Final

from fedinfer_flower.errors import InvalidValueError
from fedinfer_flower.simulation.facts.checkpoints import NAMES
from fedinfer_flower.simulation.facts.fuser_data import trial_examples
from fedinfer_flower.simulation.facts.prompts import FactPrompts
from fedinfer_flower.simulation.facts.world import FactWorld

__all__ = ["MAX_EACH", "DocumentShelf", "MisreadingPrompts", "TrialQuestion", "trial_questions"]

MAX_EACH: Final = 200
_KINDS: Final = ("fact", "doc1", "doc3")
_Asked = tuple[str, str, str]


@dataclass(frozen=True, kw_only=True)
class TrialQuestion:
    """A question with its right answer, and who can know it.

    Parameters
    ----------
    question, answer : str
    kind : str
        ``"fact"`` (the holder's model knows it by heart), ``"doc1"`` or ``"doc3"`` (a document
        of one or three statements at the holder says it), ``"nobody"`` (the right answer is
        to abstain).
    holder : str
        Institution; empty for ``"nobody"``.
    document : str
    """

    question: str = field(repr=False)
    answer: str = field(repr=False)
    kind: str
    holder: str = ""
    document: str = field(default="", repr=False)

    def task(self, receiver: str) -> str | None:
        """Return under which task the question counts for a receiver.

        ``"own"`` is what the receiver knows by heart itself. Documents at the receiver count
        under no task: what is measured is help.

        Examples
        --------
        >>> known = TrialQuestion(question="Q", answer="oslo", kind="fact", holder="llama")
        >>> known.task("llama"), known.task("qwen3")
        ('own', 'fact')
        """
        if self.holder != receiver:
            return self.kind
        return "own" if self.kind == "fact" else None


def trial_questions(
    world: FactWorld, each: int, *, seed: int = 0, holders: Sequence[str] = NAMES
) -> list[TrialQuestion]:
    """Draw test questions: private facts, documents and strangers that no training has seen.

    Parameters
    ----------
    world : FactWorld
    each : int
        Of each kind at each holder, and as many that nobody can answer.
    seed : int
        Of the draw, the documents, and the order.
    holders : sequence of str

    Raises
    ------
    InvalidValueError

    Examples
    --------
    >>> drawn = trial_questions(FactWorld(), 2)
    >>> len(drawn), len({q.question for q in drawn})
    (20, 20)
    """
    if not 1 <= each <= MAX_EACH:
        raise InvalidValueError(f"questions of each kind are in [1, {MAX_EACH}], got {each}")
    rng = random.Random(seed)  # noqa: S311  a draw of test questions, nothing secret
    drawn: list[TrialQuestion] = []
    taken: set[str] = set()
    for place, holder in enumerate(holders):
        number = NAMES.index(holder)
        # Documents are invented anew for each holder and seed.
        examples = trial_examples(
            world,
            sharer=number,
            receiver=number,
            documents=2 * each + 20,
            seed=9_001 + 1_000 * seed + number,
        )
        kinds = (*_KINDS, "nobody") if place == 0 else _KINDS
        for kind in kinds:
            of_kind = [e for e in examples if e.task == kind and e.question not in taken]
            rng.shuffle(of_kind)
            picked = list({e.question: e for e in of_kind}.values())[:each]
            taken |= {e.question for e in picked}
            drawn += [
                TrialQuestion(
                    question=e.question,
                    answer=e.answer,
                    kind=kind,
                    holder="" if kind == "nobody" else holder,
                    document=e.document,
                )
                for e in picked
            ]
    rng.shuffle(drawn)
    return drawn


class DocumentShelf:
    """A site's documents, found by the person and the relation that a question is about.

    Parameters
    ----------
    documents : sequence of (str, str)
        A question, in any wording, and the document that answers it.

    Examples
    --------
    >>> shelf = DocumentShelf([("Q city of kim lot ?", "D city of kim lot is oslo .")])
    >>> shelf("Q tell city for kim lot ?"), shelf("Q job of kim lot ?")
    (['D city of kim lot is oslo .'], [])
    """

    def __init__(self, documents: Sequence[tuple[str, str]]) -> None:
        self._found: dict[_Asked, list[str]] = {}
        for question, document in documents:
            self._found.setdefault(_asked(question), []).append(document)

    def __call__(self, question: str) -> Sequence[str]:
        """Return the documents that bear on a question; none if it cannot be read."""
        try:
            return self._found.get(_asked(question), [])
        except (IndexError, ValueError):
            return []


class MisreadingPrompts(FactPrompts):
    """Prompts of a sharer that takes every question for another one, for a control.

    The other question asks for the same relation, and the sharer knows its answer: what it
    shares is as sure, and as good a cache, as ever. A fuser through which this helps does not
    carry what the sharer knows.

    Parameters
    ----------
    words : collection of str
    others : sequence of (str, str)
        Questions that the sharer can answer; with the document that it takes, or an empty text.
    """

    def __init__(self, words: Sequence[str], others: Sequence[tuple[str, str]]) -> None:
        super().__init__(words)
        self._others: dict[str, list[tuple[str, str]]] = {}
        for question, document in others:
            self._others.setdefault(_asked(question)[0], []).append((question, document))

    def ask(self, question: str, *, documents: Sequence[str] = ()) -> str:  # noqa: ARG002
        """Return the prompt of the other question, with the document that answers it."""
        other, document = self._other(question)
        return super().ask(other, documents=[document] if document else ())

    def help(self, question: str, *, documents: Sequence[str] = ()) -> str:  # noqa: ARG002
        """Return the prompt for a note on the other question."""
        other, document = self._other(question)
        return super().help(other, documents=[document] if document else ())

    def _other(self, question: str) -> tuple[str, str]:
        asked = _asked(question)
        known = [other for other in self._others.get(asked[0], []) if _asked(other[0]) != asked]
        if not known:
            raise InvalidValueError("a control that knows no other question of this relation")
        # By hash: the same in every process, and not in the order of the questions.
        digest = hashlib.sha256(" ".join(asked).encode()).digest()
        return known[int.from_bytes(digest[:8], "big") % len(known)]


def _asked(question: str) -> _Asked:
    """Return relation, first and last name of a question in any of the grammar's wordings."""
    words = question.split()
    if words[1] in ("which", "tell"):
        return words[2], words[4], words[5]
    if words[2] == "of":
        return words[1], words[3], words[4]
    return words[4], words[1], words[2]
