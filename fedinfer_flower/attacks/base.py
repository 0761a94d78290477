"""What an attack is, and what it reports.

An attack is a frozen dataclass of its options. It is run on *evidence*: what the attacker
sees, and beside it the truth, which only the scoring uses. Evidence comes from the caller,
or from a `TargetFederation` under a protection. Every statistic is large where the attacker
does well, so that all results read alike.
"""

from __future__ import annotations

import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import TYPE_CHECKING, Any, ClassVar, Generic, TypeVar

from fedinfer_flower.registry import Registry

if TYPE_CHECKING:
    from fedinfer_flower.attacks.federation import TargetFederation
    from fedinfer_flower.privacy.base import Protection

__all__ = ["ATTACKS", "Attack", "AttackResult", "Evidence", "Position"]

Evidence = TypeVar("Evidence")


class Position(StrEnum):
    """Where the attacker stands."""

    COORDINATOR = "coordinator"
    QUERIER = "querier"
    SITE = "site"
    POOL = "pool"


@dataclass(frozen=True, kw_only=True)
class AttackResult:
    """What one attack achieved against one mode.

    Parameters
    ----------
    attack : str
        Registered name.
    mode : str
        What it ran against: a protection with its options, and further defences.
    statistic : str
        What `value` is. Large is good for the attacker.
    value : float
    baseline : float
        What an attacker reaches who sees nothing.
    threshold : float
        Above it the attack is said to succeed.
    threshold_reason : str
        Where the threshold comes from.
    claim_limit : float, optional
        The most that the mode's promise leaves possible, with room for chance; None if the
        mode promises nothing here.
    interval : tuple of float, optional
        Of `value`, at 95 %.
    detail : mapping
        Further figures; no inputs, no scores.

    Examples
    --------
    >>> result = AttackResult(attack="stealing", mode="plain", statistic="fidelity", value=0.9,
    ...     baseline=0.1, threshold=0.5, threshold_reason="half way to a perfect copy")
    >>> result.succeeded, result.verdict, result.claim
    (True, 'succeeds', 'none')
    """

    attack: str
    mode: str
    statistic: str
    value: float
    baseline: float
    threshold: float
    threshold_reason: str
    claim_limit: float | None = None
    interval: tuple[float, float] | None = None
    detail: Mapping[str, float | int | str] = field(default_factory=dict)

    @property
    def succeeded(self) -> bool:
        """Whether the attack beats what chance explains."""
        return self.value > self.threshold

    @property
    def verdict(self) -> str:
        """Either ``"succeeds"`` or ``"stopped"``."""
        return "succeeds" if self.succeeded else "stopped"

    @property
    def claim(self) -> str:
        """``"none"`` where the mode promises nothing, else ``"kept"`` or ``"broken"``."""
        if self.claim_limit is None:
            return "none"
        return "kept" if self.value <= self.claim_limit else "broken"

    def to_dict(self) -> dict[str, Any]:
        """Return the result with its verdict as plain values."""
        plain = dataclasses.asdict(self) | {"detail": dict(self.detail)}
        return plain | {
            "interval": None if self.interval is None else list(self.interval),
            "succeeded": self.succeeded,
            "claim": self.claim,
        }


@dataclass(frozen=True, kw_only=True)
class Attack(ABC, Generic[Evidence]):
    """Base of all attacks.

    Attributes
    ----------
    name : str
        Registered name.
    sees : frozenset of Position
        Whose view suffices.
    threat : str
        What goes wrong for whom, in one sentence.
    stopped_by : frozenset of str
        Protections that promise to stop or to bound it. A protection that is not here may
        hinder the attack and promises nothing.
    """

    name: ClassVar[str] = ""
    sees: ClassVar[frozenset[Position]] = frozenset()
    threat: ClassVar[str] = ""
    stopped_by: ClassVar[frozenset[str]] = frozenset()

    @abstractmethod
    def evidence(
        self, federation: TargetFederation, protection: Protection, *, seed: int = 0
    ) -> dict[str, Evidence]:
        """Collect what the attacker sees of a federation.

        Returns
        -------
        evidence : dict
            By mode, which is the protection's label and whatever else is in place; empty
            if the attack has nothing to work on under this protection.
        """

    @abstractmethod
    def run(self, evidence: Evidence, *, mode: str = "", seed: int = 0) -> AttackResult:
        """Attack, and compare with the truth.

        Parameters
        ----------
        evidence
            What the attacker sees, and the truth for scoring.
        mode : str
            Label of the result.
        seed : int
            Of the attacker's own choices; protections have no seed.
        """


ATTACKS: Registry[Attack[Any]] = Registry(
    kind="attack", package="fedinfer_flower.attacks", group="fedinfer_flower.attacks"
)
"""All attacks by name."""
