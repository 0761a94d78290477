"""The receiver's choice, for each question, between its own answer and each sharer's cache.

A gate sees four numbers a participant and no label: largest probability, entropy, margin
and probability of abstaining of the next token (`language.confidence.EVIDENCE`). Optionally
it sees whether answers agree.

Axes: B questions, J sharers.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Final, Self

import torch
from torch import Tensor

from fedinfer_flower.errors import FuserError, InvalidScoresError, InvalidValueError, ShapeError
from fedinfer_flower.registry import Registry

__all__ = ["ABSTAINS", "GATES", "Gate", "agreement", "make_gate", "usable"]

ABSTAINS: Final = 0.5
"""Who abstains with at least this probability has nothing to bring."""

_SLACK: Final = 1e-2
"""Evidence may have been rounded to sixteen bits on its way."""
_MAX_ENTROPY: Final = 25.0
"""Nats; a vocabulary of 2**32 tokens has 22."""


class Gate(ABC):
    """Base of all gates.

    Attributes
    ----------
    name : str
        Registered name.
    trainable : bool
        Whether the gate has to be trained for its receiver.

    Privacy
    -------
    Runs where the caches are fused: evidence discloses to that role how sure each sharer
    is of each question. Evidence is what a sharer says of itself. A sharer that claims to
    be certain is chosen; no gate can tell a liar from an expert. Where the own answer is
    taken at once, whoever relays messages sees that nobody was asked.
    """

    name: ClassVar[str] = ""
    trainable: ClassVar[bool] = False

    def choose(
        self,
        own: Tensor,
        sharers: Tensor,
        available: Tensor,
        agreement: Tensor | None = None,
    ) -> Tensor:
        """Choose the sharers to fuse; no 1 in a row is the receiver's own answer.

        Parameters
        ----------
        own : float tensor (B, 4)
            Evidence of the receiver.
        sharers : float tensor (B, J, 4)
            Evidence of each sharer; anything where it is not available.
        available : tensor (B, J)
            1 for a sharer that answered in time.
        agreement : float tensor (B, J), optional
            See `agreement`; gates that were trained without it ignore it.

        Returns
        -------
        chosen : float tensor (B, J)
            0 or 1. Never 1 for a sharer that is not available or whose evidence no model
            could have produced.

        Raises
        ------
        ShapeError
        InvalidScoresError
            If the receiver's own evidence is not finite or out of range.
        """
        device = own.device
        # A few numbers a question: faster on the processor, wherever the model runs.
        own, sharers, available = own.cpu().float(), sharers.cpu().float(), available.cpu()
        agreement = None if agreement is None else agreement.cpu().float()
        seen = usable(own, sharers, available, agreement)
        # What an absent or malformed sharer left in its row must not reach the others'.
        sharers = torch.where(seen[..., None], sharers, 0.0)
        agreement = None if agreement is None else torch.where(seen, agreement, 0.0)
        return (self._pick(own, sharers, seen, agreement) & seen).float().to(device)

    def own_suffices(self, own: Tensor) -> Tensor:
        """Return, before anybody is asked, where the own answer is taken; bool (B,)."""
        return torch.zeros(len(own), dtype=torch.bool)

    @abstractmethod
    def _pick(self, own: Tensor, sharers: Tensor, seen: Tensor, agreement: Tensor | None) -> Tensor:
        """Return the choice as bool (B, J); evidence is checked, 0 where not `seen`."""

    def options(self) -> dict[str, Any]:
        """Return the options that make the same gate elsewhere, fit for JSON."""
        return {}

    def tensors(self) -> dict[str, Tensor]:
        """Return the trained weights by name."""
        return {}

    @classmethod
    def restore(cls, options: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Self:
        """Make the gate that `options` and `tensors` came from.

        Raises
        ------
        FuserError
            If they do not fit this kind of gate.
        """
        if tensors:
            raise FuserError(f"gate {cls.name!r} has no weights, its file has")
        try:
            return cls(**options)
        except TypeError:
            raise FuserError(f"gate {cls.name!r} has other options than its file") from None


GATES: Registry[Gate] = Registry(
    kind="gate", package="fedinfer_flower.kv.gates", group="fedinfer_flower.gates"
)


def make_gate(name: str, **options: Any) -> Gate:
    """Return a gate that needs no training.

    Raises
    ------
    UnknownNameError
    InvalidValueError
        If the gate has to be trained, or has no such option.

    Examples
    --------
    >>> make_gate("top-k", k=2).options()
    {'k': 2}
    """
    kind = GATES.get(name)
    if kind.trainable:
        raise InvalidValueError(
            f"gate {name!r} has to be trained for its receiver",
            hint="read a trained one with load_gate, or use 'top-k' or 'none'",
        )
    try:
        return kind(**options)
    except TypeError:
        raise InvalidValueError(f"gate {name!r} has no such option") from None


def usable(
    own: Tensor, sharers: Tensor, available: Tensor, agreement: Tensor | None = None
) -> Tensor:
    """Return which sharers are available with evidence that a model can have; bool (B, J).

    A sharer's malformed evidence costs the sharer its place and nobody else anything.

    Raises
    ------
    ShapeError
    InvalidScoresError
        If the receiver's own evidence is malformed: its model is broken.
    """
    if own.ndim != 2 or sharers.ndim != 3 or own.shape[1] != 4 or sharers.shape[2] != 4:
        raise ShapeError("a gate takes evidence of shapes (B, 4) and (B, J, 4)")
    rows = tuple(sharers.shape[:2])
    if rows[0] != len(own) or tuple(available.shape) != rows:
        raise ShapeError("a gate takes evidence and availability of the same questions")
    if agreement is not None and tuple(agreement.shape) != rows:
        raise ShapeError("a gate takes one agreement a question and sharer")
    if not bool(_possible(own).all()):
        raise InvalidScoresError(
            "the receiver's own evidence is not finite or out of range",
            hint="check the receiver's model: its logits hold NaN or infinity",
        )
    seen = (available > 0) & _possible(sharers)
    if agreement is not None:
        seen &= (agreement >= 0.0) & (agreement <= 1.0)
    return seen


def _possible(evidence: Tensor) -> Tensor:
    high = torch.tensor([1.0, _MAX_ENTROPY, 1.0, 1.0]) + _SLACK
    return ((evidence >= -_SLACK) & (evidence <= high)).all(-1)


def agreement(own: Sequence[str], sharers: Sequence[Sequence[str]], available: Tensor) -> Tensor:
    """Return, for each sharer, the share of the other participants that say the same.

    Parameters
    ----------
    own : sequence of str
        The receiver's answers, or first words of them; case and outer blanks do not count.
    sharers : sequence of sequences of str
        ``sharers[b][j]``, the answer of sharer j to question b.
    available : tensor (B, J)

    Returns
    -------
    agreement : float tensor (B, J)
        In [0, 1]; 0 for a sharer that is not available.

    Examples
    --------
    >>> agreement(["Rome"], [["rome", "Paris"]], torch.ones(1, 2)).tolist()
    [[0.5, 0.0]]
    """
    out = torch.zeros(available.shape)
    for b, (mine, theirs) in enumerate(zip(own, sharers, strict=True)):
        said = [text.strip().casefold() for text in theirs]
        present = [j for j in range(len(said)) if available[b, j] > 0]
        for j in present:
            others = [said[i] for i in present if i != j] + [mine.strip().casefold()]
            out[b, j] = sum(text == said[j] for text in others) / len(others)
    return out
