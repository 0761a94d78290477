"""Entropy-weighted: the surer a site is, the more it counts."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from fedinfer_flower.ensemble.base import RULES, Array, SiteContext, softmax
from fedinfer_flower.ensemble.options import option
from fedinfer_flower.ensemble.weighted import WeightedRule

__all__ = ["EntropyWeighted"]


@RULES.register("entropy-weighted")
@dataclass(frozen=True, kw_only=True)
class EntropyWeighted(WeightedRule):
    """Weight each site's probabilities by how little entropy they have.

    Use when the sites are calibrated but share no class counts; prefer `class-share` if
    they do. A site sets its own weight, so an overconfident or dishonest one gains:
    `cap` limits that gain, and settlements should never pay on it.

    Score: ``(w_k p_k, w_k)`` with ``w_k = min(exp(-H(p_k)), cap)``, divided after the
    sum. With the default cap it is FedSEI's entropy vote (arXiv 2603.02214) exactly.

    Parameters
    ----------
    cap : float
        Largest weight. ``exp(H)`` is the number of classes that a site hesitates
        between, so 0.5 says: being surer than a toss-up between two classes adds
        nothing. No site then counts more than ``cap * n_classes`` times as much as one
        that knows nothing. The default, 1.0, caps nothing.

    Privacy
    -------
    Needs the sum only. Reveals the weighted mean and the sum of the weights to the
    querier: how sure the sites are together, not which one.

    Examples
    --------
    >>> site = SiteContext(present=np.array([True, True]))
    >>> EntropyWeighted().score(np.log(np.array([[0.5, 0.5]])), site)
    array([[0.25, 0.25, 0.5 ]])
    """

    cap: float = option(1.0, low=1e-3, high=1.0)

    def weight_bound(self, n_classes: int) -> float:  # noqa: ARG002
        """Return the cap."""
        return self.cap

    def answer(self, logits: Array, site: SiteContext) -> tuple[Array, Array]:  # noqa: ARG002
        """Return probabilities, weighted by their capped inverse perplexity."""
        probabilities = softmax(logits)
        entropy = -(probabilities * np.log(probabilities)).sum(axis=-1)
        return probabilities, np.minimum(np.exp(-entropy), self.cap)
