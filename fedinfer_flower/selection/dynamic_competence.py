"""Dynamic competence: ask sites that can tell, row by row, whether they know the query."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from fedinfer_flower.ensemble.base import RULES, Evidence
from fedinfer_flower.errors import InvalidValueError, SelectionError
from fedinfer_flower.selection.base import (
    SELECTORS,
    Array,
    Selection,
    SelectionNeed,
    Selector,
    SiteEvidence,
)
from fedinfer_flower.selection.candidate import Candidate
from fedinfer_flower.selection.coverage_greedy import CoverageGreedy
from fedinfer_flower.selection.sequential_groups import COUNT_CAP, own_coverage

__all__ = ["DynamicCompetence"]


@SELECTORS.register("dynamic-competence")
@dataclass(frozen=True, kw_only=True)
class DynamicCompetence(Selector):
    """Ask sites that measure familiarity, and let each weight its own answer by it.

    The competence of a site for one query depends on the query, which the coordinator may
    not see. So the choice is made at the site: its density of the query, near its own
    training data or far from it, scales its score under rules "open-set" and
    "open-set-class-share". This selector picks who can do that, in coverage order, and
    refuses a rule that would ignore it.

    Sites that do not measure familiarity are left out, with that as the reason.

    Privacy
    -------
    The coordinator never learns who was competent for a row. Familiarity is what a site says
    of itself: one that always says 1.0 counts fully everywhere, as under a rule without it.

    References
    ----------
    .. [1] Cruz, Sabourin, Cavalcanti, Dynamic classifier selection: recent advances and
       perspectives, Information Fusion 41, 2018.

    Examples
    --------
    >>> from fedinfer_flower.profile import SiteProfile
    >>> sites = [
    ...     Candidate(
    ...         site_id=k,
    ...         profile=SiteProfile(name=f"s{k}", classes=("x",), familiarity=k != 1),
    ...     )
    ...     for k in range(3)
    ... ]
    >>> found = DynamicCompetence().select(sites, SelectionNeed(classes=("x",), rule="open-set"))
    >>> sorted(found.site_ids), found.refused
    ([0, 2], {1: 'dynamic-competence: does not measure familiarity'})
    """

    needs = frozenset({SiteEvidence.FAMILIARITY})

    def score(self, candidates: Sequence[Candidate], need: SelectionNeed) -> Array:
        """Return each site's own coverage; 0.0 if it does not measure familiarity."""
        measures = np.array([candidate.profile.familiarity for candidate in candidates])
        return np.asarray(own_coverage(candidates, need.classes) * measures)

    def select(self, candidates: Sequence[Candidate], need: SelectionNeed) -> Selection:
        """Pick among the sites that measure familiarity.

        Raises
        ------
        InvalidValueError
            If the rule would not use familiarity.
        SelectionError
            If fewer than ``need.at_least`` sites measure it and fit the limits.
        """
        _require_rule(need)
        able = [k for k, c in enumerate(candidates) if c.profile.familiarity]
        if len(able) < need.at_least:
            raise SelectionError(
                f"{len(able)} of {len(candidates)} sites measure familiarity, {need.at_least}"
                " are needed",
                hint="give LocalModel(reference_inputs=...) at the sites",
            )
        kept = [candidates[k] for k in able]
        found = CoverageGreedy(count_cap=COUNT_CAP).select(kept, need)
        scores = self.score(candidates, need)
        return Selection(
            groups=found.groups,
            reasons=dict.fromkeys(
                found.site_ids,
                f"{self.name}: weighs its own answer by familiarity, in coverage order",
            ),
            scores={c.site_id: float(s) for c, s in zip(candidates, scores, strict=True)},
            refused={
                c.site_id: f"{self.name}: does not measure familiarity"
                for c in candidates
                if not c.profile.familiarity
            },
        )


def _require_rule(need: SelectionNeed) -> None:
    # Among sites that all measure familiarity, "auto" picks a rule that uses it, unless
    # noise is added: then it may prefer a vote.
    has_noise = "dp" in re.split("[+-]", need.protection)
    if need.rule == "auto" and not has_noise:
        return
    if need.rule == "auto" or Evidence.FAMILIARITY not in RULES.get(need.rule).needs:
        raise InvalidValueError(
            f"selector 'dynamic-competence' picks sites by their familiarity with a query,"
            f" which rule {need.rule!r} may not use",
            hint="rule 'open-set' or 'open-set-class-share', or another selector",
        )
