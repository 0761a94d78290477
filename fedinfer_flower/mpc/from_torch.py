"""From a ``torch.nn.Sequential`` to a public architecture and the weights that stay secret."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from fedinfer_flower.errors import ModelError
from fedinfer_flower.mpc.network import (
    AvgPool2d,
    Conv2d,
    Flatten,
    Layer,
    Linear,
    MaxPool2d,
    NetworkSpec,
    ReLU,
)
from fedinfer_flower.privacy.base import optional_module

__all__ = ["convert"]

_ADVICE: Final = {
    "BatchNorm": "fold it into the layer before: torch.nn.utils.fusion.fuse_conv_bn_eval",
    "Softmax": "leave it out: the rules take logits",
    "LogSoftmax": "leave it out: the rules take logits",
    "Tanh": "train with ReLU: other activations are costly and inexact on shares",
    "Sigmoid": "train with ReLU: other activations are costly and inexact on shares",
    "GELU": "train with ReLU: other activations are costly and inexact on shares",
    "AdaptiveAvgPool2d": "write the same as AvgPool2d with a fixed kernel",
}
_SUPPORTED: Final = "use Linear, Conv2d, ReLU, AvgPool2d, MaxPool2d and Flatten"


def convert(
    model: Any, input_shape: tuple[int, ...]
) -> tuple[NetworkSpec, list[npt.NDArray[np.float32]]]:
    """Return (architecture, weights); see `NetworkSpec.from_torch`."""
    torch = optional_module("torch", extra="torch")
    layers: list[Layer] = []
    weights: list[npt.NDArray[np.float32]] = []
    for name, module in _leaves(model, torch.nn, prefix=""):
        # Dropout does nothing when a network answers.
        if isinstance(module, torch.nn.Identity | torch.nn.Dropout | torch.nn.Dropout2d):
            continue
        layer = _layer(name, module, torch.nn)
        layers.append(layer)
        tensors = [module.weight, module.bias] if layer.parameter_shapes() else []
        weights += [t.detach().cpu().float().numpy().copy() for t in tensors if t is not None]
    spec = NetworkSpec(input_shape=input_shape, layers=tuple(layers))
    spec.require_weights(weights)
    return spec, weights


def _leaves(model: Any, nn: Any, *, prefix: str) -> Iterator[tuple[str, Any]]:
    # A subclass may have a forward of its own, which its children do not tell.
    if not isinstance(model, nn.Sequential) or type(model).forward is not nn.Sequential.forward:
        raise ModelError(
            f"a {type(model).__name__} is not a torch.nn.Sequential",
            hint="write the network as Sequential: what its forward does cannot be read off it",
        )
    for name, child in model.named_children():
        if isinstance(child, nn.Sequential):
            yield from _leaves(child, nn, prefix=f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", child


def _layer(name: str, module: Any, nn: Any) -> Layer:
    match type(module):
        case nn.Linear:
            return Linear(
                inputs=module.in_features,
                outputs=module.out_features,
                bias=module.bias is not None,
            )
        case nn.Conv2d:
            return _conv(name, module)
        case nn.ReLU:
            return ReLU()
        case nn.AvgPool2d | nn.MaxPool2d:
            return _pool(name, module, nn)
        case nn.Flatten:
            _require(name, module, (module.start_dim, module.end_dim) == (1, -1), "its axes")
            return Flatten()
    kind = type(module).__name__
    advice = next((text for key, text in _ADVICE.items() if kind.startswith(key)), _SUPPORTED)
    raise ModelError(f"layer {name!r} is a {kind}, which cannot run on shares", hint=advice)


def _conv(name: str, module: Any) -> Conv2d:
    _require(name, module, module.groups == 1, "groups")
    _require(name, module, module.dilation == (1, 1), "dilation")
    _require(name, module, module.padding_mode == "zeros", "padding_mode")
    _require(name, module, not isinstance(module.padding, str), "a named padding")
    return Conv2d(
        inputs=module.in_channels,
        outputs=module.out_channels,
        kernel_height=module.kernel_size[0],
        kernel_width=module.kernel_size[1],
        stride=_square(name, module, module.stride, "stride"),
        padding=_square(name, module, module.padding, "padding"),
        bias=module.bias is not None,
    )


def _pool(name: str, module: Any, nn: Any) -> AvgPool2d | MaxPool2d:
    _require(name, module, not module.ceil_mode, "ceil_mode")
    _require(name, module, module.padding in (0, (0, 0)), "padding")
    kernel = _square(name, module, module.kernel_size, "kernel_size")
    stride = _square(name, module, module.stride, "stride")
    if type(module) is nn.MaxPool2d:
        _require(name, module, module.dilation in (1, (1, 1)), "dilation")
        _require(name, module, not module.return_indices, "return_indices")
        return MaxPool2d(kernel=kernel, stride=stride)
    _require(name, module, module.divisor_override is None, "divisor_override")
    return AvgPool2d(kernel=kernel, stride=stride)


def _square(name: str, module: Any, value: Any, what: str) -> int:
    if isinstance(value, int):
        return value
    _require(name, module, len(set(value)) == 1, f"a {what} that differs by axis")
    return int(value[0])


def _require(name: str, module: Any, fits: bool, what: str) -> None:
    if not fits:
        raise ModelError(
            f"layer {name!r}: {type(module).__name__} with {what} other than the default"
            " cannot run on shares",
            hint=_SUPPORTED + ", with default groups, dilation and padding mode",
        )
