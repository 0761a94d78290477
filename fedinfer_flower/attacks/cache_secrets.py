"""What an attacker wants to read from a sharer's cache: words of its prompt, by kind."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from fedinfer_flower.refine.examples import FuserExample

__all__ = ["Secrets", "fact_secrets", "word_secrets"]

Secrets = Callable[["FuserExample"], Mapping[str, tuple[str, ...]]]
"""From an example to kinds of secrets, each with its words; a kind may be empty."""

_WORD: Final = re.compile(r"[^\W_]+")
_STATEMENT: Final = re.compile(r"(\w+) of (\w+) (\w+) is (\w+) \.")
_FACT_QUESTIONS: Final = (
    re.compile(r"Q (?P<relation>\w+) of (?P<first>\w+) (?P<last>\w+) \?"),
    re.compile(r"Q which (?P<relation>\w+) has (?P<first>\w+) (?P<last>\w+) \?"),
    re.compile(r"Q (?P<first>\w+) (?P<last>\w+) : (?P<relation>\w+) \?"),
    re.compile(r"Q tell (?P<relation>\w+) for (?P<first>\w+) (?P<last>\w+) \?"),
)


def word_secrets(example: FuserExample) -> dict[str, tuple[str, ...]]:
    """Return words of any example: what was asked, the answer, and the rest of the document.

    Parameters
    ----------
    example : FuserExample

    Returns
    -------
    secrets : dict
        ``"asked words"``, ``"answer"`` (as a whole), and ``"unasked words"``: those of the
        document that are neither in the question nor in the answer.

    Examples
    --------
    >>> from fedinfer_flower.refine.examples import FuserExample
    >>> word_secrets(FuserExample("Where is Ann?", "Oslo", "Ann is in Oslo. Ben has a cat."))
    {'asked words': ('ann', 'is', 'where'), 'answer': ('oslo',), 'unasked words': ('a', 'ben', 'cat', 'has', 'in')}
    """  # noqa: E501
    asked, answer = _words(example.question), example.answer.casefold().strip()
    rest = _words(example.document) - asked - _words(example.answer)
    return {
        "asked words": tuple(sorted(asked)),
        "answer": (answer,),
        "unasked words": tuple(sorted(rest)),
    }


def fact_secrets(example: FuserExample) -> dict[str, tuple[str, ...]]:
    """Return the secrets of an example in the grammar of the small fact models.

    Parameters
    ----------
    example : FuserExample
        Its document states facts about the person asked for and about others.

    Returns
    -------
    secrets : dict
        ``"asked first name"``, ``"asked last name"``, ``"relation"``, ``"answer"``; and of
        the statements that nobody asked for, ``"unasked last name"`` and ``"unasked value"``.

    Examples
    --------
    >>> from fedinfer_flower.refine.examples import FuserExample
    >>> document = "D pet of kim lot is rex . city of ann bo is oslo ."
    >>> found = fact_secrets(FuserExample("Q city of ann bo ?", "oslo", document))
    >>> found["asked last name"], found["answer"], found["unasked value"]
    (('bo',), ('oslo',), ('rex',))
    """
    matches = [m for rule in _FACT_QUESTIONS if (m := rule.fullmatch(example.question))]
    if not matches:
        return {}
    asked = matches[0].groupdict()
    about = (asked["relation"], asked["first"], asked["last"])
    others = [s for s in _STATEMENT.findall(example.document) if tuple(s[:3]) != about]
    return {
        "asked first name": (asked["first"],),
        "asked last name": (asked["last"],),
        "relation": (asked["relation"],),
        "answer": (example.answer,),
        "unasked last name": tuple(sorted({s[2] for s in others})),
        "unasked value": tuple(sorted({s[3] for s in others})),
    }


def _words(text: str) -> set[str]:
    return {word.casefold() for word in _WORD.findall(text)}
