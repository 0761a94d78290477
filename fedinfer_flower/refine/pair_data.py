"""What both models of a pair make of examples, computed once and kept.

Axes: B examples, T tokens of the receiver, L tokens of an answer.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from fedinfer_flower.errors import FuserError, PromptTooLongError
from fedinfer_flower.kv.align import alignment_tensor
from fedinfer_flower.kv.fuser import Fuser
from fedinfer_flower.kv.layout import CacheEntries
from fedinfer_flower.kv.past import Past
from fedinfer_flower.kv.share import ShareSpec
from fedinfer_flower.language.model import LanguageModel, Prefill
from fedinfer_flower.refine.examples import FuserExample
from fedinfer_flower.refine.sharer import Shared, find_sections, prefill_all, share_prompts

__all__ = ["IGNORED", "PairData", "prepare_pair"]

IGNORED = -100
"""Label of what is not learnt: torch's own value for it."""

_BATCH_ROWS = 256


@dataclass(frozen=True, eq=False, kw_only=True)
class PairData:
    """Caches and labels of an ordered pair.

    Parameters
    ----------
    own : Prefill
        The receiver's reading of the questions.
    shared : CacheEntries
        What the sharer hands over for each.
    labels : int64 tensor (B, L)
        Tokens of the answer and what ends it; `IGNORED` behind them.
    alignment : int64 tensor (B, T), optional
        For fusers that align tokens.
    """

    own: Prefill = field(repr=False)
    shared: CacheEntries = field(repr=False)
    labels: Tensor = field(repr=False)
    alignment: Tensor | None = field(repr=False, default=None)

    def __len__(self) -> int:
        return len(self.labels)

    def select(self, index: Tensor) -> PairData:
        """Return some examples."""
        return PairData(
            own=self.own.select(index),
            shared=self.shared.select(index),
            labels=self.labels[index],
            alignment=None if self.alignment is None else self.alignment[index],
        )

    def with_caches_of(self, index: Tensor) -> PairData:
        """Return the same questions with the sharer's caches of others."""
        aligned = None if self.alignment is None else self.alignment[index]
        return replace(self, shared=self.shared.select(index), alignment=aligned)

    def batches(self) -> Iterator[PairData]:
        """Yield all examples in order, some at a time."""
        for start in range(0, len(self), _BATCH_ROWS):
            yield self.select(torch.arange(start, min(start + _BATCH_ROWS, len(self))))

    def fused(self, fuser: Fuser) -> Past:
        """Return the receiver's past with the sharer's entries fused in."""
        past = self.own.past()
        aligned = None if self.alignment is None else self.alignment[:, :-1]
        return fuser.extend(past, self.shared, alignment=aligned, clean=past)

    def loss(self, receiver: LanguageModel, fuser: Fuser) -> Tensor:
        """Return the mean cross-entropy of the answers' tokens, teacher forced."""
        fed = self.labels[:, :-1].clamp_min(0)
        logits = receiver.logits_on(self.fused(fuser), fed)[:, -self.labels.shape[1] :]
        return torch.nn.functional.cross_entropy(
            logits.reshape(-1, logits.shape[-1]).float(),
            self.labels.reshape(-1),
            ignore_index=IGNORED,
        )


def prepare_pair(
    receiver: LanguageModel,
    sharer: LanguageModel,
    examples: Sequence[FuserExample],
    share: ShareSpec,
    *,
    aligned: bool = False,
    max_answer_tokens: int = 64,
) -> PairData:
    """Let both models read all examples.

    Parameters
    ----------
    receiver, sharer : LanguageModel
    examples : sequence of FuserExample
        The receiver reads the questions, the sharer the documents too.
    share : ShareSpec
    aligned : bool
        Find which tokens belong together; the whole prompt travels then.
    max_answer_tokens : int

    Raises
    ------
    PromptTooLongError
        If an answer is longer, or a question with its answer does not fit into a window.
    FuserError
        If tokens cannot be aligned because a prompt format changes the question.
    """
    asked = [e.question for e in examples]
    prompts = [receiver.prompts.ask(question) for question in asked]
    labels = _labels(receiver, prompts, [e.answer for e in examples], max_answer_tokens)
    own = prefill_all(receiver, prompts)
    if own.entries.tokens + labels.shape[1] > receiver.layout.window:
        raise PromptTooLongError("a question with its answer is longer than the receiver's window")
    theirs = [sharer.prompts.ask(e.question, documents=e.documents) for e in examples]
    shared = share_prompts(sharer, theirs, share, questions=asked)
    alignment = _alignment(shared, own, find_sections(prompts, asked)) if aligned else None
    return PairData(own=own, shared=shared.entries, labels=labels, alignment=alignment)


def _alignment(shared: Shared, own: Prefill, sections: list[tuple[int, int]]) -> Tensor:
    if shared.tokens is None or not sections or not shared.sections:
        raise FuserError(
            "tokens of the two models cannot be aligned",
            hint="the whole prompt must travel, with the question as it was asked; or train a"
            " fuser of the last token",
        )
    return alignment_tensor(
        shared.tokens,
        own.tokens,
        sharer_sections=[[section] for section in shared.sections],
        receiver_sections=[[section] for section in sections],
    )


def _labels(
    model: LanguageModel, prompts: Sequence[str], answers: Sequence[str], most: int
) -> Tensor:
    """Return the tokens that should follow the prompts, ended as the format ends answers."""
    stop = model.prompts.stop[0] if model.prompts.stop else ""
    rows = []
    for prompt, answer in zip(prompts, answers, strict=True):
        # Most tokenizers put the space before a word into the word's first token.
        glue = "" if prompt[-1:].isspace() or answer[:1].isspace() else " "
        ids = model.tokenizer(glue + answer + stop, add_special_tokens=False)["input_ids"]
        rows.append(ids if stop else [*ids, model.tokenizer.eos_token_id])
    width = max(len(row) for row in rows)
    if width > most:
        raise PromptTooLongError(
            f"an answer of {width} tokens; the limit is {most}",
            hint="shorten the answers, or raise max_answer_tokens",
        )
    labels = torch.full((len(rows), width), IGNORED)
    for at, row in enumerate(rows):
        labels[at, : len(row)] = torch.tensor(row)
    return labels
