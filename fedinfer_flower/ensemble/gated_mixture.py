"""Gated mixture: each site weights its answer by a trained gate that looks at the answer."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import numpy as np

from fedinfer_flower.ensemble.base import RULES, Array, SiteContext
from fedinfer_flower.ensemble.stack_rule import StackRule, exact_probabilities
from fedinfer_flower.ensemble.weighted import WeightedRule

__all__ = ["GATE_FLOOR", "GatedMixture"]

GATE_FLOOR: Final = 0.2
"""Smallest weight: no gate silences a site. On toy data a floor of 0.02 was no more accurate."""


@RULES.register("gated-mixture")
@dataclass(frozen=True, kw_only=True)
class GatedMixture(StackRule, WeightedRule):
    """Mean of probabilities, weighted by how far a site's answers could be trusted in training.

    Weight: ``w_k = 0.2 + 0.8 sigmoid(<g_k, p_k> + h_k)``, with a gate of the site's own.
    Untrained: every weight 1, the mean probability.

    Source: Jacobs et al. (1991), "Adaptive mixtures of local experts", equation 1, with the
    gate at the expert and looking at its output.

    Privacy
    -------
    Needs the sum only. Gates are known to all. No gate is below 0.2, so a stack can make a
    site's answer five times fainter than another's, and no more; sites check their share
    before they use a stack (`stack_participation`).

    Examples
    --------
    >>> import numpy as np
    >>> site = SiteContext(present=np.array([True, True]))
    >>> GatedMixture().score(np.log(np.array([[0.75, 0.25]])), site)
    array([[0.75, 0.25, 1.  ]])
    """

    def weight_bound(self, n_classes: int) -> float:  # noqa: ARG002
        """Return one: a gate is a share."""
        return 1.0

    def answer(self, logits: Array, site: SiteContext) -> tuple[Array, Array]:
        """Return probabilities and the gate's weights."""
        probabilities = exact_probabilities(logits)
        arrays = self.arrays(logits.shape[1])
        if arrays is None:
            return probabilities, np.ones(len(logits))
        place = self.place(site)
        inner = probabilities @ arrays["gate_kc"][place] + arrays["gate_bias_k"][place]
        gate = 0.5 * (1.0 + np.tanh(inner / 2.0))  # a sigmoid that cannot overflow
        return probabilities, GATE_FLOOR + (1.0 - GATE_FLOOR) * gate
