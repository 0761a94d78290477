"""Make a role fail by sending it bytes that it does not expect.

A reply that is malformed must end in a typed error that counts as that site's failure. An
exception that nobody foresaw, or a process that ends, lets one site stop everybody's query.
"""

from __future__ import annotations

from dataclasses import dataclass

from fedinfer_flower.attacks.base import ATTACKS, Attack, AttackResult, Position
from fedinfer_flower.attacks.federation import TargetFederation
from fedinfer_flower.attacks.rounds import label_of
from fedinfer_flower.attacks.tampering import TamperingRun, collect_outcomes
from fedinfer_flower.privacy.base import Protection

__all__ = ["HostileBytes"]


@ATTACKS.register("hostile-bytes")
@dataclass(frozen=True, kw_only=True)
class HostileBytes(Attack[TamperingRun]):
    """Count hostile payloads that end in anything but a typed error or an opened sum.

    Parameters
    ----------
    n_random : int
        Random damages of each kind.

    Privacy
    -------
    Every protection promises that there are none. A random search that finds none does not
    prove it.
    """

    n_random: int = 40

    sees = frozenset({Position.SITE})
    threat = "One site's malformed reply ends the coordinator or the querier."

    def evidence(
        self, federation: TargetFederation, protection: Protection, *, seed: int = 0
    ) -> dict[str, TamperingRun]:
        """Attack a batch of three rows."""
        run = TamperingRun(
            collect=lambda: collect_outcomes(
                federation, protection, n_random=self.n_random, seed=seed
            ),
            claimed=True,
        )
        return {label_of(protection): run}

    def run(self, evidence: TamperingRun, *, mode: str = "", seed: int = 0) -> AttackResult:  # noqa: ARG002
        """Deliver, and count what was not foreseen."""
        outcomes = evidence.collect()
        failures = sum(outcomes.untyped.values()) + int(outcomes.died)
        return AttackResult(
            attack=self.name,
            mode=mode,
            statistic="hostile payloads that end in an unforeseen failure",
            value=float(failures),
            baseline=0.0,
            threshold=0.0,
            threshold_reason="one is enough",
            claim_limit=0.0 if evidence.claimed else None,
            detail=outcomes.counts() | {"died": int(outcomes.died)},
        )
