"""Linear stack: each site applies its own trained matrix to its answer, and the sum decides."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from fedinfer_flower.ensemble.base import RULES, Array, ScoreKind, SiteContext
from fedinfer_flower.ensemble.stack_rule import StackRule, exact_probabilities

__all__ = ["LinearStack"]


@RULES.register("linear-stack")
@dataclass(frozen=True, kw_only=True)
class LinearStack(StackRule):
    """Sum of each site's probabilities through a matrix trained for that site.

    Score: ``phi_k = p_k W_k + b_k``, logits; the sum is the multinomial logistic regression
    on all sites' answers side by side, worked out without anyone having them side by side.
    Untrained: ``phi_k = p_k``, the mean probability.

    Bounds are those of the parameters: an answer lies in the simplex, so a score lies in
    the convex hull of the C rows ``W_k[c] + b_k``. A site that does not answer takes its
    block out of the sum, which training did not see.

    Source: Wolpert (1992), "Stacked generalization", with the level-1 model linear.

    Privacy
    -------
    Needs the sum only. Matrices are known to all sites, the coordinator and the querier. A
    matrix of zeros silences a site, so all blocks but one at zero make the sum that one
    site's answer: sites check their share before they use a stack
    (`stack_participation`), which bounds that and does not exclude it.

    Examples
    --------
    >>> import numpy as np
    >>> site = SiteContext(present=np.array([True, True]))
    >>> LinearStack().score(np.log(np.array([[0.75, 0.25]])), site)
    array([[0.75, 0.25]])
    """

    score_kind = ScoreKind.LOGIT

    def _corners(self, n_classes: int) -> Array | None:
        """Return the scores of sure answers, shape (n_sites, n_classes, n_classes)."""
        arrays = self.arrays(n_classes)
        if arrays is None:
            return None
        return np.asarray(arrays["weights_kcc"] + arrays["bias_kc"][:, np.newaxis, :])

    def score_bound(self, n_classes: int) -> float:
        """Return the largest entry of a sure answer's score; no mixture exceeds it."""
        corners = self._corners(n_classes)
        return 1.0 if corners is None else max(float(np.abs(corners).max()), 1e-6)

    def sensitivity_l2(self, n_classes: int) -> float:
        """Return the widest that one site's hull is, which is between two of its corners."""
        corners = self._corners(n_classes)
        if corners is None:
            return math.sqrt(2.0)
        widest = 0.0
        for corner in corners:  # one site at a time: C x C distances and not K C x K C
            squares = (corner**2).sum(axis=1)
            apart = squares[:, np.newaxis] + squares - 2.0 * corner @ corner.T
            widest = max(widest, float(apart.max()))
        # Room for the cancellation in the line above, and never zero.
        return math.sqrt(max(widest, 0.0)) * (1.0 + 1e-9) + 1e-6 * self.score_bound(n_classes)

    def score(self, logits: Array, site: SiteContext) -> Array:
        """Return this site's part of the logits."""
        probabilities = exact_probabilities(logits)
        arrays = self.arrays(logits.shape[1])
        if arrays is None:
            return probabilities
        place = self.place(site)
        scores = probabilities @ arrays["weights_kcc"][place] + arrays["bias_kc"][place]
        bound = self.score_bound(logits.shape[1])
        return np.asarray(np.clip(scores, -bound, bound))  # the last digit of a sum of products

    def probabilities(self, total: Array, n_sites: int) -> Array:
        """Return the softmax of the summed logits; untrained, the mean probability."""
        if self.fitted is None:
            return super().probabilities(total, n_sites)
        return self.trained_probabilities(total)
