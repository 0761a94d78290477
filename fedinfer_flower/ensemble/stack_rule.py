"""Base of rules that were trained on the sites' held-out answers; no rule of its own."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from fedinfer_flower.ensemble.base import Array, EnsembleRule, Evidence, SiteContext, softmax
from fedinfer_flower.ensemble.fitted import UNTRAINED, FittedAggregator, recall, require_digest
from fedinfer_flower.errors import BindingError, InvalidValueError, LabelSpaceError
from fedinfer_flower.query import Prediction

__all__ = ["StackRule", "exact_probabilities", "log_features"]

_LOG_FLOOR = -14.0
"""Just below the logarithm of `PROBABILITY_FLOOR`, which an absent class has."""


def exact_probabilities(logits: Array) -> Array:
    """Return probabilities that no rounding puts above one."""
    return np.minimum(softmax(logits), 1.0)


def log_features(probabilities: Array) -> Array:
    """Return (p, 1 + log p / 14): both in [0, 1], the second near 0 for absent classes."""
    logs = np.maximum(np.log(probabilities), _LOG_FLOOR) / -_LOG_FLOOR + 1.0
    return np.concatenate([probabilities, logs], axis=-1)


@dataclass(frozen=True, kw_only=True)
class StackRule(EnsembleRule):
    """A rule whose parameters are a fitted aggregator.

    Parameters
    ----------
    stack : str
        Digest of the fitted aggregator, or "untrained".

    Raises
    ------
    InvalidValueError
        When built, if this process does not know the digest, or it is of another kind.
    """

    stack: str = UNTRAINED

    needs = frozenset({Evidence.STACK})

    def __post_init__(self) -> None:
        super().__post_init__()
        require_digest(self.stack)
        fitted = self.fitted
        if fitted is not None and fitted.kind != self.name:
            raise InvalidValueError(
                f"aggregator {self.stack[:16]} is a {fitted.kind}, not a {self.name}",
                hint=f"use rule {fitted.kind!r}",
            )

    @property
    def fitted(self) -> FittedAggregator | None:
        """The aggregator; None where the rule is untrained."""
        return None if self.stack == UNTRAINED else recall(self.stack)

    def arrays(self, n_classes: int) -> Mapping[str, Array] | None:
        """Return the parameters; None where the rule is untrained.

        Raises
        ------
        LabelSpaceError
            If the aggregator was trained on another number of classes.
        """
        fitted = self.fitted
        if fitted is None:
            return None
        if len(fitted.classes) != n_classes:
            raise LabelSpaceError(
                f"the aggregator was trained on {len(fitted.classes)} classes, the query has"
                f" {n_classes}",
                hint="ask with the aggregator's classes, or train another",
            )
        return fitted.arrays

    def place(self, site: SiteContext) -> int:
        """Return the site's place in the aggregator's roster.

        Raises
        ------
        BindingError
            If it is not in it.
        """
        fitted = self.fitted
        if fitted is None or site.key_id not in fitted.sites:
            raise BindingError(
                "this site is not one of those that the aggregator was trained with",
                hint="train again with this site, or leave it out of the query",
            )
        return fitted.sites.index(site.key_id)

    def require_classes(self, classes: tuple[str, ...]) -> None:
        """Require the label space of the training, in its order.

        Raises
        ------
        LabelSpaceError
            If it is another: parameters would be applied to other classes.
        """
        fitted = self.fitted
        if fitted is not None and fitted.classes != classes:
            raise LabelSpaceError(
                "the query's classes are not those of the aggregator, in its order",
                hint="ask with classes=fitted.classes",
            )

    def decide(
        self, total: Array, n_sites: int, classes: tuple[str, ...], *, tie_seed: int = 0
    ) -> Prediction:
        """Check the label space, then decide as every rule does."""
        self.require_classes(classes)
        return super().decide(total, n_sites, classes, tie_seed=tie_seed)

    def trained_probabilities(self, total: Array) -> Array:
        """Return probabilities of logits; exact zeros are what a querier can read."""
        logits = self.class_totals(total)
        shifted = np.exp(logits - logits.max(axis=-1, keepdims=True))
        return np.asarray(shifted / shifted.sum(axis=-1, keepdims=True))
