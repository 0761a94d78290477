"""What a model must be made of: one or two affine layers with an activation between them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Final

import numpy as np

from fedinfer_flower.encrypted_query.polynomial import Activation
from fedinfer_flower.ensemble.base import Array
from fedinfer_flower.errors import ModelError

__all__ = ["Affine", "Stack", "sklearn_stack", "square", "torch_stack"]

_OTHER: Final = (
    "train a LogisticRegression or an MLPClassifier with one hidden layer on this model's own"
    " predictions, or use protection 'he', under which sites see the query"
)


def square(values: Array) -> Array:
    """Return the squares: the one activation that needs no fit."""
    return np.square(values)


@dataclass(frozen=True, kw_only=True, eq=False)
class Affine:
    """``x W + b``.

    Parameters
    ----------
    weights : float array of shape (n_in, n_out)
    bias : float array of shape (n_out,)
    """

    weights: Array
    bias: Array

    def __post_init__(self) -> None:
        if not (np.isfinite(self.weights).all() and np.isfinite(self.bias).all()):
            raise ModelError("the model has weights that are NaN or infinite")

    def __call__(self, inputs: Array) -> Array:
        """Evaluate in clear."""
        return np.asarray(inputs @ self.weights + self.bias)

    def then(self, other: Affine) -> Affine:
        """Return both as one layer."""
        return Affine(weights=self.weights @ other.weights, bias=other(self.bias))


@dataclass(frozen=True, kw_only=True, eq=False)
class Stack:
    """A model in layers.

    Parameters
    ----------
    first : Affine
    activation : callable, optional
        Elementwise; None for a linear model.
    second : Affine, optional
    kind : str
    """

    first: Affine
    activation: Activation | None = None
    second: Affine | None = None
    kind: str = ""

    def logits(self, inputs: Array) -> Array:
        """Return the original model's logits in clear."""
        out = self.first(inputs)
        if self.activation is not None and self.second is not None:
            out = self.second(self.activation(out))
        return out


def _refuse(what: str, why: str, hint: str = _OTHER) -> ModelError:
    return ModelError(f"{what} cannot answer encrypted queries: {why}", hint=hint)


# -- scikit-learn ------------------------------------------------------------------------

_LINEAR: Final = ("LogisticRegression", "LinearDiscriminantAnalysis")
_SKLEARN_ACTIVATIONS: Final[dict[str, Activation]] = {
    "relu": lambda h: np.maximum(h, 0.0),
    "tanh": np.tanh,
    "logistic": lambda h: 0.5 * (1.0 + np.tanh(h / 2.0)),
}


def sklearn_stack(model: Any) -> Stack:
    """Take the layers out of a fitted scikit-learn classifier.

    Raises
    ------
    ModelError
        If it is not a `LogisticRegression`, `LinearDiscriminantAnalysis` or `MLPClassifier`
        with one hidden layer, alone or behind `StandardScaler`, `MinMaxScaler`s.
    """
    kind = type(model).__name__
    if kind == "Pipeline":
        *before, last = [step for _, step in model.steps]
        stack = sklearn_stack(last)
        for step in reversed(before):
            if step != "passthrough":
                stack = Stack(
                    first=_scaler(step).then(stack.first),
                    activation=stack.activation,
                    second=stack.second,
                    kind=stack.kind,
                )
        return stack
    if getattr(model, "classes_", None) is None:
        raise _refuse(f"a {kind}", "it is not fitted", "fit it before load_model returns it")
    if kind in _LINEAR:
        if getattr(model, "multi_class", None) == "ovr" and len(model.classes_) > 2:
            raise _refuse(f"a {kind} of one against the rest", "its normalisation is no logit")
        return Stack(
            first=_both_classes(Affine(weights=model.coef_.T, bias=model.intercept_)), kind=kind
        )
    if kind == "MLPClassifier":
        return _mlp(model)
    raise _refuse(f"a {kind}", "it is neither linear nor a network with one hidden layer")


def _mlp(model: Any) -> Stack:
    layers = [
        Affine(weights=np.asarray(weights, float), bias=np.asarray(bias, float))
        for weights, bias in zip(model.coefs_, model.intercepts_, strict=True)
    ]
    if model.out_activation_ not in {"softmax", "logistic"} or np.ndim(model.classes_[0]):
        raise _refuse("an MLPClassifier with several labels a row", "one class a row is expected")
    if model.out_activation_ == "logistic":
        layers[-1] = _both_classes(layers[-1])
    if model.activation == "identity":
        whole = layers[0]
        for layer in layers[1:]:
            whole = whole.then(layer)
        return Stack(first=whole, kind="MLPClassifier")
    if len(layers) != 2:
        raise _refuse(
            f"an MLPClassifier with {len(layers) - 1} hidden layers",
            "the parameters hold one squaring",
            "use hidden_layer_sizes=(n,), with a wider layer",
        )
    return Stack(
        first=layers[0],
        activation=_SKLEARN_ACTIVATIONS[model.activation],
        second=layers[1],
        kind="MLPClassifier",
    )


def _both_classes(layer: Affine) -> Affine:
    # One column z for two classes: logits -z/2 and z/2 have the same softmax.
    if layer.weights.shape[1] != 1:
        return layer
    halves = np.array([[-0.5, 0.5]])
    return Affine(weights=layer.weights @ halves, bias=layer.bias @ halves)


def _scaler(step: Any) -> Affine:
    kind = type(step).__name__
    if kind == "StandardScaler":
        n = step.n_features_in_
        scale = np.ones(n) if step.scale_ is None else np.asarray(step.scale_)
        mean = np.zeros(n) if step.mean_ is None else np.asarray(step.mean_)
        return Affine(weights=np.diag(1.0 / scale), bias=-mean / scale)
    if kind == "MinMaxScaler" and not step.clip:
        return Affine(weights=np.diag(step.scale_), bias=np.asarray(step.min_))
    raise _refuse(
        f"a pipeline with a {kind}",
        "the step is not affine, or not one that is known here",
        "let the querier apply it before it encrypts, or use StandardScaler",
    )


# -- torch -------------------------------------------------------------------------------

_IGNORED: Final = ("Identity", "Dropout", "Flatten")
_TORCH_ACTIVATIONS: Final = (
    *("ReLU", "LeakyReLU", "ELU", "GELU", "SiLU", "Tanh", "Sigmoid", "Softplus"),
)


def torch_stack(model: Any) -> Stack:
    """Take the layers out of a ``torch.nn.Sequential`` of `Linear` and one activation.

    A module without parameters that squares its input is taken as the square activation.

    Raises
    ------
    ModelError
        If it is made of anything else.
    """
    kind = type(model).__name__
    if kind != "Sequential":
        raise _refuse(
            f"a torch module {kind}",
            "only its author knows the order of its layers",
            "return torch.nn.Sequential(Linear, activation, Linear)",
        )
    parts: list[Affine | Activation] = []
    for layer in model:
        name = type(layer).__name__
        if name == "Linear":
            affine = _linear(layer)
            before = parts[-1] if parts else None
            if isinstance(before, Affine):
                parts[-1] = before.then(affine)
            else:
                parts.append(affine)
        elif name in _TORCH_ACTIVATIONS or _squares(layer):
            parts.append(square if _squares(layer) else _elementwise(layer))
        elif name not in _IGNORED:
            why = "it compares or divides" if "oftmax" in name else "it is not Linear"
            hint = "leave it out: the querier applies the softmax" if "oftmax" in name else _OTHER
            raise _refuse(f"a layer {name}", why, hint)
    return _stacked(parts)


def _stacked(parts: list[Affine | Activation]) -> Stack:
    affine = [part for part in parts if isinstance(part, Affine)]
    others = [part for part in parts if not isinstance(part, Affine)]
    if len(parts) == 1 and affine:
        return Stack(first=affine[0], kind="Sequential")
    if len(parts) == 3 and len(affine) == 2 and isinstance(parts[0], Affine) and others:
        return Stack(first=affine[0], activation=others[0], second=affine[1], kind="Sequential")
    raise _refuse(
        f"a Sequential with {len(affine)} linear layers and {len(others)} activations",
        "the parameters hold one squaring, between two linear layers",
        "use torch.nn.Sequential(Linear, activation, Linear), with a wider hidden layer",
    )


def _linear(layer: Any) -> Affine:
    weights = layer.weight.detach().cpu().double().numpy().T
    bias = np.zeros(weights.shape[1])
    if layer.bias is not None:
        bias = layer.bias.detach().cpu().double().numpy()
    return Affine(weights=weights.copy(), bias=bias)


def _elementwise(layer: Any) -> Activation:
    def values(samples: Array) -> Array:
        import torch

        with torch.inference_mode():
            return np.asarray(layer(torch.from_numpy(np.array(samples))).numpy())

    return values


def _squares(layer: Any) -> bool:
    import torch

    if type(layer).__module__.startswith("torch.") or any(True for _ in layer.parameters()):
        return False
    probe = torch.tensor([[-2.0, 0.5, 3.0]])
    try:
        with torch.inference_mode():
            return bool(torch.equal(layer(probe), probe * probe))
    except Exception:  # any module may be here, and may want another shape
        return False
