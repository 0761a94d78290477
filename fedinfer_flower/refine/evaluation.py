"""How often a receiver is right: alone, with a sharer's cache or text, and with a wrong cache."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor

from fedinfer_flower.errors import InvalidValueError
from fedinfer_flower.kv.fuser import Fuser
from fedinfer_flower.language.decoding import Decoding
from fedinfer_flower.language.model import LanguageModel
from fedinfer_flower.language.prompts import PromptFormat
from fedinfer_flower.language.quoting import abstains
from fedinfer_flower.refine.examples import FuserExample
from fedinfer_flower.refine.pair_data import PairData, prepare_pair
from fedinfer_flower.refine.receiver import Receiver
from fedinfer_flower.refine.sharer import continue_all

__all__ = [
    "Comparison",
    "accuracy",
    "answers_alone",
    "answers_by_text",
    "answers_fused",
    "compare",
    "other_questions",
]

_BATCH_ROWS = 256
_NOTE_TOKENS = 64
_SPARE_TOKENS = 2


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """Share of right answers by task, in [0, 1].

    Parameters
    ----------
    counts : dict
        Examples of each task.
    alone, fused, text, shuffled : dict
        The receiver by itself; with the sharer's cache; with the sharer's text; and with the
        cache of *another* question, whose answer differs. The last is the control: what it
        gains over `alone` beyond guessing is tuning of the receiver, not help by the sharer.
    """

    counts: dict[str, int]
    alone: dict[str, float] = field(default_factory=dict)
    fused: dict[str, float] = field(default_factory=dict)
    text: dict[str, float] = field(default_factory=dict)
    shuffled: dict[str, float] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """Return the fields, ready for JSON."""
        return asdict(self)


def compare(
    receiver: LanguageModel,
    sharer: LanguageModel,
    fuser: Fuser,
    examples: Sequence[FuserExample],
    *,
    text: bool = True,
    note_tokens: int = _NOTE_TOKENS,
) -> Comparison:
    """Measure a fuser on examples that it was not trained on.

    Parameters
    ----------
    receiver, sharer : LanguageModel
    fuser : Fuser
    examples : sequence of FuserExample
    text : bool
        Let the sharer help by text too: slower.
    note_tokens : int
        Most tokens of such a text.

    Raises
    ------
    PromptTooLongError
    """
    aligned = fuser.needs_alignment
    data = prepare_pair(receiver, sharer, examples, fuser.spec.share, aligned=aligned)
    prompts = receiver.prompts
    wrong = data.with_caches_of(other_questions(examples))
    notes = answers_by_text(receiver, sharer, examples, note_tokens=note_tokens) if text else None
    return Comparison(
        counts=dict(Counter(e.task for e in examples)),
        alone=accuracy(answers_alone(receiver, examples), examples, prompts),
        fused=accuracy(answers_fused(receiver, fuser, data), examples, prompts),
        text={} if notes is None else accuracy(notes, examples, prompts),
        shuffled=accuracy(answers_fused(receiver, fuser, wrong), examples, prompts),
    )


def answers_alone(model: LanguageModel, examples: Sequence[FuserExample]) -> list[str]:
    """Let a model answer without help and without documents."""
    prompts = [model.prompts.ask(e.question) for e in examples]
    return continue_all(model, prompts, _answer_tokens(model, examples))


def answers_fused(receiver: LanguageModel, fuser: Fuser, data: PairData) -> list[str]:
    """Let the receiver answer with the sharer's caches fused in."""
    settings = Decoding(
        max_new_tokens=data.labels.shape[1] + _SPARE_TOKENS, stop=tuple(receiver.prompts.stop)
    )
    out: list[str] = []
    training = fuser.training
    fuser.eval()
    with torch.no_grad():
        for batch in data.batches():
            out += receiver.decode_on(batch.fused(fuser), settings)
    fuser.train(training)
    return out


def answers_by_text(
    receiver: LanguageModel,
    sharer: LanguageModel,
    examples: Sequence[FuserExample],
    *,
    note_tokens: int = _NOTE_TOKENS,
) -> list[str]:
    """Let the sharer write a statement for each question, and the receiver answer with it."""
    asked = [sharer.prompts.help(e.question, documents=e.documents) for e in examples]
    notes = continue_all(sharer, asked, note_tokens)
    settings = Decoding(max_new_tokens=_answer_tokens(receiver, examples))
    out: list[str] = []
    for start in range(0, len(examples), _BATCH_ROWS):
        rows = slice(start, start + _BATCH_ROWS)
        out += Receiver(receiver).answer_with_notes(
            [e.question for e in examples[rows]], [[note] for note in notes[rows]], settings
        )
    return out


def accuracy(
    texts: Sequence[str], examples: Sequence[FuserExample], prompts: PromptFormat
) -> dict[str, float]:
    """Return the share of right answers by task.

    An answer is right when the prompt format finds the same answer in it as in the example's,
    or when both say "I do not know".

    Raises
    ------
    InvalidValueError
        If there is not one text an example.
    """
    if len(texts) != len(examples):
        raise InvalidValueError("not one answer an example")
    right: Counter[str] = Counter()
    for text, example in zip(texts, examples, strict=True):
        same = prompts.answer_in(text) == prompts.answer_in(example.answer)
        known = prompts.abstentions
        right[example.task] += same or (abstains(text, known) and abstains(example.answer, known))
    counts = Counter(e.task for e in examples)
    return {task: right[task] / counts[task] for task in sorted(counts)}


def other_questions(examples: Sequence[FuserExample]) -> Tensor:
    """Return for each example another one of its task with another answer; int64 (B,).

    Where a task has one answer only, another question of the task.
    """
    places: dict[str, list[int]] = {}
    for at, example in enumerate(examples):
        places.setdefault(example.task, []).append(at)
    out = torch.zeros(len(examples), dtype=torch.long)
    for group in places.values():
        n = len(group)
        for i, at in enumerate(group):
            tried = [group[(i + n // 2 + step) % n] for step in range(n)]
            differing = (j for j in tried if examples[j].answer != examples[at].answer)
            out[at] = next(differing, tried[0])
    return out


def _answer_tokens(model: LanguageModel, examples: Sequence[FuserExample]) -> int:
    longest = max((e.answer for e in examples), key=len, default="")
    ids = model.tokenizer(longest, add_special_tokens=False)["input_ids"]
    # The tokenizer may cut a shorter answer into more tokens.
    return min(2 * len(ids) + _SPARE_TOKENS, model.layout.window)
