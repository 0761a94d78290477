"""The public computation: networks and ensemble in JAX, compiled for shares by SPU.

The functions here are ordinary JAX. On clear arrays they are the reference that tests
compare with torch; on shares SPU runs the same operations. JAX is imported when called.

Axes: K owners, B queries, C classes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from enum import StrEnum
from typing import Any

from fedinfer_flower.mpc.network import (
    AvgPool2d,
    Conv2d,
    Flatten,
    Layer,
    Linear,
    MaxPool2d,
    NetworkSpec,
)
from fedinfer_flower.privacy.base import optional_module

__all__ = ["Disclosed", "MpcRule", "joint_function", "logits"]


class MpcRule(StrEnum):
    """How the owners' logits become one answer, on shares.

    No rule takes softmax: on shares it is approximate, and many times the cost of the rest.
    """

    MEAN_LOGIT = "mean-logit"
    MAJORITY_VOTE = "majority-vote"


class Disclosed(StrEnum):
    """What the querier gets to see."""

    TOTALS = "totals"
    """The mean logits, or the votes of every class."""

    LABEL = "label"
    """The winning class and nothing else; a tie goes to the class that comes first."""


def logits(spec: NetworkSpec, inputs: Any, weights: Sequence[Any]) -> Any:
    """Run one network.

    Parameters
    ----------
    spec : NetworkSpec
    inputs : JAX array of shape (n_queries, *spec.input_shape)
    weights : sequence of JAX arrays
        In the order and shapes of ``spec.parameter_shapes``.

    Returns
    -------
    logits_bc : JAX array of shape (n_queries, n_classes)
    """
    left = list(weights)
    values = inputs
    # SPU convolves channels-last only; to move axes of shares is free.
    is_image = len(spec.input_shape) == 3
    if is_image:
        values = values.transpose((0, 2, 3, 1))
    for layer in spec.layers:
        own, left = left[: len(layer.parameter_shapes())], left[len(layer.parameter_shapes()) :]
        if isinstance(layer, Flatten) and is_image:
            values, is_image = values.transpose((0, 3, 1, 2)), False
        values = _apply(layer, values, own)
    return values


def _jax() -> tuple[Any, Any]:
    return optional_module("jax", extra="mpc"), optional_module("jax.numpy", extra="mpc")


def _apply(layer: Layer, values: Any, weights: Sequence[Any]) -> Any:
    jax, jnp = _jax()
    if isinstance(layer, Linear):
        values = values @ weights[0].T
        return values + weights[1] if layer.bias else values
    if isinstance(layer, Conv2d):
        padding = (layer.padding, layer.padding)
        values = jax.lax.conv_general_dilated(
            values,
            weights[0].transpose((2, 3, 1, 0)),
            window_strides=(layer.stride, layer.stride),
            padding=(padding, padding),
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
        )
        return values + weights[1] if layer.bias else values
    if isinstance(layer, AvgPool2d | MaxPool2d):
        window = (1, layer.kernel, layer.kernel, 1)
        strides = (1, layer.stride, layer.stride, 1)
        if isinstance(layer, MaxPool2d):
            return jax.lax.reduce_window(values, -jnp.inf, jax.lax.max, window, strides, "VALID")
        sums = jax.lax.reduce_window(values, 0.0, jax.lax.add, window, strides, "VALID")
        return sums * (1.0 / layer.kernel**2)
    if isinstance(layer, Flatten):
        return values.reshape((values.shape[0], -1))
    return jnp.maximum(values, 0.0)


def joint_function(
    specs: Sequence[NetworkSpec], rule: MpcRule, disclosed: Disclosed
) -> Callable[..., Any]:
    """Return the function that the parties run on shares.

    Parameters
    ----------
    specs : sequence of NetworkSpec
        One for each owner.
    rule : MpcRule
    disclosed : Disclosed

    Returns
    -------
    function : callable
        Takes inputs and then all owners' weights; returns mean logits of shape (B, C), votes
        of shape (B, C), or labels of shape (B,).
    """

    def joint(inputs: Any, *weights: Any) -> Any:
        left = list(weights)
        answers = []
        for spec in specs:
            count = len(spec.parameter_shapes)
            answers.append(logits(spec, inputs, left[:count]))
            left = left[count:]
        return _combined(answers, rule, disclosed)

    return joint


def _combined(answers: list[Any], rule: MpcRule, disclosed: Disclosed) -> Any:
    _, jnp = _jax()
    if rule is MpcRule.MEAN_LOGIT:
        totals = sum(answers) * (1.0 / len(answers))
    else:
        # As many votes as owners, even where two logits of one owner are equal.
        classes = jnp.arange(answers[0].shape[1], dtype=jnp.int32)
        labels = [jnp.argmax(a, axis=1).astype(jnp.int32) for a in answers]
        totals = sum((label[:, None] == classes[None]).astype(jnp.int32) for label in labels)
    if disclosed is Disclosed.TOTALS:
        return totals
    return jnp.argmax(totals, axis=1).astype(jnp.int32)
