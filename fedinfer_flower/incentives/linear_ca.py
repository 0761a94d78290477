"""Linear correlated agreement: agreeing with a reference more often than by chance."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from fedinfer_flower.incentives.base import (
    SCHEMES,
    Array,
    AuditedAnswers,
    IntArray,
    LinearScheme,
    PublicFacts,
    likeliest,
)

__all__ = ["LinearCA", "agreement_weights"]


def agreement_weights(reference: IntArray, n_classes: int) -> Array:
    """Return ``(e_r - pi) / T`` with pi the frequencies of the reference's classes.

    Examples
    --------
    >>> agreement_weights(np.array([0, 1]), 2)
    array([[ 0.25, -0.25],
           [-0.25,  0.25]])
    """
    onehot = np.eye(n_classes)[reference]
    return np.asarray((onehot - onehot.mean(axis=0)) / len(reference))


@SCHEMES.register("linear-ca")
@dataclass(frozen=True, kw_only=True)
class LinearCA(LinearScheme):
    """Score ``mean_t p_k(t)[r_t] - sum_c pi_c mean_t p_k(t)[c]``.

    The reference r is the audit label; where there are none, the joint answer. Any fixed
    answer earns exactly 0 and an independent one 0 in expectation. Sharpening is rewarded,
    as under any linear score, and without labels a site bends the reference that it is
    scored by. Prefer it with labels, and blended (`AuditedBlend`).

    Parameters
    ----------
    leave_out : bool
        In clear and without labels, score each owner's sites against the joint answer of
        all others. Row sums cannot: their weights are the same for all.

    Privacy
    -------
    Needs one row sum a site and epoch, and the sum of all sites' answers or the labels; with
    `leave_out` and without labels, the answers in clear.

    References
    ----------
    .. [1] Shnayder, Agarwal, Frongillo, Parkes, "Informed truthfulness in multi-task peer
       prediction", 2016, section 4; with expectations in place of votes.

    Examples
    --------
    >>> p = np.array([[[0.9, 0.1], [0.2, 0.8]], [[1.0, 0.0], [1.0, 0.0]]])
    >>> answers = AuditedAnswers(probabilities_ktc=p, labels=np.array([0, 1]))
    >>> LinearCA().contributions(answers)
    array([0.35, 0.  ])
    """

    leave_out: bool = True

    def weights(self, facts: PublicFacts) -> Array:
        """Return ``(e_r - pi) / T``."""
        return agreement_weights(facts.reference(), facts.n_classes)

    def contributions(self, answers: AuditedAnswers) -> Array:
        """Return the row sums, each owner's against its own reference without labels."""
        if answers.labels is not None or not self.leave_out:
            return super().contributions(answers)
        self.check(answers)
        p, total_tc = answers.probabilities_ktc, answers.public().total_tc
        owners = answers.owners or tuple(f"site {k}" for k in range(answers.n_sites))
        values = np.zeros(answers.n_sites)
        for owner in dict.fromkeys(owners):
            mine = np.array([other == owner for other in owners])
            if mine.all():  # nobody to agree with
                continue
            reference = likeliest(total_tc - p[mine].sum(axis=0))
            weights_tc = agreement_weights(reference, answers.n_classes)
            values[mine] = np.einsum("ktc,tc->k", p[mine], weights_tc)
        return values
