"""Questions in other words: what each sharer gets to read instead of what the user typed.

Every sharer gets another wording, so two that compare notes do not hold the same sentence.
The names and the relation stay: see `fedinfer_flower.language.overlap` for what is left.

References
----------
.. [1] FedRefine: distinct rephrased inputs for the sharers; C2C fusers need the same text at
   both sides, so rephrasing goes with sequence-wise concatenation.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, ClassVar

from fedinfer_flower.language.keeping import Keeping
from fedinfer_flower.registry import Registry

if TYPE_CHECKING:
    from fedinfer_flower.language.model import LanguageModel

__all__ = ["REPHRASERS", "Rephraser", "Rewriting", "make_rephraser", "sharer_styles"]


@dataclass(frozen=True, kw_only=True)
class Rewriting:
    """One question in other words, and how it came about.

    Parameters
    ----------
    text : str
        What the sharer reads.
    by : str
        ``"none"``, ``"template"`` or ``"model"``: who wrote the text in the end.
    reason : str
        Why something simpler than what was asked for was used; empty if nothing was.
        ``"not taught"``, ``"too long"``, ``"unchanged"``, ``"no wording"``, or ``"lost: ..."``
        with the kinds of things that the rewrite lost. Never words of the question.

    Examples
    --------
    >>> Rewriting(text="secret", by="template", reason="not taught")
    Rewriting(by='template', reason='not taught')
    """

    text: str = field(repr=False)
    by: str
    reason: str = ""


class Rephraser(ABC):
    """Put questions in other words.

    Parameters
    ----------
    model : LanguageModel
        The receiver's own; the wording of its `prompts` is used too.
    keeping : Keeping, optional
        What a rewrite has to keep.

    Privacy
    -------
    The sharer, and whoever it colludes with, learns the names, the numbers and what is asked.
    Rewriting runs at the receiver and sends nothing.

    Examples
    --------
    >>> from fedinfer_flower.language.rephrasers.none import NoRephraser
    >>> NoRephraser(None).rephrase(["Which city?"], style=1)
    ['Which city?']
    """

    name: ClassVar[str]

    def __init__(self, model: LanguageModel | None, *, keeping: Keeping | None = None) -> None:
        self.model, self.keeping = model, keeping or Keeping()

    @abstractmethod
    def rewrite(self, questions: Sequence[str], *, style: int) -> list[Rewriting]:
        """Return each question in other words, and how that came about.

        Parameters
        ----------
        questions : sequence of str
        style : int
            0 or more; sharers get different ones. A rephraser with fewer wordings starts over.
        """

    def rephrase(self, questions: Sequence[str], *, style: int) -> list[str]:
        """Return each question in other words."""
        return [done.text for done in self.rewrite(questions, style=style)]


REPHRASERS: Registry[Rephraser] = Registry(
    kind="rephraser",
    package="fedinfer_flower.language.rephrasers",
    group="fedinfer_flower.rephrasers",
)
"""All rephrasers by name."""


def make_rephraser(
    name: str, model: LanguageModel | None, *, keeping: Keeping | None = None
) -> Rephraser:
    """Build a rephraser from its registered name.

    Raises
    ------
    UnknownNameError
        If no rephraser has that name.

    Examples
    --------
    >>> make_rephraser("template", None).rephrase(["Where is Bergen?"], style=1)
    ['In which place is Bergen?']
    """
    return REPHRASERS.get(name)(model, keeping=keeping)


def sharer_styles(sharers: Iterable[str]) -> dict[str, int]:
    """Give each sharer a style of its own, from 1; the order of naming does not matter.

    Examples
    --------
    >>> sharer_styles(["site-c", "site-b"])
    {'site-b': 1, 'site-c': 2}
    """
    return {name: style for style, name in enumerate(sorted(set(sharers)), 1)}
