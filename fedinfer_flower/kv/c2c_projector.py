"""The network of one receiver layer in a published C2C fuser.

Written from the published layout: names and shapes of the weights are those of the
checkpoints, the code is not.

Axes: B prompts, Hs and Ht key-value heads, T tokens, Ds and Dt head sizes, W width; s is the
sharer's ("source"), t the receiver's ("target").
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, Final

import torch
from torch import Tensor, nn

from fedinfer_flower.errors import FuserError

__all__ = ["DTYPES", "C2CProjector", "ProjectorShape"]

DTYPES: Final = ("float32", "bfloat16", "float16")
_SIDES: Final = ("key", "value")
_EPSILON: Final = 1e-6
_TINY: Final = 1e-20
_BOUNDS: Final = {
    "source_dim": (1, 65_536),
    "target_dim": (1, 65_536),
    "source_num_heads": (1, 1024),
    "target_num_heads": (1, 1024),
    "hidden_dim": (1, 16_384),
    "intermediate_dim": (1, 65_536),
    "num_layers": (3, 9),
    "anneal_steps": (1, 1 << 31),
}


@dataclass(frozen=True, kw_only=True)
class ProjectorShape:
    """Arguments of one network, under their published names.

    Parameters
    ----------
    source_dim, target_dim : int
        Head sizes of sharer and receiver.
    source_num_heads, target_num_heads : int
        Key-value heads.
    hidden_dim, intermediate_dim : int
        Width of the network, and within its feed-forward blocks.
    num_layers : int
        At least 3: the block that both branches share, those of the entry branch, and the
        one that gives it out.
    dropout : float
        In training only.
    initial_temperature, final_temperature : float
    anneal_steps : int
        How the published training lowered the temperature; not used in inference.
    zero_init : bool
        How the published training began; not used in inference.
    dtype : str
        In which the weights were trained: ``"float32"``, ``"bfloat16"`` or ``"float16"``.

    Raises
    ------
    FuserError

    Examples
    --------
    >>> shape = ProjectorShape.from_dict({
    ...     "source_dim": 64, "target_dim": 128, "source_num_heads": 2, "target_num_heads": 8,
    ...     "dtype": {"__type__": "torch.dtype", "value": "bfloat16"}})
    >>> shape.hidden_dim, shape.num_layers, shape.dtype
    (1024, 3, 'bfloat16')
    """

    source_dim: int
    target_dim: int
    source_num_heads: int
    target_num_heads: int
    hidden_dim: int = 1024
    intermediate_dim: int = 1024
    num_layers: int = 3
    dropout: float = 0.1
    initial_temperature: float = 1.0
    final_temperature: float = 0.001
    anneal_steps: int = 1929
    zero_init: bool = False
    dtype: str = "float32"

    def __post_init__(self) -> None:
        for name, (least, most) in _BOUNDS.items():
            value = getattr(self, name)
            if type(value) is not int or not least <= value <= most:
                raise FuserError(f"a C2C network whose {name} is not in [{least}, {most}]")
        for name in ("initial_temperature", "final_temperature"):
            value = getattr(self, name)
            if type(value) not in (int, float) or not 0.0 < value <= 1e6:
                raise FuserError(f"a C2C network whose {name} is not in (0, 1e6]")
        if type(self.dropout) not in (int, float) or not 0.0 <= self.dropout < 1.0:
            raise FuserError("a C2C network whose dropout is not in [0, 1)")
        if type(self.zero_init) is not bool:
            raise FuserError("a C2C network whose zero_init is neither true nor false")
        if self.dtype not in DTYPES:
            raise FuserError(f"a C2C network of a dtype that is not one of {', '.join(DTYPES)}")

    @classmethod
    def from_dict(cls, values: Any) -> ProjectorShape:
        """Read the ``init_args`` of a ``projector_<i>.json``.

        Raises
        ------
        FuserError
            If one is unknown, out of its range, or one without a default is missing.
        """
        if not isinstance(values, Mapping):
            raise FuserError("arguments of a C2C network that are no JSON object")
        known = {f.name for f in fields(cls)}
        needed = {name for name in known if name.startswith(("source", "target"))}
        if not needed <= set(values) <= known:
            raise FuserError("a C2C network that lacks an argument or has an unknown one")
        given = dict(values)
        if "dtype" in given:
            given["dtype"] = _dtype_name(given["dtype"])
        return cls(**given)


def _dtype_name(value: Any) -> str:
    if not isinstance(value, Mapping) or set(value) != {"__type__", "value"}:
        raise FuserError("a C2C network whose dtype is not encoded as published")
    if value["__type__"] != "torch.dtype" or not isinstance(value["value"], str):
        raise FuserError("a C2C network whose dtype is not encoded as published")
    return value["value"]


class _Block(nn.Module):
    """``x + dropout(W2 gelu(W1 rmsnorm(x)))``, without biases."""

    def __init__(self, width: int, inner: int, dropout: float) -> None:
        super().__init__()
        self.norm = nn.RMSNorm(width, eps=_EPSILON)
        self.w1 = nn.Linear(width, inner, bias=False)
        self.w2 = nn.Linear(inner, width, bias=False)
        self.dropout = dropout

    def forward(self, x: Tensor) -> Tensor:
        update = self.w2(nn.functional.gelu(self.w1(self.norm(x))))
        return x + nn.functional.dropout(update, self.dropout, self.training)


class _Stack(nn.Module):
    """Blocks one after the other; a module of its own for the published names."""

    def __init__(self, count: int, width: int, inner: int, dropout: float) -> None:
        super().__init__()
        self.blocks = nn.Sequential(*(_Block(width, inner, dropout) for _ in range(count)))

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.blocks(x)
        return out


class C2CProjector(nn.Module):
    """What is added to one receiver layer: gate times strength times projected entry.

    Keys and values have separate paths of one form. A path reads a token's features of both
    models, all heads side by side, sharer first. One block, then two branches: one gives a
    strength for each of the receiver's heads, the other the entry.

    Parameters
    ----------
    shape : ProjectorShape

    References
    ----------
    Fu et al., "Cache-to-Cache: Direct Semantic Communication Between Large Language Models",
    2025, and its published checkpoints.

    Examples
    --------
    >>> shape = ProjectorShape(source_dim=2, target_dim=4, source_num_heads=1,
    ...                        target_num_heads=2, hidden_dim=8, intermediate_dim=8)
    >>> net = C2CProjector(shape).eval()
    >>> source, target = [torch.ones(1, 1, 3, 2)] * 2, [torch.ones(1, 2, 3, 4)] * 2
    >>> keys, values = net(source, target)  # gates start closed
    >>> tuple(keys.shape), bool((values == 0).all())
    ((1, 2, 3, 4), True)
    """

    gate_temperature: Tensor

    def __init__(self, shape: ProjectorShape) -> None:
        super().__init__()
        self.shape = shape
        width, inner, dropout = shape.hidden_dim, shape.intermediate_dim, shape.dropout
        out = shape.target_num_heads * shape.target_dim
        features = shape.source_num_heads * shape.source_dim + out
        for side in _SIDES:
            self.add_module(f"{side}_in", nn.Linear(features, width))
            self.add_module(f"{side}_mlp1", _Stack(1, width, inner, dropout))
            self.add_module(f"{side}_scalar_mlp2", _Stack(1, width, width, dropout))
            self.add_module(f"{side}_scalar_head", nn.Linear(width, shape.target_num_heads))
            blocks = _Stack(shape.num_layers - 2, width, inner, dropout)
            self.add_module(f"{side}_proj_mlp2", blocks)
            self.add_module(f"{side}_proj_out", nn.Linear(width, out))
            self.register_parameter(f"{side}_gate_logit", nn.Parameter(torch.zeros(())))
        # Published with the weights; the fuser's own temperature is what a trainer sets.
        self.register_buffer("gate_temperature", torch.tensor(float(shape.initial_temperature)))

    def forward(
        self,
        source: tuple[Tensor, Tensor] | list[Tensor],
        target: tuple[Tensor, Tensor] | list[Tensor],
        *,
        temperature: float = 1.0,
    ) -> tuple[Tensor, Tensor]:
        """Return what to add to the receiver's keys and values.

        Parameters
        ----------
        source : keys and values (B, Hs, T, Ds)
            Of the sharer's token that belongs to each of the receiver's; keys rotated.
        target : keys and values (B, Ht, T, Dt)
            Keys rotated.
        temperature : float
            Of the gates in training. In evaluation they are hard: open above a logit of 0.

        Returns
        -------
        keys, values : tensors (B, Ht, T, Dt)
        """
        both = zip(_SIDES, source, target, strict=True)
        keys, values = (self._path(side, s, t, temperature) for side, s, t in both)
        return keys, values

    def _path(self, side: str, source: Tensor, target: Tensor, temperature: float) -> Tensor:
        n, heads, t, size = target.shape

        def part(name: str) -> Any:
            return getattr(self, f"{side}_{name}")

        read = torch.cat([x.transpose(1, 2).reshape(n, t, -1) for x in (source, target)], -1)
        mixed = part("mlp1")(part("in")(read.to(part("in").weight.dtype)))
        strength = torch.sigmoid(part("scalar_head")(part("scalar_mlp2")(mixed)))
        entry = part("proj_out")(part("proj_mlp2")(mixed)).view(n, t, heads, size).transpose(1, 2)
        scale = strength.transpose(1, 2)[..., None]
        scaled: Tensor = self._gate(part("gate_logit"), scale, temperature) * scale * entry
        return scaled

    def _gate(self, logit: Tensor, like: Tensor, temperature: float) -> Tensor:
        """Return the gate, one number in evaluation, one a token and head in training."""
        if not self.training:
            return (logit > 0).to(like.dtype)
        # One-sided Gumbel noise, as published; it trains, and protects nothing.
        noise = -torch.log(-torch.log(torch.rand_like(like) + _TINY) + _TINY)
        return torch.sigmoid((logit + noise) / temperature)
