"""Budget: sites whose privacy budget covers the question."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from fedinfer_flower.query import SiteId
from fedinfer_flower.selection.base import SelectionNeed
from fedinfer_flower.selection.candidate import Candidate
from fedinfer_flower.selection.gates.base import GATES, Gate

__all__ = ["BudgetGate"]

_ROUNDING = 1e-9
"""Share of a budget that may be missing through rounding alone."""


@GATES.register("budget")
@dataclass(frozen=True, kw_only=True)
class BudgetGate(Gate):
    """Leave out sites with less epsilon left than the question costs.

    The cost is epsilon a row times rows, which is what basic composition charges; a site
    with a tighter accountant may charge less and would still have answered. A question
    without epsilon (no noise) passes: there a site's policy decides, not its budget.

    Parameters
    ----------
    unknown : bool
        Whether sites that do not say what is left are asked. True by default: they refuse
        by themselves what they cannot afford.

    Privacy
    -------
    Saves refusals; protects nothing. The budget is kept and enforced at the site.

    Examples
    --------
    >>> from fedinfer_flower.profile import SiteProfile
    >>> from fedinfer_flower.selection.candidate import SiteRecord
    >>> profile = SiteProfile(name="a", classes=("x",))
    >>> site = Candidate(
    ...     site_id=SiteId(1), profile=profile, record=SiteRecord(epsilon_left=0.5)
    ... )
    >>> need = SelectionNeed(classes=("x",), n_queries=10, epsilon_per_query=0.1)
    >>> BudgetGate().admit([site], need)
    {1: 'epsilon 0.5 left, 1 is needed'}
    """

    unknown: bool = True

    def admit(self, candidates: Sequence[Candidate], need: SelectionNeed) -> Mapping[SiteId, str]:
        """Refuse sites that cannot afford it."""
        if need.epsilon_per_query is None:
            return {}
        cost = need.epsilon_per_query * need.n_queries
        refused: dict[SiteId, str] = {}
        for candidate in candidates:
            left = candidate.record.epsilon_left
            if left is None:
                if not self.unknown:
                    refused[candidate.site_id] = "does not say what epsilon is left"
            elif not left >= cost * (1.0 - _ROUNDING):
                refused[candidate.site_id] = f"epsilon {left:.4g} left, {cost:.4g} is needed"
        return refused
