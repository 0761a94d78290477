"""Let the receiver's own model put questions in other words, and check what it did."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Final

from fedinfer_flower.errors import InvalidValueError, PromptTooLongError
from fedinfer_flower.language.chat import tidied
from fedinfer_flower.language.decoding import Decoding
from fedinfer_flower.language.keeping import Keeping
from fedinfer_flower.language.rephrase import REPHRASERS, Rephraser, Rewriting
from fedinfer_flower.language.rephrasers.template import TemplateRephraser

if TYPE_CHECKING:
    from fedinfer_flower.language.model import LanguageModel

__all__ = ["ModelRephraser"]

_MAX_NEW_TOKENS: Final = 256


@REPHRASERS.register("model")
class ModelRephraser(Rephraser):
    """Rewrite with the receiver's model; by template where that fails, saying why.

    A rewrite is refused, and the template's form of the question used, if it loses a name, a
    number, a quotation, a negation or too many of the content words, if it repeats the
    question, or if the model was never taught to rewrite.

    Privacy
    -------
    As `Rephraser`. What the model writes may carry over its own habits, by which a sharer may
    tell one receiver from another.

    Examples
    --------
    >>> from fedinfer_flower.language.chat import PlainPrompts
    >>> PlainPrompts().rewrite("Where is Bergen?", style=1) is None   # then: by template
    True
    """

    def __init__(self, model: LanguageModel | None, *, keeping: Keeping | None = None) -> None:
        if model is None:
            raise InvalidValueError(
                "the rephraser 'model' without a model", hint="use 'template' or give one"
            )
        super().__init__(model, keeping=keeping)
        self._model = model
        self._template = TemplateRephraser(model, keeping=keeping)

    def rewrite(self, questions: Sequence[str], *, style: int) -> list[Rewriting]:
        """Return each question as the model puts it, or as the template does."""
        prompts = [self._model.prompts.rewrite(question, style=style) for question in questions]
        taught = [row for row, prompt in enumerate(prompts) if prompt is not None]
        written = self._written([prompt for prompt in prompts if prompt is not None])
        texts = dict(zip(taught, written, strict=True))
        return [
            self._checked(question, texts[row], style)
            if row in texts
            else self._by_template(question, style, "not taught")
            for row, question in enumerate(questions)
        ]

    def _written(self, prompts: Sequence[str]) -> list[str | None]:
        """Return what the model writes; None for prompts that do not fit."""
        settings = Decoding(max_new_tokens=_MAX_NEW_TOKENS, stop=self._model.prompts.stop)
        if not prompts:
            return []
        try:
            return [tidied(text) for text in self._model.generate(prompts, settings)]
        except PromptTooLongError:
            # One long prompt must not cost the others their rewrite.
            if len(prompts) == 1:
                return [None]
            return [text for prompt in prompts for text in self._written([prompt])]

    def _checked(self, question: str, text: str | None, style: int) -> Rewriting:
        if text is None:
            return self._by_template(question, style, "too long")
        if text.casefold().split() == question.casefold().split():
            return self._by_template(question, style, "unchanged")
        lost = self.keeping.lost(question, text)
        if lost:
            return self._by_template(question, style, f"lost: {', '.join(lost)}")
        return Rewriting(text=text, by="model")

    def _by_template(self, question: str, style: int, reason: str) -> Rewriting:
        done = self._template.rewrite([question], style=style)[0]
        because = f"{reason}; {done.reason}" if done.reason else reason
        return replace(done, reason=because)
