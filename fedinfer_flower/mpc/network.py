"""What is public about a network: its layers and their sizes, never their weights.

Arrays are in torch's order: images (n, channels, height, width), convolution weights
(out, in, height, width), linear weights (out, in).
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Final, TypeAlias

import numpy as np
import numpy.typing as npt

from fedinfer_flower.errors import EnvelopeError, ModelError
from fedinfer_flower.wire import fields
from fedinfer_flower.wire.envelope import Json

__all__ = [
    "LAYERS",
    "AvgPool2d",
    "Conv2d",
    "Flatten",
    "Layer",
    "Linear",
    "MaxPool2d",
    "NetworkSpec",
    "ReLU",
]

Shape: TypeAlias = tuple[int, ...]

MAX_LAYERS: Final = 64
MAX_SIZE: Final = 1 << 16
MAX_ARRAY: Final = 4_000_000
"""Numbers in one array. One party's shares of it have 16 bytes a number and stay in one of
SPU's chunks of 128 MiB."""


@dataclass(frozen=True, kw_only=True)
class Linear:
    """``y = x W^T + b``."""

    kind: ClassVar[str] = "linear"
    inputs: int
    outputs: int
    bias: bool = True

    def output_shape(self, shape: Shape) -> Shape:
        """Return the shape of one output, or raise ModelError."""
        if shape != (self.inputs,):
            raise ModelError(f"a linear layer of {self.inputs} inputs gets shape {shape}")
        return (self.outputs,)

    def parameter_shapes(self) -> tuple[Shape, ...]:
        """Return the shapes of weight and bias."""
        weight = (self.outputs, self.inputs)
        return (weight, (self.outputs,)) if self.bias else (weight,)


@dataclass(frozen=True, kw_only=True)
class Conv2d:
    """Cross-correlation, zero padding, no dilation, no groups."""

    kind: ClassVar[str] = "conv2d"
    inputs: int
    outputs: int
    kernel_height: int
    kernel_width: int
    stride: int = 1
    padding: int = 0
    bias: bool = True

    def output_shape(self, shape: Shape) -> Shape:
        """Return the shape of one output, or raise ModelError."""
        if len(shape) != 3 or shape[0] != self.inputs:
            raise ModelError(f"a convolution of {self.inputs} channels gets shape {shape}")
        height, width = shape[1] + 2 * self.padding, shape[2] + 2 * self.padding
        return (
            self.outputs,
            *_windows(height, width, self.kernel_height, self.kernel_width, self.stride),
        )

    def parameter_shapes(self) -> tuple[Shape, ...]:
        """Return the shapes of weight and bias."""
        weight = (self.outputs, self.inputs, self.kernel_height, self.kernel_width)
        return (weight, (self.outputs,)) if self.bias else (weight,)


@dataclass(frozen=True, kw_only=True)
class ReLU:
    """``max(x, 0)``: a secure comparison for every number, the costly part of a network."""

    kind: ClassVar[str] = "relu"

    def output_shape(self, shape: Shape) -> Shape:
        """Return the shape that came in."""
        return shape

    def parameter_shapes(self) -> tuple[Shape, ...]:
        """Return nothing."""
        return ()


@dataclass(frozen=True, kw_only=True)
class AvgPool2d:
    """Mean over windows; no padding. Linear, hence nearly free."""

    kind: ClassVar[str] = "avgpool2d"
    kernel: int
    stride: int

    def output_shape(self, shape: Shape) -> Shape:
        """Return the shape of one output, or raise ModelError."""
        return _pooled(shape, self.kernel, self.stride)

    def parameter_shapes(self) -> tuple[Shape, ...]:
        """Return nothing."""
        return ()


@dataclass(frozen=True, kw_only=True)
class MaxPool2d:
    """Maximum over windows; no padding. A tournament of secure comparisons."""

    kind: ClassVar[str] = "maxpool2d"
    kernel: int
    stride: int

    def output_shape(self, shape: Shape) -> Shape:
        """Return the shape of one output, or raise ModelError."""
        return _pooled(shape, self.kernel, self.stride)

    def parameter_shapes(self) -> tuple[Shape, ...]:
        """Return nothing."""
        return ()


@dataclass(frozen=True, kw_only=True)
class Flatten:
    """All axes but the first become one, in torch's order."""

    kind: ClassVar[str] = "flatten"

    def output_shape(self, shape: Shape) -> Shape:
        """Return the product of the axes."""
        return (math.prod(shape),)

    def parameter_shapes(self) -> tuple[Shape, ...]:
        """Return nothing."""
        return ()


Layer: TypeAlias = Linear | Conv2d | ReLU | AvgPool2d | MaxPool2d | Flatten

LAYERS: Final[Mapping[str, type[Layer]]] = {
    cls.kind: cls for cls in (Linear, Conv2d, ReLU, AvgPool2d, MaxPool2d, Flatten)
}


@dataclass(frozen=True, kw_only=True)
class NetworkSpec:
    """The architecture of one owner's network: public, and agreed before weights are shared.

    Parameters
    ----------
    input_shape : tuple of int
        Of one query: (features,) or (channels, height, width).
    layers : tuple of Layer

    Raises
    ------
    ModelError
        If a layer does not fit the one before, or the end is not one row of logits.

    Privacy
    -------
    Everything here is public: number, kinds and sizes of the layers. Weights are not in it.

    Examples
    --------
    >>> spec = NetworkSpec(input_shape=(4,), layers=(Linear(inputs=4, outputs=3), ReLU()))
    >>> spec.n_classes, spec.parameter_shapes
    (3, ((3, 4), (3,)))
    >>> NetworkSpec.from_json(spec.to_json()) == spec
    True
    """

    input_shape: Shape
    layers: tuple[Layer, ...]

    def __post_init__(self) -> None:
        if not 1 <= len(self.layers) <= MAX_LAYERS:
            raise ModelError(f"a network has 1 to {MAX_LAYERS} layers, got {len(self.layers)}")
        if len(self.input_shape) not in (1, 3) or min(self.input_shape) < 1:
            raise ModelError(
                f"a query of shape {self.input_shape}",
                hint="input_shape is (features,) or (channels, height, width)",
            )
        self._require_small(self.input_shape)
        shape = self.input_shape
        for number, layer in enumerate(self.layers):
            try:
                shape = layer.output_shape(shape)
            except ModelError as exc:
                raise ModelError(f"layer {number}: {exc.message}", hint=exc.hint) from None
            self._require_small(shape)
            for parameter in layer.parameter_shapes():
                self._require_small(parameter)
        if len(shape) != 1 or shape[0] < 2:
            raise ModelError(
                f"the network ends in shape {shape}, not in one logit a class",
                hint="end with Flatten and Linear(..., n_classes)",
            )

    @property
    def n_classes(self) -> int:
        """Logits of one query."""
        shape = self.input_shape
        for layer in self.layers:
            shape = layer.output_shape(shape)
        return shape[0]

    @property
    def parameter_shapes(self) -> tuple[Shape, ...]:
        """Shapes of all weight arrays, in order."""
        return tuple(shape for layer in self.layers for shape in layer.parameter_shapes())

    @classmethod
    def from_torch(
        cls, model: Any, input_shape: Sequence[int]
    ) -> tuple[NetworkSpec, list[npt.NDArray[np.float32]]]:
        """Return (public architecture, weight arrays) of a ``torch.nn.Sequential``.

        Parameters
        ----------
        model : torch.nn.Sequential
            Of Linear, Conv2d, ReLU, AvgPool2d, MaxPool2d and Flatten; nested is fine.
        input_shape : sequence of int
            Of one query, without the axis of the batch.

        Raises
        ------
        ModelError
            Naming the layer that cannot be run on shares, and what to do about it.
        """
        from fedinfer_flower.mpc.from_torch import convert

        return convert(model, tuple(int(n) for n in input_shape))

    def require_weights(self, weights: Sequence[npt.NDArray[np.generic]]) -> None:
        """Require arrays of exactly the shapes that the layers need.

        Raises
        ------
        ModelError
            If they differ.
        """
        shapes = tuple(tuple(w.shape) for w in weights)
        if shapes != self.parameter_shapes:
            raise ModelError(f"weights of shapes {shapes}, expected {self.parameter_shapes}")

    def to_json(self) -> dict[str, Json]:
        """Return a JSON object."""
        layers = [{"kind": layer.kind, **dataclasses.asdict(layer)} for layer in self.layers]
        return {"input-shape": list(self.input_shape), "layers": layers}

    @classmethod
    def from_json(cls, value: Json) -> NetworkSpec:
        """Read what `to_json` wrote, trusting nothing.

        Raises
        ------
        EnvelopeError
            If it is not a network that this release can run.
        """
        if not isinstance(value, dict):
            raise EnvelopeError("a network is not an object")
        fields.exactly(value, "input-shape", "layers")
        shape, layers = value["input-shape"], value["layers"]
        if not isinstance(shape, list) or len(shape) > 3 or not isinstance(layers, list):
            raise EnvelopeError("a network without input shape or layers")
        if len(layers) > MAX_LAYERS:
            raise EnvelopeError(f"a network of more than {MAX_LAYERS} layers")
        sizes = tuple(fields.whole({"size": n}, "size", low=1, high=MAX_SIZE) for n in shape)
        try:
            return cls(input_shape=sizes, layers=tuple(_read_layer(layer) for layer in layers))
        except ModelError as exc:
            raise EnvelopeError(f"a network that cannot be: {exc.message}") from None

    @staticmethod
    def _require_small(shape: Shape) -> None:
        if min(shape) < 1 or max(shape) > MAX_SIZE or math.prod(shape) > MAX_ARRAY:
            raise ModelError(
                f"an array of shape {shape}: at most {MAX_ARRAY} numbers, {MAX_SIZE} an axis",
                hint="joint computation is for small networks; a layer became empty, or too large",
            )


def _read_layer(value: Json) -> Layer:
    if not isinstance(value, dict) or value.get("kind") not in LAYERS:
        raise EnvelopeError("a layer of unknown kind")
    cls = LAYERS[value["kind"]]
    names = [field.name for field in dataclasses.fields(cls)]
    fields.exactly(value, "kind", *names)
    known: dict[str, Any] = {
        name: fields.flag(value, name)
        if name == "bias"
        else fields.whole(value, name, low=0 if name == "padding" else 1, high=MAX_SIZE)
        for name in names
    }
    return cls(**known)


def _windows(height: int, width: int, tall: int, wide: int, stride: int) -> Shape:
    if tall > height or wide > width:
        raise ModelError(f"a window of {tall}x{wide} on an image of {height}x{width}")
    return ((height - tall) // stride + 1, (width - wide) // stride + 1)


def _pooled(shape: Shape, kernel: int, stride: int) -> Shape:
    if len(shape) != 3:
        raise ModelError(f"pooling gets shape {shape}, not (channels, height, width)")
    return (shape[0], *_windows(shape[1], shape[2], kernel, kernel, stride))
