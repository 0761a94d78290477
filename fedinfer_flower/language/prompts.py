"""How a model is spoken to: questions, documents, notes of others, requests to rewrite."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol, runtime_checkable

__all__ = ["PromptFormat"]


@runtime_checkable
class PromptFormat(Protocol):
    """Turn a question into the prompts of one model.

    The same question reaches models that were trained on different templates, so each site
    brings its own. What other sites wrote is data: a format quotes it between marks that the
    text cannot contain, and never puts it where instructions stand.

    Parameters
    ----------
    stop : tuple of str
        Texts that end an answer.
    abstentions : tuple of str
        Answers with which the model says that it does not know.
    """

    stop: tuple[str, ...]
    abstentions: tuple[str, ...]

    def ask(self, question: str, *, documents: Sequence[str] = ()) -> str:
        """Return the prompt whose continuation is the answer."""
        ...

    def help(self, question: str, *, documents: Sequence[str] = ()) -> str:
        """Return the prompt whose continuation is a statement that helps another model."""
        ...

    def ask_with_notes(
        self, question: str, notes: Sequence[str], *, documents: Sequence[str] = ()
    ) -> str:
        """Return the prompt that quotes what others wrote, behind own documents, and asks."""
        ...

    def rewrite(self, question: str, *, style: int) -> str | None:
        """Return the prompt whose continuation is the question in other words.

        None if the model was never taught to rewrite.
        """
        ...

    def answer_in(self, text: str) -> str:
        """Return the answer in what the model generated, normalised for comparing."""
        ...
