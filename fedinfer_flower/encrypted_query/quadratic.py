"""What is evaluated on ciphertexts: a quadratic form of the inputs, one for each class.

``logits = ((x W + b) ** 2) A + x L + d`` with ``W`` (F, H), ``b`` (H,), ``A`` (H, C), ``L``
(F, C) and ``d`` (C,). A linear model is the case H = 0; a network with one hidden layer whose
activation has degree 2 is the whole. Biases are added on their own, in the level at which they
are needed, never folded into a product.

Axes: B queries, F features, H hidden units, C classes.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from fedinfer_flower.ensemble.base import Array

__all__ = ["NEGLIGIBLE", "QuadraticForm"]

NEGLIGIBLE = 2.0**-35
"""A smaller weight is taken as zero: at the smallest weight scale, 2**36, it has no digits."""


@dataclass(frozen=True, kw_only=True, eq=False)
class QuadraticForm:
    """Weights of the form; see the module.

    Parameters
    ----------
    hidden_weights : float array of shape (n_features, n_hidden)
    hidden_bias : float array of shape (n_hidden,)
    square_weights : float array of shape (n_hidden, n_classes)
    linear_weights : float array of shape (n_features, n_classes)
    offset : float array of shape (n_classes,)

    Examples
    --------
    >>> form = QuadraticForm.linear(np.array([[2.0, 0.0]]), np.array([1.0, 3.0]))
    >>> form(np.array([[5.0]]))
    array([[11.,  3.]])
    """

    hidden_weights: Array
    hidden_bias: Array
    square_weights: Array
    linear_weights: Array
    offset: Array

    @classmethod
    def linear(cls, weights: Array, offset: Array) -> QuadraticForm:
        """Return the form without hidden units."""
        n_features, n_classes = weights.shape
        return cls(
            hidden_weights=np.zeros((n_features, 0)),
            hidden_bias=np.zeros(0),
            square_weights=np.zeros((0, n_classes)),
            linear_weights=weights,
            offset=offset,
        )

    @property
    def n_features(self) -> int:
        """F."""
        return len(self.linear_weights)

    @property
    def n_hidden(self) -> int:
        """H."""
        return len(self.hidden_bias)

    @property
    def n_classes(self) -> int:
        """C."""
        return len(self.offset)

    @property
    def n_products(self) -> int:
        """Products of a ciphertext with a weight: what an evaluation costs."""
        return int(
            sum(
                np.count_nonzero(np.abs(weights) >= NEGLIGIBLE)
                for weights in (self.hidden_weights, self.square_weights, self.linear_weights)
            )
        )

    def __call__(self, inputs: Array) -> Array:
        """Return the logits in clear, shape (n_queries, n_classes)."""
        hidden = inputs @ self.hidden_weights + self.hidden_bias
        return np.asarray(
            hidden**2 @ self.square_weights + inputs @ self.linear_weights + self.offset
        )

    def logit_bound(self, input_bound: float) -> float:
        """Return the largest absolute logit of inputs within [-input_bound, input_bound]."""
        reach = input_bound * np.abs(self.hidden_weights).sum(axis=0) + np.abs(self.hidden_bias)
        columns = (
            reach**2 @ np.abs(self.square_weights)
            + input_bound * np.abs(self.linear_weights).sum(axis=0)
            + np.abs(self.offset)
        )
        return float(columns.max(initial=0.0))

    def hidden_bound(self, input_bound: float) -> float:
        """Return the largest absolute value of a hidden unit before it is squared."""
        reach = input_bound * np.abs(self.hidden_weights).sum(axis=0) + np.abs(self.hidden_bias)
        return float(reach.max(initial=0.0))

    def pruned(self) -> QuadraticForm:
        """Return the same form without hidden units that no input reaches."""
        live = np.abs(self.hidden_weights).max(axis=0, initial=0.0) >= NEGLIGIBLE
        constant = self.hidden_bias[~live] ** 2 @ self.square_weights[~live]
        return QuadraticForm(
            hidden_weights=self.hidden_weights[:, live],
            hidden_bias=self.hidden_bias[live],
            square_weights=self.square_weights[live],
            linear_weights=self.linear_weights,
            offset=self.offset + constant,
        )

    def with_columns(self, matrix: Array, constants: Array) -> QuadraticForm:
        """Return the form whose logits are ``logits @ matrix + constants``."""
        return QuadraticForm(
            hidden_weights=self.hidden_weights,
            hidden_bias=self.hidden_bias,
            square_weights=self.square_weights @ matrix,
            linear_weights=self.linear_weights @ matrix,
            offset=self.offset @ matrix + constants,
        )
