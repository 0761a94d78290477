"""Where a sharer's cache holds the answer, found by a linear probe before any fuser is trained.

Axes: N examples, F features, C answers.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Final

import torch
from torch import Tensor

from fedinfer_flower.errors import InvalidValueError
from fedinfer_flower.kv.layout import CacheEntries
from fedinfer_flower.kv.share import ShareSpec
from fedinfer_flower.language.model import LanguageModel
from fedinfer_flower.language.quoting import abstains
from fedinfer_flower.refine.examples import FuserExample, split_examples
from fedinfer_flower.refine.sharer import continue_all, share_prompts

__all__ = ["ProbeReport", "probe"]

_LEAST_EXAMPLES: Final = 40
_LEAST_PER_ANSWER: Final = 2.0
_RIDGE: Final = 30.0
_ANSWER_TOKENS: Final = 32
_ENOUGH: Final = 0.9


@dataclass(frozen=True, kw_only=True)
class ProbeReport:
    """Share of held-out answers that a ridge regression reads off a sharer's cache, in [0, 1].

    Parameters
    ----------
    asked : int
        Examples given that can be answered at all.
    known : int
        Those that the sharer itself answers rightly: the others say nothing about its cache.
    held_out, answers : int
        Held-out examples, and different answers among which the probe chooses.
    chance : float
        By always giving the most frequent answer.
    layers : list of list of float
        One row a layer; columns are the last tokens of the prompt in order, then the decoded
        token.
    plain, hidden, decoded, decoded_hidden : float
        What travels under ``ShareSpec(last=1)`` with neither, with the final hidden state, with
        one decoded token, and with both; all layers together.
    """

    asked: int
    known: int
    held_out: int
    answers: int
    chance: float
    layers: list[list[float]]
    plain: float
    hidden: float
    decoded: float
    decoded_hidden: float

    def advice(self, enough: float = _ENOUGH) -> ShareSpec | None:
        """Return the cheapest share from which the answers can be read, if there is one.

        Without one no fuser of the last token will serve; use the text medium.
        """
        rising = (
            (self.plain, ShareSpec(last=1, decode=0)),
            (self.hidden, ShareSpec(last=1, decode=0, hidden=True)),
            (self.decoded, ShareSpec(last=1, decode=1)),
            (self.decoded_hidden, ShareSpec(last=1, decode=1, hidden=True)),
        )
        return next((share for found, share in rising if found >= enough), None)

    def to_dict(self) -> dict[str, Any]:
        """Return the fields, ready for JSON."""
        return asdict(self)


def probe(
    sharer: LanguageModel,
    examples: Sequence[FuserExample],
    *,
    last: int = 4,
    holdout: float = 0.3,
    seed: int = 0,
    ridge: float = _RIDGE,
) -> ProbeReport:
    """Find out which share can serve any receiver, from the sharer alone.

    A cache never contains what the last layer computed. A model that settles its answer late
    has it in the final hidden state, or in the token that it decodes next, and nowhere before.

    Parameters
    ----------
    sharer : LanguageModel
    examples : sequence of FuserExample
        Public, with answers that recur; each question is asked with its document.
    last : int
        Last tokens of the prompt to look at, in the table of layers.
    holdout : float
        Share of the questions held out.
    seed : int
        Of the choice of what is held out.
    ridge : float
        Strength of the penalty on standardised features.

    Raises
    ------
    InvalidValueError
        If too few examples are answered rightly, or answers do not recur.
    PromptTooLongError

    Privacy
    -------
    Needs the sharer's model and public examples; the report holds accuracies only.

    Notes
    -----
    The probe is linear, a fuser is not: what the probe cannot read a fuser may still use.
    """
    asked = [e for e in examples if not abstains(e.answer, sharer.prompts.abstentions)]
    known = _answered(sharer, asked)
    if len(known) < _LEAST_EXAMPLES:
        raise InvalidValueError(
            f"the sharer answers {len(known)} of {len(asked)} examples rightly; the probe needs"
            f" {_LEAST_EXAMPLES}",
            hint="give examples of what the sharer knows, or with documents that it can read",
        )
    train, held = split_examples(known, holdout=holdout, seed=seed)
    answers = {answer: at for at, answer in enumerate(sorted({e.answer for e in train}))}
    held = [e for e in held if e.answer in answers]
    if len(train) < _LEAST_PER_ANSWER * len(answers) or not held:
        raise InvalidValueError(
            "the examples' answers do not recur, so a probe cannot learn them",
            hint="give several questions for each answer",
        )
    prompts = [sharer.prompts.ask(e.question, documents=e.documents) for e in [*train, *held]]
    share = ShareSpec(last=last, decode=1, hidden=True)
    entries = share_prompts(sharer, prompts, share).entries
    labels = torch.tensor([answers[e.answer] for e in [*train, *held]])
    cut = len(train)

    def read(features: Tensor) -> float:
        return _ridge_accuracy(features, labels, cut, ridge, len(answers))

    places = range(-entries.tokens, 0)
    layers = range(entries.layout.layers)
    return ProbeReport(
        asked=len(asked),
        known=len(known),
        held_out=len(held),
        answers=len(answers),
        chance=Counter(labels[cut:].tolist()).most_common(1)[0][1] / len(held),
        layers=[[read(entries.flat(layer)[:, at]) for at in places] for layer in layers],
        plain=read(_all_layers(entries, -2, -1, hidden=False)),
        hidden=read(_all_layers(entries, -2, -1, hidden=True)),
        decoded=read(_all_layers(entries, -2, None, hidden=False)),
        decoded_hidden=read(_all_layers(entries, -2, None, hidden=True)),
    )


def _answered(sharer: LanguageModel, examples: Sequence[FuserExample]) -> list[FuserExample]:
    prompts = [sharer.prompts.ask(e.question, documents=e.documents) for e in examples]
    texts = continue_all(sharer, prompts, _ANSWER_TOKENS) if prompts else []
    same = sharer.prompts.answer_in
    return [e for e, text in zip(examples, texts, strict=True) if same(text) == same(e.answer)]


def _all_layers(entries: CacheEntries, start: int, stop: int | None, *, hidden: bool) -> Tensor:
    """Return (N, F): all layers of some tokens side by side."""
    kept = entries.cut(start, stop)
    parts = [kept.flat(layer) for layer in range(kept.layout.layers)]
    if hidden and kept.hidden is not None:
        parts.append(kept.hidden)
    return torch.cat(parts, -1).flatten(1)


def _ridge_accuracy(
    features: Tensor, labels: Tensor, cut: int, ridge: float, classes: int
) -> float:
    """Fit on the first `cut` rows, return the share of right answers on the others."""
    x = features.double()
    mean, deviation = x[:cut].mean(0), x[:cut].std(0)
    # A feature that never changes on the training part carries nothing.
    x = torch.where(deviation > 0, (x - mean) / deviation.clamp_min(1e-12), 0.0)
    train, rest = x[:cut], x[cut:]
    target = torch.nn.functional.one_hot(labels[:cut], classes).double()
    centre = target.mean(0)
    if cut < x.shape[1]:
        # The dual form: as many unknowns as examples.
        gram = train @ train.T + ridge * torch.eye(cut, dtype=torch.float64)
        scores = rest @ (train.T @ torch.linalg.solve(gram, target - centre))
    else:
        gram = train.T @ train + ridge * torch.eye(x.shape[1], dtype=torch.float64)
        scores = rest @ torch.linalg.solve(gram, train.T @ (target - centre))
    return float(((scores + centre).argmax(1) == labels[cut:]).double().mean())
