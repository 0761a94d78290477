"""What a gate is: it says which sites may not be asked, and why.

Gates come before selectors and know no scores. What a gate reads of a profile is the site's
claim; what it reads of a record is what the coordinator knows, and wins.
"""

from __future__ import annotations

import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import IntEnum
from typing import Any, ClassVar, NamedTuple

from fedinfer_flower.ensemble.options import Scalar, checked_options, require_known_options
from fedinfer_flower.query import SiteId
from fedinfer_flower.registry import Registry
from fedinfer_flower.selection.base import SelectionNeed
from fedinfer_flower.selection.candidate import Candidate

__all__ = ["GATES", "Admission", "Gate", "Stage", "apply_gates", "make_gate"]


class Stage(IntEnum):
    """When a gate is applied: what looks at several sites comes after what looks at one."""

    SITE = 0
    PARTY = 1
    WHOLE = 2


@dataclass(frozen=True, kw_only=True)
class Gate(ABC):
    """Base of all gates: a frozen dataclass whose fields are its options.

    Attributes
    ----------
    name : str
        Registered name.
    stage : Stage
        ``SITE`` judges each site alone, ``PARTY`` the sites of one owner together,
        ``WHOLE`` all that are left.
    """

    name: ClassVar[str] = ""
    stage: ClassVar[Stage] = Stage.SITE

    def __post_init__(self) -> None:
        for name, value in checked_options(f"gate {self.name!r}", self).items():
            object.__setattr__(self, name, value)

    def options(self) -> dict[str, Scalar]:
        """Return the options that make the same gate elsewhere; see `make_gate`."""
        return dataclasses.asdict(self)

    @abstractmethod
    def admit(self, candidates: Sequence[Candidate], need: SelectionNeed) -> Mapping[SiteId, str]:
        """Return the sites that may not be asked, each with the reason."""

    def objection(self, group: Sequence[Candidate], need: SelectionNeed) -> str:  # noqa: ARG002
        """Return why sites that were chosen may not be asked together; empty if they may.

        Candidates that pass a gate together need not do so in part: whoever selects asks
        again about each group whose sum is released.
        """
        return ""


class Admission(NamedTuple):
    """Who passed the gates, and who did not.

    Parameters
    ----------
    kept : tuple of Candidate
        In the order given.
    refused : mapping of SiteId to str
        The first gate that refused the site, and why.
    """

    kept: tuple[Candidate, ...]
    refused: Mapping[SiteId, str]


def apply_gates(
    gates: Sequence[Gate], candidates: Sequence[Candidate], need: SelectionNeed
) -> Admission:
    """Apply gates, those of a later stage to what the earlier ones left.

    Within a stage they are applied in the order given.

    Examples
    --------
    >>> from fedinfer_flower.profile import SiteProfile
    >>> from fedinfer_flower.selection.gates import make_gate
    >>> site = Candidate(site_id=SiteId(1), profile=SiteProfile(name="a", classes=("x",)))
    >>> gate = make_gate("jurisdiction", {"allowed": "eu"})
    >>> apply_gates([gate], [site], SelectionNeed(classes=("x",))).refused
    {1: 'jurisdiction: unknown'}
    """
    kept = tuple(candidates)
    refused: dict[SiteId, str] = {}
    for gate in sorted(gates, key=lambda gate: gate.stage):
        out = gate.admit(kept, need)
        refused |= {site: f"{gate.name}: {reason}" for site, reason in out.items()}
        kept = tuple(candidate for candidate in kept if candidate.site_id not in out)
    return Admission(kept, refused)


GATES: Registry[Gate] = Registry(
    kind="eligibility gate",
    package="fedinfer_flower.selection.gates",
    group="fedinfer_flower.selection_gates",
)
"""All gates by name."""


def make_gate(name: str, options: Mapping[str, object] | None = None) -> Gate:
    """Build a gate from its registered name and its options.

    Raises
    ------
    UnknownNameError
        If no gate has that name.
    InvalidValueError
        If an option does not exist, has the wrong type or lies outside its range.

    Examples
    --------
    >>> from fedinfer_flower.selection.gates import make_gate
    >>> make_gate("owner-cap", {"most": 2})
    OwnerCap(most=2)
    """
    cls = GATES.get(name)
    given: dict[str, Any] = dict(options or {})
    known = [f.name for f in dataclasses.fields(cls) if f.init]
    require_known_options(f"gate {name!r}", given, known)
    return cls(**given)
