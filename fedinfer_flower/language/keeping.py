"""Check that a question in other words still asks the same, as far as words can show it.

A rewrite is compared with the question for what an answer depends on: names, numbers, quoted
phrases, answer options, negation, and the words that carry the content. The check reads
surfaces. It catches a name that was dropped or a number that was changed; it does not catch
two names that changed places.
"""

from __future__ import annotations

import re
from collections.abc import Collection
from dataclasses import dataclass, field
from typing import Final

from fedinfer_flower.errors import InvalidValueError

__all__ = ["Keeping", "keeps", "names_in"]

_WORD: Final = re.compile(r"[^\W_](?:[\w'\u2019.-]*[^\W_])?")
_NUMBER: Final = re.compile(r"\d+(?:[.,:/]\d+)*")
# An opening mark ends the search for a closing one: time stays linear in the text.
_QUOTED: Final = re.compile(
    '"([^"\n]+)"|\u201c([^\u201c\u201d\n]+)\u201d|\u00ab([^\u00ab\u00bb\n]+)\u00bb|`([^`\n]+)`'
)
_OPTION: Final = re.compile(r"\(?[A-Ha-h1-9][).:]\s+\S")
_SENTENCE_END: Final = '.?!:\n"\u201c('
_NEGATION: Final = re.compile(
    r"(?:no|not|never|none|neither|nor|nobody|nothing|without|except|cannot|.+n't)"
)
_FUNCTION: Final = re.compile(
    "a|an|the|this|that|these|those|i|you|he|she|it|we|they|me|him|her|us|them|my|your|his|its|"
    "our|their|one|who|whom|whose|what|which|when|where|why|how|is|are|was|were|be|been|being|"
    "am|do|does|did|done|has|have|had|having|can|could|will|would|shall|should|may|might|must|"
    "of|in|on|at|by|for|from|to|with|about|as|into|than|then|there|here|and|or|but|if|so|"
    "because|while|also|just|please|tell|give|name|say|state|find|answer|question|know|known|"
    "want|like|need|explain|describe|identify|provide|list|show|let|ask|asked|asking|wonder|"
    "wondering|request|get|many|much|any|some|each|other|such|called|same|following|correct|"
    "information|whether|kindly|specify|mention|indicate|determine"
)
"""Words that a wording may change freely."""
_LONGEST_FACTOR: Final = 3
_LONGEST_EXTRA: Final = 120


@dataclass(frozen=True, kw_only=True)
class Keeping:
    """What a rewrite has to keep.

    Names, numbers, quoted phrases, answer options and negation are always kept, and names and
    numbers that the question does not have are refused: a model may have answered instead.

    Parameters
    ----------
    content_share : float
        Share of the remaining content words to keep, in [0, 1]. 1 also for languages in which
        names have no capitals.
    common : collection of str, optional
        Words that everybody knows. If given, all other words are rare and must all be kept.

    Examples
    --------
    >>> Keeping().lost("Who wrote Emma in 1815?", "In 1815, who was the author of Persuasion?")
    ('name', 'added name', 'content')
    >>> Keeping().lost("Who wrote Emma in 1815?", "In 1815, Emma was written by whom?")
    ('content',)
    >>> Keeping(content_share=0.0).lost("Who wrote Emma?", "Emma is by whom?")
    ()
    """

    content_share: float = 0.6
    common: Collection[str] | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        if not 0.0 <= self.content_share <= 1.0:
            raise InvalidValueError("content_share is in [0, 1]")
        if isinstance(self.common, str):
            raise InvalidValueError("common is a collection of words")

    def lost(self, question: str, rewritten: str) -> tuple[str, ...]:
        """Return what a rewrite lost or added, by kind; never the words themselves.

        Parameters
        ----------
        question, rewritten : str

        Returns
        -------
        kinds : tuple of str
            Of ``"length"``, ``"name"``, ``"added name"``, ``"number"``, ``"added number"``,
            ``"quotation"``, ``"option"``, ``"negation"``, ``"content"``, ``"rare word"``.
            Empty if nothing was lost.
        """
        old, new = _words(question), _words(rewritten)
        old_numbers, new_numbers = set(_NUMBER.findall(question)), set(_NUMBER.findall(rewritten))
        names = {name.casefold() for name in names_in(question)}
        faults = {
            "length": not new or len(rewritten) > _LONGEST_FACTOR * len(question) + _LONGEST_EXTRA,
            "name": not names <= new,
            "added name": not {n.casefold() for n in names_in(rewritten)} <= old,
            "number": not old_numbers <= new_numbers,
            "added number": not new_numbers <= old_numbers,
            "quotation": not _has(rewritten, _quotations(question)),
            "option": not _has(rewritten, _options(question)),
            "negation": _negative(old) != _negative(new),
            "content": not self._content(old - names, new),
            "rare word": not self._rare(old) <= new,
        }
        return tuple(kind for kind, fault in faults.items() if fault)

    def _content(self, old: set[str], new: set[str]) -> bool:
        stems = {_stem(word) for word in old if not _is_function(word)}
        kept = stems & {_stem(word) for word in new}
        return len(kept) >= self.content_share * len(stems)

    def _rare(self, words: set[str]) -> set[str]:
        if self.common is None:
            return set()
        common = {word.casefold() for word in self.common}
        return {word for word in words - common if not _is_function(word)}


def keeps(question: str, rewritten: str, *, keeping: Keeping | None = None) -> bool:
    """Whether a rewrite keeps what the answer depends on.

    Examples
    --------
    >>> keeps("Is 7 prime?", "Tell me whether 7 is prime.")
    True
    >>> keeps("Is 7 not prime?", "Tell me whether 7 is prime.")
    False
    """
    return not (keeping or Keeping()).lost(question, rewritten)


def names_in(text: str) -> tuple[str, ...]:
    """Return the names of a text: words with a capital or with letters and digits mixed.

    A capital at the start of a sentence counts unless the word is a common one there
    ("Which", "Tell").

    Examples
    --------
    >>> names_in("Which city is H2O Corp of Anna Lee in?")
    ('H2O', 'Corp', 'Anna', 'Lee')
    """
    found = []
    for match in _WORD.finditer(text):
        word = match[0]
        plain = word.casefold()
        mixed = any(c.isdigit() for c in word) and any(c.isalpha() for c in word)
        if not (mixed or any(c.isupper() for c in word)):
            continue
        at = match.start() - 1
        while at >= 0 and text[at] == " ":
            at -= 1
        starts = at < 0 or text[at] in _SENTENCE_END
        if plain == "i" or (starts and _is_function(plain)):
            continue
        found.append(word.removesuffix("'s").removesuffix("\u2019s"))
    return tuple(found)


def _words(text: str) -> set[str]:
    words = {word.casefold().replace("\u2019", "'") for word in _WORD.findall(text)}
    return words | {word.removesuffix("'s") for word in words}


def _negative(words: set[str]) -> bool:
    return any(_NEGATION.fullmatch(word) for word in words)


def _is_function(word: str) -> bool:
    return (_FUNCTION.fullmatch(word) or _NEGATION.fullmatch(word)) is not None


def _quotations(text: str) -> list[str]:
    return ["".join(groups) for groups in _QUOTED.findall(text)]


def _options(text: str) -> list[str]:
    lines = [line.strip() for line in text.split("\n")]
    return [line for line in lines if _OPTION.match(line)]


def _has(text: str, parts: list[str]) -> bool:
    whole = " ".join(text.casefold().split())
    return all(" ".join(part.casefold().split()) in whole for part in parts)


def _stem(word: str) -> str:
    for ending in ("'s", "ing", "ies", "ed", "es", "s", "e", "y"):
        if word.endswith(ending) and len(word) - len(ending) >= 3:
            return word.removesuffix(ending)
    return word
