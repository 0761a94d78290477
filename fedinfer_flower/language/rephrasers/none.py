"""Pass questions on as they are."""

from __future__ import annotations

from collections.abc import Sequence

from fedinfer_flower.language.rephrase import REPHRASERS, Rephraser, Rewriting

__all__ = ["NoRephraser"]


@REPHRASERS.register("none")
class NoRephraser(Rephraser):
    """Leave questions as they are.

    Privacy
    -------
    Every sharer reads the user's own sentence.

    Examples
    --------
    >>> NoRephraser(None).rephrase(["Which city?"], style=3)
    ['Which city?']
    """

    def rewrite(self, questions: Sequence[str], *, style: int) -> list[Rewriting]:  # noqa: ARG002
        """Return the questions."""
        return [Rewriting(text=question, by="none") for question in questions]
