"""What a way to mix answers is: which exchanges it needs, and what it makes of them.

Axes: J sites or samples, B questions.
"""

from __future__ import annotations

import random
import re
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Final

from fedinfer_flower.errors import InvalidValueError, ShapeError
from fedinfer_flower.registry import Registry

__all__ = [
    "ABSTENTIONS",
    "ANSWER_MIXINGS",
    "AnswerMixing",
    "Exchange",
    "Mixed",
    "normalised",
    "vote",
]

ABSTENTIONS: Final = ("i don't know", "i do not know", "unknown", "unk")
"""Answers that say nothing, in the form of `normalised`; an empty one says nothing either."""

_EDGES: Final = " \t\r\n.,;:!?\"'`()[]*"

Answers = Mapping[str, Sequence[str | None]]
"""Answers by site, in the order of the questions; None where there is none."""


@dataclass(frozen=True, kw_only=True)
class Exchange:
    """One run of `FedRefine` that a mixing needs.

    Parameters
    ----------
    settings : mapping
        Arguments of `FedRefine` that the mixing fixes.
    """

    settings: Mapping[str, Any]


@dataclass(frozen=True, kw_only=True)
class Mixed:
    """Mixed answers, in the order of the questions.

    Parameters
    ----------
    answers : tuple of str or None
        None where nobody answered.
    shares : tuple of float
        Part of the votes that were cast for the answer; 1.0 where nobody else was heard, 0.0
        where all abstained or nobody answered.
    """

    answers: tuple[str | None, ...] = field(repr=False)
    shares: tuple[float, ...]


class AnswerMixing(ABC):
    """Base of all ways to mix answers.

    Attributes
    ----------
    name : str
        Registered name.
    """

    name: ClassVar[str] = ""

    @abstractmethod
    def exchanges(self, sites: Sequence[str] | None) -> tuple[Exchange, ...]:
        """Return what to ask, of all sites where None are named."""

    @abstractmethod
    def mix(self, answers: Sequence[Answers]) -> Mixed:
        """Return one answer a question from the answers of each exchange."""


ANSWER_MIXINGS: Registry[AnswerMixing] = Registry(
    kind="answer mixing",
    package="fedinfer_flower.strategies.answer_mixing",
    group="fedinfer_flower.answer_mixings",
)
"""All ways to mix answers by name."""


def normalised(answer: str) -> str:
    """Return an answer as it is compared: case, spaces and marks at its ends do not count.

    Examples
    --------
    >>> normalised("  The  Nile. ")
    'the nile'
    """
    return re.sub(r"\s+", " ", answer).strip(_EDGES).casefold()


def vote(
    answers: Sequence[Sequence[str | None]],
    *,
    abstentions: Sequence[str] = ABSTENTIONS,
    tie_seed: int = 0,
) -> Mixed:
    """Return the answer that most voters gave, for each question.

    Abstentions do not vote; where all who answered abstain, the answer is their abstention.
    Ties are broken by lot, from `tie_seed` and the question's number alone. What is returned
    is the winner's answer as most of its voters wrote it.

    Parameters
    ----------
    answers : sequence of J sequences of B str or None
        From each voter.
    abstentions : sequence of str
    tie_seed : int

    Raises
    ------
    ShapeError
        If voters answered different numbers of questions.

    Examples
    --------
    >>> vote([["Nile"], ["nile."], ["Congo"], ["unknown"], [None]])
    Mixed(shares=(0.6666666666666666,))
    """
    if not answers or len({len(column) for column in answers}) != 1:
        raise ShapeError("voters answered different numbers of questions, or there are none")
    silent = {normalised(text) for text in (*abstentions, "")}
    found = [
        _winner([a for a in row if a is not None], silent, lot=f"{tie_seed}|{place}")
        for place, row in enumerate(zip(*answers, strict=True))
    ]
    return Mixed(answers=tuple(a for a, _ in found), shares=tuple(s for _, s in found))


def _winner(given: Sequence[str], silent: set[str], *, lot: str) -> tuple[str | None, float]:
    votes = Counter(key for answer in given if (key := normalised(answer)) not in silent)
    if not votes:
        return (Counter(given).most_common(1)[0][0] if given else None), 0.0
    most = max(votes.values())
    tied = sorted(key for key, n in votes.items() if n == most)
    winner = random.Random(lot).choice(tied)  # noqa: S311  a lot that can be drawn again
    written = Counter(answer for answer in given if normalised(answer) == winner)
    return written.most_common(1)[0][0], most / votes.total()


def require_name(name: str, what: str) -> None:
    """Require the name of one site.

    Raises
    ------
    InvalidValueError
    """
    if not isinstance(name, str) or not name or name == "all":
        raise InvalidValueError(f"{what} is the name of one site")
