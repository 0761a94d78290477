"""Jurisdiction: sites under a law that the question may be asked under."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from fedinfer_flower.errors import InvalidValueError
from fedinfer_flower.query import SiteId
from fedinfer_flower.selection.base import SelectionNeed
from fedinfer_flower.selection.candidate import Candidate
from fedinfer_flower.selection.gates.base import GATES, Gate

__all__ = ["JurisdictionGate"]


@GATES.register("jurisdiction")
@dataclass(frozen=True, kw_only=True)
class JurisdictionGate(Gate):
    """Ask only sites whose jurisdiction is on a list.

    The registered jurisdiction of a site wins over the one it claims. Tags are compared
    whole, without regard to case: ``eu`` admits ``EU`` and neither ``de`` nor ``eu-de``.

    Parameters
    ----------
    allowed : str
        Tags separated by commas.
    unknown : bool
        Whether sites without a tag are asked. False by default.
    registered_only : bool
        Whether a claim counts as no tag. Set it where a law is at stake: a site may write
        any tag into its model card.

    Privacy
    -------
    Reads record and model card. It bounds where the question is *sent*; where a site's
    machines stand, nothing here can tell.

    Examples
    --------
    >>> from fedinfer_flower.profile import SiteProfile
    >>> profile = SiteProfile(name="a", classes=("x",), model_card={"jurisdiction": "ch"})
    >>> site = Candidate(site_id=SiteId(1), profile=profile)
    >>> JurisdictionGate(allowed="eu, uk").admit([site], SelectionNeed(classes=("x",)))
    {1: "'ch' is not allowed"}
    """

    allowed: str = ""
    unknown: bool = False
    registered_only: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if not all(tag.strip() for tag in self.allowed.split(",")):
            raise InvalidValueError(
                "gate 'jurisdiction' has an empty list, or an empty tag",
                hint="allowed='eu,uk'",
            )

    def admit(self, candidates: Sequence[Candidate], need: SelectionNeed) -> Mapping[SiteId, str]:  # noqa: ARG002
        """Refuse tags that are not on the list."""
        allowed = {tag.strip().casefold() for tag in self.allowed.split(",")}
        refused: dict[SiteId, str] = {}
        for candidate in candidates:
            registered = candidate.record.jurisdiction
            tag = (registered if self.registered_only else candidate.jurisdiction).strip()
            if not tag and not self.unknown:
                refused[candidate.site_id] = "unknown"
            elif tag and tag.casefold() not in allowed:
                refused[candidate.site_id] = f"{tag[:64]!r} is not allowed"
        return refused
