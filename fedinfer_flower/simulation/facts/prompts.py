"""How the small models of the fact world are spoken to."""

from __future__ import annotations

from collections.abc import Collection, Sequence

from fedinfer_flower.simulation.facts.world import ABSTENTION, WORDINGS

__all__ = ["FactPrompts"]

_MAX_NOTES = 8
_MAX_NOTE_WORDS = 12


class FactPrompts:
    """Prompts in the grammar that the small models were trained on.

    Their language has no instructions at all, so what a note can do is state a fact. Words
    that are not of the language are dropped before quoting.

    Parameters
    ----------
    words : collection of str
        The language, of which notes may be made.
    """

    stop: tuple[str, ...] = (" .", ".")
    abstentions: tuple[str, ...] = (ABSTENTION,)

    def __init__(self, words: Collection[str]) -> None:
        self._words = frozenset(words) - {"Q", "A", "S", "D", "?"}

    def ask(self, question: str, *, documents: Sequence[str] = ()) -> str:
        """Return ``D <statements> Q ... ? A``."""
        return " ".join([*_one_document(documents), question, "A"])

    def help(self, question: str, *, documents: Sequence[str] = ()) -> str:
        """Return ``D <statements> Q ... ? S``."""
        return " ".join([*_one_document(documents), question, "S"])

    def ask_with_notes(
        self, question: str, notes: Sequence[str], *, documents: Sequence[str] = ()
    ) -> str:
        """Return the question behind own documents and one made of the notes."""
        kept = []
        for note in notes[:_MAX_NOTES]:
            words = [w for w in note.split() if w in self._words][:_MAX_NOTE_WORDS]
            if words and ABSTENTION not in words:
                kept.append(" ".join([*words, "."] if words[-1] != "." else words))
        return self.ask(question, documents=[*documents, *kept])

    def rewrite(self, question: str, *, style: int) -> str | None:  # noqa: ARG002
        """Return None: these models were never taught to rewrite."""
        return None

    def answer_in(self, text: str) -> str:
        """Return the first word."""
        return text.split(" ", maxsplit=1)[0]

    def reword(self, question: str, *, style: int) -> str:
        """Return the question in another of the grammar's wordings."""
        words = question.split()
        if words[1] in ("which", "tell"):
            relation, first, last = words[2], words[4], words[5]
        elif words[2] == "of":
            relation, first, last = words[1], words[3], words[4]
        else:
            first, last, relation = words[1], words[2], words[4]
        return WORDINGS[style % len(WORDINGS)].format(relation=relation, first=first, last=last)


def _one_document(documents: Sequence[str]) -> list[str]:
    statements = " ".join(d.removeprefix("D ") for d in documents)
    return [f"D {statements}"] if statements else []
