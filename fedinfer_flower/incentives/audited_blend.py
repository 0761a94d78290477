"""Audited blend, the default: worth to the ensemble, and agreement with audit labels."""

from __future__ import annotations

from dataclasses import dataclass

from fedinfer_flower.ensemble.options import option
from fedinfer_flower.incentives.base import SCHEMES, Array, LinearScheme, PublicFacts
from fedinfer_flower.incentives.linear_ca import agreement_weights
from fedinfer_flower.incentives.smooth_shapley import diagonal_weights

__all__ = ["AuditedBlend"]


@SCHEMES.register("audited-blend")
@dataclass(frozen=True, kw_only=True)
class AuditedBlend(LinearScheme):
    """Half `SmoothShapley` times K, half `LinearCA`, both by audit labels.

    The first half says how much a site moves the joint answer towards the labels, the second
    is what a site earns by its own answers whatever the others say: it steadies the first,
    whose weights come from nearly tied queries most of all. Times K, so that the halves have
    like sizes however many sites there are.

    The weights are centred over queries, as those of the second half are anyway. So any fixed
    answer (one class always, class frequencies, uniform) earns exactly 0, and one that has
    nothing to do with the query 0 in expectation, but for the little that it bends the joint
    answer itself. An echo of the joint answer is right as often as the ensemble and is paid
    for it: seal answers, so that nobody has one. Not strictly proper: sharpening
    may pay a single site. Copies pay: settle clusters (`Quotient`).

    Parameters
    ----------
    agreement : float
        Part of the linear correlated agreement.
    sharpness : float
        Of the smooth accuracy; see `SmoothShapley`.
    centred : bool
        Whether fixed answers earn exactly 0. They do not in the accuracy game, where the most
        frequent class is right now and then.

    Privacy
    -------
    Needs one row sum a site and epoch, and the sum of all sites' answers to each audit query.

    Examples
    --------
    >>> import numpy as np
    >>> from fedinfer_flower.incentives.base import AuditedAnswers
    >>> p = np.array([[[0.9, 0.1], [0.2, 0.8]], [[1.0, 0.0], [1.0, 0.0]]])
    >>> answers = AuditedAnswers(probabilities_ktc=p, labels=np.array([0, 1]))
    >>> good, constant = AuditedBlend().contributions(answers)
    >>> bool(good > 0.3), bool(abs(constant) < 1e-12)
    (True, True)
    """

    needs_labels = True

    agreement: float = option(0.5, low=0.0, high=1.0)
    sharpness: float = option(9.0, low=0.1, high=100.0)
    centred: bool = True

    def weights(self, facts: PublicFacts) -> Array:
        """Return the weighted sum of both schemes' weights."""
        agreeing = agreement_weights(facts.require_labels(self.name), facts.n_classes)
        moving = diagonal_weights(facts, self.sharpness) * facts.n_sites
        if self.centred:
            moving -= moving.mean(axis=0)
        return self.agreement * agreeing + (1.0 - self.agreement) * moving
