"""The public architecture: read off torch exactly, or refused by name."""

from __future__ import annotations

import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedinfer_flower.errors import EnvelopeError, ModelError
from fedinfer_flower.mpc.network import (
    AvgPool2d,
    Conv2d,
    Flatten,
    Linear,
    MaxPool2d,
    NetworkSpec,
    ReLU,
)

torch = pytest.importorskip("torch", reason="needs the extra 'torch'")
nn = torch.nn


def lenet() -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(3, 6, 5),
        nn.ReLU(),
        nn.AvgPool2d(2),
        nn.Conv2d(6, 16, 5),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(400, 120),
        nn.ReLU(),
        nn.Dropout(0.5),
        nn.Sequential(nn.Linear(120, 84), nn.ReLU()),
        nn.Linear(84, 10, bias=False),
    )


def test_torch_network_becomes_layers_and_weights() -> None:
    spec, weights = NetworkSpec.from_torch(lenet(), (3, 32, 32))

    assert [layer.kind for layer in spec.layers] == [
        "conv2d", "relu", "avgpool2d", "conv2d", "relu", "maxpool2d", "flatten",
        "linear", "relu", "linear", "relu", "linear",
    ]  # fmt: skip
    assert spec.n_classes == 10
    assert [w.shape for w in weights] == list(spec.parameter_shapes)
    assert all(w.dtype == np.float32 for w in weights)


def test_weights_are_copies() -> None:
    model = nn.Sequential(nn.Linear(2, 2))
    _, weights = NetworkSpec.from_torch(model, (2,))
    with torch.no_grad():
        model[0].weight.add_(1.0)
    assert not np.array_equal(weights[0], model[0].weight.detach().numpy())


class OwnForward(nn.Sequential):
    def forward(self, x):
        return -super().forward(x)


@pytest.mark.parametrize(
    ("layer", "named"),
    [
        (nn.BatchNorm2d(3), "fold"),
        (nn.Softmax(dim=1), "leave it out"),
        (nn.Tanh(), "ReLU"),
        (nn.GELU(), "ReLU"),
        (nn.LeakyReLU(), "use Linear"),
        (nn.Conv2d(3, 3, 3, groups=3), "default groups"),
        (nn.Conv2d(3, 3, 3, dilation=2), "dilation"),
        (nn.Conv2d(3, 3, 3, padding="same"), "padding"),
        (nn.Conv2d(3, 3, 3, stride=(1, 2)), "stride"),
        (nn.Conv2d(3, 3, 3, padding=1, padding_mode="reflect"), "padding"),
        (nn.MaxPool2d(2, ceil_mode=True), "ceil_mode"),
        (nn.MaxPool2d(3, padding=1), "padding"),
        (nn.AvgPool2d(2, divisor_override=3), "divisor_override"),
        (nn.Flatten(2), "axes"),
        (OwnForward(nn.ReLU()), "Sequential"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, nn.Module) else value,
)
def test_layer_that_cannot_run_is_refused_with_advice(layer: nn.Module, named: str) -> None:
    model = nn.Sequential(layer, nn.Flatten(), nn.Linear(3 * 8 * 8, 2))
    with pytest.raises(ModelError) as caught:
        NetworkSpec.from_torch(model, (3, 8, 8))
    assert named in str(caught.value)
    assert type(layer).__name__ in str(caught.value) or "'0'" in str(caught.value)


def test_model_that_is_no_sequential_is_refused() -> None:
    with pytest.raises(ModelError, match=r"not a torch\.nn\.Sequential"):
        NetworkSpec.from_torch(nn.Linear(2, 2), (2,))


@pytest.mark.parametrize(
    ("shape", "layers", "text"),
    [
        ((4,), (Linear(inputs=5, outputs=2),), "layer 0"),
        ((4,), (Linear(inputs=4, outputs=1),), "one logit a class"),
        ((1, 4, 4), (Linear(inputs=16, outputs=2),), "layer 0"),
        ((1, 4, 4), (MaxPool2d(kernel=5, stride=1), Flatten()), "window"),
        ((4,), (AvgPool2d(kernel=2, stride=2),), "pooling"),
        ((1, 2, 2), (Conv2d(inputs=2, outputs=1, kernel_height=1, kernel_width=1),), "channels"),
        ((4, 4), (ReLU(),), "input_shape"),
        ((4,), (), "1 to 64 layers"),
        ((60_000,), (Linear(inputs=60_000, outputs=100),), "at most"),
    ],
)
def test_layers_that_do_not_fit_are_refused(shape: tuple, layers: tuple, text: str) -> None:
    with pytest.raises(ModelError, match=text):
        NetworkSpec(input_shape=shape, layers=layers)


def test_json_round_trip() -> None:
    spec, _ = NetworkSpec.from_torch(lenet(), (3, 32, 32))
    assert NetworkSpec.from_json(json.loads(json.dumps(spec.to_json()))) == spec


@pytest.mark.parametrize(
    "change",
    [
        {"layers": [{"kind": "softmax"}]},
        {"layers": [{"kind": "relu", "size": 1}]},
        {"layers": [{"kind": "linear", "inputs": 4, "outputs": 10**9, "bias": True}]},
        {"layers": [{"kind": "linear", "inputs": 4, "outputs": 3, "bias": 1}]},
        {"layers": "relu"},
        {"layers": [[]]},
        {"layers": [{"kind": "relu"}] * 65},
        {"input-shape": [4.0]},
        {"input-shape": [0]},
        {"extra": 1},
    ],
)
def test_foreign_network_is_refused(change: dict) -> None:
    valid = NetworkSpec(input_shape=(4,), layers=(Linear(inputs=4, outputs=3),)).to_json()
    with pytest.raises(EnvelopeError):
        NetworkSpec.from_json(valid | change)


@given(st.recursive(st.none() | st.integers() | st.text(), st.lists, max_leaves=5))
def test_junk_is_refused_with_a_typed_error(junk: object) -> None:
    with pytest.raises(EnvelopeError):
        NetworkSpec.from_json(junk)
