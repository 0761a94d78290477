"""Mean logit: the sites' centred logits, added up."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from fedinfer_flower.ensemble.base import (
    RULES,
    Array,
    EnsembleRule,
    ScoreKind,
    SiteContext,
    softmax,
    top_distance,
)
from fedinfer_flower.ensemble.options import option

__all__ = ["MeanLogit"]


@RULES.register("mean-logit")
@dataclass(frozen=True, kw_only=True)
class MeanLogit(EnsembleRule):
    """Average the logits of all sites: the rule of FedSEI's prototype.

    Depends on the scale of each model's logits, so calibrate first, and lets one site
    veto a class; prefer `mean-probability`.

    Score: ``phi_k = z' - mean_c z'_c`` with ``z' = max(z - max_c z_c, -clip)``. Within a
    row only differences of logits mean anything. What lies more than `clip` below the
    row's best class is cut there, so the best class is never cut, as clipping to
    [-clip, clip] could do. FedSEI (arXiv 2603.02214) averages the logits as they are: the
    same answer as long as no class is cut.

    Parameters
    ----------
    clip : float
        Largest distance below the best class that counts. The default, 16, is a
        probability ratio of 1e-7.

    Privacy
    -------
    Needs the sum only. Logits say more about a model than probabilities do, since no
    class saturates; `dp` noise grows with `clip`.

    Examples
    --------
    >>> site = SiteContext(present=np.array([True, True]))
    >>> MeanLogit(clip=8.0).score(np.array([[5.0, 1.0], [0.0, -1e9]]), site)
    array([[ 2., -2.],
           [ 4., -4.]])
    """

    clip: float = option(16.0, low=1.0, high=64.0)

    score_kind = ScoreKind.LOGIT

    def score_bound(self, n_classes: int) -> float:  # noqa: ARG002
        """Return `clip`: entries lie in [-clip, 0], their mean too."""
        return self.clip

    def sensitivity_l2(self, n_classes: int) -> float:
        """Return the diameter of a box of side `clip`, which centring cannot enlarge."""
        return self.clip * math.sqrt(n_classes)

    def score(self, logits: Array, site: SiteContext) -> Array:  # noqa: ARG002
        """Return clipped and centred logits."""
        clipped = top_distance(logits).clip(min=-self.clip)
        return np.asarray(clipped - clipped.mean(axis=-1, keepdims=True))

    def probabilities(self, total: Array, n_sites: int) -> Array:
        """Return the softmax of the mean."""
        return softmax(self.class_totals(total) / max(n_sites, 1))
