"""Reword questions by rules: the model's own grammar where it has one, English otherwise."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import Final

from fedinfer_flower.language.rephrase import REPHRASERS, Rephraser, Rewriting

__all__ = ["FRAMES", "TemplateRephraser"]

_BE: Final = r"(?P<be>is|are|was|were)"
_RULES: Final = tuple(
    (re.compile(pattern, re.IGNORECASE), wordings)
    for pattern, wordings in (
        (
            rf"what {_BE} (?P<x>.+)\?",
            ("Tell me what {x} {be}.", "I want to know what {x} {be}.", "{X}: what {be} it?"),
        ),
        (
            rf"where {_BE} (?P<x>.+)\?",
            ("In which place {be} {x}?", "At what place {be} {x}?", "Tell me where: {be} {x}?"),
        ),
        (
            r"when (?P<be>is|are|was|were|did|does|do) (?P<x>.+)\?",
            ("At what time {be} {x}?", "On which date {be} {x}?", "Tell me when: {be} {x}?"),
        ),
        (
            r"who (?!am |are |is |was |were )(?P<x>.+)\?",
            ("Which person {x}?", "Name the one who {x}.", "Tell me who {x}."),
        ),
        (
            r"how many (?P<x>.+)\?",
            ("What number of {x}?", "Give a count: how many {x}?", "Tell me how many: {x}?"),
        ),
    )
)
FRAMES: Final = (
    "{q}",
    "Please answer this: {q}",
    "Here is a question. {q}",
    "I would like to know: {q}",
    "{q} Tell me what is known about it.",
    "Someone asks: {q}",
)
"""Around questions that no rule takes apart. They leave the sentence as it is."""


@REPHRASERS.register("template")
class TemplateRephraser(Rephraser):
    """Reword by rules, in this order: `prompts.reword`, English patterns, frames.

    Use for models that were never taught to rewrite. A `PromptFormat` with a method
    ``reword(question, *, style) -> str`` is asked first. English patterns take common short
    questions apart; around any other question a frame is put, which hides nothing of it.

    Privacy
    -------
    As `Rephraser`. A frame leaves the user's sentence in full.

    Examples
    --------
    >>> TemplateRephraser(None).rephrase(["Who wrote Emma?"], style=1)
    ['Which person wrote Emma?']
    """

    def rewrite(self, questions: Sequence[str], *, style: int) -> list[Rewriting]:
        """Return each question reworded; unchanged where a rewording loses something."""
        return [self._one(question, style) for question in questions]

    def _one(self, question: str, style: int) -> Rewriting:
        reword: Callable[..., str] | None = getattr(
            getattr(self.model, "prompts", None), "reword", None
        )
        if reword is None:
            text = _english(question, style)
        else:
            try:
                text = reword(question, style=style)
            except (IndexError, KeyError, ValueError):
                return Rewriting(text=question, by="none", reason="no wording")
        lost = self.keeping.lost(question, text)
        if lost:
            return Rewriting(text=question, by="none", reason=f"lost: {', '.join(lost)}")
        return Rewriting(text=text, by="template")


def _english(question: str, style: int) -> str:
    if style == 0:
        return question
    for pattern, wordings in _RULES:
        # A second sentence or a list of options is no part of a pattern.
        if (found := pattern.fullmatch(question.strip())) and "?" not in found["x"]:
            parts = {k: v for k, v in found.groupdict().items() if v is not None}
            parts["X"] = parts["x"][:1].upper() + parts["x"][1:]
            return wordings[(style - 1) % len(wordings)].format(**parts)
    return FRAMES[1 + (style - 1) % (len(FRAMES) - 1)].format(q=question)
