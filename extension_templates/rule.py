"""TODO: name of the rule: what it does, in one line.

Copy this file to fedinfer_flower/ensemble/, or to a package of your own, and fill in each
TODO. As it stands it is the mean probability. docs/how-to/add-a-rule.md has the details.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from fedinfer_flower.ensemble.base import RULES, Array, EnsembleRule, SiteContext, softmax
from fedinfer_flower.ensemble.options import option

__all__ = ["MyRule"]


@RULES.register("my-rule")  # TODO: its name, in kebab-case
@dataclass(frozen=True, kw_only=True)
class MyRule(EnsembleRule):
    """TODO: say what a site does, as an order.

    TODO: say when to use it and which rule to prefer otherwise.

    Score: TODO ``phi_k = strength * p_k``; with its source.

    Parameters
    ----------
    strength : float
        TODO: what it does; a rule needs no options at all.

    Privacy
    -------
    TODO: "Needs the sum only." or what else the coordinator sees; what the sum reveals.

    Examples
    --------
    >>> import numpy as np
    >>> site = SiteContext(present=np.array([True, True]))
    >>> MyRule().score(np.log(np.array([[0.25, 0.75]])), site)
    array([[0.25, 0.75]])
    """

    strength: float = option(1.0, low=0.1, high=10.0)

    # TODO: set `score_kind` if scores are no probabilities, `needs` for evidence such as
    # class counts, and `discloses = Disclosure.SCORES` with a `combine` if a sum is not enough.

    def score_bound(self, n_classes: int) -> float:  # noqa: ARG002
        """TODO: return the largest absolute value that an entry of a score can have."""
        return self.strength

    def sensitivity_l2(self, n_classes: int) -> float:  # noqa: ARG002
        """TODO: return how far apart two scores can be; leave out if you don't know."""
        return math.sqrt(2.0) * self.strength

    def score(self, logits: Array, site: SiteContext) -> Array:  # noqa: ARG002
        """TODO: turn logits (n_queries, n_classes) into scores (n_queries, score_width)."""
        return self.strength * softmax(logits)
