"""Policy: sites that say they do not answer such a question."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from fedinfer_flower.query import SiteId
from fedinfer_flower.selection.base import SelectionNeed
from fedinfer_flower.selection.candidate import Candidate
from fedinfer_flower.selection.gates.base import GATES, Gate

__all__ = ["PolicyGate"]


@GATES.register("policy")
@dataclass(frozen=True, kw_only=True)
class PolicyGate(Gate):
    """Leave out sites whose model card says that they would refuse, or cannot help.

    A site's model card may have the rows ``protections`` and ``rules`` (names separated by
    commas) and ``max-rows`` (a whole number). A site without a row is asked: its own policy
    decides there, and this gate saves a round trip only. A row that cannot be read refuses
    the site. A site whose model knows none of the question's classes is left out too.

    Parameters
    ----------
    silent : bool
        Whether sites that say nothing of protections or rules are asked. True by default.

    Privacy
    -------
    Reads the model card, which every coordinator is shown. What a site says here is more
    than its refusals would tell.

    Examples
    --------
    >>> from fedinfer_flower.profile import SiteProfile
    >>> profile = SiteProfile(name="a", classes=("x",), model_card={"protections": "secagg, he"})
    >>> site = Candidate(site_id=SiteId(1), profile=profile)
    >>> PolicyGate().admit([site], SelectionNeed(classes=("x",), protection="plain"))
    {1: "does not answer under 'plain'"}
    """

    silent: bool = True

    def admit(self, candidates: Sequence[Candidate], need: SelectionNeed) -> Mapping[SiteId, str]:
        """Refuse by what the card says."""
        said = {candidate.site_id: self._reason(candidate, need) for candidate in candidates}
        return {site: reason for site, reason in said.items() if reason}

    def _reason(self, candidate: Candidate, need: SelectionNeed) -> str:
        card = candidate.profile.model_card
        for row, wanted, refusal in (
            ("protections", need.protection, f"does not answer under {need.protection!r}"),
            ("rules", need.rule, f"does not answer for rule {need.rule!r}"),
        ):
            # "auto" is no rule yet: which one it becomes depends on who is asked.
            if wanted == "auto":
                continue
            if row not in card and not self.silent:
                return f"says nothing of its {row}"
            if row in card and wanted not in {name.strip() for name in card[row].split(",")}:
                return refusal
        most = card.get("max-rows")
        if most is not None:
            if not (most.isascii() and most.isdecimal()) or len(most) > 18:
                return "its max-rows is no number"
            if need.n_queries > int(most):
                return f"answers at most {int(most)} rows"
        return "" if candidate.knows(need.classes).any() else "knows none of the classes"
