"""A small network that compares each sharer with the receiver's own answer.

Axes: B questions, J sharers.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Final, Self

import torch
from torch import Tensor, nn

from fedinfer_flower.errors import FuserError, InvalidValueError
from fedinfer_flower.kv.gate import ABSTAINS, GATES, Gate

__all__ = ["GateNetwork", "LearnedGate", "LearnedGateSpec"]

_INPUTS: Final = 4 + 4 + 2
_CLAMP: Final = 5.0
"""Deviations; what lies further out was not seen in training."""


@dataclass(frozen=True, kw_only=True)
class LearnedGateSpec:
    """Size of the network, and the thresholds of the guard.

    Parameters
    ----------
    width : int
        Of the two hidden layers, in [1, 1024].
    margin : float, optional
        Log-odds against the own answer that a sharer must exceed, at least 0. None accepts
        nobody: the value of a gate that was not calibrated, or did not pass.
    own_probability : float, optional
        The own answer is taken at once where its largest probability is at least this. None
        for never.
    own_abstention : float
        ... and where its probability of abstaining is at most this.
    uses_agreement : bool
        Whether agreement was known in training.
    """

    width: int = 32
    margin: float | None = None
    own_probability: float | None = None
    own_abstention: float = 0.1
    uses_agreement: bool = False

    def __post_init__(self) -> None:
        if type(self.width) is not int or not 1 <= self.width <= 1024:
            raise InvalidValueError("width of a gate is a whole number in [1, 1024]")
        if type(self.uses_agreement) is not bool:
            raise InvalidValueError("uses_agreement of a gate is true or false")
        for name, high in (
            ("margin", math.inf),
            ("own_probability", 1.0 + 1e-6),
            ("own_abstention", 1.0),
        ):
            value = getattr(self, name)
            if value is None and name != "own_abstention":
                continue
            number = isinstance(value, int | float) and not isinstance(value, bool)
            if not number or not (math.isfinite(value) and 0.0 <= value <= high):
                raise InvalidValueError(f"{name} of a gate is a number of its range")


class GateNetwork(nn.Module):
    """Score every sharer against the own answer; the order of sharers does not matter.

    Inputs of sharer j: its evidence, the receiver's, its agreement and whether agreement is
    known. Evidence is in standard deviations of the training data. The evidence of *other*
    sharers is no input: trained where exactly one of them knows each answer, a network that
    saw it took two sharers that both know for a contradiction, and stayed alone.
    """

    mean: Tensor
    scale: Tensor

    def __init__(self, width: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Linear(_INPUTS, width),
            nn.GELU(),
            nn.Linear(width, width),
            nn.GELU(),
            nn.Linear(width, 1),
        )
        self.register_buffer("mean", torch.zeros(4))
        self.register_buffer("scale", torch.ones(4))

    def forward(self, own: Tensor, sharers: Tensor, agreement: Tensor | None = None) -> Tensor:
        """Return the log-odds of each sharer; (B, J)."""
        rows, j = sharers.shape[:2]
        mine, theirs = (
            ((x - self.mean) / self.scale).clamp(-_CLAMP, _CLAMP) for x in (own, sharers)
        )
        if agreement is None:
            said = torch.zeros(rows, j, 2)
        else:
            # A negative agreement stands for "not known".
            known = (agreement >= 0.0).float()
            said = torch.stack([agreement * known, known], -1)
        inputs = torch.cat([theirs, mine[:, None].expand(rows, j, 4), said], -1)
        scores: Tensor = self.layers(inputs).squeeze(-1)
        return scores


@GATES.register("learned")
class LearnedGate(Gate):
    """Fuse the one sharer whose expected loss is least, if the guard lets it pass.

    The guard: (1) where the receiver is sure and does not abstain, its own answer is taken
    at once; (2) a sharer that abstains is never taken, so if all abstain the receiver's own
    answer stands; (3) a sharer must beat the own answer by a calibrated margin. A gate that
    was not calibrated takes nobody.

    Parameters
    ----------
    spec : LearnedGateSpec, optional
    network : GateNetwork, optional
        Default one with small random weights.

    Examples
    --------
    >>> own = torch.tensor([[0.5, 1.0, 0.1, 0.0]])
    >>> LearnedGate().choose(own, own[:, None], torch.ones(1, 1)).tolist()
    [[0.0]]
    """

    trainable = True

    def __init__(
        self, spec: LearnedGateSpec | None = None, network: GateNetwork | None = None
    ) -> None:
        self.spec = spec or LearnedGateSpec()
        self.network = network or GateNetwork(self.spec.width)
        self.network.eval()

    def own_suffices(self, own: Tensor) -> Tensor:
        """Return where the receiver is sure enough to ask nobody; bool (B,)."""
        if self.spec.own_probability is None:
            return super().own_suffices(own)
        sure = own[:, 0] >= self.spec.own_probability
        return sure & (own[:, 3] <= self.spec.own_abstention)

    @torch.no_grad()
    def log_odds(
        self, own: Tensor, sharers: Tensor, seen: Tensor, agreement: Tensor | None = None
    ) -> Tensor:
        """Return each sharer's log-odds against the own answer (B, J), after the guard.

        Minus infinity where a sharer cannot be taken, whatever the margin.
        """
        known = agreement if self.spec.uses_agreement else None
        scores: Tensor = self.network(own, sharers, known)
        barred = ~seen | (sharers[..., 3] >= ABSTAINS) | self.own_suffices(own)[:, None]
        return scores.masked_fill(barred, -math.inf)

    def _pick(self, own: Tensor, sharers: Tensor, seen: Tensor, agreement: Tensor | None) -> Tensor:
        chosen = torch.zeros_like(seen)
        if self.spec.margin is None or not seen.shape[1]:
            return chosen
        scores = self.log_odds(own, sharers, seen, agreement)
        best = scores.max(dim=1, keepdim=True)
        return chosen.scatter_(1, best.indices, best.values > self.spec.margin)

    def options(self) -> dict[str, Any]:
        """Return the fields of the spec."""
        return asdict(self.spec)

    def tensors(self) -> dict[str, Tensor]:
        """Return the network's weights and the scales of its inputs."""
        return {k: v.detach().clone() for k, v in self.network.state_dict().items()}

    @classmethod
    def restore(cls, options: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Self:
        """Make the gate from spec and weights; see `Gate.restore`."""
        if set(options) != set(LearnedGateSpec.__dataclass_fields__):
            raise FuserError("a gate that lacks an option or has an unknown one")
        try:
            spec = LearnedGateSpec(**options)
        except InvalidValueError as exc:
            raise FuserError(exc.message) from None
        network = GateNetwork(spec.width)
        want = network.state_dict()
        same = set(want) == set(tensors) and all(
            tensors[k].shape == v.shape and tensors[k].dtype == v.dtype for k, v in want.items()
        )
        if not same:
            raise FuserError("a gate whose weights have other names, shapes or types than its spec")
        if not all(bool(torch.isfinite(t).all()) for t in tensors.values()):
            raise FuserError("a gate with weights that are not finite")
        if not bool((tensors["scale"] > 0.0).all()):
            raise FuserError("a gate whose input scales are not positive")
        network.load_state_dict(dict(tensors))
        return cls(spec, network)
