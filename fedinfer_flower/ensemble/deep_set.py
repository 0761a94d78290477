"""Deep set: sites embed their answers alike, the sum is decoded by the querier."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from fedinfer_flower.ensemble.base import RULES, Array, SiteContext
from fedinfer_flower.ensemble.stack_rule import StackRule, exact_probabilities, log_features

__all__ = ["DeepSet"]


@RULES.register("deep-set")
@dataclass(frozen=True, kw_only=True)
class DeepSet(StackRule):
    """Trained embedding of each answer, summed, decoded by a trained network at the querier.

    Score: ``phi_k = (p_k, e_k)``, ``e_k = tanh(relu(f(p_k) A + a) B + b)`` with
    ``f(p) = (p, 1 + log p / 14)``: the logarithm shows which classes a site does not know.
    Decision: ``skip sum p_k + relu(sum phi_k M + m) N + n``, logits. Untrained: the mean
    probability. All sites share one embedding, so one that joins later can take part; how
    well is for a measurement to say, since the decoder was trained on other sites.

    Source: Zaheer et al. (2017), "Deep Sets", theorem 2.

    Privacy
    -------
    Needs the sum only, but of more numbers than classes: at most three a class. The
    embedding may tell sites apart by the classes that they do not know, so a hostile one
    can be silent for all but one such pattern. Sites that trained check their share on
    their own held-out rows; others cannot.

    Examples
    --------
    >>> import numpy as np
    >>> site = SiteContext(present=np.array([True, True]))
    >>> DeepSet().score(np.log(np.array([[0.75, 0.25]])), site)
    array([[0.75, 0.25]])
    """

    def _embedding(self, n_classes: int) -> int:
        arrays = self.arrays(n_classes)
        return 0 if arrays is None else arrays["rho_out"].shape[1]

    def score_width(self, n_classes: int) -> int:
        """Return one entry a class, and the embedding's."""
        return n_classes + self._embedding(n_classes)

    def sensitivity_l2(self, n_classes: int) -> float:
        """Return the diameter of a simplex beside a box of side two."""
        return math.sqrt(2.0 + 4.0 * self._embedding(n_classes))

    def score(self, logits: Array, site: SiteContext) -> Array:  # noqa: ARG002
        """Return probabilities and, trained, their embedding."""
        probabilities = exact_probabilities(logits)
        arrays = self.arrays(logits.shape[1])
        if arrays is None:
            return probabilities
        inner = log_features(probabilities) @ arrays["rho_in"] + arrays["rho_in_bias"]
        outer = np.maximum(inner, 0.0) @ arrays["rho_out"] + arrays["rho_out_bias"]
        return np.concatenate([probabilities, np.tanh(outer)], axis=1)

    def class_totals(self, total: Array) -> Array:
        """Return the decoder's logits; untrained, the sum itself."""
        fitted = self.fitted
        if fitted is None:
            return total
        arrays = fitted.arrays
        inner = np.maximum(total @ arrays["mu_in"] + arrays["mu_in_bias"], 0.0)
        decoded = inner @ arrays["mu_out"] + arrays["mu_out_bias"]
        return np.asarray(arrays["skip"] * total[:, : len(fitted.classes)] + decoded)

    def probabilities(self, total: Array, n_sites: int) -> Array:
        """Return the softmax of the decoder's logits; untrained, the mean probability."""
        if self.fitted is None:
            return super().probabilities(total, n_sites)
        return self.trained_probabilities(total)
