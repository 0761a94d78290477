"""MLP stack: a trained network that looks at all sites' answers side by side."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from fedinfer_flower.ensemble.base import RULES, Array, Disclosure, SiteContext
from fedinfer_flower.ensemble.stack_rule import StackRule, exact_probabilities

__all__ = ["MlpStack"]


@RULES.register("mlp-stack")
@dataclass(frozen=True, kw_only=True)
class MlpStack(StackRule):
    """A hidden layer over the sites' probabilities side by side, as in FENS.

    Score: the probabilities in the site's own block of K, zeros elsewhere, so that adding
    puts the answers side by side; a score is K times as long as the answer. Decision:
    ``skip sum p_k + tanh(x H + h) O + o`` with x the concatenation. Untrained: the mean
    probability, in scores of one entry a class. A site that does not answer leaves zeros,
    which training did not see.

    Source: Allouah et al. (2024), "Revisiting Ensembling in One-Shot Federated Learning"
    (FENS), the neural-network aggregator of section 3.

    Privacy
    -------
    Needs each site's own scores: their sum *is* all the answers, one beside the other, so
    it is declared `SCORES` and refused under secure sums and encryption. Under `dp` each
    site adds noise to all K blocks, so a block carries that of K sites.

    Examples
    --------
    >>> import numpy as np
    >>> site = SiteContext(present=np.array([True, True]))
    >>> MlpStack().score(np.log(np.array([[0.75, 0.25]])), site)
    array([[0.75, 0.25]])
    """

    discloses = Disclosure.SCORES

    def score_width(self, n_classes: int) -> int:
        """Return one block a site of the roster."""
        fitted = self.fitted
        return n_classes if fitted is None else n_classes * len(fitted.sites)

    def sensitivity_l2(self, n_classes: int) -> float:  # noqa: ARG002
        """Return the diameter of the simplex: the other blocks are zero."""
        return math.sqrt(2.0)

    def score(self, logits: Array, site: SiteContext) -> Array:
        """Return probabilities in the site's block."""
        probabilities = exact_probabilities(logits)
        if self.arrays(logits.shape[1]) is None:
            return probabilities
        n_queries, n_classes = logits.shape
        place = self.place(site) * n_classes
        scores = np.zeros((n_queries, self.score_width(n_classes)))
        scores[:, place : place + n_classes] = probabilities
        return scores

    def class_totals(self, total: Array) -> Array:
        """Return the network's logits; untrained, the sum itself."""
        fitted = self.fitted
        if fitted is None:
            return total
        arrays = fitted.arrays
        inner = np.tanh(total @ arrays["hidden"] + arrays["hidden_bias"])
        blocks = total.reshape(len(total), len(fitted.sites), len(fitted.classes))
        decoded = inner @ arrays["out"] + arrays["out_bias"]
        return np.asarray(arrays["skip"] * blocks.sum(axis=1) + decoded)

    def probabilities(self, total: Array, n_sites: int) -> Array:
        """Return the softmax of the network's logits; untrained, the mean probability."""
        if self.fitted is None:
            return super().probabilities(total, n_sites)
        return self.trained_probabilities(total)
