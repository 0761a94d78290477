"""Measure how much of a question a rewrite still shows.

Rewriting changes wording. It hides neither the names in a question nor what is asked of them,
and the check that a rewrite keeps its meaning makes sure of that. These numbers say how much
of the wording is left; none of them is a privacy guarantee.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from difflib import SequenceMatcher
from typing import Final

from fedinfer_flower.errors import InvalidValueError
from fedinfer_flower.language.keeping import names_in

__all__ = ["ORDERS", "Overlap", "mean_overlap", "overlap"]

ORDERS: Final = (1, 2, 3, 4)
"""Lengths of the n-grams, in words."""

_WORD: Final = re.compile(r"\w+")


@dataclass(frozen=True, kw_only=True)
class Overlap:
    """How much of a question is in its rewrite; every number is in [0, 1].

    Parameters
    ----------
    ngrams : tuple of float
        For n of `ORDERS`: share of the question's distinct n-grams of words that the rewrite
        has too. 0 where the question is shorter than n.
    substring : float
        Longest run of characters that both share, as a share of the question's length; case,
        punctuation and spacing are normalised.
    entities : float
        Share of the question's names and numbers that the rewrite has. It is near 1 by
        intent: a rewrite that loses one is refused.

    Examples
    --------
    >>> overlap("Where was Ada born?", "In which place was Ada born?").entities
    1.0
    """

    ngrams: tuple[float, ...]
    substring: float
    entities: float


def overlap(question: str, rewritten: str, *, entities: Iterable[str] | None = None) -> Overlap:
    """Measure one rewrite.

    Parameters
    ----------
    question, rewritten : str
    entities : iterable of str, optional
        Names and numbers of the question; default those that `names_in` and digits show. Give
        them where names have no capitals.
    """
    old, new = _words(question), _words(rewritten)
    shown = set(new)
    if entities is None:
        entities = [*names_in(question), *re.findall(r"\d+", question)]
    wanted = {word for entity in entities for word in _words(entity)}
    a, b = " ".join(old), " ".join(new)
    match = SequenceMatcher(None, a, b, autojunk=False).find_longest_match()
    return Overlap(
        ngrams=tuple(_share(_ngrams(old, n), _ngrams(new, n)) for n in ORDERS),
        substring=match.size / len(a) if a else 0.0,
        entities=_share(wanted, shown) if wanted else 1.0,
    )


def mean_overlap(measured: Iterable[Overlap]) -> Overlap:
    """Return the mean of several measurements.

    Raises
    ------
    InvalidValueError
        If there are none.

    Examples
    --------
    >>> same, other = overlap("a b", "a b"), overlap("a b", "c d")
    >>> mean_overlap([same, other]).ngrams
    (0.5, 0.5, 0.0, 0.0)
    """
    rows = list(measured)
    if not rows:
        raise InvalidValueError("a mean over no measurements")
    n = len(rows)
    columns = zip(*(row.ngrams for row in rows), strict=True)
    return Overlap(
        ngrams=tuple(sum(column) / n for column in columns),
        substring=sum(row.substring for row in rows) / n,
        entities=sum(row.entities for row in rows) / n,
    )


def _words(text: str) -> list[str]:
    return _WORD.findall(text.casefold())


def _ngrams(words: list[str], n: int) -> set[tuple[str, ...]]:
    return {tuple(words[i : i + n]) for i in range(len(words) - n + 1)}


def _share(wanted: Collection[object], there: Collection[object]) -> float:
    return sum(item in there for item in wanted) / len(wanted) if wanted else 0.0
