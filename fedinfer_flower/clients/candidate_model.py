"""A language model as a classifier over candidate continuations.

Sites whose models have different vocabularies cannot add up token probabilities. They can
agree on *texts* that may come next, and each scores those with its own tokens. What results
is an ordinary local model with named classes, so that every rule and every protection works
on it as on any other.

Axes: B rows, C candidates.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Final

import numpy as np
import numpy.typing as npt

from fedinfer_flower.clients.local_model import LocalModel
from fedinfer_flower.ensemble.base import Array
from fedinfer_flower.errors import ModelError
from fedinfer_flower.wire.text_rows import read_text_rows, text_rows

if TYPE_CHECKING:
    from fedinfer_flower.language.model import LanguageModel

__all__ = ["CandidateModel", "writable"]

_STYLES: Final = ("answer", "statement")


def writable(model: LanguageModel, candidates: Sequence[str], *, lead: str = " ") -> list[str]:
    """Return the candidates that a model's tokenizer can write and read back.

    Parameters
    ----------
    model : LanguageModel
    candidates : sequence of str
    lead : str
        What stands between the text so far and a candidate.
    """
    unknown = model.tokenizer.unk_token_id
    kept = []
    for text in candidates:
        ids = _ids(model, lead + text)
        back = model.tokenizer.decode(ids, skip_special_tokens=False).strip()
        if ids and unknown not in ids and back == text.strip():
            kept.append(text)
    return kept


class CandidateModel:
    """Score candidate continuations of a question with a local language model.

    Return `local_model()` from the `load_model` of an `InferenceMod`; ask with `FedDecode`.

    Parameters
    ----------
    model : LanguageModel
    candidates : sequence of str
        Texts that may come next: words, option letters, labels. Those that the model's
        tokenizer cannot write are left out. No candidate should be the beginning of another:
        the shorter one's probability holds that of the longer.
    abstentions : sequence of str, optional
        Texts with which the model says that it does not know; default those of its prompt
        format. One that is no candidate has its probability spread evenly over all
        candidates: a site that does not know then has no say, instead of voting for what
        seems likely to it when it is not let abstain.
    style : {"answer", "statement"}
        Which prompt of the model's format is continued.
    documents : callable, optional
        From a question to texts of the site that are put before it.
    lead : str
        Between the prompt or the text so far, and a candidate. Empty for prompts that end in
        white space.
    batch_rows : int
        Rows in one pass of the model.

    Raises
    ------
    ModelError
        If no candidate can be written, or one comes twice.

    Privacy
    -------
    The candidates are class names: coordinator, querier and all sites read them. They must
    not come from the site's private data. Scores are of the model's whole continuation over
    the agreed candidates only; what leaves the site is what rule and protection make of
    them. With documents, an answer tells about the documents too, and the noise of `dp`
    covers both.

    Examples
    --------
    >>> from fedinfer_flower.simulation.facts.checkpoints import load
    >>> model = CandidateModel(load("qwen3"), ["butor", "Paris"])
    >>> model.classes
    ('butor',)
    """

    def __init__(
        self,
        model: LanguageModel,
        candidates: Sequence[str],
        *,
        abstentions: Sequence[str] | None = None,
        style: str = "answer",
        documents: Callable[[str], Sequence[str]] | None = None,
        lead: str = " ",
        batch_rows: int = 64,
    ) -> None:
        if isinstance(candidates, str) or len(set(candidates)) != len(candidates):
            raise ModelError("candidates are a list of texts, none twice")
        if style not in _STYLES or batch_rows < 1:
            raise ModelError("style is 'answer' or 'statement', batch_rows at least 1")
        self.classes = tuple(writable(model, candidates, lead=lead))
        if not self.classes:
            raise ModelError(
                f"the model's tokenizer can write none of {len(candidates)} candidates",
                hint="candidates are texts in the model's language, without markup",
            )
        given = model.prompts.abstentions if abstentions is None else tuple(abstentions)
        spread = [text for text in given if text not in self.classes]
        self._model, self._style, self._lead = model, style, lead
        self._documents, self._batch_rows = documents, batch_rows
        texts = (*self.classes, *writable(model, spread, lead=lead))
        self._pieces = [tuple(_ids(model, lead + text)) for text in texts]
        # Tokenizers set their padding per call and are not safe between threads.
        self._lock = threading.Lock()

    def __call__(self, inputs: npt.NDArray[np.generic]) -> Array:
        """Return log-probabilities (B, C) of rows that `text_rows` wrote.

        Raises
        ------
        ShapeError
            If the rows hold no text.
        PromptTooLongError
            If one does not fit into the model's window.
        """
        prompts = [self._prompt(question, text) for question, text in read_text_rows(inputs)]
        size = self._batch_rows
        with self._lock:
            parts = [
                self._scores(prompts[start : start + size])
                for start in range(0, len(prompts), size)
            ]
        scores = np.concatenate(parts)
        own, abstains = scores[:, : len(self.classes)], scores[:, len(self.classes) :]
        if not abstains.shape[1]:
            return own
        even = _log_sum(abstains) - np.log(len(self.classes))
        return np.asarray(np.logaddexp(own, even))

    def local_model(
        self,
        *,
        holdout: tuple[Sequence[str], Sequence[str]] | None = None,
        **facts: Any,
    ) -> LocalModel:
        """Return what `load_model` should.

        Parameters
        ----------
        holdout : (sequence of str, sequence of str), optional
            Questions and answers, each a candidate, that the model was not trained on, to
            calibrate its temperature.
        **facts
            Further arguments of `LocalModel`.
        """
        if holdout is not None:
            questions, answers = holdout
            facts["holdout"] = (text_rows(questions, [""] * len(questions)), list(answers))
        card = {"kind": "candidates of a language model", "style": self._style}
        return LocalModel(
            model=self,
            classes=self.classes,
            outputs="logits",
            digest=self._model.layout.model_digest,
            model_card={**card, **facts.pop("model_card", {})},
            **facts,
        )

    # -- parts -------------------------------------------------------------------------

    def _prompt(self, question: str, text: str) -> str:
        documents = [] if self._documents is None else list(self._documents(question))
        prompts = self._model.prompts
        ask = prompts.ask if self._style == "answer" else prompts.help
        prompt = ask(question, documents=documents)
        return prompt + self._lead + text if text else prompt

    def _scores(self, prompts: Sequence[str]) -> Array:
        """Return sums of log-probabilities of all pieces, shape (B, candidates + abstentions).

        As `LanguageModel.score`, with one pass for all candidates that differ in their last
        token only: of words with a token each that is one pass in all.
        """
        import torch

        ends: dict[tuple[int, ...], list[tuple[int, int]]] = {}
        for column, piece in enumerate(self._pieces):
            ends.setdefault(piece[:-1], []).append((column, piece[-1]))
        self._model.tokens(prompts, room=max(map(len, self._pieces)))
        past = self._model.prefill(prompts).past()
        scores = np.empty((len(prompts), len(self._pieces)))
        with torch.no_grad():
            for before, last in ends.items():
                labels = torch.tensor([before], dtype=torch.long).expand(len(prompts), -1)
                logp = self._model.logits_on(past, labels).float().log_softmax(-1)
                told = logp[:, : len(before)].gather(2, labels[..., None])[..., 0].sum(1)
                columns, ids = zip(*last, strict=True)
                found = told[:, None] + logp[:, len(before)][:, list(ids)]
                scores[:, list(columns)] = found.double().numpy()
        return scores


def _ids(model: LanguageModel, text: str) -> list[int]:
    ids: list[int] = model.tokenizer(text, add_special_tokens=False)["input_ids"]
    return ids


def _log_sum(scores: Array) -> Array:
    top = scores.max(axis=1, keepdims=True)
    return np.asarray(top + np.log(np.exp(scores - top).sum(axis=1, keepdims=True)))
