"""What a receiver's gate can choose from, on questions whose answers are known.

Axes: N questions, J sharers, L tokens of an answer.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from fedinfer_flower.errors import ShapeError
from fedinfer_flower.kv.fuser import Fuser
from fedinfer_flower.kv.past import Past
from fedinfer_flower.kv.share import ShareSpec
from fedinfer_flower.language.decoding import Decoding
from fedinfer_flower.language.model import LanguageModel
from fedinfer_flower.refine.evaluation import accuracy
from fedinfer_flower.refine.examples import FuserExample
from fedinfer_flower.refine.gate_calibration import GateExamples
from fedinfer_flower.refine.pair_data import IGNORED, PairData, prepare_pair
from fedinfer_flower.refine.receiver import Receiver
from fedinfer_flower.refine.sharer import share_prompts

__all__ = ["GateTrial", "read_gate_trial"]

_BATCH_ROWS = 256
_SPARE_TOKENS = 2
_EVIDENCE_ONLY = ShareSpec(last=1, decode=0)


@dataclass(frozen=True, eq=False, kw_only=True)
class GateTrial:
    """Questions as one receiver and its sharers have read them.

    Made by `read_gate_trial`. Reading is done once; any choice of sharers can then be
    measured.

    Parameters
    ----------
    receiver : LanguageModel
    fusers : tuple of Fuser
        One a sharer, in evaluation mode.
    pairs : tuple of PairData
        What each sharer hands over.
    evidence : float32 tensor (N, J, 4)
        How sure each sharer is.
    examples : tuple of FuserExample
    """

    receiver: LanguageModel
    fusers: tuple[Fuser, ...]
    pairs: tuple[PairData, ...] = field(repr=False)
    evidence: Tensor = field(repr=False)
    examples: tuple[FuserExample, ...] = field(repr=False)

    def __len__(self) -> int:
        return len(self.examples)

    @torch.no_grad()
    def answers(self, gates: Tensor) -> list[str]:
        """Let the receiver answer with the sharers that are open.

        Parameters
        ----------
        gates : tensor (N, J)
            0 or 1; a row of zeros is the receiver alone.

        Raises
        ------
        ShapeError
        """
        settings = Decoding(
            max_new_tokens=self._labels.shape[1] + _SPARE_TOKENS,
            stop=tuple(self.receiver.prompts.stop),
        )
        texts: list[str] = []
        for rows in self._batches(gates):
            texts += self.receiver.decode_on(self._fused(gates, rows), settings)
        return texts

    def right(self, gates: Tensor) -> Tensor:
        """Return which answers are right with these sharers; bool (N,)."""
        prompts = self.receiver.prompts
        found = (
            accuracy([text], [example], prompts)[example.task]
            for text, example in zip(self.answers(gates), self.examples, strict=True)
        )
        return torch.tensor([share == 1.0 for share in found])

    @torch.no_grad()
    def losses(self, gates: Tensor) -> Tensor:
        """Return the negative log-probability of each right answer, in nats; float32 (N,)."""
        parts = []
        for rows in self._batches(gates):
            labels = self._labels[rows]
            fed = labels[:, :-1].clamp_min(0)
            logits = self.receiver.logits_on(self._fused(gates, rows), fed)
            each = torch.nn.functional.cross_entropy(
                logits[:, -labels.shape[1] :].transpose(1, 2).float(),
                labels,
                ignore_index=IGNORED,
                reduction="none",
            )
            parts.append(each.sum(1))
        return torch.cat(parts)

    def only(self, sharer: int | None) -> Tensor:
        """Return the gates (N, J) that open one sharer for every question, or none."""
        gates = torch.zeros(self.evidence.shape[:2])
        if sharer is not None:
            gates[:, sharer] = 1.0
        return gates

    def gate_examples(self) -> GateExamples:
        """Return what `refine.gate_training.train_gate` and `assess_gate` take."""
        options = [self.only(j) for j in (None, *range(len(self.fusers)))]
        return GateExamples(
            own=self.pairs[0].own.evidence,
            sharers=self.evidence,
            losses=torch.stack([self.losses(gates) for gates in options], 1),
            correct=torch.stack([self.right(gates) for gates in options], 1),
            tasks=tuple(example.task for example in self.examples),
        )

    @property
    def _labels(self) -> Tensor:
        return self.pairs[0].labels

    def _batches(self, gates: Tensor) -> list[Tensor]:
        if gates.shape != self.evidence.shape[:2]:
            raise ShapeError("gates of another shape than questions x sharers")
        starts = range(0, len(self), _BATCH_ROWS)
        return [torch.arange(start, min(start + _BATCH_ROWS, len(self))) for start in starts]

    def _fused(self, gates: Tensor, rows: Tensor) -> Past:
        own = self.pairs[0].own.select(rows)
        pairs = [pair.select(rows) for pair in self.pairs]
        return Receiver(self.receiver).fuse(
            own,
            [(fuser, pair.shared) for fuser, pair in zip(self.fusers, pairs, strict=True)],
            gates[rows],
            alignments=[pair.alignment for pair in pairs],
        )


def read_gate_trial(
    receiver: LanguageModel,
    sharers: Sequence[tuple[LanguageModel, Fuser]],
    examples: Sequence[FuserExample],
    *,
    holders: Sequence[Collection[int]],
) -> GateTrial:
    """Let a receiver and its sharers read questions.

    Parameters
    ----------
    receiver : LanguageModel
    sharers : sequence of (LanguageModel, Fuser)
        At least one; the fuser is of this sharer to this receiver.
    examples : sequence of FuserExample
        New to the fusers, or every sharer looks better than it is.
    holders : sequence of collection of int
        For each example, the sharers that can read its document.

    Raises
    ------
    FuserError
        If a fuser is of another pair.
    PromptTooLongError
    ShapeError
        If there are no sharers, or not one entry of `holders` an example.

    Notes
    -----
    *Privacy.* Runs at one place with all models and documents: for public questions, or in
    a simulation.

    Examples
    --------
    >>> from fedinfer_flower.kv.fuser import make_fuser
    >>> from fedinfer_flower.refine.fuser_training import default_spec
    >>> from fedinfer_flower.simulation.facts.families import FAMILIES, build
    >>> from fedinfer_flower.simulation.facts.prompts import FactPrompts
    >>> from fedinfer_flower.simulation.facts.world import FactWorld
    >>> world = FactWorld()
    >>> receiver, sharer = (
    ...     LanguageModel(*build(family, world), prompts=FactPrompts(world.words))
    ...     for family in FAMILIES[:2]
    ... )
    >>> fuser = make_fuser(default_spec(receiver, sharer, width=8)).eval()
    >>> fact = world.facts(world.gate_people[1])[0]
    >>> examples = [FuserExample(fact.question(), fact.value, task="fact")]
    >>> trial = read_gate_trial(receiver, [(sharer, fuser)], examples, holders=[()])
    >>> tuple(trial.gate_examples().losses.shape)
    (1, 2)
    """
    if not sharers or len(holders) != len(examples):
        raise ShapeError("a gate's trial has a sharer, and holders for each example")
    pairs, shown = [], []
    for j, (model, fuser) in enumerate(sharers):
        seen = [
            example if j in who else replace(example, document="")
            for example, who in zip(examples, holders, strict=True)
        ]
        share, aligned = fuser.spec.share, fuser.needs_alignment
        pairs.append(prepare_pair(receiver, model, seen, share, aligned=aligned))
        prompts = [model.prompts.ask(e.question, documents=e.documents) for e in seen]
        shown.append(share_prompts(model, prompts, _EVIDENCE_ONLY).evidence)
    return GateTrial(
        receiver=receiver,
        fusers=tuple(fuser for _, fuser in sharers),
        pairs=tuple(pairs),
        evidence=torch.stack(shown, 1),
        examples=tuple(examples),
    )
