"""Leave one out: what the ensemble loses without a site."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from fedinfer_flower.incentives.base import SCHEMES, Array, AuditedAnswers, ContributionScheme
from fedinfer_flower.incentives.games import as_utility, coalition_values

__all__ = ["LeaveOneOut"]


@SCHEMES.register("leave-one-out")
@dataclass(frozen=True, kw_only=True)
class LeaveOneOut(ContributionScheme):
    """Score ``v(N) - v(N without k)``.

    Two equal sites make each other worthless, so that honest duplicates earn nothing; values
    do not sum to the ensemble's worth, and are noisy.

    Parameters
    ----------
    utility : str
        ``accuracy`` or ``brier``; see `fedinfer_flower.incentives.games.Utility`.

    Privacy
    -------
    Needs K + 1 coalitions' answers; here taken from each site's answers in clear.

    Examples
    --------
    >>> p = np.array([[[0.9, 0.1]], [[0.4, 0.6]], [[0.4, 0.6]]])
    >>> answers = AuditedAnswers(probabilities_ktc=p, labels=np.array([0]))
    >>> LeaveOneOut().contributions(answers)
    array([1., 0., 0.])
    """

    needs_labels = True

    utility: str = "accuracy"

    def __post_init__(self) -> None:
        super().__post_init__()
        as_utility(self.utility)

    def contributions(self, answers: AuditedAnswers) -> Array:
        """Return the loss without each."""
        self.check(answers)
        everybody = np.ones((1, answers.n_sites), dtype=bool)
        members = np.concatenate([everybody, ~np.eye(answers.n_sites, dtype=bool)])
        values = coalition_values(answers, members, as_utility(self.utility))
        return np.asarray(values[0] - values[1:])
